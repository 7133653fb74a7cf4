"""LoRA adapters in PEFT's format: which weights of a ColQwen2.5 they change, and by what. Needs neither torch nor mlx.

A backend that has the base's weights by their canonical names merges an adapter into them:

    plan = lora.read(folder)
    tensors = load_file(plan.file)  # safetensors.torch, or mx.load
    lora.merge(weights, tensors, plan, widen=Tensor.float, narrow=lambda merged: merged.to(dtype))
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from mlx_embeddings_backends.colqwen.checkpoint import canonical_name
from mlx_embeddings_backends.errors import UnsupportedModel
from mlx_embeddings_backends.files import read_object

PREFIX: Final = "base_model.model."
# What is said of how the adapter was trained, or for which modules, which the files' own names say too.
WITHOUT_EFFECT: Final = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
})  # fmt: skip
READ: Final = frozenset({
    "alpha_pattern", "init_lora_weights", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern",
    "use_rslora",
})  # fmt: skip
# Initialisations that leave the base's weights as they are; PiSSA, OLoRA, CorDA and LoftQ change those too.
INITIALISATIONS: Final = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class Update:
    """`weight += scale * B @ A`."""

    target: str  # the weight's canonical name, [out, in]
    a: str  # a tensor's name in the adapter's file, [rank, in]
    b: str  # likewise, [out, rank]
    scale: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What an adapter does to its base."""

    file: Path
    updates: tuple[Update, ...]
    replacements: Mapping[str, str]  # canonical name -> the name in the file of what stands in its place


def read(folder: Path) -> Plan:
    """The adapter in `folder`: adapter_config.json, and the names and shapes in adapter_model.safetensors.

    Raises `UnsupportedModel` for all that is not plain LoRA, or where files and config do not agree.
    """
    config = read_object(folder / "adapter_config.json")
    _check(config)
    file = folder / "adapter_model.safetensors"
    shapes = _shapes(file)
    pairs: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for name in shapes:
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
            if name != pairs.setdefault(match[1], {}).setdefault(match[2], name):
                raise UnsupportedModel(f"the adapter's {name!r} is there twice")
        elif (target := _replaced(name, config)) is not None:
            replacements[target] = name
    updates = []
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise UnsupportedModel(f"the adapter has only one of lora_A and lora_B for {module!r}")
        if (target := canonical_name(f"{module}.weight")) is not None:
            scale = _scale(config, module.removeprefix(PREFIX), shapes[pair["A"]], shapes[pair["B"]])
            updates.append(Update(target, pair["A"], pair["B"], scale))
    targets = [*replacements, *(update.target for update in updates)]
    if len(set(targets)) != len(targets):
        raise UnsupportedModel("the adapter changes a weight twice, by two names for it")
    return Plan(file, tuple(updates), replacements)


def merge(
    weights: dict[str, Any],
    tensors: Mapping[str, Any],
    plan: Plan,
    *,
    widen: Callable[[Any], Any],
    narrow: Callable[[Any], Any],
) -> None:
    """Change `weights`, by canonical name, in place. `tensors` is what `plan.file` holds; arrays are torch's or MLX's.

    Sums and products are taken of what `widen` gives, which is to be float32; `narrow` gives the dtype that the model
    has. Raises `UnsupportedModel` where the base has not the weight that an update is for, or has it in another shape.
    """
    for target, name in plan.replacements.items():
        weights[target] = narrow(tensors[name])
    for update in plan.updates:
        a, b = tensors[update.a], tensors[update.b]
        weight = weights.get(update.target)
        if weight is None:
            raise UnsupportedModel(f"the adapter changes {update.target!r}, which its base model has not")
        if tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise UnsupportedModel(
                f"the adapter changes {update.target!r} as [{b.shape[0]}, {a.shape[1]}], "
                f"and its base model has it as {list(weight.shape)}"
            )
        weights[update.target] = narrow(widen(weight) + update.scale * (widen(b) @ widen(a)))


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what is not LoRA, and every option that is set and not known here: it would change the vectors."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(f"the adapter is of type {config.get('peft_type')!r}: only LORA is known")
    if config.get("init_lora_weights") not in INITIALISATIONS:
        raise UnsupportedModel(
            f"the adapter was initialised by {config['init_lora_weights']!r}, which changes its base model too: "
            "convert it to plain LoRA, as PEFT's save_pretrained does"
        )
    for key, value in config.items():
        if key not in WITHOUT_EFFECT | READ and value and value != "none":
            raise UnsupportedModel(f"adapter_config.json has {key} = {value!r:.80}: only plain LoRA is known")


def _shapes(file: Path) -> dict[str, Sequence[int]]:
    """Of each tensor in the file, by its name there."""
    if not file.exists():
        if file.with_suffix(".bin").exists():
            raise UnsupportedModel("the adapter is a pickle, adapter_model.bin: convert it to safetensors")
        raise UnsupportedModel(f"the adapter's folder has no {file.name}")
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UnsupportedModel(f"{file.name} is not a safetensors file: {error}") from error


def _replaced(name: str, config: Mapping[str, Any]) -> str | None:
    """The canonical name of a weight that the adapter carries whole, as `modules_to_save` allows."""
    module = name.rpartition(".")[0]
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not any(f".{module}".endswith(f".{each}") for each in saved):
        raise UnsupportedModel(f"the adapter has {name!r}, which is neither lora_A nor lora_B")
    return canonical_name(name)


def _scale(config: Mapping[str, Any], module: str, a: Sequence[int], b: Sequence[int]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (https://arxiv.org/abs/2312.03732)."""
    rank = _of_pattern(config, "rank_pattern", module, config.get("r"))
    alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank > 0:
        raise UnsupportedModel(
            f"the adapter is of rank {rank} by adapter_config.json, and has {list(a)} and {list(b)} for {module!r}"
        )
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UnsupportedModel(f"adapter_config.json: alpha is {alpha!r}")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The first pattern that the module's name ends in, as PEFT matches them."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise UnsupportedModel(f"adapter_config.json: {key} is {patterns!r:.80}")
    for pattern, value in patterns.items():
        # Patterns are regular expressions: without groups and repetition, none can take for ever.
        if not re.fullmatch(r"[\w.^$\\|-]+", pattern):
            raise UnsupportedModel(f"adapter_config.json: {key} has {pattern!r:.80}: only names are known")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise UnsupportedModel(f"adapter_config.json: {key} has {pattern!r:.80}: {error}") from error
    return default
