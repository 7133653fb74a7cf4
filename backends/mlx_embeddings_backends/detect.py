"""A checkpoint's own files decide which class loads it. Names map to import strings, which are resolved when chosen."""

import importlib
import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mlx_embeddings_backends import adapterhub
from mlx_embeddings_backends.base import Backend, LoadOptions
from mlx_embeddings_backends.errors import MissingDependency, UnsupportedModel
from mlx_embeddings_backends.files import read_json, read_object

BackendName = Literal["torch", "mlx"]

SENTENCE_TRANSFORMER = "mlx_embeddings_backends.torch.sentence_transformer:SentenceTransformerBackend"
MLX_TEXT_ENCODER = "mlx_embeddings_backends.mlx.text_encoder:MlxTextEncoder"

# Text encoders by the `model_type` of their config.json, each held to sentence-transformers' own vectors by a test.
TEXT_ENCODERS = (
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "gemma3_text", "gpt2", "llama",
    "longformer", "mistral", "modernbert", "mpnet", "mt5", "nomic_bert", "qwen2", "qwen3", "roberta", "t5",
    "xlm-roberta",
)  # fmt: skip
MLX_TEXT_ENCODERS = ("bert", "modernbert", "qwen3", "xlm-roberta")
COLQWEN = "colqwen2_5"

VERIFIED: dict[BackendName, dict[str, str]] = {
    "torch": dict.fromkeys(TEXT_ENCODERS, SENTENCE_TRANSFORMER)
    | {
        COLQWEN: "mlx_embeddings_backends.torch.colqwen2_5:TorchColQwen2_5",
        "clip": "mlx_embeddings_backends.torch.clip:TransformersClip",
        "open_clip": "mlx_embeddings_backends.torch.open_clip:OpenClip",
        "siglip": "mlx_embeddings_backends.torch.clip:TransformersClip",
    },
    "mlx": dict.fromkeys(MLX_TEXT_ENCODERS, MLX_TEXT_ENCODER)
    | {
        COLQWEN: "mlx_embeddings_backends.mlx.colqwen2_5:MlxColQwen2_5",
        "siglip": "mlx_embeddings_backends.mlx.siglip:MlxSiglip",
    },
}
# What the libraries below have beside those: no test here compares its vectors with anything.
UNVERIFIED_MLX = dict.fromkeys(("gemma3_text", "lfm2"), MLX_TEXT_ENCODER)

# Modules of modules.json, by class name. sentence-transformers imports whatever class a local folder names, its own
# .py files too: nothing outside this list and that package gets so far.
MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout", "WeightedLayerPooling")


