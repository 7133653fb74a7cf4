"""Text encoders on MLX against sentence-transformers' own `encode`, on tiny checkpoints and on a real one."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, WeightedLayerPooling
from torch import nn

from mlx_embeddings_backends.base import Backend, DType, Item
from mlx_embeddings_backends.detect import MLX_TEXT_ENCODERS
from mlx_embeddings_backends.errors import MissingDependency, UnsupportedModel
from mlx_embeddings_backends.hub import resolve
from tests import parity
from tests.checkpoints import CONFIGS, HIDDEN, MAX_TOKENS, TOKENIZERS, bare_encoder, dense, sentence_transformer, shake
from tests.mlx_checkpoints import changed_json, older_layout
from tests.parity import cosines, distance, embed, embed_singly, reference
from tests.server import MINILM, Server
from tests.test_torch_parity import POOLING_MODES, TEXTS, words

TOLERANCE = 1e-5  # of any component of a unit vector, in float32


def layer_norm() -> LayerNorm:
    module = LayerNorm(HIDDEN)
    shake(module)
    return module


def load(folder: Path, dtype: DType | Literal["auto"] = "float32") -> Backend:
    return parity.load(folder, dtype, backend="mlx")


@pytest.mark.parametrize("model_type", MLX_TEXT_ENCODERS)
def test_a_padded_batch_of_every_architecture_equals_sentence_transformers(model_type: str, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    backend = load(folder)
    rows = embed(backend, TEXTS)
    assert distance(rows, reference(folder).encode(TEXTS)) < TOLERANCE
    assert distance(rows, embed_singly(backend, TEXTS)) < TOLERANCE
    assert backend.info.max_tokens == MAX_TOKENS
    forth, back = embed(backend, ["the quick brown fox", "fox brown quick the"])
    assert np.abs(forth - back).max() > 0.05  # or positions would not count, and nothing of them be tested


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed, which has the layers")
@pytest.mark.parametrize("model_type", ["gemma3_text", "lfm2"])
def test_architectures_that_need_mlx_lm(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "lfm2", TOKENIZERS["qwen3"])
    kinds = ["conv", "full_attention", "conv"]
    monkeypatch.setitem(CONFIGS, "lfm2", {**CONFIGS["qwen3"], "num_hidden_layers": 3, "layer_types": kinds})
    folder = bare_encoder(tmp_path, model_type)
    rows = embed(load(folder), TEXTS)
    assert distance(rows, reference(folder).encode(TEXTS)) < TOLERANCE
    assert distance(rows, embed_singly(load(folder), TEXTS)) < TOLERANCE


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is not None, reason="mlx-lm is installed")
def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="pip install mlx-lm"):
        load(bare_encoder(tmp_path, "gemma3_text"))


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
        ("xlm-roberta", {"hidden_act": "gelu_pytorch_tanh", "type_vocab_size": 1}),
        ("modernbert", {"hidden_activation": "silu", "norm_bias": True, "attention_bias": True, "mlp_bias": True}),
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("modernbert", {"global_attn_every_n_layers": 2, "local_attention": 4, "norm_eps": 0.1}),
        ("qwen3", {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "attention_bias": True}),
        ("qwen3", {"num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 0.1}),
    ],
)
def test_what_the_config_says_is_done(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type, **config)
    assert distance(embed(load(folder), TEXTS), reference(folder).encode(TEXTS)) < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "old"),
    [("qwen3", {"rope_theta": 50.0}), ("modernbert", {"global_rope_theta": 80.0, "local_rope_theta": 40.0})],
)
def test_rope_as_older_configs_have_it(model_type: str, old: dict[str, float], tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    changed_json(folder / "config.json", rope_parameters=None, layer_types=None, **old)
    assert distance(embed(load(folder), TEXTS), reference(folder).encode(TEXTS)) < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("bert", {"hidden_act": "mish"}),
        ("bert", {"is_decoder": True}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("qwen3", {"hidden_act": "gelu"}),
        ("qwen3", {"is_causal": False}),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
    ],
)
def test_what_is_not_computed_is_refused(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    changed_json(folder / "config.json", **config)
    with pytest.raises(UnsupportedModel, match="know"):
        load(folder)


@pytest.mark.parametrize(("model_type", "padding_side"), [("bert", "right"), ("qwen3", "left")])
@pytest.mark.parametrize("mode", [*POOLING_MODES, ("cls", "mean"), ("lasttoken", "max")], ids=str)
def test_every_pooling_mode(mode: str | tuple[str, ...], model_type: str, padding_side: str, tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, model_type, pooling=mode, tokenizer_options={"padding_side": padding_side})
    backend = load(folder)
    rows = embed(backend, TEXTS)
    np.testing.assert_allclose(rows, reference(folder).encode(TEXTS), atol=1e-4)  # by their lengths, too
    assert distance(rows, embed_singly(backend, TEXTS)) < TOLERANCE
    assert backend.info.dimensions == rows.shape[1] == HIDDEN * (1 if isinstance(mode, str) else 2)


@pytest.mark.parametrize(
    "after",
    [
        [dense(HIDDEN, 24)],
        [dense(HIDDEN, 24, nn.GELU(), bias=False), dense(24, 48, nn.Sigmoid()), dense(48, 16, nn.ReLU())],
        [dense(HIDDEN, 24, nn.Identity()), dense(24, 16, nn.SiLU())],
        [Normalize(), layer_norm()],
        [layer_norm(), Dropout(0.5), dense(HIDDEN, 24), Normalize()],
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
    assert backend.info.dimensions == rows.shape[1]
    if not backend.info.normalize:  # then lengths count too
        np.testing.assert_allclose(rows, expected, atol=TOLERANCE)


def test_the_last_normalize_is_left_to_the_caller(tmp_path: Path) -> None:
    backend = load(sentence_transformer(tmp_path, after=[Normalize()], truncate_dim=12))
    rows = embed(backend, TEXTS)
    assert backend.info.normalize and backend.info.dimensions == 12
    assert (np.abs(np.linalg.norm(rows, axis=1) - 1) > 0.1).all()
    assert distance(rows, reference(tmp_path / "model").encode(TEXTS)) < TOLERANCE


@pytest.mark.parametrize(
    ("before", "after", "config", "message"),
    [
        ([WeightedLayerPooling(HIDDEN, 2, 1)], [], {}, "only Pooling behind the transformer"),
        ([], [dense(HIDDEN, 24, nn.Hardswish())], {}, "'Hardswish' is not known"),
        ([], [Normalize("token_embeddings")], {}, "module_input_name 'token_embeddings'"),
    ],
)
def test_modules_that_are_not_known_are_refused(
    before: list[nn.Module], after: list[nn.Module], config: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = sentence_transformer(tmp_path, before=before, after=after, output_hidden_states=True)
    with pytest.raises(UnsupportedModel, match=message):
        load(folder)


def test_prompts_of_the_checkpoint(tmp_path: Path) -> None:
    prompts = {"query": "query : ", "document": "passage : the ", "none": ""}
    folder = sentence_transformer(tmp_path, "qwen3", prompts=prompts, default_prompt_name="document")
    backend, library = load(folder), reference(folder)
    assert dict(backend.info.prompts) == prompts
    assert backend.info.default_prompt == "document"
    for name, prompt in prompts.items():
        rows = embed(backend, [Item(text, prompt) for text in TEXTS])
        assert distance(rows, library.encode(TEXTS, prompt_name=name)) < TOLERANCE
    assert dict(load(bare_encoder(tmp_path / "bare")).info.prompts) == parity.load(tmp_path / "bare").info.prompts


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_tokens_of_a_prompt_that_is_not_pooled(mode: str, tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, pooling=mode, include_prompt=False)
    backend, library = load(folder), reference(folder)
    groups = set()
    for prompt in ("", "query : ", "represent the sentence for retrieval :"):
        items = [Item(text, prompt) for text in TEXTS[1:5]]
        groups.add(backend.prepare(items)[0].group)
        expected = library.encode(TEXTS[1:5], prompt=prompt, batch_size=1)
        assert distance(embed(backend, items), expected) < TOLERANCE
    assert len(groups) == 3  # never in one batch


@pytest.mark.parametrize("model_type", MLX_TEXT_ENCODERS)
def test_truncation_at_max_seq_length(model_type: str, tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, model_type, max_seq_length=13)  # not a multiple of what lengths are
    backend, library = load(folder), reference(folder)
    assert backend.info.max_tokens == 13
    texts = [words(count) for count in (1, 9, 10, 11, 12, 13, 14, 200)]
    items = [Item(text, "query : ") for text in texts]
    assert distance(embed(backend, items, "end"), library.encode(texts, prompt="query : ")) < TOLERANCE
    cut = [prepared.truncated for prepared in backend.prepare(items, "end")]
    assert cut == [len(library.tokenizer("query : " + text, truncation=False)["input_ids"]) > 13 for text in texts]


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
def test_no_more_tokens_than_there_are_positions(model_type: str, tmp_path: Path) -> None:
    """XLM-R's begin behind padding_idx: two fewer than max_position_embeddings says."""
    options = {"model_max_length": 10**30}
    folder = bare_encoder(tmp_path, model_type, max_position_embeddings=13, tokenizer_options=options)
    backend = load(folder)
    assert backend.info.max_tokens == (11 if model_type == "xlm-roberta" else 13)
    assert distance(embed(backend, TEXTS, "end"), embed_singly(backend, TEXTS, "end")) < TOLERANCE


