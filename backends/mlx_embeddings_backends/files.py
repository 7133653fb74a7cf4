"""A checkpoint's small files, read with errors for the person who typed the command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlx_embeddings_backends.errors import ModelError, UnsupportedModel


def read_json(file: Path) -> Any:
    """Raises `UnsupportedModel`."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UnsupportedModel(f"the model's folder has no {file.name}") from None
    except ValueError as error:
        raise UnsupportedModel(f"{file.name} is not JSON: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises `UnsupportedModel`."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{file.name} is not a JSON object")
    return content


def read_optional_object(file: Path) -> dict[str, Any]:
    """The same, but empty where there is no such file."""
    return read_object(file) if file.exists() else {}


def read_tokenizer(folders: Sequence[Path], *, remedy: str = "") -> Tokenizer:
    """tokenizer.json of the first folder that has one. Raises `ModelError`; `remedy` ends the sentence that says so."""
    for folder in folders:
        file = folder / "tokenizer.json"
        if not file.is_file():
            continue
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelError(f"tokenizer.json cannot be read: {error}") from error
    raise ModelError(
        f"the checkpoint has no tokenizer.json: save its tokenizer with transformers' `save_pretrained`{remedy}"
    )


def weight_files(folder: Path) -> list[Path]:
    """safetensors, else PyTorch's pickles: the file of the usual name, else those that an index names.

    Else all safetensors that there are, as some MLX checkpoints have them. Raises `ModelError`.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json")
        if files := sorted(folder.glob("*.safetensors")):
            return files
    raise ModelError("the model's folder has no weights: no safetensors, and no pytorch_model.bin")


def _indexed(index: Path) -> list[Path]:
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index.name} is no index of weights")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        is_weights = Path(name).name == name and name.endswith((".safetensors", ".bin"))
        if not is_weights or not (index.parent / name).is_file():
            raise ModelError(f"{index.name} names {name!r}, which is no file of weights in the model's folder")
    return [index.parent / name for name in names]
