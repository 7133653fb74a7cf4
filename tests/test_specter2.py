"""SPECTER2 over HTTP, on both backends: the `adapters` library's vectors, with an adapter for each request."""

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from mlx_embeddings_backends import checkpoints
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_server.errors import InvalidRequest
from mlx_embeddings_server.inputs.parse import Content, parse_input
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.conftest import DATA
from tests.server import Server

SPECTER2 = DATA / "specter2"
BASE, PROXIMITY, ADHOC_QUERY = (SPECTER2 / name for name in ("base", "specter2_proximity", "specter2_adhoc_query"))
EXPECTED = json.loads((SPECTER2 / "expected.json").read_text())
TEXTS: list[str] = EXPECTED["texts"]
KEYS = {"proximity": "specter2_proximity", "adhoc_query": "specter2_adhoc_query"}
Rows = NDArray[np.float32]


@pytest.fixture(scope="module", params=["torch", "mlx"])
def specter2(request: pytest.FixtureRequest) -> Iterator[Server]:
    adapters = ("--adapter", f"proximity={PROXIMITY}", "--adapter", f"adhoc_query={ADHOC_QUERY}")
    flags = ("--served-model-name", "specter2", "--backend", request.param, "--dtype", "float32", *adapters)
    with Server("--model", str(BASE), *flags) as server:
        yield server


def embed(server: Server, input: object, **fields: object) -> Rows:
    reply = server.embed(input, model="specter2", **fields)
    assert reply.status_code == 200, reply.text
    return np.array([each["embedding"] for each in reply.json()["data"]], dtype=np.float32)


def error(server: Server, input: object, **fields: object) -> dict[str, Any]:
    reply = server.embed(input, model="specter2", **fields)
    assert reply.status_code == 400, reply.text
    return dict(reply.json()["error"])


def expected(adapter: str) -> Rows:
    return np.array(EXPECTED[KEYS[adapter]], dtype=np.float32)


def assert_equal(rows: Rows, reference: Rows) -> None:
    assert_allclose(rows, reference, atol=1e-5, rtol=0)


# The reference's vectors.


@pytest.mark.parametrize("adapter", KEYS)
def test_each_adapter_gives_the_reference_vectors_together_and_alone(specter2: Server, adapter: str) -> None:
    assert_equal(embed(specter2, TEXTS, adapter=adapter), expected(adapter))
    assert_equal(np.concatenate([embed(specter2, text, adapter=adapter) for text in TEXTS]), expected(adapter))


def test_the_first_adapter_is_the_default_and_documents_take_it(specter2: Server) -> None:
    assert_equal(embed(specter2, TEXTS), expected("proximity"))
    assert_equal(embed(specter2, TEXTS, input_type="document"), expected("proximity"))


def test_queries_take_adhoc_query_unless_another_adapter_is_asked_for(specter2: Server) -> None:
    assert_equal(embed(specter2, TEXTS, input_type="query"), expected("adhoc_query"))
    assert_equal(embed(specter2, TEXTS, input_type="query", adapter="proximity"), expected("proximity"))


def test_the_official_client_chooses_an_adapter(specter2: Server) -> None:
    client = openai.OpenAI(base_url=f"{specter2.url}/v1", api_key="none")
    reply = client.embeddings.create(model="specter2", input=TEXTS, extra_body={"adapter": "adhoc_query"})
    assert_equal(np.array([item.embedding for item in reply.data], dtype=np.float32), expected("adhoc_query"))


def test_vectors_are_not_normalised_unless_asked(specter2: Server) -> None:
    rows = expected("proximity")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert_equal(embed(specter2, TEXTS, normalize=True), unit)


