"""Whose collections are whose."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.scripted import scripted_server
from tests.scripted_models import load, models_file
from tests.server import Server
from tests.test_access_tokens import SECRET, claims, signed
from tests.threaded import ThreadedServer

PLACES = ("/api/v1/embeddings/collections", "/v1/collections")
KEY = "a key of more than 16 characters".replace(" ", "-")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("users")
    settings = {"jwt_secret": SECRET, "jwt_admin_claim": "admin", "collections": "chroma"}
    with scripted_server(folder, collections_path=folder / "kept", **settings) as server:
        yield server


class User:
    def __init__(self, server: Server | ThreadedServer, name: str, **more: Any) -> None:
        token = signed(claims(sub=name, **more))
        self._client = server.client
        self._headers = {"Authorization": f"Bearer {token}"}

    def __call__(self, method: str, path: str, json: Any = None) -> httpx.Response:
        return self._client.request(method, path, json=json, headers=self._headers)

    def names(self) -> list[str]:
        return [each["name"] for each in self("GET", PLACES[0]).json()]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "other",
    [{"sub": "bob"}, {"sub": "root", "admin": True}, {"sub": "Alice"}, {"sub": "alice/"}, {"sub": "everybody"}],
    ids=lambda each: each["sub"],
)
def test_nobody_sees_or_touches_the_collections_of_another(
    server: Server, place: str, other: Mapping[str, Any]
) -> None:
    alice, stranger = User(server, "alice"), User(server, other["sub"], admin=other.get("admin"))
    name = f"notes-{other['sub'].strip('/')}-{place.count('/')}"
    body = {"name": name, "embedding_model": "toy"}
    assert alice("POST", place, body).status_code == 201
    assert alice("POST", f"{place}/{name}/documents", {"documents": [{"id": "secret", "text": "mine"}]}).is_success
    assert name not in stranger.names()
    for method, path, body_sent in (
        ("GET", "/stats", None),
        ("GET", "/documents", None),
        ("GET", "/documents?ids=secret", None),
        ("DELETE", "/documents?ids=secret", None),
        ("POST", "/documents", {"documents": [{"id": "secret", "text": "not yours"}]}),
        ("POST", "/query", {"query": "mine"}),
        ("DELETE", "", None),
    ):
        reply = stranger(method, f"{place}/{name}{path}", body_sent)
        assert (reply.status_code, "collection_not_found" in reply.text) == (404, True), (path, reply.text)
    # The same name is free for him, and what he does with his own leaves hers as it is.
    assert stranger("POST", place, body).status_code == 201
    assert stranger("POST", f"{place}/{name}/documents", {"documents": [{"id": "secret", "text": "his"}]}).is_success
    [found] = alice("POST", f"{place}/{name}/query", {"query": "his"}).json()["results"]
    assert found["text"] == "mine"
    assert stranger("DELETE", f"{place}/{name}").status_code == 204
    assert alice("GET", f"{place}/{name}/stats").json()["count"] == 1


def test_documents_and_queries_count_for_their_caller_s_limits(tmp_path: Path) -> None:
    settings = {"rate_limit_requests": 3, "rate_limit_tokens": 4, "jwt_secret": SECRET, "collections": "qdrant"}
    file = models_file(tmp_path, {"toy": {}}, collections_path=str(tmp_path / "kept"), **settings)
    with ThreadedServer(file, load) as server:
        alice, bob = User(server, "alice"), User(server, "bob")
        assert alice("POST", PLACES[0], {"name": "notes", "embedding_model": "toy"}).status_code == 201
        reply = alice("POST", f"{PLACES[0]}/notes/documents", {"documents": ["one two", "three four"]})
        assert reply.status_code == 200 and reply.headers["x-ratelimit-remaining-tokens"] == "0"
        reply = alice("POST", f"{PLACES[1]}/notes/query", {"query": "one"})
        assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 0
        assert alice("GET", f"{PLACES[0]}/notes/stats").json()["count"] == 2
        assert bob("POST", PLACES[0], {"name": "notes", "embedding_model": "toy"}).status_code == 201


def test_without_a_token_there_is_nothing(server: Server) -> None:
    for place in PLACES:
        for method, path in (
            ("GET", ""),
            ("POST", ""),
            ("DELETE", "/abc"),
            ("GET", "/abc/stats"),
            ("POST", "/abc/query"),
        ):
            assert server.client.request(method, f"{place}{path}").status_code == 401


def test_a_key_that_is_set_later_keeps_what_was_there_and_tokens_lead_elsewhere(tmp_path: Path) -> None:
    file = models_file(tmp_path, {"toy": {}}, collections="qdrant", collections_path=str(tmp_path / "kept"))
    with ThreadedServer(file, load) as open_to_all:
        body = {"name": "notes", "embedding_model": "toy"}
        assert open_to_all.client.post(PLACES[1], json=body).status_code == 201
    settings = json.loads(file.read_text())
    ways: dict[str, tuple[dict[str, str], list[dict[str, str]]]] = {
        "key": ({"api_key": KEY}, [{"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}]),
        "tokens": (
            {"jwt_secret": SECRET},
            [{"Authorization": f"Bearer {signed(claims(sub=name))}"} for name in ("anonymous", "user", "everybody")],
        ),
    }
    for way, (more, callers) in ways.items():
        file.write_text(json.dumps(settings | more))
        with ThreadedServer(file, load) as server:
            for headers in callers:
                listed = server.client.get(PLACES[1], headers=headers).json()
                assert [each["name"] for each in listed] == (["notes"] if way == "key" else [])
