"""POST /embed: the OpenCLIP service's request, and that of Hugging Face's Text Embeddings Inference (TEI)."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import ArrayLike, NDArray

from mlx_embeddings_server.errors import ApiError, BodyTooLarge, InternalError, Overloaded, Unavailable, embed_body
from tests.checkpoints import sentence_transformer
from tests.clip_checkpoints import PICTURES, TEXTS, Reference, open_clip_folder, png
from tests.colqwen_checkpoints import CHECKPOINT, least_cosine, reference_vectors
from tests.server import MINILM, Server
from tests.threaded import AnyServer, ThreadedServer

KEY = "sesame"
LONG = " ".join(f"number {number}" for number in range(200))  # more than the 256 tokens that the model takes
QUERY = "How large is the bathroom?"
IMAGES = [base64.b64encode(png(picture)).decode() for picture in PICTURES]

Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_clip_folder(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def keyed(clip_folder: Path) -> Iterator[ThreadedServer]:
    """Behind a key, which its client sends: `clip`, of texts and images, `pages`, with multi-vectors, and `plain`.

    The last is a text model that does not normalise by itself, and has a prompt for queries.
    """
    plain = sentence_transformer(clip_folder.parent / "plain", prompts={"query": "query: "})
    checkpoints = {"clip": clip_folder, "pages": CHECKPOINT, "plain": plain}
    models = [str(path) for path in checkpoints.values()]
    with ThreadedServer(model=models, served_model_name=list(checkpoints), dtype="float32", api_key=KEY) as server:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def texts(reference_texts: list[str]) -> list[str]:
    """Without the empty one, which is refused. One is too long: sentence-transformers too cut it at its end."""
    return [text for text in reference_texts if text]


@pytest.fixture(scope="module")
def expected(reference_texts: list[str], reference_vectors: Rows) -> Rows:
    return reference_vectors[[bool(text) for text in reference_texts]]


def post(server: AnyServer, path: str = "/embed", **body: Any) -> httpx.Response:
    return server.client.post(path, json=body)


def rows_of(reply: httpx.Response) -> Rows:
    """Of a request that succeeds, [inputs, dimensions]."""
    assert reply.status_code == 200, reply.text
    body = reply.json()
    if isinstance(body, dict):
        assert list(body) == ["embeddings"]
        body = body["embeddings"]
    return np.array(body, dtype=np.float32)


def openai_rows(server: AnyServer, input: object, model: str = MINILM, **fields: object) -> Rows:
    reply = server.embed(input, model, **fields)
    assert reply.status_code == 200, reply.text
    return np.array([each["embedding"] for each in reply.json()["data"]], dtype=np.float32)


def lengths(rows: ArrayLike) -> Rows:
    lengths: Rows = np.linalg.norm(np.asarray(rows, dtype=np.float32), axis=-1)
    return lengths


def refusal(reply: httpx.Response, status: int = 400) -> str:
    """The message of an error, which stands where either service's clients look for it."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert body.keys() == {"error", "error_type", "detail"}
    assert body["error"] == body["detail"] and body["error_type"] == "Validation"
    return str(body["error"])


# The two shapes


@pytest.mark.parametrize("path", ["/embed", "/"])  # clients that are told TEI's address alone post to /
def test_the_vectors_are_the_reference_implementations(
    server: Server, path: str, texts: list[str], expected: Rows
) -> None:
    for field, kind in (("texts", dict), ("inputs", list)):
        reply = post(server, path, **{field: texts})
        assert reply.headers["content-type"] == "application/json"
        assert type(reply.json()) is kind
        assert_allclose(rows_of(reply), expected, atol=1e-5)


def test_one_input_gives_an_array_of_one(server: Server, texts: list[str], expected: Rows) -> None:
    assert_allclose(rows_of(post(server, inputs=texts[0])), expected[:1], atol=1e-5)


@pytest.mark.parametrize("field", ["texts", "inputs"])
def test_the_vectors_are_those_of_the_openai_route(server: Server, field: str) -> None:
    texts = ["a photo of a dog", "a red car", "a photo of a dog"]
    reply = server.client.post("/embed", json={field: texts})
    assert_array_equal(rows_of(reply), openai_rows(server, texts))


@pytest.mark.parametrize("field", ["texts", "inputs"])
def test_vectors_have_length_one_unless_normalize_is_false(server: Server, field: str) -> None:
    body: dict[str, Any] = {field: ["a photo of a dog", "a red car"]}
    usual, asked, raw = (
        rows_of(post(server, **body | more)) for more in ({}, {"normalize": True}, {"normalize": False})
    )
    assert_array_equal(usual, asked)
    assert_allclose(lengths(usual), 1, atol=1e-6)
    assert np.abs(lengths(raw) - 1).min() > 0.1
    assert_allclose(raw / lengths(raw)[:, None], usual, atol=1e-6)


