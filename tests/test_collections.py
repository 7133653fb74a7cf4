"""Collections over HTTP, at both of their places: every route, with each store."""

import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest

from tests.scripted import DIMENSIONS, scripted_server, vector
from tests.server import Server
from tests.stores import ChromaServer

PLACES = ("/api/v1/embeddings/collections", "/v1/collections")
_MOST = 1_100_000  # bytes of a request, and of the documents in a reply
FACTS = {"provider": "local", "embedding_model": "toy", "embedding_dimension": DIMENSIONS}


@pytest.fixture(scope="module", params=["chroma", "chroma-server", "qdrant"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("collections")
    with ExitStack() as stack:
        target = request.param
        if target == "chroma-server":
            target = stack.enter_context(ChromaServer(folder / "chroma")).url
        settings = {
            "collections": target,
            "collections_path": folder / "kept",
            "max_request_inputs": 50,
            "max_request_bytes": _MOST,
        }
        yield stack.enter_context(scripted_server(folder, default_model="toy", **settings))


@pytest.fixture(params=PLACES)
def collection(request: pytest.FixtureRequest, server: Server) -> str:
    """The address of a new one."""
    name = f"c-{uuid.uuid4()}"
    assert server.client.post(request.param, json={"name": name, "embedding_model": "toy"}).status_code == 201
    return f"{request.param}/{name}"


def good(reply: httpx.Response, status: int = 200) -> Any:
    assert reply.status_code == status, reply.text
    return reply.json()


def put(server: Server, collection: str, documents: Sequence[object]) -> Any:
    return good(server.client.post(f"{collection}/documents", json={"documents": documents}))


def ids_of(server: Server, collection: str, **params: Any) -> list[str]:
    found = good(server.client.get(f"{collection}/documents", params=params))["documents"]
    return [each["id"] for each in found]


def ask(server: Server, collection: str, query: object, **fields: Any) -> Any:
    return good(server.client.post(f"{collection}/query", json={"query": query, **fields}))["results"]


def refusal(reply: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message, in the shape of the place."""
    body = reply.json()
    if reply.request.url.path.startswith("/api/"):
        return reply.status_code, body["code"], body["detail"]
    return reply.status_code, body["error"]["code"], body["error"]["message"]


@pytest.mark.parametrize("place", PLACES)
def test_a_collection_is_made_listed_counted_and_deleted(server: Server, place: str) -> None:
    client, name = server.client, f"news.{place.count('/')}"
    body = {"name": name, "metadata": {"domain": "news", "year": 2024}, "embedding_model": "toy", "provider": "local"}
    made = good(client.post(place, json=body), 201)
    assert made == {"name": name, "metadata": {"domain": "news", "year": 2024, **FACTS}}
    assert made in good(client.get(place))
    put(server, f"{place}/{name}", ["one", "two"])
    counted = {"count": 2, "embedding_dimension": DIMENSIONS}
    assert good(client.get(f"{place}/{name}/stats")) == made | counted
    deleted = client.delete(f"{place}/{name}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert refusal(client.delete(f"{place}/{name}"))[:2] == (404, "collection_not_found")
    assert made not in good(client.get(place))


def test_the_default_model_makes_collections_that_name_none(server: Server) -> None:
    made = good(server.client.post(PLACES[1], json={"name": f"c-{uuid.uuid4()}"}), 201)
    assert made["metadata"] == FACTS


def test_both_places_show_the_same_collections(server: Server, collection: str) -> None:
    name = collection.rpartition("/")[2]
    for place in PLACES:
        assert name in [each["name"] for each in good(server.client.get(place))]


def test_documents_are_stored_replaced_read_and_deleted(server: Server, collection: str) -> None:
    documents = [
        {"id": "a", "text": "red apples", "metadata": {"kind": "fruit", "n": 1}},
        {"id": "b/../ü", "text": "blue sky", "metadata": {"kind": "sky", "n": 2.5, "is": True}},
        {"id": "c", "text": "old cars"},
    ]
    reply = put(server, collection, documents)
    assert (reply["ids"], reply["count"], reply["model"]) == (["a", "b/../ü", "c"], 3, "toy")
    assert reply["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    put(server, collection, [{"id": "a", "text": "green pears", "metadata": {"n": 7}}])
    shown = good(server.client.get(f"{collection}/documents", params={"ids": ["c", "a", "none", "b/../ü"]}))
    assert shown["documents"] == [
        {"id": "c", "text": "old cars", "image": None, "metadata": {}},
        {"id": "a", "text": "green pears", "image": None, "metadata": {"n": 7}},
        {"id": "b/../ü", "text": "blue sky", "image": None, "metadata": {"kind": "sky", "n": 2.5, "is": True}},
    ]
    [filtered] = good(
        server.client.get(
            f"{collection}/documents", params={"where": '{"n": {"$gt": 2}, "kind": "sky"}', "include": "text"}
        )
    )["documents"]
    assert filtered == {"id": "b/../ü", "text": "blue sky"}
    deleted = server.client.delete(f"{collection}/documents", params={"ids": ["a", "none"]})
    assert good(deleted) == {"deleted": 1}
    twice = server.client.request("DELETE", f"{collection}/documents?ids=rain", json={"ids": ["final"]})
    assert twice.status_code == 400 and "not in both" in twice.text
    by_filter = server.client.request("DELETE", f"{collection}/documents", json={"where": {"kind": "sky"}})
    assert good(by_filter) == {"deleted": 1}
    assert ids_of(server, collection) == ["c"]


def test_a_document_without_an_id_gets_one(server: Server, collection: str) -> None:
    ids = put(server, collection, ["one text", {"text": "another", "id": None}])["ids"]
    assert len({uuid.UUID(each) for each in ids}) == 2
    assert sorted(ids_of(server, collection)) == sorted(ids)


def test_pages_of_documents_have_each_of_them_once(server: Server, collection: str) -> None:
    put(server, collection, [{"id": f"{n:02}", "text": f"text {n}", "metadata": {"n": n}} for n in range(30)])
    pages = [ids_of(server, collection, limit=8, offset=offset) for offset in range(0, 40, 8)]
    assert [len(page) for page in pages] == [8, 8, 8, 6, 0]
    assert sorted(id for page in pages for id in page) == [f"{n:02}" for n in range(30)]
    assert sorted(ids_of(server, collection, where='{"n": {"$gte": 27}}')) == ["27", "28", "29"]


def test_a_query_finds_what_is_most_like_it(server: Server, collection: str) -> None:
    texts = [f"text {n}" for n in range(40)]
    put(server, collection, [{"id": t, "text": t, "metadata": {"even": n % 2 == 0}} for n, t in enumerate(texts)])
    rows = np.stack([vector(each) for each in texts])
    asked = vector("a question")
    cosines = dict(zip(texts, rows @ asked / np.linalg.norm(rows, axis=1) / np.linalg.norm(asked), strict=True))
    best = sorted(texts, key=lambda each: -cosines[each])
    for results, expected in (
        (ask(server, collection, "a question"), best[:10]),
        (ask(server, collection, {"text": "a question"}, n_results=3), best[:3]),
        (
            ask(server, collection, "a question", n_results=4, where={"even": True}),
            [each for each in best if int(each.split()[1]) % 2 == 0][:4],
        ),
    ):
        assert [each["id"] for each in results] == expected
        for each in results:
            assert each["score"] == pytest.approx(cosines[each["id"]], abs=1e-5)
            assert each["distance"] == pytest.approx(1 - each["score"], abs=1e-5)
            assert each["text"] == each["id"] and each["metadata"]["even"] in (True, False)
    [only] = ask(server, collection, "text 7", n_results=1, include=["metadata"])
    assert only.keys() == {"id", "score", "distance", "metadata"} and only["id"] == "text 7"
    assert ask(server, collection, "text 7", where={"even": "maybe"}) == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("name", "status"),
    [("ab", 400), ("-abc", 400), ("a/../../b", 400), ("..", 400), ("a b c", 400), ("ünicode", 400), ("a" * 513, 400)],
)
def test_names_with_tricks_are_refused(server: Server, place: str, name: str, status: int) -> None:
    code = "invalid_collection_name"
    assert refusal(server.client.post(place, json={"name": name, "embedding_model": "toy"}))[:2] == (status, code)
    before = good(server.client.get(place))
    reply = server.client.delete(f"{place}/{quote(name, safe='')}")
    assert reply.status_code in (400, 404, 405)
    assert good(server.client.get(place)) == before


def test_of_two_creations_at_once_one_succeeds(server: Server) -> None:
    for _ in range(3):
        body = {"name": f"c-{uuid.uuid4()}", "embedding_model": "toy"}
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda place: server.client.post(place, json=body), PLACES * 4))  # noqa: B023
        assert sorted(each.status_code for each in made) == [201] + [409] * 7
        assert {refusal(each)[1] for each in made if each.status_code == 409} == {"collection_exists"}


BAD_DOCUMENTS = {
    "none": ([], "documents must be a list of documents"),
    "no list": ("a text", "documents must be a list of documents"),
    "too many": (["x"] * 51, "the limit is 50"),
    "number": ([7], "documents[0] must be a text"),
    "unknown key": ([{"txt": "a"}], "documents[0] has the key 'txt'"),
    "number for an id": (["a", {"id": 7, "text": "a"}], "documents[1].id must be a string"),
    "empty id": ([{"id": "", "text": "a"}], "documents[0].id must have 1 to 512 bytes"),
    "an id twice": (
        [{"id": "a", "text": "a"}, {"id": "a", "text": "b"}],
        "documents[1].id is 'a', which is there twice",
    ),
    "nothing in it": (["a", {"id": "b"}], "documents[1] has neither text nor image"),
    "empty text": ([{"text": ""}], "documents[0] has neither text nor image"),
    "image": ([{"image": "https://example.com/a.png"}], "documents[0] has an image"),
    "nested metadata": ([{"text": "a", "metadata": {"a": {"b": 1}}}], "must be a text, a number, true or false"),
    "metadata list": ([{"text": "a", "metadata": []}], "documents[0].metadata must be an object"),
    "reserved key": ([{"text": "a", "metadata": {"$a": 1}}], "do not begin with '$'"),
    "large number": ([{"text": "a", "metadata": {"n": 2**64}}], "number of 64 bits"),
    "many keys": ([{"text": "a", "metadata": {str(n): n for n in range(65)}}], "the most is 64"),
    "not computable": (["good", "nan"], "a vector with NaN"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_documents_are_refused_and_none_of_the_request_is_stored(
    server: Server, collection: str, case: str
) -> None:
    documents, told = BAD_DOCUMENTS[case]
    reply = server.client.post(f"{collection}/documents", json={"documents": documents})
    assert reply.status_code == (500 if case == "not computable" else 400), reply.text
    assert told in reply.text.replace("\\'", "'")
    assert good(server.client.get(f"{collection}/stats"))["count"] == 0


@pytest.mark.parametrize(
    ("fields", "code", "told"),
    [
        ({}, "missing_required_parameter", "query is missing"),
        ({"query": ["a", "b"]}, "invalid_type", "query must be a text"),
        ({"query": ""}, "empty_input", "query is an empty string"),
        ({"query": {"image": "https://example.com/a.png"}}, "unsupported_modality", "takes text only"),
        ({"query": "a", "n_results": 0}, "invalid_value", "1 to 1000"),
        ({"query": "a", "n_results": 1001}, "invalid_value", "1 to 1000"),
        ({"query": "a", "n_results": "5"}, "invalid_value", "n_results"),
        ({"query": "a", "where": {"n": {"$like": 1}}}, "invalid_filter", "$like"),
        ({"query": "a", "where": [1]}, "invalid_filter", ""),
        ({"query": "a", "include": ["vectors"]}, "invalid_value", "include"),
    ],
)
def test_bad_queries_are_refused(server: Server, collection: str, fields: Any, code: str, told: str) -> None:
    status, given, message = refusal(server.client.post(f"{collection}/query", json=fields))
    assert (status, given) == (400, code) and told in message


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("GET", {"limit": "0"}, "invalid_value"),
        ("GET", {"limit": "1001"}, "invalid_value"),
        ("GET", {"limit": "many"}, "invalid_value"),
        ("GET", {"offset": "-1"}, "invalid_value"),
        ("GET", {"offset": "9" * 30}, "invalid_value"),
        ("GET", {"where": "{"}, "invalid_json"),
        ("GET", {"where": "[" * 20_000}, "invalid_json"),
        ("GET", {"where": '{"n": {"$gt": NaN}}'}, "invalid_filter"),
        ("GET", {"ids": "a", "where": '{"n": 1}'}, "invalid_value"),
        ("GET", {"ids": ["a"] * 51}, "too_many_inputs"),
        ("GET", {"include": "vectors"}, "invalid_value"),
        ("DELETE", {}, "invalid_value"),
        ("DELETE", {"where": "{}"}, "invalid_value"),
        ("DELETE", {"where": '{"a": {"$b": 1}}'}, "invalid_filter"),
    ],
)
def test_bad_choices_of_documents_are_refused(
    server: Server, collection: str, method: str, params: Any, code: str
) -> None:
    put(server, collection, ["one"])
    reply = server.client.request(method, f"{collection}/documents", params=params)
    assert refusal(reply)[:2] == (400, code), reply.text
    assert good(server.client.get(f"{collection}/stats"))["count"] == 1


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"embedding_model": "toy"}, 400, "missing_required_parameter"),
        ({"name": 7, "embedding_model": "toy"}, 400, "invalid_value"),
        ({"name": "abc", "embedding_model": "none"}, 404, "model_not_found"),
        ({"name": "abc", "embedding_model": "toy", "provider": "none"}, 404, "provider_not_found"),
        ({"name": "abc", "embedding_model": "toy", "metadata": {"a": [1]}}, 400, "invalid_value"),
        ({"name": "abc", "embedding_model": "toy", "metadata": {"embedding_dimension": 7}}, 400, "invalid_value"),
        ({"name": "abc", "embedding_model": "toy", "metadata": {"a": "x" * 2**20}}, 400, "invalid_value"),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_bad_creations_are_refused(server: Server, place: str, body: Any, status: int, code: str) -> None:
    assert refusal(server.client.post(place, json=body))[:2] == (status, code)
    assert "abc" not in [each["name"] for each in good(server.client.get(place))]


def test_metadata_as_it_is_shown_can_be_sent_again(server: Server, collection: str) -> None:
    place, _, name = collection.rpartition("/")
    [shown] = [each for each in good(server.client.get(place)) if each["name"] == name]
    made = good(server.client.post(place, json=shown | {"name": f"{name}-again", "embedding_model": "toy"}), 201)
    assert made == {"name": f"{name}-again", "metadata": FACTS}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_too_much_for_one_reply_is_refused_with_what_to_do(server: Server, place: str) -> None:
    name = f"c-{uuid.uuid4()}"
    good(server.client.post(place, json={"name": name}), 201)
    for number in range(3):
        put(server, f"{place}/{name}", [{"id": str(number), "text": "long " * 80_000, "metadata": {"n": number}}])
    for reply in (
        server.client.get(f"{place}/{name}/documents"),
        server.client.get(f"{place}/{name}/documents", params={"ids": ["0", "1", "2"]}),
        server.client.post(f"{place}/{name}/query", json={"query": "a"}),
    ):
        status, code, message = refusal(reply)
        assert (status, code) == (400, "reply_too_large") and "ask for fewer at once" in message
    assert len(ids_of(server, f"{place}/{name}", limit=2)) == len(ids_of(server, f"{place}/{name}", ids="1")) + 1 == 2
    assert len(ids_of(server, f"{place}/{name}", include="metadata")) == 3
    assert len(ask(server, f"{place}/{name}", "a", include=["metadata"])) == 3
    too_large = server.client.post(f"{place}/{name}/documents", json={"documents": ["x" * _MOST]})
    assert refusal(too_large)[:2] == (413, "request_too_large")


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_there_is_told(server: Server, place: str) -> None:
    for method, path, body in (
        ("GET", "/stats", None),
        ("GET", "/documents", None),
        ("DELETE", "/documents?ids=a", None),
        ("POST", "/documents", {"documents": ["a"]}),
        ("POST", "/query", {"query": "a"}),
        ("DELETE", "", None),
    ):
        reply = server.client.request(method, f"{place}/nobody-made-it{path}", json=body)
        status, code, message = refusal(reply)
        assert (status, code) == (404, "collection_not_found") and "nobody-made-it" in message


def test_a_client_that_leaves_takes_its_documents_along(server: Server, collection: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        body = {"documents": ["work 1 second", "another"]}
        server.client.post(f"{collection}/documents", json=body, timeout=0.3)
    put(server, collection, [{"id": "after", "text": "a text"}])  # waits for its turn
    assert ids_of(server, collection) == ["after"]


def test_health_says_what_keeps_the_collections(server: Server) -> None:
    shown = server.client.get("/health").json()["collections"]
    assert shown["store"] in ("chroma", "qdrant") and shown["state"] == "ok"
    assert set(PLACES) < set(server.client.get("/").json()["endpoints"])


def test_the_reference_has_every_route_and_what_it_takes(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    for place in PLACES:
        assert paths[place].keys() == {"get", "post"} and paths[f"{place}/{{name}}"].keys() == {"delete"}
        assert paths[f"{place}/{{name}}/documents"].keys() == {"get", "post", "delete"}
        parameters = paths[f"{place}/{{name}}/documents"]["get"]["parameters"]
        assert {"name", "ids", "where", "limit", "offset", "include"} == {each["name"] for each in parameters}
        body = paths[f"{place}/{{name}}/query"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"query", "n_results", "where", "include"} < body["properties"].keys()
