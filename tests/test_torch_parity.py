"""The torch backend against sentence-transformers' own `encode`, on tiny checkpoints of every kind that is accepted."""

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, WeightedLayerPooling
from torch import nn

from mlx_embeddings_backends.base import Item
from mlx_embeddings_backends.detect import TEXT_ENCODERS
from tests.checkpoints import HIDDEN, MAX_TOKENS, WORDS, bare_encoder, dense, sentence_transformer
from tests.parity import distance, embed, embed_singly, load, reference

TOLERANCE = 1e-4  # of any component of a unit vector, in float32
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS[:-1], count))


# From one token, or three with special ones, to a few short of the limit.
TEXTS = ["the", "Silent river", "Unheard-of: Ω ж 中 日!", words(20), words(7, seed=1), words(MAX_TOKENS - 10, seed=2)]


@pytest.mark.parametrize("model_type", TEXT_ENCODERS)
def test_a_padded_batch_of_every_architecture_equals_sentence_transformers(model_type: str, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    backend = load(folder)
    rows = embed(backend, TEXTS)
    assert distance(rows, reference(folder).encode(TEXTS)) < TOLERANCE
    assert distance(rows, embed_singly(backend, TEXTS)) < TOLERANCE
    assert backend.info.max_tokens == MAX_TOKENS


def test_a_bare_encoder_is_pooled_by_the_mean_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(bare_encoder(tmp_path / "bare"))
    assert "mean pooling is used" in caplog.text
    caplog.clear()
    load(sentence_transformer(tmp_path / "complete"))
    assert "pooling is used" not in caplog.text


@pytest.mark.parametrize(("model_type", "padding_side"), [("bert", "right"), ("qwen3", "left")])
@pytest.mark.parametrize("mode", [*POOLING_MODES, ("cls", "mean")], ids=str)
def test_every_pooling_mode_on_either_padding_side(
    mode: str | tuple[str, ...], model_type: str, padding_side: str, tmp_path: Path
) -> None:
    folder = sentence_transformer(tmp_path, model_type, pooling=mode, tokenizer_options={"padding_side": padding_side})
    backend = load(folder)
    rows = embed(backend, TEXTS)
    assert distance(rows, reference(folder).encode(TEXTS)) < TOLERANCE
    assert distance(rows, embed_singly(backend, TEXTS)) < TOLERANCE
    assert backend.info.dimensions == rows.shape[1] == HIDDEN * (1 if isinstance(mode, str) else 2)


@pytest.mark.parametrize(
    "after",
    [
        [dense(HIDDEN, 24)],
        [dense(HIDDEN, 24, nn.Identity(), bias=False)],
        [dense(HIDDEN, 24, nn.GELU())],
        [dense(HIDDEN, 48, nn.Identity(), bias=False), dense(48, 16, nn.ReLU())],
        [LayerNorm(HIDDEN)],
        [Normalize(), dense(HIDDEN, 24)],
        [LayerNorm(HIDDEN), Dropout(0.5), dense(HIDDEN, 24), Normalize()],
    ],
    ids=lambda after: "-".join(type(module).__name__ for module in after),
)
def test_modules_behind_the_pooling(after: list[nn.Module], tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, after=after)
    backend = load(folder)
    expected = reference(folder).encode(TEXTS)
    rows = embed(backend, TEXTS)
    assert distance(rows, expected) < TOLERANCE
    assert backend.info.normalize == isinstance(after[-1], Normalize)
    if not backend.info.normalize:  # then lengths count too
        np.testing.assert_allclose(rows, expected, atol=TOLERANCE)


def test_the_last_normalize_is_left_to_the_caller(tmp_path: Path) -> None:
    backend = load(sentence_transformer(tmp_path, after=[Normalize()]))
    assert backend.info.normalize
    assert (np.abs(np.linalg.norm(embed(backend, TEXTS), axis=1) - 1) > 0.1).all()


def test_layers_weighted_before_the_pooling(tmp_path: Path) -> None:
    layers = WeightedLayerPooling(HIDDEN, num_hidden_layers=2, layer_start=1)
    layers.layer_weights.data = layers.layer_weights.data.new_tensor([3.0, 1.0])
    folder = sentence_transformer(tmp_path, before=[layers], output_hidden_states=True)
    expected = reference(folder).encode(TEXTS)
    assert distance(embed(load(folder), TEXTS), expected) < TOLERANCE
    plain = bare_encoder(tmp_path / "plain")
    assert distance(reference(plain).encode(TEXTS), expected) > 0.01


def test_prompts_and_the_default_one(tmp_path: Path) -> None:
    prompts = {"query": "query : ", "document": "passage : the ", "none": ""}
    folder = sentence_transformer(tmp_path, prompts=prompts, default_prompt_name="document")
    backend, library = load(folder), reference(folder)
    assert dict(backend.info.prompts) == prompts
    assert backend.info.default_prompt == "document"
    for name, prompt in prompts.items():
        rows = embed(backend, [Item(text, prompt) for text in TEXTS])
        assert distance(rows, library.encode(TEXTS, prompt_name=name)) < TOLERANCE
    by_default = embed(backend, [Item(text, backend.info.prompts["document"]) for text in TEXTS])
    assert distance(by_default, library.encode(TEXTS)) < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "mode"),
    [*(("bert", mode) for mode in POOLING_MODES), ("t5", "mean"), ("gpt2", "max"), ("llama", "cls")],
)
def test_tokens_of_a_prompt_that_is_not_pooled(model_type: str, mode: str, tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, model_type, pooling=mode, include_prompt=False)
    backend, library = load(folder), reference(folder)
    texts = TEXTS[1:5]  # gpt2 reads the space at a prompt's end as a token: one word alone would be left out with it
    groups = set()
    for prompt in ("", "query : ", "represent the sentence for retrieval :"):
        items = [Item(text, prompt) for text in texts]
        groups.add(backend.prepare(items)[0].group)
        expected = library.encode(texts, prompt=prompt, batch_size=1)
        assert distance(embed(backend, items), expected) < TOLERANCE
    assert len(groups) == 3  # never in one batch


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "qwen3", "t5"])
def test_truncation_at_max_seq_length(model_type: str, tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, model_type, max_seq_length=16, prompts={"query": "query : "})
    backend, library = load(folder), reference(folder)
    assert backend.info.max_tokens == 16
    texts = [words(count) for count in (1, 12, 13, 14, 15, 16, 17, 200)]
    for prompt in ("", "query : "):
        items = [Item(text, prompt) for text in texts]
        expected = library.encode(texts, prompt=prompt, batch_size=1)
        assert distance(embed(backend, items, "end"), expected) < TOLERANCE
        cut = [prepared.truncated for prepared in backend.prepare(items, "end")]
        assert cut == [len(library.tokenizer(prompt + text, truncation=False)["input_ids"]) > 16 for text in texts]


