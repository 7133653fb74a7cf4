"""A checkpoint's own files decide which class loads it. Names map to import strings, which are resolved when chosen."""

import gc
import importlib
import importlib.util
import platform
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from mlx_embeddings_backends import adapterhub, rerankers
from mlx_embeddings_backends.base import Backend, Kind, LoadOptions
from mlx_embeddings_backends.errors import MissingDependency, UnsupportedModel
from mlx_embeddings_backends.files import read_json, read_object, read_optional_object
from mlx_embeddings_backends.hub import BGE_M3_HEADS

BackendName = Literal["torch", "mlx"]

_DEVICES: dict[BackendName, str] = {"torch": "torch.devices", "mlx": "mlx.device"}

SENTENCE_TRANSFORMER = "mlx_embeddings_backends.torch.sentence_transformer:SentenceTransformerBackend"
MLX_TEXT_ENCODER = "mlx_embeddings_backends.mlx.text_encoder:MlxTextEncoder"
CROSS_ENCODER = "mlx_embeddings_backends.torch.cross_encoder:CrossEncoderBackend"
CAUSAL_RERANKER = "mlx_embeddings_backends.torch.causal_reranker:CausalRerankerBackend"
SPARSE_ENCODER = "mlx_embeddings_backends.torch.sparse_encoder:SparseEncoderBackend"

# Text encoders by the `model_type` of their config.json, each held to sentence-transformers' own vectors by a test.
TEXT_ENCODERS = (
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "gemma3_text", "gpt2", "llama",
    "longformer", "mistral", "modernbert", "mpnet", "mt5", "nomic_bert", "qwen2", "qwen3", "roberta", "t5",
    "xlm-roberta",
)  # fmt: skip
MLX_TEXT_ENCODERS = ("bert", "modernbert", "qwen3", "xlm-roberta")
BGE_M3 = "bge_m3"
COLQWEN = "colqwen2_5"
# Rerankers, likewise: `*ForSequenceClassification` with one label.
CROSS_ENCODERS = (
    "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta",
)  # fmt: skip
_SCORES = "ForSequenceClassification"
# Language models of rerankers that are asked for a yes or a no, likewise.
CAUSAL_RERANKERS = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
# Masked language models of sparse encoders, likewise.
SPARSE_ENCODERS = (
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "modernbert", "mpnet", "roberta",
    "xlm-roberta",
)  # fmt: skip

VERIFIED: dict[BackendName, dict[str, str]] = {
    "torch": dict.fromkeys(TEXT_ENCODERS, SENTENCE_TRANSFORMER)
    | {
        BGE_M3: "mlx_embeddings_backends.torch.bge_m3:BgeM3Backend",
        COLQWEN: "mlx_embeddings_backends.torch.colqwen2_5:TorchColQwen2_5",
        "causal_reranker": CAUSAL_RERANKER,
        "clip": "mlx_embeddings_backends.torch.clip:TransformersClip",
        "cross_encoder": CROSS_ENCODER,
        "open_clip": "mlx_embeddings_backends.torch.open_clip:OpenClip",
        "siglip": "mlx_embeddings_backends.torch.clip:TransformersClip",
        "sparse_encoder": SPARSE_ENCODER,
    },
    "mlx": dict.fromkeys(MLX_TEXT_ENCODERS, MLX_TEXT_ENCODER)
    | {
        BGE_M3: MLX_TEXT_ENCODER,
        COLQWEN: "mlx_embeddings_backends.mlx.colqwen2_5:MlxColQwen2_5",
        "siglip": "mlx_embeddings_backends.mlx.siglip:MlxSiglip",
    },
}
# By the end of the names of architectures that are more than a text encoder.
_KINDS = {"causal_reranker": CAUSAL_RERANKER, "cross_encoder": CROSS_ENCODER, "sparse_encoder": SPARSE_ENCODER}
# What the libraries below have beside those: no test here compares its vectors with anything.
UNVERIFIED_MLX = dict.fromkeys(("gemma3_text", "lfm2"), MLX_TEXT_ENCODER)

# Modules of modules.json, by class name. sentence-transformers imports whatever class a local folder names, its own
# .py files too: nothing outside this list and that package gets so far.
MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout", "WeightedLayerPooling")
SPARSE_MODULES = (
    *MODULES, "MLMTransformer", "SpladePooling", "SparseAutoEncoder", "SparseStaticEmbedding", "Router",
)  # fmt: skip


