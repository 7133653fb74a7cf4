"""A collection and its model: what a restart, another name, other files or a fallback change."""

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.scripted_models import load, models_file, models_server
from tests.server import Server
from tests.threaded import ThreadedServer
from tests.upstream import always, good, providers_server, upstream

PLACE = "/v1/collections"


AnyServer = Server | ThreadedServer


def start(folder: Path, models: Mapping[str, Any]) -> ThreadedServer:
    return ThreadedServer(
        models_file(folder, models, collections="qdrant", collections_path=str(folder / "kept")), load
    )


def rewrite(folder: Path, models: Mapping[str, Any], **settings: Any) -> None:
    """The file, for the next start. Models are served from the folders that are there."""
    file = folder / "models.yaml"
    old = json.loads(file.read_text())
    file.write_text(json.dumps(old | {"models": models} | settings))


def make(server: AnyServer, model: str) -> None:
    reply = server.client.post(PLACE, json={"name": "notes", "embedding_model": model})
    assert reply.status_code == 201, reply.text


def put(server: AnyServer, *documents: object, **fields: Any) -> httpx.Response:
    return server.client.post(f"{PLACE}/notes/documents", json={"documents": documents, **fields})


def ask(server: AnyServer, query: str = "a text", **fields: Any) -> httpx.Response:
    return server.client.post(f"{PLACE}/notes/query", json={"query": query, **fields})


def error(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def count(server: AnyServer) -> int:
    return int(server.client.get(f"{PLACE}/notes/stats").json()["count"])


@pytest.mark.parametrize("store", ["chroma", "qdrant"])
def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path, store: str) -> None:
    server = models_server(tmp_path, {"a": {}}, collections=store, collections_path=str(tmp_path / "kept"))
    with server:
        make(server, "a")
        assert put(server, *({"id": str(n), "text": f"text {n}"} for n in range(20))).is_success
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with server:
        assert count(server) == 20
        [best] = ask(server, "text 7", n_results=1).json()["results"]
        assert (best["id"], best["text"]) == ("7", "text 7") and best["score"] == pytest.approx(1, abs=1e-5)


def test_a_name_that_means_another_model_now_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    server = start(tmp_path, {"a": {}, "b": {}})
    with server:
        make(server, "a")
        assert put(server, {"id": "1", "text": "a text"}).is_success
    rewrite(tmp_path, {"a": {"name": str(tmp_path / "b")}})
    with server:
        for reply in (put(server, "another"), ask(server)):
            assert error(reply) == (409, "collection_mismatch")
            assert "source b instead of a" in reply.json()["error"]["message"]
        assert count(server) == 1
        [document] = server.client.get(f"{PLACE}/notes/documents").json()["documents"]
        assert document["text"] == "a text"
    # Under whatever name the first one comes back, it is the collection's again.
    rewrite(tmp_path, {"other": {"name": str(tmp_path / "a")}})
    with server:
        assert put(server, {"id": "2", "text": "another"}).json()["model"] == "other"
        assert [each["id"] for each in ask(server).json()["results"]] == ["1", "2"]
    rewrite(tmp_path, {"a": {"name": str(tmp_path / "b")}, "other": {"name": str(tmp_path / "a")}})
    with server:
        assert put(server, {"id": "3", "text": "a third"}).json()["model"] == "other"


