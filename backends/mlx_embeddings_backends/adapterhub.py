"""AdapterHub's adapters, in which SPECTER2 comes: small layers within those of a base, chosen for each request.

Of its many forms one is computed here: a bottleneck behind each layer's feed-forward block (Pfeiffer et al.,
https://arxiv.org/abs/2005.00247). With h what the block's last linear layer gives, r the block's input, f the
non-linearity, and the layer's own LayerNorm LN, which is applied twice, the layer gives

    LN(h + r + up(f(down(LN(h + r)))))

Any other form is refused by name, never approximated. Keys, defaults and names are those of `adapters` 1.3.0.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_object

ARCHITECTURES: Final = ("bert",)

# SPECTER2's adapters carry the control tokens of its training as names.
_NAMES: Final = {"[PRX]": "proximity", "[QRY]": "adhoc_query", "[CLF]": "classification", "[RGN]": "regression"}

# What a config has to say for the formula above to be the adapter's.
_FORMULA: Final[Mapping[str, Any]] = {
    "architecture": None,
    "output_adapter": True,
    "mh_adapter": False,
    "cross_adapter": False,
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "phm_layer": False,
    "leave_out": [],
    "inv_adapter": None,
    "invertible_adapter": None,
}
# What AdapterHub takes in place of a key that is missing, where that is something else. MISSING: it takes nothing.
_MISSING: Final = object()
_OTHER_DEFAULTS: Final = {"output_adapter": _MISSING, "mh_adapter": _MISSING, "original_ln_before": False}
# Of training, or of what the formula does not have.
_WITHOUT_EFFECT: Final = frozenset({
    "adapter_residual_before_ln", "dropout", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity",
    "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "learn_phm", "phm_bias", "phm_c_init",
    "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule", "stochastic_depth",
})  # fmt: skip
# Configs that AdapterHub has names for, and which are the formula's.
_SEQ_BN: Final = {
    "output_adapter": True, "mh_adapter": False, "original_ln_before": True, "non_linearity": "relu",
    "reduction_factor": 16,
}  # fmt: skip
_NAMED: Final = {"pfeiffer": _SEQ_BN, "seq_bn": _SEQ_BN}
# As both backends call them.
_NON_LINEARITIES: Final = {"gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}

_FILES: Final = ("adapter.safetensors", "pytorch_adapter.bin")
# The base within another model or not, and of the adapter's name what a part of PyTorch's names can be.
_WEIGHT: Final = re.compile(
    r"(?:\w+\.)*encoder\.layer\.(\d{1,4})\.output\.adapters\.([^.]+)\.adapter_(down\.0|up)\.(weight|bias)"
)


class Array(Protocol):
    """torch's or MLX's."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


A = TypeVar("A", bound=Array)


@dataclass(frozen=True, slots=True)
class Bottleneck(Generic[A]):
    """Weights of one layer's `down` and `up`."""

    down_weight: A  # [bottleneck, dim]
    down_bias: A  # [bottleneck]
    up_weight: A  # [dim, bottleneck]
    up_bias: A  # [dim]