# The libraries import their parts when these are first used, in circles: two threads at once find halves of modules.
_LOADING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Choice:
    """The class that will load a checkpoint, and why."""

    target: str  # "module:class"
    backend: BackendName
    reason: str
    verified: bool = True  # a test holds the architecture on this backend to the reference implementation
    architecture: str = ""  # of VERIFIED, or one that is not there


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
    kind: Kind | None = None,
) -> Choice:
    """Read the checkpoint's files. Raises `UnsupportedModel` with what is known, and what was found.

    `base` is the folder of what a LoRA adapter in `folder` was made for. `has_adapters`: it is to be run with
    AdapterHub adapters. `kind` is what the user calls the model, where its files leave that open. MLX is chosen by
    itself on Apple silicon, for what is verified there.
    """
    architecture = _adapted(base) if base is not None else _architecture(folder)
    if architecture == "xlm-roberta" and any((folder / name).exists() for name in BGE_M3_HEADS):
        architecture = BGE_M3
    elif kind == "sparse-embeddings" and not architecture.endswith("sparse_encoder"):
        architecture = _bare_sparse_encoder(folder, architecture)
    _check_kind(kind, architecture)
    if kind == "rerank" and not (folder / "modules.json").exists():
        rerankers.check_answers(folder / "config.json")
    if has_adapters and architecture not in adapterhub.ARCHITECTURES:
        known = ", ".join(adapterhub.ARCHITECTURES)
        raise UnsupportedModel(f"--adapter is for models of the architecture {known}, not {architecture!r}")
    if backend == "auto":
        name, reason = _choose_backend(architecture, [folder] if base is None else [folder, base])
    else:
        name, reason = cast("BackendName", backend), "asked for"
        if (name, architecture) == ("mlx", BGE_M3):
            reason += ", with its dense vectors only"
    if target := VERIFIED[name].get(architecture):
        return Choice(target, name, reason, architecture=architecture)
    if name == "mlx":
        unverified = UNVERIFIED_MLX.get(architecture)
    else:
        unverified = _KINDS.get(architecture.rpartition(" ")[2], SENTENCE_TRANSFORMER)
    if unverified is not None and allow_unverified:
        return Choice(unverified, name, reason, verified=False, architecture=architecture)
    raise UnsupportedModel(_refusal(architecture, name, has_unverified=unverified is not None))


def _check_kind(kind: Kind | None, architecture: str) -> None:
    """Whether the model is what the user calls it. Any model of dense or multi-vectors can rerank."""
    for suffix, what, right in (
        ("causal_reranker", "a reranker", "rerank"),
        ("cross_encoder", "a reranker", "rerank"),
        ("sparse_encoder", "a sparse encoder", "sparse-embeddings"),
    ):
        if kind not in (None, right) and architecture.endswith(suffix):
            raise UnsupportedModel(f"this is {what}: its `type` is {right}, not {kind}")


def _choose_backend(architecture: str, folders: Sequence[Path]) -> tuple[BackendName, str]:
    if architecture == BGE_M3:
        return "torch", "of BGE-M3 the MLX backend has dense vectors only"
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
    """Import the chosen class and load the checkpoint with it: one after another, from whatever threads."""
    module_name, _, class_name = choice.target.partition(":")
    with _LOADING:
        try:
            module = _import_settled(module_name)
        except ModuleNotFoundError as error:
            remedy = f"`uv sync` or `pip install {error.name}`"
            raise MissingDependency(
                f"the {choice.backend} backend needs the package {error.name!r}: {remedy}"
            ) from error
        return cast("Backend", getattr(module, class_name)(folder, options))


def _import_settled(name: str) -> ModuleType:
    """What libraries make stays, half a million objects: the collector need not look through them again and again.

    Each look would stop the server for a third of a second. Only the first library's, before there is a model: what is
    out of the collector's sight is never freed, if it only refers to itself.
    """
    if name in sys.modules or gc.get_freeze_count():  # which counts them one by one: a tenth of a second
        return importlib.import_module(name)
    gc.disable()
    try:
        module = importlib.import_module(name)
    finally:
        gc.enable()
    gc.freeze()
    return module


def free_memory(backend: BackendName) -> None:
    """Once a model is gone: give back what its library keeps of the device's memory."""
    module = sys.modules.get(f"mlx_embeddings_backends.{_DEVICES[backend]}")
    if module is not None:  # else nothing was loaded by it
        module.free_memory()


def _architecture(folder: Path) -> str:
    """What the checkpoint is, once everything around it is known to be run as it should be."""
    if not (folder / "modules.json").exists():
        return "open_clip" if (folder / "open_clip_config.json").exists() else _of_config(folder / "config.json")
    modules = read_json(folder / "modules.json")
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise UnsupportedModel("modules.json is not a list of modules")
    if read_optional_object(folder / "config_sentence_transformers.json").get("model_type") == "SparseEncoder":
        return _sparse_encoder(folder, modules)
    if any(_class_name(module) == "LogitScore" for module in modules):
        return _causal_reranker(folder, modules)
    for module in modules:
        _check_module(folder, module)
    if _class_name(modules[0]) != "Transformer":
        raise UnsupportedModel("the first module of modules.json must be a Transformer")
    architecture = _of_config(_inside(folder, modules[0]) / "config.json")
    _check_scores(folder, [_class_name(module) for module in modules], architecture)
    return architecture


