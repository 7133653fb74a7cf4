"""Which device a model runs on, and in which precision its matrix products are taken."""

import re

import torch
from torch import nn

from mlx_embeddings_backends.base import DType
from mlx_embeddings_backends.errors import ModelError

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Padded tokens a batch. On a CPU the activations of larger batches fall out of its caches: all-MiniLM-L6-v2 ran 35%
# slower at 16,384 tokens than at 2,048, and a short query behind such a batch waited eight times as long.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 16384


def choose_device(wanted: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. A device that is not here is a `ModelError`."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", wanted):
        raise ModelError(f"--device {wanted}: known are auto, cpu, cuda, cuda:N and mps")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"--device {wanted}: torch finds no CUDA device here; use --device cpu or --device auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"--device {wanted}: there are only {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"--device {wanted}: torch finds no Metal device here; use --device cpu or --device auto")
    return device


def choose_dtype(wanted: str, device: torch.device) -> DType:
    """The dtype of matrix products.

    `auto` is bfloat16 where the device multiplies it natively, float16 on other GPUs, float32 on other CPUs.
    """
    match wanted:
        case "float32" | "bfloat16" | "float16":
            return wanted
    if device.type == "cpu":
        return "bfloat16" if cpu_multiplies_bfloat16() else "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "float16"


def cpu_multiplies_bfloat16() -> bool:
    """AVX512-BF16 or AMX: without them bfloat16 products are emulated, and slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def memory_bytes(*modules: nn.Module) -> int:
    """Of their weights on the device. Weights that are one and the same tensor count once."""
    weights = [weight for module in modules for weight in module.state_dict().values()]
    return sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())


def free_memory() -> None:
    """Give back what torch keeps of the devices' memory for tensors to come."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def batch_tokens(device: torch.device) -> int:
    return CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
