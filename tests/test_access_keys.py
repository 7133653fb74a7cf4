"""Where the keys of tokens come from: a file or an issuer's URL, which changes them, hangs, lies or is not there."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mlx_embeddings_server.auth import jwks
from mlx_embeddings_server.auth.access import access_of
from mlx_embeddings_server.auth.caller import Access
from mlx_embeddings_server.auth.tokens import AdminClaim, TokenAccess
from mlx_embeddings_server.errors import ApiError
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.scripted import scripted_server
from tests.test_access_tokens import ask, by_hand, claims, signed

RSA, OTHER_RSA = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
EC, OTHER_EC = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
PEM = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def jwk(key: Any, kid: str | None = None, **more: Any) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name("RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256")
    found = dict(json.loads(algorithm.to_jwk(key.public_key())))
    return found | ({"kid": kid} if kid else {}) | more


class Issuer:
    """Where the keys of tokens are fetched: a server of its own."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.status, self.body, self.seconds, self.fetches = 200, b"", 0.0, 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches += 1
                time.sleep(issuer.seconds)
                body = issuer.body or json.dumps({"keys": issuer.keys}).encode()
                status = 200 if self.path == "/other" else issuer.status
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if status == 302:
                    self.send_header("Location", "/other")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/keys"
        threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.close()


def test_tokens_signed_by_keys_of_an_issuer(tmp_path: Path, issuer: Issuer) -> None:
    issuer.status = 503
    with scripted_server(tmp_path, jwt_jwks=issuer.url) as server:
        unreachable = ask(server, signed(claims(), RSA, "RS256", "one"))
        assert (unreachable.status_code, unreachable.json()["error"]["code"]) == (503, "token_keys_unavailable")
        assert unreachable.headers["retry-after"] == "10"
        assert ask(server, "nonsense").status_code == 401  # that needs no keys to be seen
        assert "--jwt-audience" in server.log and "answered with status 503" in server.log

        issuer.status, issuer.keys = 200, [jwk(RSA, "one"), jwk(EC, "two", use="sig")]
        time.sleep(jwks.REFRESH_SECONDS)
        assert ask(server, signed(claims(), RSA, "RS256", "one")).status_code == 200
        assert ask(server, signed(claims(), EC, "ES256", "two")).status_code == 200
        fetches = issuer.fetches
        issuer.close()

        refused = {
            "public key as secret": hmac_with(PEM, "one"),
            "none": by_hand({"alg": "none", "kid": "one"}, claims()),
            "the other key's algorithm": signed(claims(), EC, "ES256", "one"),
            "another RSA key": signed(claims(), OTHER_RSA, "RS256", "one"),
            "another algorithm": signed(claims(), RSA, "RS384", "one"),
        }
        assert {kind: ask(server, token).status_code for kind, token in refused.items()} == dict.fromkeys(refused, 401)
        # The issuer is gone: what is known goes on.
        assert ask(server, signed(claims(sub="bob"), RSA, "RS256", "one")).status_code == 200
        assert issuer.fetches == fetches


def hmac_with(secret: bytes, kid: str) -> str:
    """PyJWT itself refuses to sign so."""
    unsigned = by_hand({"alg": "HS256", "kid": kid}, claims()).rpartition(".")[0]
    signature = hmac.new(secret, unsigned.encode(), hashlib.sha256).digest()
    return f"{unsigned}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def access(issuer: Issuer, clock: Clock) -> TokenAccess:
    keys = jwks.from_url(issuer.url, clock=clock)
    return TokenAccess(keys, audience=None, issuer=None, admin_claim=AdminClaim("admin"))


async def outcome(access: Access, token: str) -> str:
    """The caller's name, or the error's code."""
    try:
        return (await access.identify(token, None)).name
    except ApiError as error:
        return str(error.code)


def of_alice(key: Any, kid: str | None) -> str:
    return signed(claims(), key, "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256", kid)


