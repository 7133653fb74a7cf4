"""A token for each user: which are taken, which are not, and what is said of them."""

import base64
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from mlx_embeddings_server.auth.tokens import LEEWAY, AdminClaim
from tests.scripted import scripted_server
from tests.server import Server

SECRET = "0123456789abcdef" * 4  # what HS512 wants
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)

OTHER_SECRET = "another secret of 32 bytes or more"

Claims = Mapping[str, Any]


def claims(**changes: Any) -> dict[str, Any]:
    """Good ones; None drops one."""
    good = {"sub": "alice", "aud": "embeddings", "iss": "https://id.example.com", "exp": int(time.time()) + 300}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def signed(payload: Claims, key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None) -> str:
    return jwt.encode(dict(payload), key, algorithm, headers={"kid": kid} if kid else None)


def by_hand(header: Any, payload: Any, signature: bytes = b"") -> str:
    """What no library would make."""
    parts = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in (header, payload)]
    return ".".join(base64.urlsafe_b64encode(each).rstrip(b"=").decode() for each in (*parts, signature))


def ask(server: Server, token: str | bytes, method: str = "GET", path: str = "/v1/models") -> httpx.Response:
    value = token if isinstance(token, bytes) else token.encode()
    return server.client.request(method, path, headers=[(b"Authorization", b"Bearer " + value)])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "secret").write_text(SECRET + "\n")
    of_tokens = {"jwt_audience": "embeddings", "jwt_issuer": "https://id.example.com", "jwt_admin_claim": "role=admin"}
    with scripted_server(folder, jwt_secret_file=folder / "secret", access_log=True, **of_tokens) as server:
        yield server


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aud": ["other", "embeddings"]},
        {"exp": int(time.time()) - LEEWAY + 300},
        {"nbf": int(time.time()) + LEEWAY // 2},
        {"sub": "a" * 255},
        {"iat": 0, "jti": "1", "more": {"a": [1]}},
    ],
)
def test_good_tokens_are_taken(server: Server, changes: Claims) -> None:
    for _ in range(2):  # anew, and as one that is known
        assert ask(server, signed(claims(**changes))).status_code == 200


def bad_tokens() -> dict[str, tuple[str | bytes, str]]:
    now, good = int(time.time()), signed(claims())
    head, body, signature = good.split(".")
    other_body = by_hand({}, claims(sub="mallory")).split(".")[1]
    crit = jwt.encode(claims(), SECRET, "HS256", headers={"crit": ["exp"]})
    return {
        "expired": (signed(claims(exp=now - LEEWAY - 1)), "token_expired"),
        "long expired": (signed(claims(exp=1)), "token_expired"),
        "not yet valid": (signed(claims(nbf=now + 3600)), "token_not_yet_valid"),
        "issued in the future": (signed(claims(iat=now + 3600)), "token_not_yet_valid"),
        "unsigned": (by_hand({"alg": "none"}, claims()), "token_algorithm_refused"),
        "unsigned NONE": (by_hand({"alg": "NONE", "typ": "JWT"}, claims()), "token_algorithm_refused"),
        "unsigned with a signature": (by_hand({"alg": "none"}, claims(), b"x" * 32), "token_algorithm_refused"),
        "no algorithm": (by_hand({"typ": "JWT"}, claims()), "token_algorithm_refused"),
        "wrong audience": (signed(claims(aud="another")), "token_wrong_audience"),
        "audience of another kind": (signed(claims(aud={"a": 1})), "token_wrong_audience"),
        "no audience": (signed(claims(aud=None)), "token_claim_missing"),
        "wrong issuer": (signed(claims(iss="https://evil.example.com")), "token_wrong_issuer"),
        "no issuer": (signed(claims(iss=None)), "token_claim_missing"),
        "foreign key": (signed(claims(), OTHER_SECRET), "token_signature_invalid"),
        "foreign key, expired": (
            signed(claims(exp=1), OTHER_SECRET),
            "token_signature_invalid",
        ),
        "empty key": (by_hand({"alg": "HS256"}, claims(), b""), "token_signature_invalid"),
        "altered": (f"{head}.{other_body}.{signature}", "token_signature_invalid"),
        "cut": (good[:-3], "token_signature_invalid"),
        "HS512 with the secret": (signed(claims(), algorithm="HS512"), "token_algorithm_refused"),
        "RS256": (signed(claims(), RSA, "RS256"), "token_algorithm_refused"),
        "no exp": (signed(claims(exp=None)), "token_claim_missing"),
        "exp of no number": (signed(claims(exp="soon")), "token_malformed"),
        "exp without end": (by_hand_signed(b'{"sub": "a", "aud": "embeddings", "exp": 1e999}'), "token_malformed"),
        "no sub": (signed(claims(sub=None)), "token_claim_missing"),
        "sub of no text": (by_hand_signed(claims(sub=7)), "token_malformed"),
        "empty sub": (signed(claims(sub="")), "token_malformed"),
        "sub too long": (signed(claims(sub="a" * 256)), "token_malformed"),
        "sub with a line end": (signed(claims(sub="a\nb")), "token_malformed"),
        "critical header": (crit, "token_malformed"),
        "payload of no object": (by_hand_signed([1, 2]), "token_malformed"),
        "payload of no JSON": (by_hand_signed(b"\xff{"), "token_malformed"),
        "brackets in brackets": (by_hand(b"[" * 5000, {}), "token_malformed"),
        "brackets in a signed one": (by_hand_signed(b"[" * 5000), "token_malformed"),
        "header of no object": (by_hand([], claims()), "token_malformed"),
        "no token": ("hello", "token_malformed"),
        "dots": ("..", "token_malformed"),
        "too many parts": (good + ".x.y", "token_malformed"),
        "no base64": ("$.$.$", "token_malformed"),
        "too long": (signed(claims(more="x" * 9000)), "token_malformed"),
        "not ASCII": (b"\xff.\xfe.\xfd", "token_malformed"),
    }


