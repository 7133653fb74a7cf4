"""Our own BERT on odd shapes, and what products in half precision cost: on tiny checkpoints and on a real one."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, PreTrainedModel

from mlx_embeddings_backends.base import DType, Item
from mlx_embeddings_backends.detect import TEXT_ENCODERS
from mlx_embeddings_backends.hub import resolve
from mlx_embeddings_backends.torch.bert import BertEncoder
from mlx_embeddings_backends.torch.devices import cpu_multiplies_bfloat16
from mlx_embeddings_backends.torch.mixed_precision import MixedLinear, use_mixed_products
from tests.checkpoints import WORDS, bare_encoder
from tests.parity import Rows, cosines, distance, embed, embed_singly, load, reference
from tests.server import MINILM

TOLERANCE = 1e-4
# Around the steps to which rows are rounded up: 8 to 64, 32 to 512, 128 beyond.
LENGTHS = (1, 7, 8, 9, 63, 64, 65, 511, 512, 513)

# Half precision on tiny models, beside float32. An input of a product is rounded by up to 2**-9 of itself in
# bfloat16, and by 2**-12 in float16; the sums are of 32 or 48 terms, and roundings average out less than in real ones.
# Measured over all architectures: 1.3e-4 (mt5) and 2e-6 away from 1.
TINY_COSINE: dict[DType, float] = {"bfloat16": 0.9995, "float16": 0.99999}
REAL_COSINE = 0.9999

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device: needs an NVIDIA GPU and its driver"
)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def bert(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = bare_encoder(tmp_path_factory.mktemp("tiny"), request.param)
    model: PreTrainedModel = AutoModel.from_pretrained(folder).eval()
    return model


def random_ids(lengths: Sequence[int], seed: int = 0) -> list[NDArray[np.int64]]:
    """Of ordinary tokens, behind the special ones."""
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 5 + len(WORDS), length) for length in lengths]


def mean_of_tokens(library: SentenceTransformer, ids: NDArray[np.int64]) -> Rows:
    """transformers' own hidden states of one unpadded text, averaged: [1, dim]."""
    transformer: Any = library[0]
    with torch.inference_mode():
        hidden = transformer.model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state
    return np.asarray(hidden.mean(dim=1).numpy())


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=12), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_packed_tokens_give_the_hidden_states_of_transformers(
    bert: PreTrainedModel, lengths: list[int], seed: int
) -> None:
    ids = random_ids(lengths, seed)
    ids[0][-1] = bert.config.pad_token_id  # a padding token of the text is not padding
    encoder = BertEncoder(bert, torch.float32)
    with torch.inference_mode():
        hidden = encoder(encoder.pack(ids))
        for row, each in zip(hidden, ids, strict=True):
            expected = bert(input_ids=torch.from_numpy(each)[None]).last_hidden_state[0]
            torch.testing.assert_close(row[: len(each)], expected, atol=TOLERANCE, rtol=0)
            assert not row[len(each) :].any()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "modernbert", "qwen3", "t5"])
def test_rows_of_every_rounding(model_type: str, tmp_path: Path) -> None:
    """Alone, and all in one batch that is mostly padding."""
    sizes = {} if model_type == "t5" else {"max_position_embeddings": 520}
    folder = bare_encoder(tmp_path, model_type, tokenizer_options={"model_max_length": 518}, **sizes)
    backend, library = load(folder), reference(folder)
    ids = random_ids(LENGTHS)
    items = [Item(tuple(each.tolist())) for each in ids]
    expected = np.concatenate([mean_of_tokens(library, each) for each in ids])
    assert distance(embed_singly(backend, items), expected) < TOLERANCE
    assert distance(embed(backend, items), expected) < TOLERANCE


SHORT_TEXTS = [" ".join(WORDS[at : at + count]) for at, count in enumerate((1, 2, 3, 5, 8, 13, 21, 34, 50))]


@cache
def minilm() -> Path:
    return resolve(MINILM).path


@cache
def texts_of_many_lengths() -> tuple[str, ...]:
    generator = np.random.default_rng(0)
    return tuple(" ".join(generator.choice(WORDS, count)) for count in np.linspace(1, 250, 60, dtype=int))


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        pytest.param(
            "auto",
            marks=pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="the CPU has neither AVX512-BF16 nor AMX"),
        ),
    ],
)
def test_bfloat16_products_keep_the_vectors_of_a_real_model(
    dtype: Literal["bfloat16", "auto"], reference_texts: list[str]
) -> None:
    texts = [*reference_texts, *(texts_of_many_lengths() if dtype == "bfloat16" else texts_of_many_lengths()[::6])]
    backend = load(minilm(), dtype)
    assert backend.info.dtype == "bfloat16"
    rows = np.concatenate([embed(backend, texts[at : at + 8], "end") for at in range(0, len(texts), 8)])
    assert cosines(rows, reference(minilm()).encode(texts)).min() >= REAL_COSINE


def test_float32_is_chosen_where_bfloat16_is_not_native() -> None:
    native = cpu_multiplies_bfloat16()
    assert load(minilm(), "auto").info.dtype == ("bfloat16" if native else "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "gemma3_text", "gpt2", "mt5", "qwen3"])
def test_half_precision_products_of_tiny_models(model_type: str, dtype: DType, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    backend = load(folder, dtype)
    rows = embed(backend, SHORT_TEXTS)
    assert rows.dtype == np.float32
    assert not np.array_equal(rows, embed(load(folder), SHORT_TEXTS))  # or nothing was in half precision
    assert cosines(rows, reference(folder).encode(SHORT_TEXTS)).min() >= TINY_COSINE[dtype]
    assert cosines(rows, embed_singly(backend, SHORT_TEXTS)).min() >= TINY_COSINE[dtype]


def test_only_plain_linear_layers_are_replaced() -> None:
    class OwnLinear(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(4, 4, bias=False), "own": OwnLinear(4, 4), "norm": nn.LayerNorm(4)})
    use_mixed_products(model, torch.bfloat16)
    assert isinstance(model["plain"], MixedLinear)
    assert type(model["own"]) is OwnLinear
    assert model["plain"](torch.ones(2, 4)).dtype == torch.float32


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("model_type", TEXT_ENCODERS)
def test_every_architecture_on_cuda(model_type: str, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    expected = reference(folder).encode(SHORT_TEXTS)
    backend = load(folder, device="cuda")
    rows = embed(backend, SHORT_TEXTS)
    assert backend.info.device.startswith("cuda")
    assert distance(rows, expected) <= 1e-3
    assert distance(rows, embed_singly(backend, SHORT_TEXTS)) <= 1e-3
    for dtype, bound in TINY_COSINE.items():
        assert cosines(embed(load(folder, dtype, "cuda"), SHORT_TEXTS), expected).min() >= bound


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 0.999999), ("bfloat16", REAL_COSINE), ("float16", REAL_COSINE)]
)
def test_a_real_model_on_cuda(dtype: DType, bound: float, reference_texts: list[str]) -> None:
    texts = [*reference_texts, *texts_of_many_lengths()]
    rows = embed(load(minilm(), dtype, "cuda"), texts, "end")
    assert cosines(rows, reference(minilm()).encode(texts)).min() >= bound