def test_vectors_have_length_one_where_the_checkpoint_has_no_such_step(keyed: ThreadedServer) -> None:
    raw = openai_rows(keyed, "a green stone", "plain")
    assert np.abs(lengths(raw) - 1).min() > 0.1
    assert_allclose(
        rows_of(post(keyed, texts=["a green stone"], model="plain")), raw / lengths(raw)[:, None], atol=1e-6
    )


def test_a_prompt_by_its_name(keyed: ThreadedServer) -> None:
    rows = rows_of(post(keyed, inputs="a green stone", prompt_name="query", model="plain", normalize=False))
    assert_array_equal(rows, openai_rows(keyed, "query: a green stone", "plain"))


def test_texts_are_texts_whatever_they_look_like(keyed: ThreadedServer) -> None:
    texts = ["http://a.b/c.png", "data:image/png,"]
    assert_array_equal(
        rows_of(post(keyed, texts=texts)), openai_rows(keyed, [{"text": each} for each in texts], "clip")
    )
    assert "inputs[0]" in refusal(post(keyed, inputs=texts[1:]))  # TEI's field is as /v1's: here it is a broken image


def test_token_ids_are_inputs_too(server: Server) -> None:
    ids = [101, 7592, 102]
    assert_array_equal(rows_of(post(server, inputs=[ids])), openai_rows(server, [ids]))


def test_fields_of_tei_and_of_nobody(server: Server) -> None:
    """`options` is what Chroma's clients of Hugging Face's API send."""
    half = rows_of(post(server, inputs="a red car", dimensions=192, prompt_name=None, options={"wait_for_model": True}))
    assert_array_equal(half, openai_rows(server, "a red car", dimensions=192))


# Images


def test_texts_and_images_have_open_clips_vectors(keyed: ThreadedServer, clip_folder: Path) -> None:
    reference = Reference.of(clip_folder)
    texts, images = reference.texts(), reference.images(PICTURES)
    pairs: list[tuple[Rows, dict[str, Any]]] = [(texts, {"texts": TEXTS}), (images, {"images": IMAGES})]
    for rows, body in pairs:
        assert_allclose(rows_of(post(keyed, **body)), rows / lengths(rows)[:, None], atol=1e-5)
        assert_allclose(rows_of(post(keyed, **body, normalize=False)), rows, atol=1e-4)


def test_images_come_as_data_uris_too(keyed: ThreadedServer) -> None:
    rows = rows_of(post(keyed, images=[f"data:image/png;base64,{image}" for image in IMAGES]))
    assert_allclose(rows, rows_of(post(keyed, images=IMAGES)), atol=1e-6)


def test_an_image_that_is_none_is_named(keyed: ThreadedServer) -> None:
    assert "images[1] is no image" in refusal(post(keyed, images=[IMAGES[0], "no image"]))
    assert "--allow-private-image-urls" in refusal(post(keyed, images=["http://127.0.0.1/secret.png"]))


def test_a_model_of_texts_refuses_images(server: Server) -> None:
    assert "takes text only" in refusal(post(server, images=IMAGES[:1]))


# Which model


def test_the_first_model_answers_unless_another_is_named(keyed: ThreadedServer) -> None:
    rows = rows_of(post(keyed, texts=[QUERY]))
    assert_array_equal(rows, rows_of(post(keyed, texts=[QUERY], model="clip")))
    assert rows.shape[1] != rows_of(post(keyed, texts=[QUERY], model="pages")).shape[-1]


def test_an_unknown_model_is_refused_with_the_names_of_the_known(keyed: ThreadedServer) -> None:
    message = refusal(post(keyed, texts=[QUERY], model="gpt"), 404)
    assert "gpt" in message and "clip" in message and "pages" in message


def test_a_multi_vector_model_gives_a_list_of_vectors_for_each_input(keyed: ThreadedServer) -> None:
    page = base64.b64encode((CHECKPOINT.parent / "image_1.png").read_bytes()).decode()
    for body in ({"images": [page, page]}, {"inputs": [{"image": page}, f"data:image/png;base64,{page}"]}):
        for vectors in rows_of(post(keyed, model="pages", **body)):
            assert least_cosine(vectors, reference_vectors()["image_1"]) >= 0.9999


# Too long


@pytest.mark.parametrize("field", ["texts", "inputs"])
def test_what_is_too_long_is_cut_and_the_reply_says_which(server: Server, field: str) -> None:
    given = ["short", LONG, "short", LONG]
    ways: list[dict[str, Any]] = [{}, {"truncate": True}, {"truncation_direction": "right"}, {"truncate": "end"}]
    for way in ways:
        reply = server.client.post("/embed", json={field: given, **way})
        assert reply.headers["x-embeddings-truncated"] == "1,3"
        assert_array_equal(rows_of(reply), openai_rows(server, given, truncate="end"))
    assert "x-embeddings-truncated" not in server.client.post("/embed", json={field: ["short"]}).headers