def by_hand_signed(payload: Any) -> str:
    unsigned = by_hand({"alg": "HS256"}, payload).rpartition(".")[0]
    signature = jwt.get_algorithm_by_name("HS256").sign(unsigned.encode(), SECRET.encode())
    return f"{unsigned}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


@pytest.mark.parametrize("kind", bad_tokens())
def test_bad_tokens_are_refused_and_the_code_says_why(server: Server, kind: str) -> None:
    token, code = bad_tokens()[kind]

    reply = ask(server, token)

    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (401, "authentication_error", code)
    assert reply.headers["www-authenticate"].startswith('Bearer error="invalid_token", error_description="the token ')
    assert SECRET not in reply.text and str(token)[:40] not in reply.text.replace("TOKEN", "")


def test_a_known_token_is_refused_once_it_has_expired(server: Server) -> None:
    token = signed(claims(exp=int(time.time()) - LEEWAY + 3))
    assert ask(server, token).status_code == 200

    time.sleep(3.1)

    assert ask(server, token).json()["error"]["code"] == "token_expired"


def test_without_a_token_it_is_said_what_to_send(server: Server) -> None:
    bare = server.client.get("/v1/models")
    keyed = server.client.get("/v1/models", headers={"X-API-KEY": SECRET})

    assert bare.status_code == keyed.status_code == 401
    assert bare.headers["www-authenticate"] == "Bearer"
    assert bare.json()["error"]["code"] == keyed.json()["error"]["code"] == "token_missing"
    assert "takes no X-API-Key" in keyed.json()["error"]["message"]
    assert server.client.get("/health").status_code == 200


def test_load_and_unload_and_metrics_are_for_admins(server: Server) -> None:
    user, admin = signed(claims(role="editor", admin=True)), signed(claims(role=["editor", "admin"]))
    for method, path in (("POST", "/v1/models/toy/load"), ("POST", "/v1/models/toy/unload"), ("GET", "/metrics")):
        refusal = ask(server, user, method, path)
        error = refusal.json()["error"]
        assert (refusal.status_code, error["type"], error["code"]) == (403, "permission_error", "admin_required")
        assert ask(server, admin, method, path).status_code == 200
        assert ask(server, "x", method, path).status_code == 401


def test_tokens_are_in_no_log(server: Server) -> None:
    good, bad = signed(claims(sub="carol")), signed(claims(sub="carol"), OTHER_SECRET)
    assert (ask(server, good).status_code, ask(server, bad).status_code) == (200, 401)
    server.wait_for_log("GET /v1/models 401")

    assert all(each not in server.log for each in (SECRET, *good.split(".")[1:], *bad.split(".")[1:]))


@pytest.mark.parametrize(
    ("setting", "claim", "is_admin"),
    [
        ("admin", {"admin": True}, True), ("admin", {"admin": "true"}, False), ("admin", {"admin": 1}, False),
        ("admin", {}, False), ("role=admin", {"role": "admin"}, True), ("role=admin", {"role": "no-admin"}, False),
        ("role=admin", {"role": ["user", "admin"]}, True), ("role=admin", {"role": {"admin": 1}}, False),
        ("scope=a:b=c", {"scope": "x a:b=c y"}, True), ("role=admin", {"role": True}, False),
        ("https://example.com/admin", {"https://example.com/admin": True}, True),
    ],
)  # fmt: skip
def test_the_claim_of_admins(setting: str, claim: Claims, is_admin: bool) -> None:
    assert AdminClaim(setting).holds(claim) is is_admin
