"""One key for all, what stays open without it, who is an admin, and pages of other origins."""

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.auth.access import access_of
from mlx_embeddings_server.setting_combinations import check_combinations
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.scripted import scripted_server
from tests.server import Server

KEY = "sk-correct-horse-battery-staple"
ORIGIN = "https://app.example.com"
SECRET = "x" * 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("access")
    (folder / "key").write_text(f"\n  {KEY}\n")
    (folder / "key").chmod(0o644)
    with scripted_server(folder, api_key_file=folder / "key", cors_origin=ORIGIN, access_log=True) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def embed(server: Server, headers: dict[str, str]) -> httpx.Response:
    return server.client.post("/v1/embeddings", json={"model": "toy", "input": "hello"}, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY),
        {"Authorization": f"bearer  {KEY}"},
        {"X-API-KEY": KEY},
        bearer("not the key") | {"X-API-KEY": KEY},
        bearer(KEY) | {"X-API-KEY": "not the key"},
    ],
)
def test_the_key_of_a_file_is_taken_in_either_header(server: Server, headers: dict[str, str]) -> None:
    assert embed(server, headers).status_code == 200


@pytest.mark.parametrize(
    "key",
    ["", "s", KEY[:-1], KEY + "x", KEY.upper(), "x" * len(KEY), "x" * 30_000, hashlib.sha256(KEY.encode()).hexdigest()],
)
@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_keys_that_are_wrong_or_of_another_length_are_refused(server: Server, header: str, key: str) -> None:
    reply = embed(server, {header: f"Bearer {key}".strip() if header == "Authorization" else key})

    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"].startswith("Bearer")
    assert reply.headers["x-request-id"]
    assert len(key) < 10 or key not in reply.text


def test_keys_of_bytes_beyond_ascii_are_refused(server: Server) -> None:
    reply = server.client.get("/v1/models", headers=[(b"Authorization", b"Bearer \xff\xfe\xc3\xbc")])

    assert reply.status_code == 401


def test_without_a_key_a_challenge_names_no_error(server: Server) -> None:
    reply = embed(server, {})

    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert embed(server, {"Authorization": f"Basic {KEY}"}).status_code == 401


def test_the_official_client_tells_a_wrong_key(server: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/", "/docs", "/openapi.json"])
def test_probes_and_the_reference_are_open(server: Server, path: str) -> None:
    assert server.client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"), ("GET", "/v1/models/toy"), ("POST", "/v1/models/toy/load"), ("POST", "/v1/embeddings"),
        ("POST", "/v1/rerank"), ("POST", "/v1/embed_sparse"), ("POST", "/embed"), ("POST", "/"), ("GET", "/metrics"),
        ("GET", "/api/v1/models"), ("POST", "/api/v1/embeddings"), ("POST", "/api/v1/rerank"),
    ],
)  # fmt: skip
def test_all_else_wants_the_key(server: Server, method: str, path: str) -> None:
    assert server.client.request(method, path).status_code == 401
    assert server.client.request(method, path, headers=bearer(KEY)).status_code in (200, 400)


