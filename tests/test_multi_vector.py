"""ColQwen2.5 over HTTP, on both backends: colpali-engine's vectors, and every form that they can be asked for in."""

import base64
import functools
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openai
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.conftest import DATA
from tests.server import Server
from tests.threaded import AnyServer, ThreadedServer

COLQWEN = DATA / "colqwen2_5"
SETTINGS: dict[str, Any] = {
    "model": [str(COLQWEN / "checkpoint")],
    "served_model_name": ["colqwen"],
    "dtype": "float32",
}
EXPECTED = load_file(COLQWEN / "expected.safetensors")
QUERIES: list[str] = json.loads((COLQWEN / "queries.json").read_text())
Vectors = NDArray[np.float32]  # [vectors, dimensions]


@pytest.fixture(scope="module", params=["mlx", "torch"])
def colqwen(request: pytest.FixtureRequest) -> Iterator[ThreadedServer]:
    with ThreadedServer(**SETTINGS, backend=request.param) as server:
        yield server


def data_uri(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((COLQWEN / f"{name}.png").read_bytes()).decode()


def image(name: str) -> dict[str, str]:
    return {"image": data_uri(name)}


def embed(server: AnyServer, input: object, **fields: object) -> list[Vectors]:
    reply = server.embed(input, model="colqwen", **fields)
    assert reply.status_code == 200, reply.text
    return [np.array(each["embedding"], dtype=np.float32) for each in reply.json()["data"]]


def error(server: AnyServer, input: object, **fields: object) -> dict[str, Any]:
    reply = server.embed(input, model="colqwen", **fields)
    assert reply.status_code == 400, reply.text
    return dict(reply.json()["error"])


def least_cosine(vectors: Vectors, expected: Vectors) -> float:
    """Of each token's vector with its counterpart; both are of length 1."""
    assert vectors.shape == expected.shape
    return float((vectors.astype(np.float64) * expected).sum(axis=1).min())


# The reference


@pytest.mark.parametrize("place", range(3))
def test_queries_and_documents(colqwen: ThreadedServer, place: int) -> None:
    [query] = embed(colqwen, QUERIES[place])
    [same] = embed(colqwen, QUERIES[place], input_type="query")
    [document] = embed(colqwen, QUERIES[place], input_type="document")
    assert least_cosine(query, EXPECTED[f"query_{place}"]) >= 0.9999
    assert_array_equal(query, same)
    assert least_cosine(document, EXPECTED[f"document_{place}"]) >= 0.9999


@pytest.mark.parametrize("name", ["image_0", "image_1"])
def test_images(colqwen: ThreadedServer, name: str) -> None:
    [vectors] = embed(colqwen, image(name))
    assert least_cosine(vectors, EXPECTED[name]) >= 0.9999
    assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_a_page_that_is_scaled_down(colqwen: ThreadedServer) -> None:
    [vectors] = embed(colqwen, image("page_resized"))
    assert least_cosine(vectors, EXPECTED["page_resized"]) >= 0.9999


def test_one_ragged_batch_of_everything(colqwen: ThreadedServer) -> None:
    names = ["image_1", "page_resized", "image_0"]
    given = [QUERIES[1], image(names[0]), QUERIES[0], image(names[1]), QUERIES[2], image(names[2])]
    wanted = ["query_1", names[0], "query_0", names[1], "query_2", names[2]]
    for name, vectors in zip(wanted, embed(colqwen, given), strict=True):
        assert least_cosine(vectors, EXPECTED[name]) >= 0.9999, name


# Forms of the reply


def test_base64_with_its_shape_through_the_official_client(colqwen: ThreadedServer) -> None:
    client = openai.OpenAI(base_url=f"{colqwen.url}/v1", api_key="none")
    reply = client.embeddings.create(model="colqwen", input=QUERIES)
    for place, each in enumerate(reply.data):
        vectors = np.array(each.embedding, dtype=np.float32).reshape(each.model_extra["shape"])  # type: ignore[index]
        assert least_cosine(vectors, EXPECTED[f"query_{place}"]) >= 0.9999


def test_octet_stream(colqwen: ThreadedServer) -> None:
    fields = {"model": "colqwen", "input": [QUERIES[0], image("image_1")], "include": ["patches"]}
    reply = colqwen.client.post("/v1/embeddings", json=fields, headers={"Accept": "application/octet-stream"})
    assert reply.headers["x-embeddings-shape"] == "16,128;24,128"
    assert reply.headers["x-embeddings-patches"].startswith(";")
    rows = np.frombuffer(reply.content, dtype="<f4").reshape(-1, 128)
    assert least_cosine(rows[:16], EXPECTED["query_0"]) >= 0.9999
    assert least_cosine(rows[16:], EXPECTED["image_1"]) >= 0.9999


@pytest.mark.parametrize(("dtype", "width"), [("int8", 128), ("uint8", 128), ("binary", 16), ("ubinary", 16)])
def test_quantised_vectors(colqwen: ThreadedServer, dtype: str, width: int) -> None:
    [floats] = embed(colqwen, QUERIES[0])
    reply = colqwen.embed(QUERIES[0], model="colqwen", output_dtype=dtype)
    numbers = np.array(reply.json()["data"][0]["embedding"])
    assert numbers.shape == (16, width)
    if dtype == "ubinary":
        assert_array_equal(np.unpackbits(numbers.astype(np.uint8), axis=1), floats > 0)
    if dtype == "int8":
        assert_array_equal(numbers, np.rint(floats / np.abs(floats).max(axis=1, keepdims=True) * 127))
    [each] = colqwen.embed(QUERIES[0], model="colqwen", output_dtype=dtype, encoding_format="base64").json()["data"]
    assert each["shape"] == [16, width]
    assert (
        base64.b64decode(each["embedding"])
        == numbers.astype(np.int8 if dtype in ("int8", "binary") else np.uint8).tobytes()
    )


def test_fewer_dimensions_are_normalised_again(colqwen: ThreadedServer) -> None:
    [vectors] = embed(colqwen, QUERIES[0], dimensions=32)
    cut = EXPECTED["query_0"][:, :32]
    assert_allclose(vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-4)


def test_raw_vectors_point_the_same_way(colqwen: ThreadedServer) -> None:
    [raw] = embed(colqwen, QUERIES[0], normalize=False)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert not np.allclose(lengths, 1)
    assert least_cosine(raw / lengths, EXPECTED["query_0"]) >= 0.9999


def test_usage_counts_every_token(colqwen: ThreadedServer) -> None:
    usage = colqwen.embed([QUERIES[0], image("image_1")], model="colqwen").json()["usage"]
    assert usage["prompt_tokens"] == 16 + 24


def test_the_model_says_what_it_is(colqwen: ThreadedServer) -> None:
    [model] = colqwen.client.get("/v1/models").json()["data"]
    assert model["output"] == "multi_vector"
    assert model["modalities"] == ["text", "image"]
    assert model["dimensions"] == 128
    assert model["verified"] is True


# Pooling and patches


def patches_of(server: AnyServer, name: str, pool: str | None = None) -> dict[str, int]:
    [each] = server.embed(image(name), model="colqwen", include=["patches"], pool=pool).json()["data"]
    return dict(each["patches"])


def test_patches_are_where_the_image_is(colqwen: ThreadedServer) -> None:
    """image_0 is 224 x 140 pixels, of which 28 x 28 make a vector."""
    grid = patches_of(colqwen, "image_0")
    assert (grid["rows"], grid["columns"]) == (5, 8)
    # Of the prompt's tokens those before the image come first: <|im_start|>user\n<|vision_start|>.
    [alone] = embed(colqwen, "user\n", input_type="document")
    assert grid["offset"] == 1 + len(alone) + 1


@pytest.mark.parametrize("pool", ["rows", "columns", "mean"])
def test_pooling_over_the_patch_grid(colqwen: ThreadedServer, pool: str) -> None:
    [full] = embed(colqwen, image("image_0"))
    grid = patches_of(colqwen, "image_0")
    rows, columns, offset = grid["rows"], grid["columns"], grid["offset"]
    assert rows != columns
    patches = full[offset : offset + rows * columns].reshape(rows, columns, -1)
    mean = {
        "rows": np.array([patches[row, :].mean(axis=0) for row in range(rows)]),
        "columns": np.array([patches[:, column].mean(axis=0) for column in range(columns)]),
        "mean": full[offset : offset + rows * columns].mean(axis=0)[np.newaxis],
    }[pool]
    [pooled] = embed(colqwen, image("image_0"), pool=pool)
    assert_allclose(pooled, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
    left = patches_of(colqwen, "image_0", pool=pool)
    assert left["rows"] * left["columns"] == len(pooled)


def test_hierarchical_pooling(colqwen: ThreadedServer) -> None:
    given = [image("image_0"), image("image_1"), QUERIES[1]]
    pooled = load_file(COLQWEN / "pooled.safetensors")
    for name, vectors in zip(
        ["image_0", "image_1", "query_1"], embed(colqwen, given, token_pool_factor=3), strict=True
    ):
        assert_allclose(vectors, pooled[f"{name}.factor_3"], atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"pool": "rows", "token_pool_factor": 2}, "pool", "exclude each other"),
        ({"pool": "rows"}, "pool", r"input[1] is no image"),
        ({"pool": "all"}, "pool", "rows"),
        ({"token_pool_factor": 0}, "token_pool_factor", "greater than or equal to 1"),
        ({"token_pool_factor": 2, "normalize": False}, "normalize", "length 1"),
        ({"token_pool_factor": 2, "include": ["patches"]}, "include", "no patches"),
        ({"include": ["everything"]}, "include", "patches"),
        ({"prompt": "Find: "}, "prompt", '"image"'),
    ],
)
def test_what_cannot_be_asked_for(colqwen: ThreadedServer, fields: dict[str, object], param: str, words: str) -> None:
    told = error(colqwen, [image("image_1"), QUERIES[0]], **fields)
    assert told["param"] == param
    assert words in told["message"]