def test_new_keys_are_fetched_when_a_token_names_one_and_old_ones_go(issuer: Issuer) -> None:
    async def run() -> None:
        clock = Clock()
        subject = access(issuer, clock)
        issuer.keys = [jwk(RSA, "one")]
        assert await outcome(subject, of_alice(RSA, "one")) == "alice"

        issuer.keys = [jwk(EC, "two")]
        assert await outcome(subject, of_alice(EC, "two")) == "token_signature_invalid"  # asked a moment ago
        clock.now += jwks.REFRESH_SECONDS
        assert await outcome(subject, of_alice(EC, "two")) == "alice"
        assert await outcome(subject, of_alice(RSA, "one")) == "token_signature_invalid"  # it was known before

    asyncio.run(run())


def test_a_key_that_was_withdrawn_goes_without_anybody_asking_for_another(issuer: Issuer) -> None:
    async def run() -> None:
        clock = Clock()
        subject = access(issuer, clock)
        issuer.keys = [jwk(RSA, "one"), jwk(EC, "two")]
        assert await outcome(subject, of_alice(RSA, "one")) == "alice"
        issuer.keys = [jwk(EC, "two")]
        clock.now += 3600

        await outcome(subject, of_alice(RSA, "one"))  # starts the fetch, and does not wait for it
        while issuer.fetches < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)

        assert await outcome(subject, of_alice(RSA, "one")) == "token_signature_invalid"

    asyncio.run(run())


def test_an_issuer_without_keys_has_withdrawn_them_all(issuer: Issuer) -> None:
    async def run() -> None:
        clock = Clock()
        subject = access(issuer, clock)
        issuer.keys = [jwk(RSA, "one")]
        assert await outcome(subject, of_alice(RSA, "one")) == "alice"
        issuer.keys = []
        clock.now += jwks.REFRESH_SECONDS
        assert await outcome(subject, of_alice(EC, "unknown")) == "token_signature_invalid"  # fetches

        assert await outcome(subject, of_alice(RSA, "one")) == "token_signature_invalid"  # it was known before
        assert await outcome(subject, signed(claims(sub="bob"), RSA, "RS256", "one")) == "token_signature_invalid"
        issuer.keys = [jwk(RSA, "one")]
        clock.now += jwks.REFRESH_SECONDS
        assert await outcome(subject, of_alice(RSA, "one")) == "alice"

    asyncio.run(run())


def test_of_keys_with_one_id_the_first_is_used_and_the_log_says_so_once(
    issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        clock = Clock()
        subject = access(issuer, clock)
        issuer.keys = [jwk(RSA, "one"), jwk(EC, "one"), jwk(RSA, "one"), jwk(OTHER_RSA), jwk(OTHER_EC)]
        assert await outcome(subject, of_alice(RSA, "one")) == "alice"
        assert await outcome(subject, of_alice(EC, "one")) != "alice"
        clock.now += jwks.REFRESH_SECONDS
        assert await outcome(subject, of_alice(EC, "unknown")) == "token_signature_invalid"
        assert issuer.fetches == 2

    asyncio.run(run())
    [warning] = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.endswith("the first is used, the others are not: 'one', none")


def test_a_key_of_the_same_name_is_another_key(issuer: Issuer) -> None:
    async def run() -> None:
        clock = Clock()
        subject = access(issuer, clock)
        issuer.keys = [jwk(RSA, "one")]
        assert await outcome(subject, of_alice(RSA, "one")) == "alice"
        issuer.keys = [jwk(OTHER_RSA, "one")]
        clock.now += jwks.REFRESH_SECONDS
        assert await outcome(subject, of_alice(EC, "unknown")) == "token_signature_invalid"  # fetches

        assert await outcome(subject, of_alice(RSA, "one")) == "token_signature_invalid"
        assert await outcome(subject, of_alice(OTHER_RSA, "one")) == "alice"

    asyncio.run(run())


def test_a_flood_of_unknown_keys_is_one_fetch(issuer: Issuer) -> None:
    async def run() -> None:
        subject = access(issuer, Clock())
        issuer.keys, issuer.seconds = [jwk(RSA, "one")], 0.2
        tokens = [of_alice(RSA, f"unknown {number}") for number in range(20)]

        at_once = await asyncio.gather(*(outcome(subject, token) for token in tokens))
        later = [await outcome(subject, token) for token in tokens]

        assert set(at_once + later) == {"token_signature_invalid"}
        assert issuer.fetches == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b""), (404, b""), (302, b""), (200, b"<html>"), (200, b"[]"), (200, b"{}"), (200, b'{"keys": {}}'),
        (200, b'{"keys": [1, {}, {"kty": "RSA"}, {"kty": "EC", "crv": "P-256", "x": 1, "y": 2}]}'),
        (200, b'{"keys": [{"kty": "RSA", "n": "!", "e": null}, {"kty": ["EC"]}, {"kty": "oct", "k": "AAAA"}]}'),
        (200, b"[" * 100_000), (200, b"\xff\xfe"),
        (200, json.dumps({"keys": [jwk(EC, "two")]}).encode() + b" " * 300_000),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_key_set_leaves_the_known_keys(issuer: Issuer, status: int, body: bytes) -> None:
    async def run() -> None:
        clock = Clock()
        subject = access(issuer, clock)
        issuer.keys = [jwk(RSA, "one")]
        assert await outcome(subject, of_alice(RSA, "one")) == "alice"
        issuer.status, issuer.body, issuer.keys = status, body, [jwk(EC, "two")]
        clock.now += jwks.REFRESH_SECONDS

        assert await outcome(subject, of_alice(EC, "two")) == "token_keys_unavailable"
        assert await outcome(subject, signed(claims(sub="bob"), RSA, "RS256", "one")) == "bob"

    asyncio.run(run())


