"""The tiny reference ColQwen2.5 (tests/data/colqwen2_5) in every layout that such checkpoints have on the hub.

Its vectors are colpali-engine's, and stay the same whatever its files are called.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mlx_embeddings_backends.base import Backend, EncodedImage, Item

DATA = Path(__file__).parent / "data" / "colqwen2_5"
CHECKPOINT = DATA / "checkpoint"

Weights = dict[str, NDArray[Any]]
Vectors = dict[str, NDArray[np.float32]]
Config = Literal["both", "nested", "beside", "transformers5", "colpali", "colpali5"]

# Of the vision tower, the language model and the projection; the first is the reference checkpoint's own.
NAMINGS: dict[str, tuple[str, str, str]] = {
    "hub": ("vlm.model.visual.", "vlm.model.language_model.", "embedding_proj_layer."),
    "mlx": ("vlm.vision_tower.", "vlm.language_model.model.", "embedding_proj_layer."),
    "transformers5": ("vlm.visual.", "vlm.language_model.", "embedding_proj_layer."),
    "colpali": ("visual.", "model.", "custom_text_proj."),
    "colpali_nested": ("visual.", "language_model.", "custom_text_proj."),
    "colpali_model": ("model.visual.", "model.language_model.", "custom_text_proj."),
}
CONFIGS: tuple[Config, ...] = ("both", "nested", "beside", "transformers5", "colpali", "colpali5")
_TEXT_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "hidden_act", "use_sliding_window",
    "sliding_window", "max_window_layers",
)  # fmt: skip
# Equal to transformers' defaults, and so left out of a nested config that it saves.
_LEFT_OUT = ("patch_size", "spatial_merge_size", "temporal_patch_size", "window_size", "hidden_act", "in_channels")


def variant(
    folder: Path, *, naming: str = "hub", config: Config = "both", shards: int = 1, preprocessor: bool = True
) -> Path:
    """The reference checkpoint in `folder`, its weights named and its config laid out as asked for."""
    weights = {_renamed(name, naming): weight for name, weight in load_file(CHECKPOINT / "model.safetensors").items()}
    if naming == "mlx":
        kernel = "vlm.vision_tower.patch_embed.proj.weight"
        weights[kernel] = np.ascontiguousarray(weights[kernel].transpose(0, 2, 3, 4, 1))
    return write(folder, weights, config_of(config), shards=shards, preprocessor=preprocessor)


def write(
    folder: Path, weights: Weights, config: Mapping[str, Any], *, shards: int = 1, preprocessor: bool = True
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = ["tokenizer.json", "tokenizer_config.json", *(["preprocessor_config.json"] if preprocessor else [])]
    for name in names:
        shutil.copy(CHECKPOINT / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    placed = {name: files[place % shards] for place, name in enumerate(weights)}
    for file in files:
        save_file({name: weights[name] for name in weights if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def config_of(kind: Config) -> dict[str, Any]:
    """The reference's config.json, its text keys where transformers 4 (beside), 5 or colpali-engine puts them."""
    outer: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text())
    inner: dict[str, Any] = outer["vlm_config"]
    if kind in ("nested", "transformers5", "colpali5"):
        inner = {key: value for key, value in inner.items() if key not in _TEXT_KEYS}
    if kind in ("beside", "colpali"):
        del inner["text_config"]
        inner["vision_config"]["in_chans"] = inner["vision_config"]["in_channels"]
        for key in _LEFT_OUT:
            del inner["vision_config"][key]
    if kind in ("transformers5", "colpali5"):
        text = inner["text_config"]
        text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta"), "type": "mrope"}
        text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
        inner["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    if kind in ("colpali", "colpali5"):
        return {**inner, "architectures": ["ColQwen2_5"]}
    return {**outer, "vlm_config": inner}


def reference_items(*, resized: bool = True) -> dict[str, Item]:
    """What the reference vectors are of, by their names; `resized` adds the page that has to be resized."""
    queries = json.loads((DATA / "queries.json").read_text())
    items = {f"query_{place}": Item(text, "Query: ", "query") for place, text in enumerate(queries)}
    items |= {f"document_{place}": Item(text, "", "document") for place, text in enumerate(queries)}
    names = ["image_0", "image_1", *(["page_resized"] if resized else [])]
    return items | {name: Item(EncodedImage((DATA / f"{name}.png").read_bytes())) for name in names}


def reference_vectors() -> Vectors:
    """colpali-engine's, by name: unit vectors, [tokens, 128]."""
    return load_file(DATA / "expected.safetensors")


def least_cosine(rows: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Of any token with its counterpart."""
    assert rows.shape == expected.shape
    wide = rows.astype(np.float64)
    return float((wide / np.linalg.norm(wide, axis=1, keepdims=True) * expected).sum(axis=1).min())


def _renamed(name: str, naming: str) -> str:
    for own, other in zip(NAMINGS["hub"], NAMINGS[naming], strict=True):
        if name.startswith(own):
            return other + name.removeprefix(own)
    raise AssertionError(name)


def embed(model: Backend, items: Sequence[Item]) -> list[NDArray[np.float32]]:
    """All in one ragged batch."""
    return list(model.run(model.collate(model.prepare(items))))


def worst(model: Backend, names: Sequence[str] | None = None, expected: Vectors | None = None) -> float:
    """The least cosine of any token of these items, all in one batch, with the reference's."""
    items, expected = reference_items(), expected or reference_vectors()
    names = list(items) if names is None else names
    rows = embed(model, [items[name] for name in names])
    return min(least_cosine(row, expected[name]) for name, row in zip(names, rows, strict=True))
