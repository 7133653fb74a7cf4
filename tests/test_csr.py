"""CSR, sparse encoders with an auto-encoder behind a dense model, beside sentence-transformers' SparseEncoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.base.modules import Normalize, Router
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, WeightedLayerPooling
from torch import nn

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import DType, Item, Role
from mlx_embeddings_backends.errors import InputTooLong
from mlx_embeddings_backends.torch.sparse_autoencoder import SparseAutoEncoder
from tests.checkpoints import HIDDEN, WORDS, dense
from tests.parity import load
from tests.sparse_checkpoints import auto_encoder, csr, dense_modules, save
from tests.sparse_parity import TEXTS, TOLERANCE, check, cosines, embed, expected, reference, rows, rows_singly

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.mark.parametrize("model_type", detect.TEXT_ENCODERS)
def test_every_text_encoder(model_type: str, tmp_path: Path) -> None:
    folder = csr(tmp_path, model_type)
    assert detect.choose(folder).target == detect.SPARSE_ENCODER
    backend = load(folder)
    assert (backend.info.outputs, backend.info.dimensions) == (("sparse",), 96)
    check(backend, reference(folder))


@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
@pytest.mark.parametrize("mode", [*POOLING_MODES, ("cls", "mean")])
def test_every_pooling(model_type: str, mode: str | tuple[str, ...], tmp_path: Path) -> None:
    width = HIDDEN * (1 if isinstance(mode, str) else len(mode))
    folder = csr(tmp_path, model_type, pooling=mode, encoder=auto_encoder(width))
    check(load(folder), reference(folder))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 12, 96])
def test_the_k_largest_that_are_above_zero(k: int, normalize: bool, tmp_path: Path) -> None:
    folder = csr(tmp_path, encoder=auto_encoder(k=k, normalize=normalize))
    backend = load(folder)
    check(backend, reference(folder))
    most = max(vector.indices.size for vector in embed(backend, TEXTS))
    assert most == k if k < 96 else 12 < most < 96


@pytest.mark.parametrize(
    ("after", "width"),
    [
        ([Normalize()], HIDDEN),
        ([dense(HIDDEN, 24)], 24),
        ([LayerNorm(HIDDEN), Dropout(0.5), dense(HIDDEN, 24, nn.GELU()), Normalize()], 24),
    ],
    ids=lambda after: "-".join(type(module).__name__ for module in after) if isinstance(after, list) else "",
)
def test_modules_between_the_pooling_and_the_auto_encoder(after: list[nn.Module], width: int, tmp_path: Path) -> None:
    folder = csr(tmp_path, after=after, encoder=auto_encoder(width))
    check(load(folder), reference(folder))


def test_layers_weighted_before_the_pooling(tmp_path: Path) -> None:
    layers = WeightedLayerPooling(HIDDEN, num_hidden_layers=2, layer_start=1)
    layers.layer_weights.data = layers.layer_weights.data.new_tensor([3.0, 1.0])
    folder = csr(tmp_path, before=[layers], config={"output_hidden_states": True})
    check(load(folder), reference(folder))
    assert np.abs(expected(reference(folder), TEXTS) - expected(reference(csr(tmp_path / "plain")), TEXTS)).max() > 0.01


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_tokens_of_a_prompt_that_is_not_pooled(model_type: str, tmp_path: Path) -> None:
    folder = csr(tmp_path, model_type, include_prompt=False)
    backend, library = load(folder), reference(folder)
    groups = set()
    for prompt in ("", "query : ", "represent the sentence for retrieval :"):
        items = [Item(text, prompt) for text in TEXTS[:4]]
        groups.add(backend.prepare(items)[0].group)
        wanted = expected(library, TEXTS[:4], prompt=prompt)
        np.testing.assert_allclose(rows(backend, items), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert len(groups) == 3  # never in one batch


def test_prompts_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    prompts = {"query": "query: ", "document": "passage: "}
    folder = csr(tmp_path, prompts=prompts, default_prompt_name="document")
    backend, library = load(folder), reference(folder)
    assert (backend.info.prompts, backend.info.default_prompt) == (prompts, "document")
    roles: list[Role] = ["query", "document"]
    for role in roles:
        found = rows(backend, [Item(text, prompts[role], role) for text in TEXTS])
        np.testing.assert_allclose(found, expected(library, TEXTS, role), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_router_gives_queries_and_documents_encoders_of_their_own(tmp_path: Path) -> None:
    queries = [*dense_modules(tmp_path / "query", pooling="cls"), auto_encoder(k=3, seed=4)]
    documents = [*dense_modules(tmp_path / "document", "mpnet"), auto_encoder()]
    folder = save(tmp_path / "model", [Router.for_query_document(queries, documents)])
    backend, library = load(folder), reference(folder)
    roles: list[Role | None] = [None, "query", "document"]
    for role in roles:
        check(backend, library, role)
        check(backend, library, role, max_active_dims=5)
    assert backend.token_strings([]) is None


def test_a_router_before_one_auto_encoder(tmp_path: Path) -> None:
    queries, documents = dense_modules(tmp_path / "query", pooling="cls"), dense_modules(tmp_path / "document", "mpnet")
    folder = save(tmp_path / "model", [Router.for_query_document(queries, documents), auto_encoder()])
    check(load(folder), reference(folder), "query")
    check(load(folder), reference(folder), "document")


@pytest.mark.parametrize("most", [1, 5, 30])
def test_the_checkpoints_max_active_dims_takes_the_place_of_k(most: int, tmp_path: Path) -> None:
    folder = csr(tmp_path, max_active_dims=most)
    backend = load(folder)
    check(backend, reference(folder))
    assert max(vector.indices.size for vector in embed(backend, TEXTS)) == most


@pytest.mark.parametrize("saved", [None, 5])
@pytest.mark.parametrize("most", [1, 12, 30, 96])
def test_a_request_may_ask_for_fewer_values_or_more(most: int, saved: int | None, tmp_path: Path) -> None:
    folder = csr(tmp_path, max_active_dims=saved)
    check(load(folder), reference(folder), max_active_dims=most)


def test_more_values_than_there_are(tmp_path: Path) -> None:
    """Of which the library makes an error."""
    backend = load(csr(tmp_path))
    items = [[Item(text, max_active_dims=most) for text in TEXTS] for most in (96, 10**12)]
    assert np.array_equal(rows(backend, items[0]), rows(backend, items[1]))


def test_items_that_want_different_numbers_of_values_share_no_batch(tmp_path: Path) -> None:
    prepared = load(csr(tmp_path)).prepare([Item("river", max_active_dims=most) for most in (None, 3, 3, 4)])
    assert [each.group == prepared[1].group for each in prepared] == [False, True, True, False]


def test_dimensions_stand_for_no_tokens(tmp_path: Path) -> None:
    assert load(csr(tmp_path)).token_strings([1, 2]) is None


def test_a_text_too_long_is_cut_only_when_that_is_asked_for(tmp_path: Path) -> None:
    folder = csr(tmp_path, max_seq_length=12)
    backend, library = load(folder), reference(folder)
    long = " ".join(WORDS[:40])
    assert backend.info.max_tokens == 12
    with pytest.raises(InputTooLong):
        backend.prepare([Item("river"), Item(long)])
    wanted = expected(library, [long])
    np.testing.assert_allclose(rows(backend, [long], "end"), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_names_that_older_versions_saved(tmp_path: Path) -> None:
    folder = csr(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    for module, package in zip(modules, ("models", "models", "sparse_encoder.models"), strict=True):
        module["type"] = f"sentence_transformers.{package}.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 50, "do_lower_case": False}))
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    backend = load(folder)
    assert backend.info.max_tokens == 50
    check(backend, reference(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "qwen3"])
def test_half_precision_keeps_the_vectors(model_type: str, dtype: DType, tmp_path: Path) -> None:
    folder = csr(tmp_path, model_type)
    wanted, backend = expected(reference(folder), TEXTS), load(folder, dtype)
    for found in (rows(backend, TEXTS), rows_singly(backend, TEXTS)):
        assert not np.array_equal(found, wanted)
        assert cosines(found, wanted).min() >= 0.999


def test_what_is_not_a_number_is_not_dropped() -> None:
    weight = torch.ones(6, 4)
    weight[2] = float("nan")
    indices, values = SparseAutoEncoder(weight, torch.zeros(4), torch.zeros(6), k=3, normalize=False)(torch.ones(1, 4))
    assert values[indices == 2].isnan().all() and 2 in indices


def test_memory_is_that_of_the_weights_in_use(tmp_path: Path) -> None:
    folder = csr(tmp_path, "distilbert")
    files = [folder / "model.safetensors", folder / "2_SparseAutoEncoder" / "model.safetensors"]
    weights = {name: each for file in files for name, each in load_file(file).items()}
    del weights["stats_last_nonzero"]
    assert load(folder).info.memory_bytes == pytest.approx(sum(each.nbytes for each in weights.values()), rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device: needs an NVIDIA GPU")
@pytest.mark.cuda
@pytest.mark.parametrize("model_type", detect.TEXT_ENCODERS)
def test_every_text_encoder_on_cuda(model_type: str, tmp_path: Path) -> None:
    folder = csr(tmp_path, model_type)
    wanted = expected(reference(folder), TEXTS)
    assert np.abs(rows(load(folder, device="cuda"), TEXTS) - wanted).max() <= 1e-3