@pytest.mark.parametrize("prompt", ["", "query : "])
def test_truncation_at_the_start_keeps_the_prompt_and_the_end(prompt: str, tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, max_seq_length=16)
    kept = 14 - len(prompt.split())  # beside [CLS] and [SEP]
    many = words(50)
    expected = reference(folder).encode([prompt + " ".join(many.split()[-kept:])])
    assert distance(embed(load(folder), [Item(many, prompt)], "start"), expected) < TOLERANCE


@pytest.mark.parametrize(
    "model_type", ["bert", "gpt2", "longformer", "modernbert", "mpnet", "roberta", "t5", "xlm-roberta"]
)
def test_literal_special_tokens_in_the_text(model_type: str, tmp_path: Path) -> None:
    """sentence-transformers reads them as special; RoBERTa's kin leave padding tokens out of their positions too."""
    folder = bare_encoder(tmp_path, model_type)
    library = reference(folder)
    texts = [f"river {token} stone{token} light" for token in library.tokenizer.all_special_tokens]
    texts += [f"{library.tokenizer.pad_token} the {library.tokenizer.pad_token}", "the"]
    ids = [item.payload.tolist() for item in load(folder).prepare([Item(text) for text in texts])]
    assert ids == library.tokenizer(texts)["input_ids"]
    assert distance(embed(load(folder), texts), library.encode(texts, batch_size=1)) < TOLERANCE


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "qwen3", "t5"])
def test_token_ids_give_the_vectors_of_their_text(model_type: str, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    library = reference(folder)
    items = [Item(tuple(ids)) for ids in library.tokenizer(TEXTS)["input_ids"]]
    assert distance(embed(load(folder), items), library.encode(TEXTS)) < TOLERANCE


def test_truncate_dim_of_the_checkpoint(tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, after=[Normalize()], truncate_dim=12)
    backend = load(folder)
    expected = reference(folder).encode(TEXTS)
    assert expected.shape[1] == backend.info.dimensions == 12
    assert distance(embed(backend, TEXTS), expected) < TOLERANCE


def test_a_checkpoint_that_lowercases(tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, "gpt2", do_lower_case=True)
    texts = ["The RIVER and the Stone", "THE"]
    rows = embed(load(folder), texts)
    assert distance(rows, reference(folder).encode(texts)) < TOLERANCE
    assert distance(rows, embed(load(folder), [text.lower() for text in texts])) < TOLERANCE


def test_a_chat_template_is_left_alone_where_the_checkpoint_leaves_it_alone(tmp_path: Path) -> None:
    """Qwen3-Embedding: its tokenizer has a template, and its files, of before sentence-transformers 6, no use of it."""
    template = "{% for message in messages %}of {{ message['content'] }}{% endfor %}"
    options = {"chat_template": template}
    folder = sentence_transformer(tmp_path, "qwen3", pooling="lasttoken", tokenizer_options=options)
    (folder / "sentence_bert_config.json").unlink()
    assert distance(embed(load(folder), TEXTS), reference(folder).encode(TEXTS)) < TOLERANCE


@pytest.mark.parametrize("positions", [MAX_TOKENS, 4])
def test_no_more_tokens_than_there_are_positions(positions: int, tmp_path: Path) -> None:
    """RoBERTa's table starts behind padding_idx: two places fewer than max_position_embeddings says."""
    folder = bare_encoder(
        tmp_path, "roberta", max_position_embeddings=positions + 2, tokenizer_options={"model_max_length": 10**30}
    )
    backend = load(folder)
    assert backend.info.max_tokens == positions
    assert np.isfinite(embed(backend, [words(100)], "end")).all()
