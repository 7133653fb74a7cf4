"""ColQwen2.5 checkpoints: their configs and weight names, in every layout that is about, made into one.

Layouts: transformers' (`vlm_config` inside, weights `vlm.*`), colpali-engine's (Qwen2.5-VL's own config, weights
`visual.*`, `model.*`, `custom_text_proj.*`), and the MLX conversions of either.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from mlx_embeddings_backends.errors import UnsupportedModel
from mlx_embeddings_backends.files import read_object

Json = Mapping[str, Any]

# transformers' `save_pretrained` leaves out of a nested config what equals its class's defaults, which are these.
VISION_DEFAULTS: Final[Json] = {
    "depth": 32, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu",
}  # fmt: skip
TEXT_DEFAULTS: Final[Json] = {"max_position_embeddings": 32768, "rope_theta": 1_000_000.0, "hidden_act": "silu"}
TOKEN_DEFAULTS: Final = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
EMBEDDING_DIM: Final = 128  # of colpali-engine, which writes it into no file
MOST: Final = 10_000_000  # no size of a model exceeds it; layers are held to less
MOST_LAYERS: Final = 1000

# The text model's keys: they stand in `text_config`, or, as transformers 4 wrote them, beside it.
TEXT_SIZES: Final = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
TEXT_KEYS: Final = (
    *TEXT_SIZES, "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window",
    "sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The language model. Names are those of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # of half a head's dimensions: those of time, row and column

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower. Names are those of config.json; sizes of patches and windows are in pixels."""

    depth: int
    hidden_size: int
    intermediate_size: int
    out_hidden_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]

    @property
    def patch_dim(self) -> int:
        """Values of one patch as it enters the tower: three channels, and the still image as every frame."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches of a whole window."""
        return (self.window_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class ColQwenConfig:
    """All that decides a ColQwen2.5's vectors, but its weights and its processor."""

    text: TextConfig
    vision: VisionConfig
    embedding_dim: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int

    def as_transformers(self) -> dict[str, Any]:
        """What transformers' `Qwen2_5_VLConfig` is made of: `Qwen2_5_VLConfig(**config.as_transformers())`."""
        text, vision = self.text, self.vision
        rope = {"rope_type": "default", "rope_theta": text.rope_theta, "mrope_section": list(text.mrope_section)}
        return {
            "text_config": {
                **{key: getattr(text, key) for key in TEXT_SIZES},
                "rms_norm_eps": text.rms_norm_eps,
                "hidden_act": "silu",
                "rope_parameters": rope,
                "bos_token_id": None,
                "eos_token_id": None,
            },
            "vision_config": {
                **{key: getattr(vision, key) for key in VisionConfig.__dataclass_fields__},
                "fullatt_block_indexes": list(vision.fullatt_block_indexes),
                "hidden_act": "silu",
                "in_channels": 3,
            },
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "tie_word_embeddings": True,
        }


def read_config(folder: Path) -> ColQwenConfig:
    """The config.json in `folder`. Raises `UnsupportedModel` that names the key which is missing or is not known."""
    outer = read_object(folder / "config.json")
    inner = outer["vlm_config"] if isinstance(outer.get("vlm_config"), dict) else outer
    if inner.get("model_type") != "qwen2_5_vl":
        raise UnsupportedModel(f"config.json is of {inner.get('model_type')!r}, where 'qwen2_5_vl' is expected")
    nested = _object(inner, "text_config") if inner.get("text_config") is not None else {}
    text = _text_config(_text_keys(inner, nested))
    vision = _vision_config({**VISION_DEFAULTS, **_object(inner, "vision_config")})
    if vision.out_hidden_size != text.hidden_size:
        raise UnsupportedModel(
            f"config.json: vision_config.out_hidden_size is {vision.out_hidden_size}, hidden_size {text.hidden_size}"
        )
    tokens = {**TOKEN_DEFAULTS, **nested, **inner}
    return ColQwenConfig(
        text=text,
        vision=vision,
        embedding_dim=_size({"embedding_dim": EMBEDDING_DIM, **outer}, "embedding_dim"),
        **{key: _size(tokens, key) for key in TOKEN_DEFAULTS},
    )


def canonical_name(name: str) -> str | None:
    """A weight's name as this package has it: `visual.*`, `language_model.*` or `embedding_proj_layer.*`.

    After `language_model.` come `layers.N.*`, `embed_tokens.*` or `norm.*`. None: a weight that is not used.
    Raises `UnsupportedModel` where the name belongs to no known layout.
    """
    rest = name.removeprefix("base_model.model.").removeprefix("vlm.").removeprefix("model.")
    rest = rest.replace("language_model.model.", "language_model.", 1) if rest.startswith("language_model.") else rest
    module, _, inside = rest.partition(".")
    if module == "lm_head" or rest.startswith("language_model.lm_head.") or rest.endswith(".inv_freq"):
        return None
    match module:
        case "visual" | "vision_tower":
            return f"visual.{inside}"
        case "language_model":
            return rest
        case "layers" | "embed_tokens" | "norm":
            return f"language_model.{rest}"
        case "embedding_proj_layer" | "custom_text_proj":
            return f"embedding_proj_layer.{inside}"
    raise UnsupportedModel(f"the weights have {name!r}, which is no name of a ColQwen2.5's")


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Names in the files -> canonical names, without those that are not used. Two that become one are refused."""
    canonical: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name in names:
        known = canonical_name(name)
        if known is None:
            continue
        if known in origin:
            raise UnsupportedModel(f"the weights {origin[known]!r} and {name!r} are the same one twice")
        canonical[name] = known
        origin[known] = name
    return canonical


def _text_keys(inner: Json, nested: Json) -> Json:
    """The text model's keys from `text_config`, from beside it, or from both where they agree."""
    beside = {key: inner[key] for key in TEXT_KEYS if inner.get(key) is not None}
    for key in (*TEXT_SIZES, "rms_norm_eps"):
        if key in nested and key in beside and nested[key] != beside[key]:
            raise UnsupportedModel(f"config.json: {key} is {beside[key]!r}, and {nested[key]!r} in text_config")
    return {**TEXT_DEFAULTS, **beside, **{key: nested[key] for key in TEXT_KEYS if nested.get(key) is not None}}


def _text_config(keys: Json) -> TextConfig:
    _require_silu(keys, "hidden_act")
    rope = _rope(keys)
    sizes = {key: _size(keys, key) for key in TEXT_SIZES}
    config = TextConfig(
        **sizes,
        rms_norm_eps=_positive(keys, "rms_norm_eps"),
        rope_theta=_positive({"rope_theta": keys["rope_theta"], **rope}, "rope_theta"),
        mrope_section=_mrope_section(rope),
    )
    if config.num_hidden_layers > MOST_LAYERS:
        raise _wrong("num_hidden_layers", config.num_hidden_layers)
    if config.hidden_size % config.num_attention_heads or config.head_dim % 2:
        raise _wrong("num_attention_heads", config.num_attention_heads)
    if config.num_attention_heads % config.num_key_value_heads:
        raise _wrong("num_key_value_heads", config.num_key_value_heads)
    if sum(config.mrope_section) * 2 != config.head_dim:
        raise UnsupportedModel(
            f"config.json: mrope_section {list(config.mrope_section)} does not add up to half of a head's "
            f"{config.head_dim} dimensions"
        )
    _check_no_sliding_window(keys, config.num_hidden_layers)
    return config


def _check_no_sliding_window(keys: Json, layers: int) -> None:
    slides = keys.get("use_sliding_window") and keys.get("sliding_window")
    kinds = keys.get("layer_types", [])
    if (
        slides
        and _size(keys, "max_window_layers") < layers
        or not isinstance(kinds, list)
        or "sliding_attention" in kinds
    ):
        raise UnsupportedModel("config.json: attention in a sliding window (use_sliding_window) is not known here")


def _rope(keys: Json) -> Json:
    """`rope_parameters` (transformers 5) or `rope_scaling`."""
    key = "rope_parameters" if "rope_parameters" in keys else "rope_scaling"
    rope = _object(keys, key)
    # Qwen's own files say mrope; transformers rewrites that to default and may leave both.
    kinds = {str(rope[name]) for name in ("rope_type", "type") if name in rope}
    if not kinds <= {"default", "mrope"}:
        raise UnsupportedModel(f"config.json: {key} is of type {sorted(kinds)}, where only mrope is known")
    return rope


def _mrope_section(rope: Json) -> tuple[int, int, int]:
    section = rope.get("mrope_section")
    if not isinstance(section, list) or len(section) != 3 or not all(_is_size(part) for part in section):
        raise _wrong("mrope_section", section)
    time, row, column = section
    return time, row, column


def _vision_config(keys: Json) -> VisionConfig:
    _require_silu(keys, "hidden_act")
    for key in ("in_channels", "in_chans"):
        if keys.get(key, 3) != 3:
            raise _wrong(f"vision_config.{key}", keys[key])
    rope = keys.get("rope_parameters")
    if rope is not None and (not isinstance(rope, dict) or rope.get("rope_theta", 10000.0) != 10000.0):
        raise _wrong("vision_config.rope_parameters", rope)
    full = keys["fullatt_block_indexes"]
    sizes = {key: _size(keys, key) for key in VisionConfig.__dataclass_fields__ if key != "fullatt_block_indexes"}
    if not isinstance(full, list) or not all(isinstance(each, int) and 0 <= each < sizes["depth"] for each in full):
        raise _wrong("vision_config.fullatt_block_indexes", full)
    config = VisionConfig(**sizes, fullatt_block_indexes=tuple(full))
    if config.depth > MOST_LAYERS:
        raise _wrong("vision_config.depth", config.depth)
    if config.hidden_size % config.num_heads or (config.hidden_size // config.num_heads) % 4:
        raise _wrong("vision_config.num_heads", config.num_heads)
    if config.patch_size > 256 or config.temporal_patch_size > 16 or config.spatial_merge_size > 16:
        raise UnsupportedModel("config.json: vision_config has patches larger than are known")
    unit = config.patch_size * config.spatial_merge_size
    if config.window_size % unit or config.window_size > 64 * unit:
        raise _wrong("vision_config.window_size", config.window_size)
    return config


def _require_silu(keys: Json, key: str) -> None:
    if keys[key] != "silu":
        raise _wrong(key, keys[key])


def _size(keys: Json, key: str) -> int:
    value = keys.get(key)
    if not _is_size(value):
        raise _wrong(key, value)
    return value


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


def _positive(keys: Json, key: str) -> float:
    value = keys.get(key)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _wrong(key, value)
    return float(value)


def _object(keys: Json, key: str) -> Json:
    value = keys.get(key)
    if not isinstance(value, dict):
        raise _wrong(key, value)
    return value


def _wrong(key: str, value: Any) -> UnsupportedModel:
    if value is None:
        return UnsupportedModel(f"config.json lacks {key}, without which the vectors cannot be known")
    return UnsupportedModel(f"config.json: {key} is {value!r:.80}, which is not known here")
