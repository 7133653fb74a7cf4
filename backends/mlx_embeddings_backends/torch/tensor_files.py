"""A checkpoint's files of weights, and whether they are all that a model takes."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.torch import pickles


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors, or in a pickle, on the CPU. Runs no code of its. Raises `ModelError`."""
    if file.suffix != ".safetensors":
        return pickles.read(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file.name} is not a safetensors file, or is cut short: {error}") from error


def check_tensors(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, config: str) -> None:
    """Raises `ModelError` unless names and shapes are those `expected`, as the file `config` has them."""
    if lacking := sorted(expected.keys() - weights.keys()):
        raise ModelError(f"the files lack {len(lacking)} of the model's weights, such as {lacking[0]}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ModelError(f"the files have {len(unknown)} weights that the model has not, such as {unknown[0]}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ModelError(f"{name} is {list(weights[name].shape)}, where {config} asks for {list(tensor.shape)}")