@pytest.mark.parametrize("direction", ["left", "Left"])
def test_the_left_is_cut_where_that_is_asked_for(server: Server, direction: str) -> None:
    rows = rows_of(post(server, inputs=LONG, truncate=True, truncation_direction=direction))
    assert_array_equal(rows, openai_rows(server, LONG, truncate="start"))
    assert not np.allclose(rows, openai_rows(server, LONG, truncate="end"), atol=1e-3)


def test_what_is_too_long_is_refused_where_truncate_is_false(server: Server) -> None:
    message = refusal(post(server, inputs=["short", LONG], truncate=False))
    assert "inputs[1]" in message and "256" in message
    # It advises what this route takes too.
    assert '"truncate": "end"' in message
    assert refusal(post(server, texts=[LONG], truncate="none", truncation_direction="left"))


# Keys


def test_a_key_is_ignored_where_the_server_has_none(server: Server) -> None:
    for value in ("Bearer anything", "Basic dTpw", "nonsense"):
        reply = server.client.post("/embed", json={"texts": ["a"]}, headers={"Authorization": value})
        assert reply.status_code == 200


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_a_key_is_wanted_where_the_server_has_one(keyed: ThreadedServer, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        reply = httpx.post(keyed.url + path, json={"inputs": "a"}, headers=headers, trust_env=False)
        assert "Authorization: Bearer KEY" in refusal(reply, 401)
        assert reply.headers["www-authenticate"].split()[0] == "Bearer"
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
        assert httpx.post(keyed.url + path, json={"inputs": "a"}, headers=headers, trust_env=False).status_code == 200


def test_get_stays_what_it_was(keyed: ThreadedServer) -> None:
    body = httpx.get(keyed.url + "/", trust_env=False).json()
    assert body["status"] == "ok" and body["models"] == ["clip", "pages", "plain"] and "/embed" in body["endpoints"]


# What is refused


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "texts, images or inputs is missing"),
        ({"texts": None, "input": ["a"]}, "texts, images or inputs is missing"),
        ({"texts": []}, "an empty list"),
        ({"images": []}, "an empty list"),
        ({"inputs": []}, "an empty list"),
        ({"inputs": ""}, "an empty string"),
        ({"texts": ["a", ""]}, "texts[1] is an empty string"),
        ({"inputs": ["a", ""]}, "inputs[1] is an empty string"),
        ({"texts": "a"}, "texts must be a list of strings"),
        ({"texts": ["a", 5]}, "texts must be a list of strings"),
        ({"texts": {"text": "a"}}, "texts must be a list of strings"),
        ({"images": "a"}, "images must be a list of strings"),
        ({"images": [{"image": "a"}]}, "images must be a list of strings"),
        ({"inputs": 5.5}, "must be a string"),
        ({"inputs": ["a", None]}, "inputs[1] must be a string"),
        ({"texts": ["a"], "inputs": ["a"]}, "texts and inputs exclude each other"),
        ({"texts": ["a"], "images": ["a"]}, "texts and images exclude each other"),
        ({"texts": ["a"], "normalize": "yes"}, "normalize"),
        ({"texts": ["a"], "truncate": "middle"}, "truncate"),
        ({"inputs": "a", "truncation_direction": "up"}, "truncation_direction"),
        ({"inputs": "a", "dimensions": 0}, "dimensions"),
        ({"inputs": "a", "dimensions": 385}, "384"),
        ({"inputs": "a", "prompt_name": "none such"}, "prompt_name"),
        ({"inputs": ["a"] * 2049}, "the limit is 2048"),
        ([], "must be a JSON object"),
    ],
)
def test_a_bad_body_is_refused_with_what_is_wrong(server: Server, body: object, words: str) -> None:
    assert words in refusal(server.client.post("/embed", json=body))


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_what_is_no_json_is_refused(server: Server, path: str) -> None:
    for content in (b'{"texts": ["a"', b"", b'{"texts": ["\xff"]}'):
        reply = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert "not valid JSON" in refusal(reply)
    reply = server.client.post(path, content=b"a red car", headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in refusal(reply, 415)
    # Programs and people who come by other ways keep /v1's shape.
    assert server.client.put(path, json={"inputs": "a"}).json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("full", retry_after=1), "Overloaded"),
        (InternalError("broken"), "Backend"),
        (Unavailable("shutting down"), "Unhealthy"),
        (BodyTooLarge("large"), "Validation"),
    ],
)
def test_errors_have_teis_types(error: ApiError, kind: str) -> None:
    assert embed_body(error) == {"error": error.message, "error_type": kind, "detail": error.message}


def test_the_reference_shows_both_shapes(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    schema = paths["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"texts", "images", "inputs", "normalize", "truncate"} <= schema["properties"].keys()
    assert "post" not in paths["/"]
