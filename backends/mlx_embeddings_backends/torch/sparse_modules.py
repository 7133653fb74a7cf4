"""A folder's sparse encoder as sentence-transformers' modules, on the CPU, in float32 whatever the files hold.

The modules load themselves, and `detect` has looked at what the folder names: no class beyond those below is imported.
The library's SparseEncoder itself would make up an autoencoder for a folder that is none.
"""

import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, cast

import torch
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling, WeightedLayerPooling
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseStaticEmbedding, SpladePooling
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from mlx_embeddings_backends.base import Role
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_json, read_object, read_optional_object, weight_files
from mlx_embeddings_backends.torch.sparse_autoencoder import SparseAutoEncoder
from mlx_embeddings_backends.torch.tensor_files import read_tensors

ROLES: Final[tuple[Role | None, ...]] = (None, "query", "document")


@dataclass(frozen=True, slots=True)
class SparseModules:
    """`routes`: the modules that a text goes through, by what it is embedded as. Several may be the same objects."""

    routes: dict[Role | None, list[nn.Module]]
    prompts: dict[str, str]
    default_prompt: str | None
    most_values: int | None  # of a vector that are kept, the largest


def load(folder: Path) -> SparseModules:
    """Runs no code of the files, and unpickles tensors only. Raises `ModelError`."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        first, *rest = _load_modules(folder)
    except pickle.UnpicklingError as error:
        raise UnsupportedModel(
            "the weights are a pickle with more than tensors in it, which could run any code: convert it to safetensors"
        ) from error
    config = read_optional_object(folder / "config_sentence_transformers.json")
    saved = config.get("prompts")
    prompts = {"query": "", "document": ""}
    if isinstance(saved, dict):
        prompts |= {str(name): str(prompt or "") for name, prompt in saved.items()}
    default_prompt, most_values = config.get("default_prompt_name"), config.get("max_active_dims")
    if default_prompt is not None and default_prompt not in prompts:
        raise ModelError(f"the checkpoint's default_prompt_name is {default_prompt!r}, which is none of its prompts")
    is_number = isinstance(most_values, int) and not isinstance(most_values, bool)
    if most_values is not None and (not is_number or most_values < 1):
        raise ModelError(f"the checkpoint's max_active_dims is {most_values!r}: it must be a number from 1")
    return SparseModules({role: _route(first, rest, role) for role in ROLES}, prompts, default_prompt, most_values)


def _route(first: nn.Module, rest: list[nn.Module], role: Role | None) -> list[nn.Module]:
    if not isinstance(first, Router):
        return [first, *rest]
    try:
        name = cast("str", first._resolve_route(task=role, modality="text"))
    except ValueError as error:
        task = "a text of no role" if role is None else f"a {role}"
        raise UnsupportedModel(f"the checkpoint's Router has no route for {task}") from error
    return [*cast("nn.Sequential", first.sub_modules[name]), *rest]


def _load_modules(folder: Path) -> list[nn.Module]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model_kwargs = {"dtype": torch.float32}
    if not (folder / "modules.json").exists():
        transformer = Transformer(
            str(folder),
            transformer_task="fill-mask",
            model_kwargs=options | model_kwargs,
            processor_kwargs=dict(options),
            config_kwargs=dict(options),
        )
        return [transformer, SpladePooling(pooling_strategy="max")]
    modules: list[nn.Module] = []
    for entry in read_json(folder / "modules.json"):
        kind, path = _class_of(entry["type"]), str(entry["path"])
        own = {"module_classes": _route_classes(folder / path)} if kind is Router else {}
        modules.append(kind.load(str(folder), subfolder=path, model_kwargs=model_kwargs, **options, **own))
    return modules


def _route_classes(router: Path) -> dict[str, Any]:
    """The classes that a Router's folder names, in the file that it would read itself."""
    config = read_optional_object(router / Router.config_file_name) or read_object(router / "config.json")
    return {name: _class_of(name) for name in config["types"].values()}


def _class_of(name: str) -> Any:
    return _CLASSES[name.rpartition(".")[2]]


class StaticEmbedding(SparseStaticEmbedding):
    """Reads its files from its own folder: the library looks for a JSON of weights where the process was started."""

    # Of the library's parameters those that are for downloads come to nothing here: they are taken, and not named,
    # which mypy sees as another signature.
    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **_: Any) -> Self:  # type: ignore[override]
        root = Path(model_name_or_path)
        folder = root / subfolder
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        path = read_optional_object(folder / "config.json").get("path")
        if isinstance(path, str) and path.endswith(".json"):
            weight = _weights_of_tokens(path, [folder, root], tokenizer)
        else:
            weights = {name: each for file in weight_files(folder) for name, each in read_tensors(file).items()}
            if set(weights) != {"weight"} or weights["weight"].ndim != 1:
                raise ModelError("the SparseStaticEmbedding's file does not hold one weight a token, and nothing else")
            weight = weights["weight"].float()
        if len(weight) < len(tokenizer):
            raise ModelError(f"the SparseStaticEmbedding has {len(weight)} weights for {len(tokenizer)} tokens")
        return cls(tokenizer, weight)


def _weights_of_tokens(path: str, folders: Sequence[Path], tokenizer: Any) -> Tensor:
    """Of a JSON object such as idf.json, in one of the folders -> [vocabulary]"""
    places = [folder / path for folder in folders if ".." not in Path(path).parts and not Path(path).is_absolute()]
    file = next(filter(Path.is_file, places), None)
    if file is None:
        raise ModelError(f"the SparseStaticEmbedding takes its weights from {path!r}, which the folder does not have")
    content = read_object(file)
    if not all(isinstance(value, int | float) for value in content.values()):
        raise ModelError(f"{file.name} is not an object of tokens and their weights")
    weight = torch.zeros(len(tokenizer))
    for token, value in content.items():
        weight[tokenizer.convert_tokens_to_ids(token)] = value
    return weight


_CLASSES: Final[dict[str, Any]] = {
    "Dense": Dense,
    "Dropout": Dropout,
    "LayerNorm": LayerNorm,
    "MLMTransformer": MLMTransformer,
    "Normalize": Normalize,
    "Pooling": Pooling,
    "Router": Router,
    "SparseAutoEncoder": SparseAutoEncoder,
    "SparseStaticEmbedding": StaticEmbedding,
    "SpladePooling": SpladePooling,
    "Transformer": Transformer,
    "WeightedLayerPooling": WeightedLayerPooling,
}
