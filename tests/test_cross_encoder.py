"""Rerankers on torch against sentence-transformers' own `predict`, on tiny checkpoints of every accepted kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, DType, LoadOptions, Truncate
from mlx_embeddings_backends.errors import InputTooLong
from mlx_embeddings_backends.hub import resolve
from mlx_embeddings_backends.pairs import PairTokenizer
from mlx_embeddings_server.engine.engine import Engine
from tests.checkpoints import HIDDEN, MAX_TOKENS
from tests.parity import embed, embed_singly, load
from tests.peak_memory import run_alone
from tests.rerank_checkpoints import change, cross_encoder, pair_tokenizer, reranker
from tests.rerank_parity import Scores, items, largest, raw, reference, words
from tests.server import MINILM

TOLERANCE = 1e-5  # of a score, in float32
# Measured over all architectures: 0.019 and 0.0029 (mpnet), of scores that are 0.15 to 1 apart.
HALF_PRECISION: dict[DType, float] = {"bfloat16": 0.04, "float16": 0.004}

# From nothing to a few short of the limit; documents longer than their query, and the other way round.
PAIRS = [
    ("the", "river"),
    ("Silent river", "Unheard-of: Ω ж 中 日!"),
    ("lazy dog", words(7)),
    (words(5, seed=1), words(45, seed=2)),
    (words(40, seed=3), "stone"),
    ("light", ""),
    ("", words(9, seed=4)),
    ("music [SEP] </s>", "water [SEP] house </s> [PAD] <pad>"),
]


def sigmoid(scores: Scores) -> Scores:
    return np.asarray(1 / (1 + np.exp(-scores)), dtype=np.float32)


@pytest.mark.parametrize("model_type", detect.CROSS_ENCODERS)
def test_scores_of_every_architecture_equal_sentence_transformers(model_type: str, tmp_path: Path) -> None:
    folder = reranker(tmp_path, model_type)
    backend, library = load(folder), reference(folder)
    scores, expected = embed(backend, items(PAIRS)), raw(library, PAIRS)
    assert scores.dtype == np.float32 and scores.shape == (len(PAIRS), 1)
    assert expected.std() > 0.1  # or equality would say little
    assert largest(scores - expected) < TOLERANCE
    assert largest(scores - embed_singly(backend, items(PAIRS))) < TOLERANCE
    assert backend.info.outputs == ("rerank",) and backend.info.output == "rerank"
    assert backend.info.score_activation == "sigmoid"
    assert largest(sigmoid(scores[:, 0]) - library.predict(PAIRS)) < TOLERANCE
    assert (backend.info.dimensions, backend.info.max_tokens) == (1, MAX_TOKENS)


@pytest.mark.parametrize("model_type", detect.CROSS_ENCODERS)
def test_pairs_are_tokenised_as_the_checkpoints_tokenizer_does(model_type: str, tmp_path: Path) -> None:
    prepared = load(reranker(tmp_path, model_type)).prepare(items(PAIRS))
    expected = pair_tokenizer(model_type)(PAIRS)
    assert [each.payload.ids.tolist() for each in prepared] == expected["input_ids"]
    assert [each.tokens for each in prepared] == [len(ids) for ids in expected["input_ids"]]
    assert not any(each.truncated for each in prepared)
    assert ("token_type_ids" in expected) == (model_type in ("bert", "deberta-v2", "electra"))
    if "token_type_ids" in expected:
        assert [each.payload.types.tolist() for each in prepared] == expected["token_type_ids"]
        assert all(each.payload.types.any() for each in prepared)


def test_a_real_encoder_and_its_tokenizer(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, with a random layer behind it."""
    source = resolve(MINILM).path
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    backend, library = load(tmp_path), reference(tmp_path)
    pairs = [*PAIRS, ("Naïve café?", "Unbelievably slow: 東京, 1984 (" + words(40) + ")")]
    ids = [each.payload.ids.tolist() for each in backend.prepare(items(pairs))]
    assert ids == library.tokenizer(pairs)["input_ids"]
    assert largest(embed(backend, items(pairs)) - raw(library, pairs)) < TOLERANCE


def test_the_attention_of_a_whole_batch_that_is_padded_to_the_limit(tmp_path: Path) -> None:
    folder = reranker(tmp_path, "electra")
    pairs = [("a", words(count, seed=count)) for count in range(1, MAX_TOKENS - 4, 3)]
    assert largest(embed(load(folder), items(pairs)) - raw(reference(folder), pairs)) < TOLERANCE