def test_an_issuer_that_hangs_is_not_waited_for_long(issuer: Issuer) -> None:
    issuer.seconds = 6
    started = time.monotonic()

    assert asyncio.run(outcome(access(issuer, Clock()), of_alice(RSA, "one"))) == "token_keys_unavailable"
    assert 4 < time.monotonic() - started < 6


def test_a_file_is_read_at_once_and_again_when_its_keys_change(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [jwk(RSA)]}))
    subject = access_of(load_settings({"model": "m", "jwt_jwks": str(file), "jwt_audience": "embeddings"}))
    assert subject is not None

    async def run() -> None:
        assert await outcome(subject, of_alice(RSA, None)) == "alice"  # of one key no id is needed
        assert await outcome(subject, of_alice(OTHER_RSA, None)) == "token_signature_invalid"
        file.write_text(json.dumps({"keys": [jwk(RSA, "one"), jwk(EC, "two")]}))
        assert await outcome(subject, of_alice(EC, "two")) == "alice"
        assert await outcome(subject, of_alice(EC, None)) == "token_signature_invalid"

    asyncio.run(run())


@pytest.mark.parametrize(
    "key",
    [
        jwk(RSA, alg="RS512"), jwk(RSA, use="enc"), jwk(EC, alg="ES384"), {"kty": "oct", "k": "AAAA" * 20},
        jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
    ],
    ids=["RS512", "for encryption", "ES384", "secret", "1024 bits"],
)  # fmt: skip
def test_keys_that_are_not_for_this_are_not_used(tmp_path: Path, key: dict[str, Any]) -> None:
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [key]}))

    with pytest.raises(SettingsError, match="of its 1 keys none is for RS256"):
        access_of(load_settings({"model": "m", "jwt_jwks": str(tmp_path / "keys.json")}))


def test_a_file_without_keys_is_none_at_the_start_and_refuses_all_later(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text('{"keys": []}')
    settings = load_settings({"model": "m", "jwt_jwks": str(file), "jwt_audience": "embeddings"})
    with pytest.raises(SettingsError, match="--jwt-jwks: .* has no keys"):
        access_of(settings)

    file.write_text(json.dumps({"keys": [jwk(RSA, "one")]}))
    subject = access_of(settings)
    assert subject is not None

    async def run() -> None:
        assert await outcome(subject, of_alice(RSA, "one")) == "alice"
        file.write_text('{"keys": []}')
        assert await outcome(subject, of_alice(RSA, "two")) == "token_signature_invalid"  # reads
        assert await outcome(subject, of_alice(RSA, "one")) == "token_signature_invalid"

    asyncio.run(run())