def test_pooling_is_not_for_models_of_one_vector(server: Server) -> None:
    fields: dict[str, Any] = {"pool": "rows", "token_pool_factor": 2, "include": ["patches"]}
    for field, value in fields.items():
        told = server.embed("text", **{field: value}).json()["error"]
        assert told["param"] == field
        assert "multi-vector" in told["message"]


# Images in a request


@pytest.fixture(scope="module")
def folder_over_http() -> Iterator[str]:
    """The reference images at http://127.0.0.1:PORT/."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(COLQWEN))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_every_way_to_name_an_image(folder_over_http: str) -> None:
    url = f"{folder_over_http}/image_1.png"
    bare = base64.b64encode((COLQWEN / "image_1.png").read_bytes()).decode()
    given = [data_uri("image_1"), {"image": bare}, url, {"image": url}]
    with ThreadedServer(**SETTINGS, backend="mlx", allow_private_image_urls=True) as server:
        for vectors in embed(server, given):
            assert least_cosine(vectors, EXPECTED["image_1"]) >= 0.9999
        told = error(server, ["a text", f"{folder_over_http}/absent.png"])
        assert told["code"] == "image_fetch_failed"
        assert "input[1]" in told["message"] and "404" in told["message"]


def test_private_addresses_are_not_asked(colqwen: ThreadedServer, folder_over_http: str) -> None:
    told = error(colqwen, f"{folder_over_http}/image_1.png")
    assert told["code"] == "image_fetch_failed"
    assert "--allow-private-image-urls" in told["message"]


def test_a_text_with_an_image_stands_in_the_prompt(colqwen: ThreadedServer) -> None:
    [usual], [same], [other] = (
        embed(colqwen, image("image_1") | text)
        for text in ({}, {"text": "Describe the image."}, {"text": "Read the total."})
    )
    assert_allclose(usual, same, atol=1e-6)
    assert len(other) != len(usual) or not np.allclose(other, usual, atol=1e-3)
    before = patches_of(colqwen, "image_1")["offset"] + 1
    assert_allclose(other[:before], usual[:before], atol=1e-4)  # what comes before the text cannot see it


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"image": "data:image/png;base64,bm8gaW1hZ2U="}, "input[2]"),
        ({"image": "!!!"}, "input[2]"),
        ("data:image/png;base64,iVBORw0KGgo=", "input[2]"),
    ],
)
def test_one_bad_image_fails_the_whole_request_and_nothing_else(
    colqwen: ThreadedServer, bad: object, words: str
) -> None:
    told = error(colqwen, [image("image_0"), QUERIES[0], bad, image("image_1")])
    assert told["code"] == "invalid_image"
    assert words in told["message"]
    assert least_cosine(embed(colqwen, image("image_0"))[0], EXPECTED["image_0"]) >= 0.9999


def test_images_are_not_for_text_models(server: Server) -> None:
    told = server.embed([{"text": "a text"}, image("image_0")]).json()["error"]
    assert told["code"] == "unsupported_modality"
    assert "input[1]" in told["message"] and "text only" in told["message"]
    # A string that looks like an image is a text to a model of texts.
    assert server.embed("https://example.com/page.png").status_code == 200


def test_image_tokens_without_an_image(colqwen: ThreadedServer) -> None:
    """They would stand for patches that are not there: in a text they are text, and as ids they are refused."""
    assert colqwen.embed("see <|image_pad|> and <|vision_start|>", model="colqwen").status_code == 200
    told = error(colqwen, [[5, 6], [349, 352, 350]])
    assert told["code"] == "invalid_token_id"
    assert "input[1]" in told["message"] and "stands for a part of an image" in told["message"]


def test_many_clients_get_what_each_would_get_alone(colqwen: ThreadedServer) -> None:
    names = ["image_0", "image_1", "page_resized"]

    def ask(turn: int) -> Sequence[Vectors]:
        return embed(colqwen, [image(names[turn % 3]), QUERIES[turn % 3]])

    results: list[Sequence[Vectors]] = [[]] * 12

    def work(turn: int) -> None:
        results[turn] = ask(turn)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for turn, (page, query) in enumerate(results):
        assert least_cosine(page, EXPECTED[names[turn % 3]]) >= 0.9999
        assert least_cosine(query, EXPECTED[f"query_{turn % 3}"]) >= 0.9999
