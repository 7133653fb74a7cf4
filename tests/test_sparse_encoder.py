"""Sparse encoders beside sentence-transformers' SparseEncoder, from the same tiny folders."""

import json
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, Item, LoadOptions, Role, SparseVector
from mlx_embeddings_backends.errors import EmptyInput, InputTooLong, InvalidTokenId
from mlx_embeddings_backends.torch import splade as splade_module
from mlx_embeddings_backends.torch.splade import Projection
from tests.checkpoints import MAX_TOKENS, WORDS
from tests.parity import load
from tests.sparse_checkpoints import (
    POOLINGS,
    inference_free,
    masked_language_model,
    splade,
    static,
    use_json_of_weights,
    weights_of_tokens,
)
from tests.sparse_parity import TEXTS, TOLERANCE, check, cosines, dense, embed, expected, reference, rows, rows_singly

POOLED = SpladePooling()


def load_bare(folder: Path) -> Backend:
    choice = detect.choose(folder, kind="sparse-embeddings")
    return detect.load(choice, folder, LoadOptions(device="cpu", dtype="float32", kind="sparse-embeddings"))


@pytest.mark.parametrize("model_type", detect.SPARSE_ENCODERS)
def test_every_language_model_is_pooled_as_sentence_transformers_does(model_type: str, tmp_path: Path) -> None:
    folder = masked_language_model(tmp_path, model_type)
    backend = load_bare(folder)
    assert backend.info.outputs == ("sparse",)
    check(backend, reference(folder))


@pytest.mark.parametrize(("pooling", "activation"), POOLINGS)
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "xlm-roberta"])
def test_every_pooling(model_type: str, pooling: str, activation: str, tmp_path: Path) -> None:
    folder = splade(tmp_path, model_type, pooling=pooling, activation=activation)
    check(load(folder), reference(folder))


def test_the_name_that_older_versions_saved(tmp_path: Path) -> None:
    folder = splade(tmp_path, "bert")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "sentence_transformers.sparse_encoder.models.MLMTransformer"
    modules[1]["type"] = "sentence_transformers.sparse_encoder.models.SpladePooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 50, "do_lower_case": False}))
    backend = load(folder)
    assert backend.info.max_tokens == 50
    check(backend, reference(folder))


@pytest.mark.parametrize("role", [None, "query", "document"])
def test_a_router_sends_queries_and_documents_different_ways(role: Role | None, tmp_path: Path) -> None:
    folder = inference_free(tmp_path)
    backend = load(folder)
    check(backend, reference(folder), role)
    assert embed(backend, [Item("river stone", role="query")])[0].indices.size == 2


def test_queries_and_documents_of_one_request_keep_their_places(tmp_path: Path) -> None:
    folder = inference_free(tmp_path)
    backend, library = load(folder), reference(folder)
    roles: list[Role | None] = ["query", "document", None, "query", "document"]
    items = [Item(text, role=role) for text, role in zip(TEXTS, roles, strict=False)]
    prepared = backend.prepare(items)
    assert len({each.group for each in prepared}) == 2
    for each, item in zip(prepared, items, strict=True):
        found = dense(
            [cast("SparseVector", row) for row in backend.run(backend.collate([each]))], backend.info.dimensions
        )
        assert np.abs(found - expected(library, [cast("str", item.content)], item.role)).max() <= TOLERANCE


def test_the_default_route_is_the_routers_own(tmp_path: Path) -> None:
    folder = inference_free(tmp_path, default_route="query")
    backend = load(folder)
    check(backend, reference(folder))
    assert embed(backend, ["river stone"])[0].indices.size == 2


def test_weights_of_tokens_alone(tmp_path: Path) -> None:
    folder = static(tmp_path)
    check(load(folder), reference(folder))