def test_requests_for_different_adapters_at_once_do_not_mix(specter2: Server) -> None:
    """Forty requests wait while the first runs: batches of what waits would mix them."""
    adapters = ["proximity", "adhoc_query"] * 20

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=specter2.url, timeout=60, trust_env=False) as client:
            bodies = ({"model": "specter2", "input": TEXTS, "adapter": adapter} for adapter in adapters)
            return list(await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies)))

    for adapter, reply in zip(adapters, asyncio.run(run()), strict=True):
        assert_equal(np.array([each["embedding"] for each in reply.json()["data"]]), expected(adapter))


def test_the_model_list_has_the_adapters(specter2: Server) -> None:
    model = specter2.client.get("/v1/models").json()["data"][0]
    assert (model["adapters"], model["dimensions"], model["max_tokens"]) == (["proximity", "adhoc_query"], 64, 512)
    assert "adapters proximity, adhoc_query" in specter2.log


@pytest.mark.parametrize("adapter", ["classification", "", "PROXIMITY", "../specter2_proximity"])
def test_an_unknown_adapter_is_refused_with_those_there_are(specter2: Server, adapter: str) -> None:
    refused = error(specter2, "x", adapter=adapter)
    assert (refused["param"], refused["code"]) == ("adapter", "invalid_value")
    assert "proximity, adhoc_query" in refused["message"]


def test_a_model_without_adapters_takes_none(server: Server) -> None:
    reply = server.embed("x", adapter="proximity")
    assert reply.status_code == 400 and "adapters: none" in reply.json()["error"]["message"]


# Papers.


def test_a_paper_is_its_title_and_abstract_with_the_separator_between(specter2: Server) -> None:
    title, abstract = TEXTS[0].split("[SEP]")
    assert_equal(embed(specter2, [{"title": title, "abstract": abstract}]), expected("proximity")[:1])
    one = embed(specter2, {"title": title, "abstract": abstract})
    assert_equal(one, expected("proximity")[:1])


@pytest.mark.parametrize("lack", [None, "", "left out"])
def test_what_a_paper_lacks_leaves_the_separator(specter2: Server, lack: str | None) -> None:
    lacking = {} if lack == "left out" else {"title": lack, "abstract": lack}
    assert_equal(embed(specter2, lacking | {"title": "deep learning"}), embed(specter2, "deep learning[SEP]"))
    assert_equal(embed(specter2, lacking | {"abstract": "deep learning"}), embed(specter2, "[SEP]deep learning"))


def test_a_whole_batch_of_papers_goes_in_one_request(specter2: Server) -> None:
    papers = [{"title": f"deep learning {n}", "abstract": "method for data " * n} for n in range(100)]
    rows = embed(specter2, papers)
    assert rows.shape == (100, 64)
    for place in (0, 31, 99):
        assert_equal(rows[place : place + 1], embed(specter2, papers[place]))


def test_a_paper_longer_than_the_model_takes_is_cut_only_if_asked(specter2: Server) -> None:
    paper = {"title": "deep learning", "abstract": "data of protein " * 400}
    refused = error(specter2, [paper])
    assert refused["code"] == "input_too_long" and refused["details"][0]["max_tokens"] == 512
    reply = specter2.embed([paper], model="specter2", truncate="end").json()
    assert reply["usage"] == {"prompt_tokens": 512, "total_tokens": 512, "truncated_inputs": [0]}


