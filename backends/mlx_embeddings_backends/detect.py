"""A checkpoint's own files decide which class loads it. Names map to import strings, which are resolved when chosen."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mlx_embeddings_backends.base import Backend, LoadOptions
from mlx_embeddings_backends.errors import MissingDependency, UnsupportedModel

SENTENCE_TRANSFORMER = "mlx_embeddings_backends.torch.sentence_transformer:SentenceTransformerBackend"

# `model_type`s of config.json, each held to sentence-transformers' own vectors by a test.
TEXT_ENCODERS = (
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "gemma3_text", "gpt2", "llama",
    "longformer", "mistral", "modernbert", "mpnet", "mt5", "nomic_bert", "qwen2", "qwen3", "roberta", "t5",
    "xlm-roberta",
)  # fmt: skip

# Modules of modules.json, by class name. sentence-transformers imports whatever class a local folder names, its own
# .py files too: nothing outside this list and that package gets so far.
MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout", "WeightedLayerPooling")


@dataclass(frozen=True, slots=True)
class Choice:
    """The class that will load a checkpoint, and why."""

    target: str  # "module:class"
    backend: Literal["torch", "mlx"]
    reason: str


def choose(folder: Path, backend: str = "auto") -> Choice:
    """Read the checkpoint's files. Raises `UnsupportedModel` with what is known, and what was found."""
    architecture = _text_encoder(folder)
    if backend == "mlx":
        raise UnsupportedModel(f"the MLX backend cannot run the architecture {architecture!r}: use --backend torch")
    reason = "asked for" if backend == "torch" else f"the MLX backend has no {architecture!r}"
    return Choice(SENTENCE_TRANSFORMER, "torch", reason)


def load(choice: Choice, folder: Path, options: LoadOptions) -> Backend:
    """Import the chosen class and load the checkpoint with it."""
    module_name, _, class_name = choice.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"the {choice.backend} backend needs the package {error.name!r}: `uv sync` or `pip install {error.name}`"
        ) from error
    return cast(Backend, getattr(module, class_name)(folder, options))


def _text_encoder(folder: Path) -> str:
    """The `model_type` of a text encoder, once everything around it is known to be one that is run as it should be."""
    if not (folder / "modules.json").exists():
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise UnsupportedModel("this is an adapter without its base model: adapters cannot be served")
        return _architecture(folder / "config.json")
    modules = _read_json(folder / "modules.json")
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise UnsupportedModel("modules.json is not a list of modules")
    for module in modules:
        _check_module(folder, module)
    if _class_name(modules[0]) != "Transformer":
        raise UnsupportedModel("the first module of modules.json must be a Transformer")
    return _architecture(_inside(folder, modules[0]) / "config.json")


def _check_module(folder: Path, module: dict[str, Any]) -> None:
    kind = str(module.get("type", ""))
    if not kind.startswith("sentence_transformers.") or _class_name(module) not in MODULES:
        raise UnsupportedModel(f"modules.json names {kind!r}; known modules: {', '.join(MODULES)}")
    if _class_name(module) == "Dense":
        activation = _read_object(_inside(folder, module) / "config.json").get("activation_function", "torch.nn.Tanh")
        # sentence-transformers would put Tanh in its place: other vectors, without an error.
        if not str(activation).startswith("torch.nn."):
            raise UnsupportedModel(f"a Dense module has the activation {activation!r}, which is not one of torch.nn")


def _inside(folder: Path, module: dict[str, Any]) -> Path:
    path = folder / str(module.get("path", ""))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UnsupportedModel("modules.json names a path outside the model's folder")
    return path


def _class_name(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _architecture(config_file: Path) -> str:
    config = _read_object(config_file)
    model_type, listed = config.get("model_type"), config.get("architectures")
    architectures = [str(name) for name in listed] if isinstance(listed, list) else []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UnsupportedModel(
            f"{architectures[0]} scores pairs of texts (a reranker or classifier): it has no embeddings"
        )
    if model_type not in TEXT_ENCODERS:
        own_code = " It brings its own code, which this server never runs." if config.get("auto_map") else ""
        raise UnsupportedModel(f"unknown architecture {model_type!r}.{own_code} Known: {', '.join(TEXT_ENCODERS)}")
    return str(model_type)


def _read_object(file: Path) -> dict[str, Any]:
    content = _read_json(file)
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{file.name} is not a JSON object")
    return content


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UnsupportedModel(f"the model's folder has no {file.name}") from None
    except ValueError as error:
        raise UnsupportedModel(f"{file.name} is not JSON: {error}") from error
