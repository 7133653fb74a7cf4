"""Tiny sparse encoders with random weights, as sentence-transformers saves them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SparseStaticEmbedding, SpladePooling
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from tests.checkpoints import CONFIGS, HIDDEN, WORDS, bare_encoder, shake, tokenizer

POOLINGS = [(strategy, activation) for strategy in ("max", "sum") for activation in ("relu", "log1p_relu")]


def masked_language_model(
    folder: Path, model_type: str = "bert", *, tokenizer_options: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A bare transformers checkpoint of the `*ForMaskedLM` kind."""
    own = tokenizer(model_type, **(tokenizer_options or {}))
    sizes = {"vocab_size": len(own), "pad_token_id": own.pad_token_id, **CONFIGS[model_type], **config}
    settings: Any = AutoConfig.for_model(model_type, **sizes)
    of: Any = AutoModelForMaskedLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = of.from_config(settings)
        shake(model)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def splade(
    folder: Path,
    model_type: str = "bert",
    *,
    pooling: str = "max",
    activation: str = "relu",
    max_seq_length: int | None = None,
    after: Sequence[nn.Module] = (),
    **saved: Any,
) -> Path:
    """Transformer and SpladePooling. `saved` are SparseEncoder's own: prompts, default_prompt_name, max_active_dims."""
    bare = masked_language_model(folder / "bare", model_type)
    modules = [_transformer(bare, max_seq_length), _pooling(pooling, activation), *after]
    return save(folder / "model", modules, **saved)


def csr(
    folder: Path,
    model_type: str = "bert",
    *,
    pooling: str | tuple[str, ...] = "mean",
    include_prompt: bool = True,
    before: Sequence[nn.Module] = (),
    after: Sequence[nn.Module] = (),
    encoder: SparseAutoEncoder | None = None,
    max_seq_length: int | None = None,
    tokenizer_options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **saved: Any,
) -> Path:
    """Transformer, Pooling with modules `before` and `after` it, SparseAutoEncoder. `saved` are SparseEncoder's own."""
    modules = dense_modules(
        folder,
        model_type,
        pooling=pooling,
        include_prompt=include_prompt,
        max_seq_length=max_seq_length,
        tokenizer_options=tokenizer_options,
        **(config or {}),
    )
    modules = [modules[0], *before, modules[1], *after, encoder or auto_encoder()]
    return save(folder / "model", modules, **saved)


def dense_modules(
    folder: Path,
    model_type: str = "bert",
    *,
    pooling: str | tuple[str, ...] = "mean",
    include_prompt: bool = True,
    max_seq_length: int | None = None,
    **config: Any,
) -> list[Any]:
    bare = bare_encoder(folder / "bare", model_type, **config)
    return [
        Transformer(str(bare), max_seq_length=max_seq_length),
        Pooling(HIDDEN, pooling, include_prompt=include_prompt),
    ]


def auto_encoder(
    dim: int = HIDDEN, hidden_dim: int = 96, k: int = 12, *, normalize: bool = False, seed: int = 3
) -> SparseAutoEncoder:
    """With seeded weights. Some of the k largest are below zero where k is more than about half of `hidden_dim`."""
    module = SparseAutoEncoder(dim, hidden_dim, k, normalize=normalize)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shake(module)
    return module


def inference_free(
    folder: Path,
    model_type: str = "distilbert",
    *,
    default_route: str | None = "document",
    allow_empty_key: bool = True,
    **saved: Any,
) -> Path:
    """A Router: weights of tokens for queries, SPLADE for documents."""
    transformer = _transformer(masked_language_model(folder / "bare", model_type))
    router = Router.for_query_document(
        [_static(tokenizer(model_type), model_type)],
        [transformer, _pooling("max", "log1p_relu")],
        default_route=default_route,
        allow_empty_key=allow_empty_key,
    )
    return save(folder / "model", [router], **saved)


def static(folder: Path, model_type: str = "bert", **tokenizer_options: Any) -> Path:
    """Weights of tokens alone."""
    own = tokenizer(model_type, **tokenizer_options)
    return save(folder / "model", [_static(own, model_type)])


def save(folder: Path, modules: Sequence[nn.Module], **saved: Any) -> Path:
    of: Any = SparseEncoder
    of(modules=list(modules), device="cpu", **saved).save_pretrained(str(folder), create_model_card=False)
    return folder


def weights_of_tokens(model_type: str = "bert") -> torch.Tensor:
    """Some of them zero, and some negative, as training may leave them; those of special tokens are neither."""
    weights = torch.randn(len(tokenizer(model_type)), generator=torch.Generator().manual_seed(2))
    weights[:7] = 1.5
    return weights * (weights > -1)


def use_json_of_weights(folder: Path) -> dict[str, float]:
    """Replace the file of a static module's weights by an idf.json, and return what it holds."""
    idf = {word: 1.0 + place / 7 for place, word in enumerate(WORDS[:20])}
    (folder / "idf.json").write_text(json.dumps(idf))
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "path": "idf.json"}))
    return idf


def _transformer(folder: Path, max_seq_length: int | None = None) -> Transformer:
    transformer: Transformer = Transformer(str(folder), transformer_task="fill-mask", max_seq_length=max_seq_length)
    return transformer


def _static(own: Any, model_type: str) -> SparseStaticEmbedding:
    return SparseStaticEmbedding(own, weights_of_tokens(model_type))


def _pooling(strategy: str, activation: str) -> SpladePooling:
    of: Any = SpladePooling
    pooling: SpladePooling = of(pooling_strategy=strategy, activation_function=activation)
    return pooling