@pytest.mark.parametrize(("truncate", "side"), [("end", "right"), ("start", "left")])
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "xlm-roberta"])
def test_the_document_alone_is_cut(model_type: str, truncate: Truncate, side: str, tmp_path: Path) -> None:
    backend = load(reranker(tmp_path, model_type))
    library = pair_tokenizer(model_type, truncation_side=side)
    pairs = [("silent river", words(count)) for count in (50, 58, 59, 60, 61, 200)] + [(words(55), words(60, seed=1))]
    for (query, document), each in zip(pairs, backend.prepare(items(pairs), truncate), strict=True):
        whole = library(query, document)["input_ids"]
        cut = library(query, document, truncation="only_second", max_length=MAX_TOKENS)
        assert each.payload.ids.tolist() == cut["input_ids"]
        assert each.tokens == len(cut["input_ids"]) <= MAX_TOKENS
        assert each.truncated == (len(whole) > MAX_TOKENS)
        if "token_type_ids" in cut:
            assert each.payload.types.tolist() == cut["token_type_ids"]


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "roberta"])
def test_cut_documents_score_as_sentence_transformers_cuts_the_longer_text(model_type: str, tmp_path: Path) -> None:
    """Which is the document as long as it stays the longer one."""
    folder = reranker(tmp_path, model_type)
    pairs = [(words(count), words(100, seed=count)) for count in (1, 3, 10, 25)]
    assert largest(embed(load(folder), items(pairs), "end") - raw(reference(folder), pairs)) < TOLERANCE


def test_nothing_is_cut_unless_asked(tmp_path: Path) -> None:
    backend = load(reranker(tmp_path))
    pairs = [("the", "river"), ("the", words(61)), ("the", words(60)), (words(100), "river")]
    with pytest.raises(InputTooLong) as caught:
        backend.prepare(items(pairs))
    assert caught.value.lengths == [(1, 65), (3, 104)]
    assert (caught.value.max_tokens, caught.value.prompt_fills) == (MAX_TOKENS, False)


@pytest.mark.parametrize("truncate", ["end", "start"])
def test_a_query_that_leaves_no_room_for_the_document_is_too_long(truncate: Truncate, tmp_path: Path) -> None:
    backend = load(reranker(tmp_path))
    [fits] = backend.prepare(items([(words(60), words(9))]), truncate)
    assert fits.tokens == MAX_TOKENS and fits.truncated
    for pair in ((words(61), words(9)), (words(62), ""), (words(500), "river")):
        with pytest.raises(InputTooLong) as caught:
            backend.prepare(items([("the", words(70)), pair]), truncate)
        assert [index for index, _ in caught.value.lengths] == [1]
        assert caught.value.prompt_fills


def test_a_prompt_goes_before_the_query(tmp_path: Path) -> None:
    prompts = {"query": "query : ", "none": ""}
    folder = cross_encoder(tmp_path, prompts=prompts, default_prompt_name="query")
    backend, library = load(folder), reference(folder)
    assert {name: backend.info.prompts[name] for name in prompts} == prompts
    assert backend.info.default_prompt == "query"
    for name, prompt in prompts.items():
        assert largest(embed(backend, items(PAIRS, prompt=prompt)) - raw(library, PAIRS, prompt_name=name)) < TOLERANCE
    assert largest(raw(library, PAIRS, prompt_name="query") - raw(library, PAIRS, prompt_name="none")) > 0.01