def test_weights_of_an_idf_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = static(tmp_path)
    idf = use_json_of_weights(folder)
    backend = load(folder)
    [vector] = embed(backend, ["the end of the river"])
    found = dict(zip(backend.token_strings(vector.indices.tolist()) or [], vector.values.tolist(), strict=True))
    assert found == pytest.approx({"the": idf["the"], "of": idf["of"]})  # others are not in the file
    monkeypatch.chdir(folder)  # where the library looks for the file
    check(backend, reference(folder))


def test_prompts_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    prompts = {"query": "query: ", "passage": "passage: "}
    folder = splade(tmp_path, prompts=prompts, default_prompt_name="passage")
    backend, library = load(folder), reference(folder)
    assert backend.info.prompts == {"document": "", **prompts} == library.prompts
    assert backend.info.default_prompt == "passage"
    for name, prompt in prompts.items():
        found = rows(backend, [Item(text, prompt=prompt) for text in TEXTS])
        assert np.abs(found - expected(library, TEXTS, prompt_name=name)).max() <= TOLERANCE


@pytest.mark.parametrize("role", ["query", "document"])
def test_only_as_many_values_are_kept_as_the_checkpoint_says(role: Role, tmp_path: Path) -> None:
    folder = inference_free(tmp_path, max_active_dims=5)
    backend = load(folder)
    assert max(vector.indices.size for vector in embed(backend, [Item(text, role=role) for text in TEXTS])) == 5
    check(backend, reference(folder), role)


@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize("role", ["query", "document"])
def test_a_request_may_ask_for_fewer_values_or_more(role: Role, most: int, tmp_path: Path) -> None:
    folder = inference_free(tmp_path, max_active_dims=5)
    assert (weights_of_tokens("distilbert") < 0).any()  # of which the largest count, too
    check(load(folder), reference(folder), role, max_active_dims=most)


def test_token_strings_are_those_of_the_library(tmp_path: Path) -> None:
    folder = splade(tmp_path, "xlm-roberta")
    backend, library = load(folder), reference(folder)
    for vector, text in zip(embed(backend, TEXTS), TEXTS, strict=True):
        decoded: Any = library.decode(library.encode(text))
        strings = backend.token_strings(vector.indices.tolist()) or []
        assert dict(zip(strings, vector.values.tolist(), strict=True)) == pytest.approx(dict(decoded), abs=TOLERANCE)
    assert backend.token_strings([]) == []


def test_tokens_without_a_name_are_empty(tmp_path: Path) -> None:
    folder = masked_language_model(tmp_path, "bert", vocab_size=320)
    backend = load_bare(folder)
    assert backend.info.dimensions == backend.info.vocabulary_size == 320
    assert backend.token_strings([6, 319]) == ["the", ""]


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_text_too_long_is_cut_only_when_that_is_asked_for(role: Role, tmp_path: Path) -> None:
    folder = inference_free(tmp_path)
    backend, library = load(folder), reference(folder)
    long = " ".join(WORDS[:7] * 12)
    items = [Item(long, role=role), Item("river", role="document"), Item(long, role=role)]
    with pytest.raises(InputTooLong) as caught:
        backend.prepare(items)
    tokens = 7 * 12 + (2 if role == "document" else 0)
    assert caught.value.lengths == [(0, tokens), (2, tokens)] and caught.value.max_tokens == MAX_TOKENS
    assert [each.truncated for each in backend.prepare(items, "end")] == [True, False, True]
    found = rows(backend, [items[0], items[2]], "end")
    assert np.abs(found - expected(library, [long, long], role)).max() <= TOLERANCE


def test_max_seq_length_is_the_limit(tmp_path: Path) -> None:
    backend = load(splade(tmp_path, max_seq_length=12))
    assert backend.info.max_tokens == 12
    with pytest.raises(InputTooLong):
        backend.prepare([Item(" ".join(WORDS[:11]))])


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    backend = load(splade(tmp_path))
    ids = tuple(backend.prepare([Item(TEXTS[1])])[0].payload.tolist())
    assert np.array_equal(rows(backend, [Item(ids)]), rows(backend, [TEXTS[1]]))
    with pytest.raises(InvalidTokenId):
        backend.prepare([Item((1, backend.info.vocabulary_size))])