def parse(value: Any, separator: str | None = "[SEP]") -> list[Content]:
    return parse_input(value, modalities=("text",), separator=separator, max_inputs=10)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"abstract": ""}, "input[0] has neither a title nor an abstract"),
        ({"title": "", "abstract": None}, "input[0] has neither a title nor an abstract"),
        ({"title": None}, "input[0] has neither a title nor an abstract"),
        ({"title": 5, "abstract": "a"}, "input[0].title must be a string, not an integer"),
        ({"title": "t", "abstract": 3}, "input[0].abstract must be a string, not an integer"),
        ({"title": "t", "abstract": ["a"]}, "input[0].abstract must be a string, not a list"),
        ({"title": "t", "text": "x"}, "input[0] must be"),
        ({"title": "t", "abstract": "a", "year": 2017}, "input[0] must be"),
    ],
)
def test_what_is_no_paper(item: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse([item])
    assert caught.value.message.startswith(message) and caught.value.code in ("invalid_type", "empty_input")


def test_a_model_whose_tokenizer_has_no_separator_takes_no_papers() -> None:
    with pytest.raises(InvalidRequest, match="this model takes none") as caught:
        parse([{"title": "t", "abstract": "a"}], separator=None)
    assert caught.value.code == "unsupported_modality"


# What a command names.


def test_an_adapter_repository_brings_its_base(tmp_path: Path) -> None:
    adapter = copy_of_adapter(tmp_path / "specter2", name="[PRX]", model_name=str(BASE))
    query = f"adhoc_query={ADHOC_QUERY}"
    with Server("--model", str(adapter), "--adapter", query, "--dtype", "float32") as server:
        model = server.client.get("/v1/models").json()["data"][0]
        assert (model["id"], model["adapters"]) == ("specter2", ["proximity", "adhoc_query"])
        assert_equal(embed(server, TEXTS), expected("proximity"))
        assert_equal(embed(server, TEXTS, input_type="query"), expected("adhoc_query"))


def copy_of_adapter(folder: Path, **config: object) -> Path:
    shutil.copytree(PROXIMITY, folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return folder


def test_adapters_in_the_order_they_are_named_that_of_the_model_first(tmp_path: Path) -> None:
    adapter = copy_of_adapter(tmp_path / "mine", name="own", model_name=str(BASE))
    found = checkpoints.find(str(adapter), adapters=[f"b={ADHOC_QUERY}", f"a={PROXIMITY}"])
    assert list(found.adapters) == ["own", "b", "a"]
    assert (found.folder, found.snapshot.name, found.base) == (BASE, "mine", None)
    assert checkpoints.find(str(BASE)).adapters == {}


@pytest.mark.parametrize("model_name", [None, "", 3])
def test_an_adapter_that_names_no_base(tmp_path: Path, model_name: object) -> None:
    adapter = copy_of_adapter(tmp_path / "mine", name="own", model_name=model_name)
    with pytest.raises(UnsupportedModel, match="no base model: give it by --model, and this one by --adapter own"):
        checkpoints.find(str(adapter))


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--adapter x: the folder holds no AdapterHub adapter"):
        checkpoints.find(str(BASE), adapters=[f"x={BASE}"])
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(BASE)}))
    with pytest.raises(ModelError, match="--adapter x: the folder holds no AdapterHub adapter"):
        checkpoints.find(str(BASE), adapters=[f"x={lora}"])
    with pytest.raises(ModelError, match="--model names a LoRA adapter"):
        checkpoints.find(str(lora), adapters=[f"x={PROXIMITY}"])
    adapter = copy_of_adapter(tmp_path / "mine", name="own", model_name=str(BASE))
    with pytest.raises(ModelError, match="--adapter own: that is the name of --model itself"):
        checkpoints.find(str(adapter), adapters=[f"own={PROXIMITY}"])


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["proximity"], "must be NAME=ID_OR_PATH"),
        (["=allenai/specter2"], "must be NAME=ID_OR_PATH"),
        (["proximity="], "must be NAME=ID_OR_PATH"),
        (["a=x", "a=y"], "the same name"),
    ],
)
def test_settings_that_name_no_adapter(adapters: Sequence[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings({"adapter": adapters})


def test_adapters_from_yaml_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("adapter:\n  proximity: allenai/specter2\n  adhoc_query: allenai/specter2_adhoc_query\n")
    both = ("proximity=allenai/specter2", "adhoc_query=allenai/specter2_adhoc_query")
    assert load_settings({"config": str(config)}).adapter == both
    monkeypatch.setenv("MLX_EMBEDDINGS_ADAPTER", ",".join(both))
    assert load_settings().adapter == both