def test_max_seq_length_of_the_checkpoint(tmp_path: Path) -> None:
    folder = change(cross_encoder(tmp_path), "sentence_bert_config.json", max_seq_length=16)
    backend = load(folder)
    assert backend.info.max_tokens == 16
    pairs = [("the RIVER", words(30))]
    assert backend.prepare(items(pairs), "end")[0].tokens == 16
    assert largest(embed(backend, items(pairs), "end") - raw(reference(folder), pairs)) < TOLERANCE


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_no_more_tokens_than_there_are_positions(model_type: str, tmp_path: Path) -> None:
    """RoBERTa's table starts behind padding_idx: two places fewer than max_position_embeddings says."""
    backend = load(reranker(tmp_path, model_type, tokenizer_options={"model_max_length": 10**30}))
    assert backend.info.max_tokens == MAX_TOKENS
    assert np.isfinite(embed(backend, items([("the", words(200))]), "end")).all()


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, "sigmoid"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.Sigmoid"}, "sigmoid"),
        ({"sentence_transformers": {"version": "4.1.0"}}, "sigmoid"),
    ],
)
def test_the_activation_that_config_json_names(config: dict[str, Any], activation: str, tmp_path: Path) -> None:
    folder = change(reranker(tmp_path), "config.json", **config)
    assert load(folder).info.score_activation == activation
    _assert_activation_is_the_librarys(folder)


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Identity(), None])
def test_the_activation_that_sentence_transformers_saved(activation: nn.Module | None, tmp_path: Path) -> None:
    folder = cross_encoder(tmp_path, activation)
    assert load(folder).info.score_activation == ("identity" if isinstance(activation, nn.Identity) else "sigmoid")
    # What config_sentence_transformers.json says goes before config.json.
    change(folder, "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    _assert_activation_is_the_librarys(folder)


def _assert_activation_is_the_librarys(folder: Path) -> None:
    backend, library = load(folder), reference(folder)
    scores = embed(backend, items(PAIRS))[:, 0]
    relevance = sigmoid(scores) if backend.info.score_activation == "sigmoid" else scores
    assert largest(relevance - library.predict(PAIRS)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", detect.CROSS_ENCODERS)
def test_half_precision_products_keep_the_scores(model_type: str, dtype: DType, tmp_path: Path) -> None:
    folder = reranker(tmp_path, model_type)
    backend, expected = load(folder, dtype), raw(reference(folder), PAIRS)
    scores = embed(backend, items(PAIRS))
    assert scores.dtype == np.float32 and backend.info.dtype == dtype
    assert 0 < largest(scores - expected) < HALF_PRECISION[dtype]
    assert largest(scores - embed_singly(backend, items(PAIRS))) < HALF_PRECISION[dtype]


@pytest.mark.parametrize(("model_type", "made"), [("bert", 1), ("electra", 0)])
def test_memory_is_that_of_the_weights(model_type: str, made: int, tmp_path: Path) -> None:
    """Our own BERT has its positions once for each of two token types, and that of the types in them."""
    weights = load_file(reranker(tmp_path, model_type) / "model.safetensors")
    expected = sum(tensor.nbytes for tensor in weights.values())
    added = made * (MAX_TOKENS - 2) * HIDDEN * 4
    assert load(tmp_path).info.memory_bytes == expected + added
    assert load(tmp_path, "bfloat16").info.memory_bytes < expected + added


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
def test_the_engine_loads_and_warms_it_up(model_type: str, tmp_path: Path) -> None:
    folder = reranker(tmp_path, model_type)
    engine = Engine("tiny", lambda: load(folder), queue_tokens=10_000)
    assert engine.load().outputs == ("rerank",)
    assert engine.state == "ready"
    engine.stop()


@pytest.mark.parametrize(("truncate", "side"), [("end", "right"), ("start", "left")])
@pytest.mark.parametrize("size", [4_000, 4_200, 100_000, 600_000])
def test_very_long_documents_are_cut_as_the_library_cuts_them(size: int, truncate: Truncate, side: str) -> None:
    library = pair_tokenizer("bert", truncation_side=side)
    ours = PairTokenizer(Tokenizer.from_str(library.backend_tokenizer.to_str()), max_tokens=MAX_TOKENS)
    document = (words(1000) * (size // 1000))[:size]
    [short, long] = ours.prepare(items([("the", "river"), ("silent river", document)]), truncate)
    cut = library("silent river", document, truncation="only_second", max_length=MAX_TOKENS)
    assert long.payload.ids.tolist() == cut["input_ids"] and long.truncated and not short.truncated


@pytest.mark.parametrize("truncate", ["none", "end", "start"])
def test_a_long_document_of_few_tokens_is_whole(truncate: Truncate) -> None:
    ours = PairTokenizer(pair_tokenizer("bert").backend_tokenizer, max_tokens=MAX_TOKENS)
    spaces = " " * 100_000
    [plain, padded] = ours.prepare(
        items([("the river", "a stone"), (f"{spaces}the{spaces}river", f"{spaces}a{spaces}stone{spaces}")]), truncate
    )
    assert padded.payload.ids.tolist() == plain.payload.ids.tolist() and not padded.truncated


MEMORY = """
from tokenizers import Tokenizer
from mlx_embeddings_backends.base import Item, Pair
from mlx_embeddings_backends.pairs import PairTokenizer
from tests.peak_memory import peak_megabytes

tokenizer = PairTokenizer(Tokenizer.from_file({file!r}), max_tokens=64)
many, spaces = "a," * 500_000, " " * 500_000
for pairs in (
    [Pair("a", many)],
    [Pair("a", spaces + many + spaces)],
    [Pair("a", "a," * 8_000 + str(place)) for place in range(100)],
):
    before = peak_megabytes()
    for truncate in ("end", "start"):
        prepared = tokenizer.prepare([Item(pair) for pair in pairs], truncate)
        assert all(each.tokens == 64 and each.truncated for each in prepared)
    grown = peak_megabytes() - before
    assert grown < 120, grown
"""


def test_a_million_tokens_take_no_hundreds_of_megabytes(tmp_path: Path) -> None:
    pair_tokenizer("bert").save_pretrained(tmp_path)
    run_alone(MEMORY.format(file=str(tmp_path / "tokenizer.json")))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device: needs an NVIDIA GPU and its driver"
)
@pytest.mark.cuda
@pytest.mark.parametrize("model_type", detect.CROSS_ENCODERS)
def test_every_architecture_on_cuda(model_type: str, tmp_path: Path) -> None:
    folder = reranker(tmp_path, model_type)
    expected = raw(reference(folder), PAIRS)
    backend: Backend = detect.load(detect.choose(folder), folder, LoadOptions(device="cuda", dtype="float32"))
    assert backend.info.device.startswith("cuda")
    assert largest(embed(backend, items(PAIRS)) - expected) < 1e-3
    for dtype, bound in HALF_PRECISION.items():
        assert largest(embed(load(folder, dtype, "cuda"), items(PAIRS)) - expected) < bound