def test_a_text_of_no_tokens_is_refused(tmp_path: Path) -> None:
    backend = load(inference_free(tmp_path))
    with pytest.raises(EmptyInput) as caught:
        backend.prepare([Item("river"), Item("", role="query")])
    assert caught.value.index == 1


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "xlm-roberta"])
def test_half_precision_keeps_the_vectors(model_type: str, tmp_path: Path) -> None:
    folder = splade(tmp_path, model_type)
    wanted = expected(reference(folder), TEXTS)
    backend = load(folder, "bfloat16")
    for found in (rows(backend, TEXTS), rows_singly(backend, TEXTS)):
        assert not np.array_equal(found, wanted)
        assert cosines(found, wanted).min() >= 0.9995


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_small_logits_under_a_large_bias_keep_their_precision(pooling: Literal["max", "sum"]) -> None:
    """Rounded before the bias is added, or with a rounded one, they would be off by several times what is allowed."""
    torch.manual_seed(0)
    decoder = nn.Linear(32, 500)
    hidden = torch.randn(8, 32).bfloat16().float() * 4
    with torch.inference_mode():
        decoder.weight.copy_(decoder.weight.bfloat16())
        decoder.bias.fill_(-2.2)
        logits = decoder(hidden).relu().log1p()
        wanted = logits.amax(dim=0) if pooling == "max" else logits.sum(dim=0)
        found = Projection(decoder, SpladePooling(pooling), torch.bfloat16)(hidden, [(1, 8)])
    np.testing.assert_allclose(dense(found, 500)[0], wanted.numpy(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("bytes_a_piece", [1, 4000, 100_000])
def test_pieces_of_any_size_give_the_same(
    bytes_a_piece: int, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = splade(tmp_path, "bert", pooling=pooling)
    monkeypatch.setattr(splade_module, "CPU_PIECE_BYTES", bytes_a_piece)
    check(load(folder), reference(folder))


@pytest.mark.parametrize("length", [1, 8, 512, 2048])
def test_logits_are_made_in_pieces(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever there is of texts and of their tokens."""
    monkeypatch.setattr(splade_module, "CPU_PIECE_BYTES", 1 << 17)
    products = []
    linear = nn.functional.linear

    def measure(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        products.append(linear(x, weight, bias))
        return products[-1]

    project = Projection(nn.Linear(4, 3000), POOLED, torch.float32)
    monkeypatch.setattr(nn.functional, "linear", measure)
    with torch.inference_mode():
        vectors = project(torch.randn(2048, 4), [(2048 // length, length)])
    assert len(vectors) == 2048 // length
    assert sum(product.shape[1] for product in products) == 3000
    assert 1 << 15 < max(product.nbytes for product in products) <= 1 << 17


def test_what_is_not_a_number_is_not_dropped() -> None:
    decoder = nn.Linear(4, 6)
    with torch.no_grad():
        decoder.weight[2] = float("nan")
    with torch.inference_mode():
        [vector] = Projection(decoder, POOLED, torch.float32)(torch.ones(8, 4), [(1, 3)])
    assert np.isnan(vector.values[vector.indices == 2]).all() and 2 in vector.indices


def test_memory_is_counted_once(tmp_path: Path) -> None:
    folder = splade(tmp_path, "distilbert")
    weights = sum(each.nbytes for each in load_file(folder / "model.safetensors").values())
    assert load(folder).info.memory_bytes == pytest.approx(weights, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device: needs an NVIDIA GPU")
@pytest.mark.cuda
@pytest.mark.parametrize("model_type", detect.SPARSE_ENCODERS)
def test_every_language_model_on_cuda(model_type: str, tmp_path: Path) -> None:
    folder = splade(tmp_path, model_type)
    wanted = expected(reference(folder), TEXTS)
    assert np.abs(rows(load(folder, device="cuda"), TEXTS) - wanted).max() <= 1e-3
