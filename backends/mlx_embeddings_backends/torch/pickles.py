"""Checkpoints that are pickles: tensors only, and as safetensors for those who have no torch to read them with.

`python -m mlx_embeddings_backends.torch.pickles SOURCE TARGET` writes the tensors of SOURCE to TARGET as safetensors.
"""

import pickle
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlx_embeddings_backends.errors import ModelError, UnsupportedModel

# What torch.load raises for bytes that are no checkpoint, or not all of one.
_BROKEN = (
    AssertionError, AttributeError, EOFError, IndexError, KeyError, OSError, OverflowError, RuntimeError, TypeError,
    ValueError, struct.error,
)  # fmt: skip


def read(file: Path) -> dict[str, Tensor]:
    """The tensors in a pickle, on the CPU. Runs no code of its. Raises `ModelError`."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):  # which is what names a class or a function
            raise ModelError(f"{file.name} cannot be read: it is no pickle of PyTorch's") from error
        raise UnsupportedModel(
            f"{file.name} is a pickle with more than tensors in it, which could run any code: convert it to safetensors"
        ) from error
    except _BROKEN as error:
        raise ModelError(f"{file.name} cannot be read, and may be cut short: {_first_sentence(error)}") from error
    if not isinstance(content, Mapping):
        raise UnsupportedModel(f"{file.name} holds a {type(content).__name__}: only tensors by name are known")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UnsupportedModel(
                f"{file.name} holds {str(name)[:80]!r}, a {type(tensor).__name__}: only tensors by name are known"
            )
        if not _is_plain(tensor):
            raise UnsupportedModel(f"{file.name} holds {name[:80]!r}, which is sparse, quantised or not stored in full")
    return {name: tensor.detach() for name, tensor in content.items()}


def convert(source: Path, target: Path) -> None:
    """Write the tensors of a pickle as safetensors, in their dtypes. Raises `ModelError`."""
    tensors = {}
    seen: set[int] = set()
    for name, tensor in read(source).items():
        # safetensors takes neither tensors that share memory, nor parts of larger ones.
        storage = tensor.untyped_storage()
        is_whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        tensors[name] = tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)
    try:
        save_file(tensors, target)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"{source.name} cannot be made into safetensors: {_first_sentence(error)}") from error


def _is_plain(tensor: Tensor) -> bool:
    """Every element has its place in the storage: a few bytes could otherwise stand for any amount of memory."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _first_sentence(error: Exception) -> str:
    return re.split(r"\n|\. ", str(error))[0][:200] or type(error).__name__


def main() -> int:
    source, target = map(Path, sys.argv[1:])
    try:
        convert(source, target)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