def test_other_files_in_the_same_folder_are_another_model(tmp_path: Path) -> None:
    server = start(tmp_path, {"a": {}})
    with server:
        make(server, "a")
        assert put(server, "a text").is_success
    (tmp_path / "a" / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    with server:
        for reply in (put(server, "another"), ask(server)):
            assert error(reply) == (409, "collection_mismatch")
            assert "revision sha256-" in reply.json()["error"]["message"]


def test_of_two_models_from_folders_of_one_name_the_one_that_made_the_vectors_is_taken(tmp_path: Path) -> None:
    server = start(tmp_path, {"a": {}})
    with server:
        make(server, "a")
        assert put(server, {"id": "1", "text": "a text"}).is_success
    (tmp_path / "new").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "new" / "a")
    (tmp_path / "new" / "a" / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    rewrite(tmp_path, {"a": {"name": str(tmp_path / "new" / "a")}, "old": {"name": str(tmp_path / "a")}})
    with server:
        assert put(server, {"id": "2", "text": "another"}).json()["model"] == "old"
        assert ask(server, model="old").json()["model"] == "old"
        assert error(ask(server, model="a")) == (409, "collection_mismatch")
    rewrite(tmp_path, {"a": {"name": str(tmp_path / "new" / "a")}, "b": {"name": str(tmp_path / "new" / "a")}})
    with server:
        reply = ask(server)
        assert error(reply) == (409, "collection_mismatch")
        assert "holds vectors of a (dense, dimension 8); these have revision" in reply.json()["error"]["message"]


def test_another_prompt_for_documents_makes_other_vectors_and_one_for_queries_does_not(tmp_path: Path) -> None:
    folder = {"name": str(tmp_path / "a")}
    server = start(tmp_path, {"a": {}})
    with server:
        make(server, "a")
        assert put(server, "a text").is_success
    rewrite(tmp_path, {"a": folder | {"prompts": {"query": "query: "}}})
    with server:
        assert put(server, "another").is_success and ask(server).is_success
    rewrite(tmp_path, {"a": folder | {"prompts": {"document": "passage: "}}})
    with server:
        for reply in (put(server, "a third"), ask(server)):
            assert error(reply) == (409, "collection_mismatch")
            assert "prompt 'passage: ' instead of ''" in reply.json()["error"]["message"]
        assert count(server) == 2


def test_a_folder_may_be_moved(tmp_path: Path) -> None:
    server = start(tmp_path, {"a": {}})
    with server:
        make(server, "a")
        assert put(server, "a text").is_success
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").rename(tmp_path / "elsewhere" / "a")
    rewrite(tmp_path, {"a": {"name": str(tmp_path / "elsewhere" / "a")}})
    with server:
        assert put(server, "another").is_success and count(server) == 2


def test_a_model_that_is_not_served_or_not_allowed_any_more_is_told(tmp_path: Path) -> None:
    server = start(tmp_path, {"a": {}, "b": {}})
    with server:
        make(server, "a")
        assert put(server, "a text").is_success
        # What the caller takes the model to be.
        assert put(server, "another", model="a").is_success and ask(server, model="a").is_success
        assert error(put(server, "another", model="b")) == (409, "collection_mismatch")
        assert error(ask(server, model="b")) == (409, "collection_mismatch")
        assert error(ask(server, model="c")) == (404, "model_not_found")
    rewrite(tmp_path, {"b": {"name": str(tmp_path / "b")}})
    with server:
        for reply in (put(server, "another"), ask(server)):
            assert error(reply) == (409, "collection_model_not_served")
        assert count(server) == 2
    rewrite(tmp_path, {name: {"name": str(tmp_path / name)} for name in "ab"}, allowed_models=["b"])
    with server:
        assert put(server, "another").status_code == ask(server).status_code == 403
        assert server.client.delete(f"{PLACE}/notes").status_code == 204


def test_no_fallback_writes_into_a_collection_or_searches_it(tmp_path: Path) -> None:
    with start(tmp_path, {"a": {"fallback": ["b"], "dimensions": 8}, "b": {"dimensions": 8}}) as server:
        make(server, "a")
        assert put(server, {"id": "1", "text": "a text"}).is_success
        assert server.client.post("/v1/models/a/unload").is_success
        (tmp_path / "a" / "broken").touch()
        stood_in = server.embed("a text", model="a")
        assert stood_in.is_success and stood_in.headers["x-embeddings-fallback-from"] == "local"
        for reply in (put(server, "another"), ask(server)):
            assert error(reply) == (503, "model_load_failed")
        assert count(server) == 1


def test_a_provider_s_model_makes_a_collection_and_when_it_fails_nothing_is_stored(tmp_path: Path) -> None:
    with upstream({"up": good}) as other:
        providers = {"openai": {"url": f"{other.url}/up/v1", "models": ["m", "n"], "retries": 0}}
        models = {"here": {"provider": "openai", "name": "m", "dimensions": 8, "fallback": ["toy"]}}
        settings = {"collections": "chroma", "collections_path": str(tmp_path / "kept")}
        environment = {"OPENAI_API_KEY": "sk-1"}
        with providers_server(tmp_path, providers, models, environment=environment, **settings) as server:
            body = {"name": "notes", "embedding_model": "m", "provider": "openai"}
            made = server.client.post("/api/v1/embeddings/collections", json=body)
            assert made.status_code == 201, made.text
            assert made.json()["metadata"] == {
                "provider": "openai",
                "embedding_model": "here",
                "embedding_dimension": 8,
            }
            body = {"name": "of-n", "embedding_model": "openai:n"}
            made = server.client.post("/api/v1/embeddings/collections", json=body)
            assert made.json()["metadata"] == {"provider": "openai", "embedding_model": "n", "embedding_dimension": 8}
            assert server.client.post(
                f"{PLACE}/of-n/documents", json={"documents": ["a text"], "model": "openai:n"}
            ).is_success
            reply = put(server, {"id": "1", "text": "a text"}, "another")
            assert reply.is_success and reply.headers["x-embeddings-provider"] == "openai"
            assert ask(server, n_results=1).json()["results"][0]["id"] == "1"
            other.pages["up"] = always({"error": "broken"}, 500)
            assert server.embed("a text", model="here").headers["x-embeddings-provider"] == "local"
            for failed in (put(server, "a third"), ask(server)):
                assert failed.status_code in (502, 503), failed.text
            assert count(server) == 2


def test_a_model_that_cannot_be_loaded_makes_no_collection(tmp_path: Path) -> None:
    with start(tmp_path, {"a": {}}) as server:
        (tmp_path / "a" / "broken").touch()
        reply = server.client.post(PLACE, json={"name": "notes", "embedding_model": "a"})
        assert error(reply) == (503, "model_load_failed")
        assert server.client.get(PLACE).json() == []
