"""open_clip's towers from a checkpoint's folder: built by its own classes, and filled with the folder's weights alone.

Its `create_model` makes up what is lacking from random numbers, and downloads the towers that other libraries have.
"""

import contextlib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Final, cast

import timm
import torch
from torch import Tensor, nn

from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_object
from mlx_embeddings_backends.torch.open_clip_library import open_clip
from mlx_embeddings_backends.torch.open_clip_text import OpenClipTokenizer
from mlx_embeddings_backends.torch.tensor_files import check_tensors, read_tensors

CONFIG: Final = "open_clip_config.json"
# In open_clip's own order. The last ones are names that others too give their weights.
WEIGHTS: Final = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
# Of no use to vectors: what scales their products, and what CoCa writes texts with.
_UNUSED: Final = ("logit_scale", "logit_bias", "text_decoder")
# What the libraries raise for settings that make no model.
SENSELESS: Final = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class TextTower:
    """Token ids to vectors, on no more tokens than the longest text has where none of them sees those behind it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        tower = model.text if hasattr(model, "text") else model
        self._tower = tower
        self._is_own = isinstance(tower, open_clip.CLIP | open_clip.transformer.TextTransformer)
        table = tower.token_embedding if self._is_own else tower.transformer.get_input_embeddings()
        self.vocabulary_size: int = table.num_embeddings
        if self._is_own:
            is_split = tower is model  # open_clip.CLIP has the parts of its text tower as its own
            self._pool: str = tower.text_pool_type if is_split else tower.pool_type
            self._eos_id: int = tower.text_eos_id if is_split else tower.eos_id
            tower.transformer.get_cast_dtype = _float32  # else that of a product's weights would be used in between

    def end_id(self, tokenizer: OpenClipTokenizer) -> int | None:
        """Of the token whose vector becomes the text's, where it is one. Raises `ModelError`."""
        if not self._is_own or self._has_class_token or self._pool not in ("argmax", "eos"):
            return None
        if self._pool == "eos" and self._eos_id != tokenizer.end_id:
            raise ModelError(f"{CONFIG}: eos_id is {self._eos_id}, and {tokenizer.end_id} ends the tokenizer's texts")
        return tokenizer.end_id

    def needs_padding(self, tokenizer: OpenClipTokenizer) -> bool:
        """Whether a text's vector depends on how many tokens it is filled up to."""
        if not self._is_own:
            return bool(self._tower.config.pad_token_id != tokenizer.pad_id)
        if self._has_class_token or self._tower.attn_mask is None:
            return True
        end_id = tokenizer.end_id
        finds_end = self._pool == "eos" or (
            self._pool == "argmax" and end_id is not None and tokenizer.pad_id <= end_id
        )
        return not finds_end and self._pool != "first"

    @property
    def _has_class_token(self) -> bool:
        return getattr(self._tower, "cls_emb", None) is not None

    def __call__(self, ids: Tensor) -> Tensor:
        """[batch, tokens] -> [batch, dimensions], as `encode_text` does it for the full length."""
        if not self._is_own or self._has_class_token:
            return cast("Tensor", self._model.encode_text(ids, normalize=False))
        tower, tokens = self._tower, ids.shape[1]
        x = tower.token_embedding(ids) + tower.positional_embedding[:tokens]  # [batch, tokens, width]
        mask = None if tower.attn_mask is None else tower.attn_mask[:tokens, :tokens]
        x = tower.transformer(x, attn_mask=mask)
        # The norm is each token's own: that of the pooled one is enough.
        x = open_clip.transformer.text_global_pool(x, ids, self._pool, eos_token_id=self._eos_id)
        x = tower.ln_final(x)  # [batch, width]
        projection = tower.text_projection
        if projection is not None:
            x = x @ projection if isinstance(projection, Tensor) else projection(x)
        return cast("Tensor", x)


def _float32() -> torch.dtype:
    return torch.float32


def read_model_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's settings, and those of images. Raises `UnsupportedModel`."""
    config = read_object(folder / CONFIG)
    model, images = config.get("model_cfg"), config.get("preprocess_cfg") or {}
    if not isinstance(model, dict) or not isinstance(images, dict):
        raise UnsupportedModel(f"{CONFIG} has no model_cfg, or it is no JSON object")
    for name, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if not isinstance(model.get(name), kind):
            raise UnsupportedModel(f"{CONFIG}: model_cfg.{name} is {model.get(name)!r:.80}")
    return model, images


def load_model(folder: Path, config: Mapping[str, Any]) -> Any:
    """The model of these settings with the folder's weights, float32, on the CPU. Raises `ModelError`."""
    try:
        model = _build(folder, deepcopy(dict(config)))
    except SENSELESS as error:
        raise ModelError(f"{CONFIG} describes no model of open_clip's: {error}") from error
    for name in _UNUSED:
        if hasattr(model, name):
            setattr(model, name, None)
    found, expected = _own_weights(model, _read_weights(folder)), model.state_dict()
    check_tensors(found, expected, config=CONFIG)
    placed = {name: weight.to(expected[name].dtype) for name, weight in found.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    for module in model.modules():
        mask = getattr(module, "attn_mask", None)
        if isinstance(mask, Tensor) and mask.is_meta:  # the causal one, which is in no file
            module.attn_mask = torch.full(mask.shape, float("-inf")).triu(1)
    return model.eval().requires_grad_(False)


def _build(folder: Path, config: dict[str, Any]) -> Any:
    text, vision = config["text_cfg"], config["vision_cfg"]
    if name := vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False
        if not timm.is_model(name):
            raise ValueError(f"timm {timm.__version__} has no vision tower {name!r}")
    if text.get("hf_model_name"):
        text |= {"hf_model_name": str(_text_tower_folder(folder, text["hf_model_name"])), "hf_model_pretrained": False}
    is_custom = config.pop("custom_text", False) or text.get("hf_model_name")
    kind = open_clip.CLIP
    if is_custom:
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    # open_clip's own towers can be built without memory and random numbers. Others' compute what they need for later.
    is_own = not vision.get("timm_model_name") and not text.get("hf_model_name")
    with torch.device("meta") if is_own else contextlib.nullcontext():
        return kind(**config)


def _text_tower_folder(folder: Path, name: str) -> Path:
    """Where the config.json of a text tower of transformers' is: beside open_clip's. Raises `ModelError`."""
    known = open_clip.hf_configs.arch_dict
    found = read_object(folder / "config.json").get("model_type") if (folder / "config.json").exists() else None
    if found not in known:
        raise ModelError(
            f"the text tower is transformers' {name!r}, and the model's folder does not say what that is: put its "
            f"config.json beside {CONFIG} (its weights are not needed)"
        )
    return folder


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"the model's folder has no weights: no {WEIGHTS[0]}, and no {WEIGHTS[2]}")
    return read_tensors(file)


def _own_weights(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the model's own names: older checkpoints have the text tower's parts by themselves."""
    try:
        found = open_clip.convert.convert_state_dict(model, found)  # MobileCLIP's, as Apple published it
    except SENSELESS as error:
        raise ModelError(f"the weights are not those of a MobileCLIP that is known: {error}") from error
    if "positional_embedding" in found and not hasattr(model, "positional_embedding"):
        found = open_clip.model.convert_to_custom_text_state_dict(found)
    dropped = (*_UNUSED, "text.transformer.embeddings.position_ids")  # which transformers once saved
    return {name: weight for name, weight in found.items() if not name.startswith(dropped)}