def test_every_route_is_either_known_to_be_open_or_wants_the_key(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    opened = {
        path
        for path, methods in paths.items()
        for method in methods
        if server.client.request(method, path.replace("{name}", "toy")).status_code != 401
    }

    assert opened == {"/", "/health", "/livez", "/readyz"}


def test_the_reference_tells_where_keys_go(server: Server) -> None:
    told = server.client.get("/openapi.json").json()
    schemes = told["components"]["securitySchemes"]

    assert schemes["HTTPBearer"] == {"type": "http", "scheme": "bearer"}
    assert schemes["APIKeyHeader"] == {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    assert told["paths"]["/v1/embeddings"]["post"]["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
    assert "security" not in told["paths"]["/health"]["get"]


def test_the_holder_of_the_one_key_is_an_admin(server: Server) -> None:
    reply = server.client.post("/v1/models/toy/load", headers=bearer(KEY))

    assert (reply.status_code, reply.json()["id"]) == (200, "toy")


def test_metrics_can_be_opened(tmp_path: Path) -> None:
    with scripted_server(tmp_path, api_key=KEY, open_metrics="true") as server:
        assert "mlx_embeddings_requests" in server.client.get("/metrics").text
        assert server.client.get("/v1/models").status_code == 401


def test_keys_are_in_no_log_and_no_metric(server: Server) -> None:
    embed(server, bearer("sk-a-wrong-key-of-somebody"))
    embed(server, bearer(KEY))
    server.wait_for_log("POST /v1/embeddings 200")

    for secret in (KEY, "sk-a-wrong-key-of-somebody"):
        assert secret not in server.log
        assert secret not in server.client.get("/metrics", headers=bearer(KEY)).text
    assert "can be read by all users" in server.log  # of the file


# Pages of other origins


def test_a_preflight_needs_no_key(server: Server) -> None:
    wanted = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    reply = server.client.options("/v1/embeddings", headers=wanted)

    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "x-stainless-lang" in reply.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in reply.headers
    assert reply.headers["x-request-id"]


def test_pages_of_another_origin_are_not_let_in(server: Server) -> None:
    wanted = {"Origin": "https://evil.example.com", "Access-Control-Request-Method": "POST"}

    assert "access-control-allow-origin" not in server.client.options("/v1/embeddings", headers=wanted).headers
    reply = embed(server, bearer(KEY) | {"Origin": "https://evil.example.com"})
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("text", "status"), [("hello", 200), ("fail at once", 500), ("", 400)], ids=["answered", "failed", "refused"]
)
def test_pages_can_read_replies_errors_and_their_headers(server: Server, text: str, status: int) -> None:
    json = {"model": "toy", "input": text}
    reply = server.client.post("/v1/embeddings", json=json, headers=bearer(KEY) | {"Origin": ORIGIN})

    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, ORIGIN)
    exposed = reply.headers["access-control-expose-headers"].lower().split(", ")
    assert {"x-request-id", "retry-after", "x-embeddings-provider"} <= set(exposed)
    assert reply.headers["x-request-id"]


def test_pages_can_read_of_an_error_that_nobody_foresaw(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    app = create_app(load_settings({"model": str(tmp_path), "cors_origin": [ORIGIN]}))

    async def broken() -> None:
        raise RuntimeError("of which nobody thought")

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.get("/broken", headers={"Origin": ORIGIN, "X-Request-Id": "mine"})

    app.add_api_route("/broken", broken)
    reply = asyncio.run(ask())

    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert (reply.headers["access-control-allow-origin"], reply.headers["x-request-id"]) == (ORIGIN, "mine")


def test_any_origin_may_be_let_in_and_without_the_setting_none_is(tmp_path: Path) -> None:
    with scripted_server(tmp_path, cors_origin="*") as server:
        reply = server.client.get("/v1/models", headers={"Origin": ORIGIN})
        assert reply.headers["access-control-allow-origin"] == "*"
    assert load_settings({"model": "m"}).cors_origin == ()


# Settings


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"api_key": KEY, "jwt_secret": SECRET}, "--api-key and --jwt-secret exclude each other"),
        ({"api_key": KEY, "api_key_file": "key"}, "--api-key and --api-key-file exclude"),
        ({"jwt_secret": SECRET, "jwt_jwks": "keys.json"}, "--jwt-secret and --jwt-jwks exclude"),
        ({"api_key_file": "no/such/file"}, "--api-key-file: no/such/file cannot be read"),
        ({"api_key_file": "empty"}, "--api-key-file: is empty"),
        ({"api_key_file": "short"}, "--api-key-file: has a key of 5 characters"),
        ({"api_key_file": "two"}, "--api-key-file: must be of letters"),
        ({"api_key_file": "large"}, "--api-key-file: large has more than"),
        ({"api_key_file": "binary"}, "--api-key-file: binary is not text"),
        ({"api_key_file": "a\0b"}, "--api-key-file: "),
        ({"api_key": ""}, "--api-key (variable MLX_EMBEDDINGS_API_KEY, YAML key api_key): is empty"),
        ({"api_key": "schlüssel"}, "must be of letters"),
        ({"jwt_secret": "x" * 31}, "has 31 bytes, and HS256 wants 32"),
        ({"jwt_secret_file": "short"}, "--jwt-secret-file: has 5 bytes, and HS256 wants 32"),
        ({"jwt_secret": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"}, "is a public key"),
        ({"jwt_jwks": "http://id.example.com/keys"}, "must be a file or an https:// URL"),
        ({"jwt_jwks": "https://user:password@id.example.com/keys"}, "must be a URL without user and password"),
        ({"jwt_jwks": "http://localhost.example.com/keys"}, "must be a file or an https:// URL"),
        ({"jwt_jwks": "https://xn--/keys"}, "must be a URL of a host and a port that can be"),
        ({"jwt_jwks": "https://id.example.com:99999/keys"}, "must be a URL of a host and a port that can be"),
        ({"jwt_secret": SECRET, "jwt_audience": ""}, "--jwt-audience"),
        ({"jwt_jwks": "no-such.json"}, "--jwt-jwks: no-such.json cannot be read"),
        ({"jwt_jwks": "short"}, "no JSON Web Key Set"),
        ({"jwt_audience": "me"}, "--jwt-audience is about tokens: give --jwt-secret"),
        ({"api_key": KEY, "jwt_issuer": "me"}, "--jwt-issuer is about tokens"),
        ({"cors_origin": ["https://app.example.com/"]}, "must be *, or such as https://app.example.com"),
        ({"rate_limit_storage": "http://localhost:6379"}, "must be redis://HOST:PORT"),
    ],
)
def test_settings_that_cannot_be_are_told_and_no_secret_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, object], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "key": KEY.encode(), "empty": b" \n", "short": b"abcde\n", "two": f"{KEY} {KEY}".encode(),
        "large": b"k" * 70_000, "binary": b"\xff\xfe" * 20,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)

    with pytest.raises(SettingsError) as told:
        settings = load_settings({"model": "m", **flags})
        check_combinations(settings)
        access_of(settings)

    assert said in str(told.value)
    assert KEY not in str(told.value) and SECRET not in str(told.value)


def test_secrets_are_not_in_what_is_printed_of_settings() -> None:
    storage = "redis://:hunter2-and-more@localhost:6379"
    settings = load_settings({"model": "m", "jwt_secret": SECRET, "rate_limit_storage": storage})

    assert SECRET not in repr(settings) and "hunter2" not in repr(settings) + str(settings.model_dump())


def test_a_file_that_only_its_owner_reads_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    for mode, warnings in ((0o600, 0), (0o640, 0), (0o604, 1)):
        file.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            access_of(load_settings({"model": "m", "api_key_file": str(file)}))
        assert len(caplog.records) == warnings


def test_a_key_that_can_be_guessed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for key, warnings in (("short", 1), (KEY, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            access_of(load_settings({"model": "m", "api_key": key}))
        assert len(caplog.records) == warnings and key not in caplog.text