@dataclass(frozen=True, slots=True)
class Adapter(Generic[A]):
    """The layers in order, and the name of the non-linearity, as transformers has it, between `down` and `up`."""

    non_linearity: str
    layers: tuple[Bottleneck[A], ...]


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is AdapterHub's, and not PEFT's."""
    return "peft_type" not in config and "model_type" in config


def own_name(config: Mapping[str, Any]) -> str:
    """What an adapter is called by where the user gives it no name."""
    name = str(config.get("name") or "default")
    return _NAMES.get(name, name)


def read(
    folders: Mapping[str, Path], base: Mapping[str, Any], read_tensors: Callable[[Path], Mapping[str, A]]
) -> dict[str, Adapter[A]]:
    """The adapters in `folders`, by name and in their order. `base` is the config.json of the model they are for.

    `read_tensors` reads a file of safetensors or a pickle, as its suffix says. Raises a `ModelError` that names the
    adapter.
    """
    adapters = {}
    for name, folder in folders.items():
        with _named(name):
            adapters[name] = _read(folder, base, read_tensors)
    return adapters


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise type(error)(f"the adapter {name!r}: {error}") from error


def _read(folder: Path, base: Mapping[str, Any], read_tensors: Callable[[Path], Mapping[str, A]]) -> Adapter[A]:
    outer = read_object(folder / "adapter_config.json")
    config = _config(outer)
    for key in ("model_type", "hidden_size"):
        if outer.get(key) != base.get(key):
            raise UnsupportedModel(
                f"adapter_config.json has {key} {_json(outer.get(key))}, and its base model's config.json "
                f"{_json(base.get(key))}: it was made for another model"
            )
    _check(config)
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"its folder has no weights: no {_FILES[0]}, and no {_FILES[1]}")
    found = _by_layer(read_tensors(file), file.name)
    dim, count = int(base["hidden_size"]), int(base["num_hidden_layers"])
    if unknown := sorted(layer for layer, _ in found if layer >= count):
        raise UnsupportedModel(f"{file.name} has weights of layer {unknown[0]}, and its base model {count} layers")
    layers = tuple(
        _bottleneck(found, layer, dim, _bottleneck_size(config, layer, dim), file.name) for layer in range(count)
    )
    return Adapter(_non_linearity(config, outer), layers)


def _config(outer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What describes the adapter itself: an object within adapter_config.json, or a name that AdapterHub has for it."""
    config = outer.get("config")
    if isinstance(config, str) and config in _NAMED:
        return _NAMED[config]
    if not isinstance(config, dict):
        raise UnsupportedModel(
            f"adapter_config.json has config {_json(config)}, which is not supported: it must be an object, or one of "
            f"{', '.join(_NAMED)}"
        )
    return config


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what the formula is not, and what is not known here: it could change the vectors."""
    for key, expected in _FORMULA.items():
        value = config.get(key, _OTHER_DEFAULTS.get(key, expected))
        if value == expected and isinstance(value, bool) == isinstance(expected, bool):
            continue
        default = "" if value is _MISSING else f", for which AdapterHub takes {_json(value)}"
        what = f"has {key} {_json(value)}" if key in config else f"lacks {key}{default}"
        raise UnsupportedModel(f"adapter_config.json {what}, which is not supported: it must be {_json(expected)}")
    known = _FORMULA.keys() | _WITHOUT_EFFECT | {"non_linearity", "reduction_factor"}
    for key, value in config.items():
        if key not in known and value:
            raise UnsupportedModel(f"adapter_config.json has {key} {_json(value)}, which is not known")


def _non_linearity(config: Mapping[str, Any], outer: Mapping[str, Any]) -> str:
    name = config.get("non_linearity")
    own = _NON_LINEARITIES.get(name.lower()) if isinstance(name, str) else None
    if own is None:
        raise UnsupportedModel(
            f"adapter_config.json has non_linearity {_json(name)}, which is not supported: it must be one of "
            f"{', '.join(_NON_LINEARITIES)}"
        )
    if own == "gelu" and "version" not in outer:
        raise UnsupportedModel(
            "adapter_config.json has non_linearity gelu and no version: before AdapterHub's versions had numbers, that "
            "was another function; save it anew with the `adapters` library"
        )
    return own


def _bottleneck_size(config: Mapping[str, Any], layer: int, dim: int) -> int:
    factor = config.get("reduction_factor")
    if isinstance(factor, dict):
        factor = factor.get(str(layer), factor.get("default"))
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1e-3 <= factor <= 1e6:
        raise UnsupportedModel(
            f"adapter_config.json has reduction_factor {_json(config.get('reduction_factor'))}, which is not "
            f"supported: it must be a number, or an object that has one for layer {layer}"
        )
    return max(1, int(dim // factor))


def _by_layer(weights: Mapping[str, A], file_name: str) -> dict[tuple[int, str], A]:
    """By layer and part, such as (0, "down.0.weight"). All have to be of one adapter, whatever it calls itself."""
    found: dict[tuple[int, str], A] = {}
    adapters = set()
    for name, weight in weights.items():
        match = _WEIGHT.fullmatch(name)
        if match is None:
            raise UnsupportedModel(f"{file_name} has {name[:200]!r}, which is not supported")
        layer, adapter, side, kind = match.groups()
        adapters.add(adapter)
        if found.setdefault((int(layer), f"{side}.{kind}"), weight) is not weight:
            raise UnsupportedModel(f"{file_name} has {name[:200]!r} twice, by two names for it")
    if len(adapters) > 1:
        raise UnsupportedModel(f"{file_name} has weights of {len(adapters)} adapters: only one is supported")
    return found


def _bottleneck(found: Mapping[tuple[int, str], A], layer: int, dim: int, size: int, file_name: str) -> Bottleneck[A]:
    def take(part: str, *shape: int) -> A:
        weight = found.get((layer, part))
        if weight is None:
            raise UnsupportedModel(f"{file_name} lacks adapter_{part} of layer {layer}")
        if tuple(weight.shape) != shape:
            raise UnsupportedModel(
                f"{file_name} has adapter_{part} of layer {layer} as {list(weight.shape)}: by adapter_config.json it "
                f"is {list(shape)}"
            )
        if not re.search(r"\b(bfloat16|float(16|32|64))$", str(weight.dtype)):
            raise UnsupportedModel(f"{file_name} has adapter_{part} of layer {layer} as {weight.dtype}")
        return weight

    return Bottleneck(
        take("down.0.weight", size, dim), take("down.0.bias", size), take("up.weight", dim, size), take("up.bias", dim)
    )


def _json(value: object) -> str:
    return json.dumps(value)[:80]