def test_literal_special_tokens_in_the_text(tmp_path: Path) -> None:
    """XLM-R leaves padding tokens out of its positions, those of the text too."""
    folder = bare_encoder(tmp_path, "xlm-roberta")
    library = reference(folder)
    texts = [f"river {token} stone{token} light" for token in library.tokenizer.all_special_tokens]
    assert distance(embed(load(folder), texts), library.encode(texts, batch_size=1)) < TOLERANCE


def test_an_older_layout_of_the_folder(tmp_path: Path) -> None:
    folder = older_layout(sentence_transformer(tmp_path, pooling=("mean", "cls"), after=[dense(2 * HIDDEN, 24)]))
    backend = load(folder)
    assert backend.info.max_tokens == 16
    assert distance(embed(backend, TEXTS[:3]), reference(folder).encode(TEXTS[:3])) < TOLERANCE


@pytest.mark.parametrize("key", ["do_lower_case", "strip_accents"])
def test_the_tokenizer_is_set_as_transformers_sets_it(key: str, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path)
    changed_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer", **{key: False})
    texts = ["The RIVER and the Stone", "àé Éö"]
    assert distance(embed(load(folder), texts), reference(folder).encode(texts)) < TOLERANCE
    ids = [prepared.payload.tolist() for prepared in load(folder).prepare([Item(text) for text in texts])]
    assert ids == reference(folder).tokenizer(texts)["input_ids"]


