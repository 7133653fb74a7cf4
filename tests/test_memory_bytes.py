"""What a loaded model says of its memory is what the tensors of its files add up to, in the dtypes it is served in."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import DType, LoadOptions
from tests.checkpoints import HIDDEN, bare_encoder, dense, sentence_transformer
from tests.clip_checkpoints import clip_folder, open_clip_folder
from tests.colqwen_checkpoints import CHECKPOINT as COLQWEN
from tests.conftest import DATA
from tests.mlx_checkpoints import siglip
from tests.parity import load

Name = Literal["torch", "mlx"]

M3 = DATA / "bge_m3" / "checkpoint"
SPECTER2 = DATA / "specter2"
# In the files, and in no model that is served. Token types are added to the positions, on torch.
UNUSED = r"pooler\..*"
TYPES = r"embeddings\.token_type_embeddings\.weight"
LOGITS = r"logit_(scale|bias)"

MODELS: dict[str, tuple[Callable[[Path], Path], Name, str]] = {
    "t5": (lambda folder: bare_encoder(folder, "t5"), "torch", UNUSED),
    "gpt2": (lambda folder: bare_encoder(folder, "gpt2"), "torch", UNUSED),
    "xlm-roberta": (
        lambda folder: bare_encoder(folder, "xlm-roberta", type_vocab_size=1),
        "torch",
        f"{UNUSED}|{TYPES}",
    ),
    "dense": (lambda folder: sentence_transformer(folder, "qwen3", after=[dense(HIDDEN, 24)]), "torch", UNUSED),
    "clip": (clip_folder, "torch", UNUSED),
    "siglip": (siglip, "torch", UNUSED),
    "open_clip": (open_clip_folder, "torch", LOGITS),
    "colqwen": (lambda _: COLQWEN, "torch", UNUSED),
    "bge-m3": (lambda _: M3, "torch", f"{UNUSED}|{TYPES}"),
    "mlx-bert": (lambda folder: bare_encoder(folder, "bert"), "mlx", UNUSED),
    "mlx-dense": (lambda folder: sentence_transformer(folder, "qwen3", after=[dense(HIDDEN, 24)]), "mlx", UNUSED),
    "mlx-siglip": (siglip, "mlx", LOGITS),
    "mlx-colqwen": (lambda _: COLQWEN, "mlx", UNUSED),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Of all files of weights below a folder."""
    found: dict[str, Tensor] = {}
    for file in folder.rglob("*.*"):
        if file.suffix == ".safetensors":
            found |= {f"{file}: {name}": tensor for name, tensor in load_file(file).items()}
        elif file.suffix in (".pt", ".bin"):
            found |= {f"{file}: {name}": tensor for name, tensor in torch.load(file, weights_only=True).items()}
    return found


def numbers(folder: Path, unused: str = "") -> int:
    used = [tensor for name, tensor in tensors(folder).items() if not re.fullmatch(f".*: ({unused})", name)]
    return sum(tensor.numel() for tensor in used)


@pytest.mark.parametrize("kind", MODELS)
def test_in_float32_a_number_takes_four_bytes(kind: str, tmp_path: Path) -> None:
    make, backend, unused = MODELS[kind]
    folder = make(tmp_path)
    assert load(folder, backend=backend).info.memory_bytes == 4 * numbers(folder, unused)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_adapters_count_too(backend: Name, dtype: DType, size: int) -> None:
    folders = {name: SPECTER2 / f"specter2_{name}" for name in ("proximity", "adhoc_query")}
    base = SPECTER2 / "base"
    choice = detect.choose(base, backend, has_adapters=True)
    alone, adapted = (
        detect.load(choice, base, LoadOptions(device="cpu", dtype=dtype, adapters=each)).info.memory_bytes
        for each in ({}, folders)
    )
    assert adapted - alone == size * sum(map(numbers, folders.values()))


def test_in_bfloat16_products_take_two_bytes_and_the_rest_four() -> None:
    whole = r"embeddings\..*|.*LayerNorm.*|weight|bias"  # the last two are the heads'
    halved = numbers(M3, f"{UNUSED}|{whole}")
    assert load(M3, "bfloat16").info.memory_bytes == 4 * numbers(M3, f"{UNUSED}|{TYPES}") - 2 * halved