@dataclass(frozen=True, slots=True)
class Choice:
    """The class that will load a checkpoint, and why."""

    target: str  # "module:class"
    backend: BackendName
    reason: str
    verified: bool = True  # a test holds the architecture on this backend to the reference implementation


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter_config.json says of the model that it was made for."""

    kind: Literal["peft", "adapterhub"]
    name: str  # that requests call it by, where the user gives it no other
    base: str  # id or path
    revision: str | None = None  # of the base


def read_adapter(folder: Path) -> Adapter | None:
    """None: the folder holds no adapter, or a whole model too. Raises `UnsupportedModel` where no base is named."""
    if not (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
        return None
    config = read_object(folder / "adapter_config.json")
    if adapterhub.is_config(config):
        base, name = config.get("model_name"), adapterhub.own_name(config)
        if not isinstance(base, str) or not base:
            raise UnsupportedModel(
                "this is an adapter whose adapter_config.json names no base model: give it by --model, and this one by "
                f"--adapter {name}=..."
            )
        return Adapter("adapterhub", name, base)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise UnsupportedModel("this is an adapter whose adapter_config.json names no base model")
    return Adapter("peft", folder.name, base, revision if isinstance(revision, str) else None)


def choose(
    folder: Path,
    backend: str = "auto",
    *,
    base: Path | None = None,
    has_adapters: bool = False,
    allow_unverified: bool = False,
) -> Choice:
    """Read the checkpoint's files. Raises `UnsupportedModel` with what is known, and what was found.

    `base` is the folder of what a LoRA adapter in `folder` was made for. `has_adapters`: it is to be run with
    AdapterHub adapters. MLX is chosen by itself on Apple silicon, for what is verified there.
    """
    architecture = _adapted(base) if base is not None else _architecture(folder)
    if has_adapters and architecture not in adapterhub.ARCHITECTURES:
        known = ", ".join(adapterhub.ARCHITECTURES)
        raise UnsupportedModel(f"--adapter is for models of the architecture {known}, not {architecture!r}")
    if backend == "auto":
        name, reason = _choose_backend(architecture, [folder] if base is None else [folder, base])
    else:
        name, reason = cast(BackendName, backend), "asked for"
    if target := VERIFIED[name].get(architecture):
        return Choice(target, name, reason)
    unverified = UNVERIFIED_MLX.get(architecture) if name == "mlx" else SENTENCE_TRANSFORMER
    if unverified is not None and allow_unverified:
        return Choice(unverified, name, reason, verified=False)
    raise UnsupportedModel(_refusal(architecture, name, has_unverified=unverified is not None))


def _choose_backend(architecture: str, folders: Sequence[Path]) -> tuple[BackendName, str]:
    if architecture not in VERIFIED["mlx"]:
        return "torch", f"the MLX backend has no {architecture!r}"
    if architecture not in VERIFIED["torch"]:
        return "mlx", f"the torch backend has no {architecture!r}"
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return "torch", "no Apple silicon here"
    if importlib.util.find_spec("mlx") is None:
        return "torch", "mlx is not installed"
    # Of an adapter the tokenizer may be its base's. BERT's can be made of its vocabulary.
    tokenizers = ("tokenizer.json", "vocab.txt") if architecture == "bert" else ("tokenizer.json",)
    if not any(any(folder.rglob(name)) for folder in folders for name in tokenizers):
        return "torch", "the MLX backend needs tokenizer.json"
    return "mlx", "Apple silicon"


def _refusal(architecture: str, backend: BackendName, *, has_unverified: bool) -> str:
    others = [name for name, known in VERIFIED.items() if architecture in known]
    remedy = f": use --backend {others[0]}" if others else ""
    if has_unverified:
        remedy += (" or " if remedy else ": ") + (
            "--allow-unverified tries it, with no test that its vectors are the reference implementation's"
        )
    known = ", ".join(sorted(VERIFIED[backend]))
    return f"the {backend} backend does not know the architecture {architecture!r}{remedy}. Known: {known}"


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


def _architecture(folder: Path) -> str:
    """What the checkpoint is, once everything around it is known to be run as it should be."""
    if not (folder / "modules.json").exists():
        return "open_clip" if (folder / "open_clip_config.json").exists() else _of_config(folder / "config.json")
    modules = read_json(folder / "modules.json")
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise UnsupportedModel("modules.json is not a list of modules")
    for module in modules:
        _check_module(folder, module)
    if _class_name(modules[0]) != "Transformer":
        raise UnsupportedModel("the first module of modules.json must be a Transformer")
    return _of_config(_inside(folder, modules[0]) / "config.json")


def _adapted(base: Path) -> str:
    """What an adapter makes of its base: the base need not be a whole ColQwen2.5 if the adapter brings the rest."""
    architecture = _architecture(base)
    if architecture not in (COLQWEN, "qwen2_5_vl"):
        raise UnsupportedModel(f"this is an adapter of {architecture!r}: only those of {COLQWEN!r} are known")
    return COLQWEN


def _check_module(folder: Path, module: dict[str, Any]) -> None:
    kind = str(module.get("type", ""))
    if not kind.startswith("sentence_transformers.") or _class_name(module) not in MODULES:
        raise UnsupportedModel(f"modules.json names {kind!r}; known modules: {', '.join(MODULES)}")
    if _class_name(module) == "Dense":
        activation = read_object(_inside(folder, module) / "config.json").get("activation_function", "torch.nn.Tanh")
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


def _of_config(config_file: Path) -> str:
    """`model_type`; ColQwen2.5 goes by several, and under one that others go by too."""
    config = read_object(config_file)
    model_type, listed = config.get("model_type"), config.get("architectures")
    architectures = [str(name) for name in listed] if isinstance(listed, list) else []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UnsupportedModel(
            f"{architectures[0]} scores pairs of texts (a reranker or classifier): it has no embeddings"
        )
    inner = config.get("vlm_config")
    if isinstance(inner, dict) and inner.get("model_type") == "qwen2_5_vl":
        return COLQWEN  # transformers' layout, model_type colqwen2 or colqwen2_5
    if model_type == "qwen2_5_vl" and "ColQwen2_5" in architectures:
        return COLQWEN  # colpali-engine's layout
    known = sorted({name for names in VERIFIED.values() for name in names})
    if config.get("auto_map") and str(model_type) not in known:
        raise UnsupportedModel(
            f"{model_type!r} brings its own code, which this server never runs. Known: {', '.join(known)}"
        )
    return str(model_type)