def _check_scores(folder: Path, modules: Sequence[str], architecture: str) -> None:
    """A cross-encoder may be any model with modules behind it that make scores: one that is both in one is known."""
    saved = read_optional_object(folder / "config_sentence_transformers.json").get("model_type")
    if architecture.endswith("cross_encoder") and len(modules) > 1:
        raise UnsupportedModel(f"config.json is of a *{_SCORES}, and modules.json puts {modules[1]} behind it")
    if saved == "CrossEncoder" and not architecture.endswith("cross_encoder"):
        raise UnsupportedModel(
            f"this CrossEncoder is made of {', '.join(modules)}: of rerankers, only those that are a *{_SCORES}, or a "
            "language model and LogitScore, are known"
        )


def _causal_reranker(folder: Path, modules: Sequence[dict[str, Any]]) -> str:
    """Of a CrossEncoder that asks a language model for a yes or a no."""
    names = [_class_name(module) for module in modules]
    if names != ["Transformer", "LogitScore"]:
        raise UnsupportedModel(f"modules.json has {', '.join(names)}: LogitScore is known behind one Transformer only")
    for module in modules:
        _check_module(folder, module, names)
    saved = read_optional_object(folder / "config_sentence_transformers.json").get("model_type")
    if saved != "CrossEncoder":
        raise UnsupportedModel(
            "modules.json has LogitScore, which is a CrossEncoder's, and config_sentence_transformers.json gives the "
            f"model_type {saved!r}: sentence-transformers would put other modules in its place"
        )
    rerankers.check_logit_score(read_optional_object(_inside(folder, modules[1]) / "config.json"))
    config_file = _inside(folder, modules[0]) / "config.json"
    architecture = _of_config(config_file)
    rerankers.check_original(read_object(config_file))
    if architecture.endswith("cross_encoder"):
        raise UnsupportedModel(f"config.json is of a *{_SCORES}, and modules.json puts LogitScore behind it")
    return "causal_reranker" if architecture in CAUSAL_RERANKERS else f"{architecture} causal_reranker"


def _adapted(base: Path) -> str:
    """What an adapter makes of its base: the base need not be a whole ColQwen2.5 if the adapter brings the rest."""
    architecture = _architecture(base)
    if architecture not in (COLQWEN, "qwen2_5_vl"):
        raise UnsupportedModel(f"this is an adapter of {architecture!r}: only those of {COLQWEN!r} are known")
    return COLQWEN


def _sparse_encoder(folder: Path, modules: Sequence[dict[str, Any]]) -> str:
    """Of a SparseEncoder's modules, and of those that a Router among them names in a file of its own."""
    routed = []
    for module in modules:
        _check_module(folder, module, SPARSE_MODULES)
        if _class_name(module) == "Router":
            routed += _routed(_inside(folder, module), str(module.get("path", "")))
    for module in routed:
        _check_module(folder, module, SPARSE_MODULES[:-1])
    parts = [*modules, *routed]
    folders = [_inside(folder, each) for each in parts if _class_name(each).endswith("Transformer")]
    types = [_of_config(each / "config.json") for each in folders]
    # A SparseAutoEncoder stands behind a dense model.
    known = SPARSE_ENCODERS if any(_class_name(each) == "SpladePooling" for each in parts) else TEXT_ENCODERS
    return next((f"{each} sparse_encoder" for each in types if each not in known), "sparse_encoder")


def _routed(router: Path, path: str) -> list[dict[str, Any]]:
    """As modules.json would list them: `path` is that of the Router itself."""
    config = read_optional_object(router / "router_config.json") or read_object(router / "config.json")
    types, structure = config.get("types"), config.get("structure")
    if not isinstance(types, dict) or not isinstance(structure, dict) or not isinstance(config.get("parameters"), dict):
        raise UnsupportedModel("the Router's router_config.json does not say what its routes are made of")
    return [{"type": kind, "path": f"{path}/{name}" if path else name} for name, kind in types.items()]


def _bare_sparse_encoder(folder: Path, architecture: str) -> str:
    """A masked language model is one, with SPLADE's pooling, where the user says so."""
    has_modules = (folder / "modules.json").exists()
    listed = None if has_modules else read_optional_object(folder / "config.json").get("architectures")
    if not isinstance(listed, list) or not any(str(name).endswith("ForMaskedLM") for name in listed):
        raise UnsupportedModel(
            "this model gives no sparse embeddings: only a SparseEncoder of sentence-transformers does, and what "
            "config.json calls a *ForMaskedLM"
        )
    return "sparse_encoder" if architecture in SPARSE_ENCODERS else f"{architecture} sparse_encoder"


def _check_module(folder: Path, module: dict[str, Any], known: Sequence[str] = MODULES) -> None:
    kind = str(module.get("type", ""))
    if not kind.startswith("sentence_transformers.") or _class_name(module) not in known:
        raise UnsupportedModel(f"modules.json names {kind!r}; known modules: {', '.join(known)}")
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
    scores = next((name for name in architectures if name.endswith(_SCORES)), None)
    if scores is not None:
        rerankers.check_one_label(config, scores)
        if model_type in CROSS_ENCODERS:
            return "cross_encoder"
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
    return str(model_type) if scores is None else f"{model_type} cross_encoder"