def test_a_checkpoint_that_lowercases(tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, "qwen3")  # whose tokenizer.json does not
    changed_json(folder / "sentence_bert_config.json", do_lower_case=True)
    texts = ["The RIVER and the Stone", "THE"]
    assert distance(embed(load(folder), texts), reference(folder).encode(texts)) < TOLERANCE
    assert distance(embed(load(folder), texts), embed(load(folder), [text.lower() for text in texts])) == 0


@pytest.mark.parametrize("architecture", ["Qwen3Model", "Qwen3ForCausalLM"])
def test_a_bare_encoder_is_pooled_as_sentence_transformers_would_with_a_warning(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bare_encoder(tmp_path / "bare", "qwen3")
    changed_json(folder / "config.json", architectures=[architecture])
    assert distance(embed(load(folder), TEXTS), reference(folder).encode(TEXTS)) < TOLERANCE
    assert f"{'lasttoken' if architecture.endswith('LM') else 'mean'} pooling is used" in caplog.text
    caplog.clear()
    load(sentence_transformer(tmp_path / "complete"))
    assert "pooling is used" not in caplog.text


def minilm() -> Path:
    return resolve("all-MiniLM-L6-v2").path


def test_a_real_model(reference_texts: list[str], reference_vectors: NDArray[np.float32]) -> None:
    backend = load(minilm(), "auto")
    assert backend.info.dtype == "float32" and backend.info.max_tokens == 256 and backend.info.normalize
    rows = embed_singly(
        backend, reference_texts, "end"
    )  # one is of 256 tokens: padded to that, they take a minute here
    assert cosines(rows, reference_vectors).min() >= 0.9999
    assert distance(rows, reference_vectors) < TOLERANCE
    assert distance(embed(backend, reference_texts[:4]), reference_vectors[:4]) < TOLERANCE


ALONE = """
import resource, sys
from pathlib import Path
from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Item, LoadOptions

folder = Path({folder!r})
backend = detect.load(detect.choose(folder, "mlx"), folder, LoadOptions(device="cpu"))
backend.run(backend.collate(backend.prepare([Item("a text")])))
assert not {{"torch", "transformers", "sentence_transformers", "mlx_vlm"}} & sys.modules.keys()
"""


def test_a_model_is_served_without_torch_or_transformers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(folder=str(minilm()))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_server_on_mlx(reference_texts: list[str], reference_vectors: NDArray[np.float32]) -> None:
    with Server("--model", "all-MiniLM-L6-v2", "--backend", "mlx", "--dtype", "float32", "--device", "cpu") as server:
        reply = server.embed(reference_texts[:3]).raise_for_status().json()
        [model] = server.client.get("/v1/models").json()["data"]
    rows = np.array([each["embedding"] for each in reply["data"]], dtype=np.float32)
    assert cosines(rows, reference_vectors[:3]).min() >= 0.9999
    assert (model["id"], model["backend"], model["device"], model["dtype"]) == (MINILM, "mlx", "cpu", "float32")
