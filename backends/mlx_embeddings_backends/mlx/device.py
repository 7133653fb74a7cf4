"""MLX itself: which device, how much memory it may keep, and a checkpoint's weights into a module."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten

from mlx_embeddings_backends.base import DType
from mlx_embeddings_backends.errors import DeviceLost, MissingDependency, ModelError
from mlx_embeddings_backends.files import weight_files

DTYPES: dict[DType, mx.Dtype] = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

# The module that turns a pickle into safetensors. It imports torch: only ever run, never imported, from here.
PICKLE_READER: Final = "mlx_embeddings_backends.torch.pickles"

# Padded tokens a batch, as on torch: on a CPU larger batches fall out of its caches, a GPU wants more to do at once.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 16384

# Freed buffers that MLX keeps for the next batch, in bytes. Its own limit on Metal is one and a half times the working
# set that the system recommends: batches of ever new shapes would fill the memory. A batch of GPU_BATCH_TOKENS needs
# some hundreds of megabytes, in buffers of sizes that come up again.
CACHE_LIMIT: Final = 1 << 30


def choose_device(wanted: str) -> str:
    """`cpu`, `mps` (Metal), `cuda` or `cuda:N`; `auto` is the GPU if MLX finds one. Another is a `ModelError`."""
    gpu = "mps" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else None
    if wanted == "auto":
        return gpu or "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", wanted):
        raise ModelError(f"--device {wanted}: known are auto, cpu, cuda, cuda:N and mps")
    kind, _, number = wanted.partition(":")
    if kind == "cpu" or (kind == gpu and int(number or 0) < mx.device_count(mx.gpu)):
        return wanted
    raise ModelError(f"--device {wanted}: MLX finds no such device here; use --device {gpu or 'cpu'} or --device auto")


def use_device(device: str) -> None:
    """Run everything on what `choose_device` chose, and bound MLX's cache.

    Call it on the thread that loads and runs the model, before either. The default device is the whole process's: all
    models in it share one. Streams are each thread's own: what one thread leaves unevaluated no other can use.
    """
    number = int(device.partition(":")[2] or 0)
    mx.set_default_device(mx.Device(mx.cpu if device == "cpu" else mx.gpu, number))
    mx.set_cache_limit(CACHE_LIMIT)


def free_memory() -> None:
    """Give back the buffers that MLX keeps for arrays to come."""
    mx.clear_cache()


def batch_tokens(device: str) -> int:
    return CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS


@contextmanager
def device_errors() -> Iterator[None]:
    """Around whatever evaluates: raises `DeviceLost` for errors after which a smaller batch would fail as well."""
    try:
        yield
    except RuntimeError as error:
        if is_device_lost(str(error)):
            raise DeviceLost(str(error)) from error
        raise


def is_device_lost(message: str) -> bool:
    """Whether MLX's message says that the device has failed, rather than that this batch was too much for it.

    Read from MLX's source, not seen on a Mac: evaluating raises RuntimeError("[METAL] Command buffer execution failed:
    ...") with the system's text for a GPU timeout, hang, page fault or ignored submissions, and for a lack of memory
    too. CUDA's are "cudaFunction(...) failed: ...". Only a lack of memory goes away with a smaller batch.
    """
    failed = message.startswith("[METAL] Command buffer execution failed") or re.match(r"cu\w+.* failed: ", message)
    return bool(failed) and not re.search(r"out ?of ?memory|insufficient memory", message, re.IGNORECASE)


def read_weights(folder: Path) -> dict[str, mx.array]:
    """The tensors of the folder's weights by name, one file or many. Those of safetensors are read when evaluated."""
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        tensors = read_tensors(file)
        if twice := weights.keys() & tensors.keys():
            raise ModelError(f"{file.name} holds {min(twice)}, which another file of the folder holds too")
        weights |= tensors
    return weights


def read_tensors(file: Path) -> dict[str, mx.array]:
    """Those of one file of safetensors, or of a pickle. Raises `ModelError`."""
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_pickle(file: Path) -> dict[str, mx.array]:
    """By another process, which has torch: imported into this one, it would take 500 MB for good."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependency(
            f"{file.name} is a pickle, which the MLX backend reads with the package 'torch': `pip install torch`, or "
            "convert it to safetensors"
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / file.name  # which errors name
        # -P: what lies in the directory that the server was started in is nobody's module.
        command = [sys.executable, "-P", "-m", PICKLE_READER, str(file), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"its reader ended with {done.returncode}"])[-1]
            raise ModelError(reason if file.name in reason else f"{file.name} cannot be read: {reason}")
        tensors = _read_safetensors(target)
        mx.eval(tensors)  # while the file is there
    return tensors


def _read_safetensors(file: Path) -> dict[str, mx.array]:
    try:
        return cast("dict[str, mx.array]", mx.load(str(file), format="safetensors"))
    except (RuntimeError, ValueError, IndexError) as error:  # what its C++ exceptions become
        if "unsupported dtype F64" in str(error):
            raise ModelError(
                f"{file.name} holds float64 tensors, which MLX does not read: convert them to float32, or use "
                "--backend torch"
            ) from error
        raise ModelError(f"{file.name} cannot be read: {error}".replace(f"{file.parent}/", "")) from error


def fill(
    module: Module,
    weights: Mapping[str, mx.array],
    wanted: DType | Literal["auto"] = "auto",
    quantization: Mapping[str, Any] | None = None,
) -> DType:
    """Load `weights` into `module`, all of them and nothing else, and evaluate it. Returns the dtype it now has.

    `auto` is the dtype that most bytes of the weights are stored in. `quantization` is that of an MLX checkpoint's
    config.json, its paths those of `module`: layers with `.scales` among the weights stay quantised, and the dtype is
    that of these scales. Raises `ModelError` where names, shapes or kinds do not fit.
    """
    if quantization is not None:
        _quantize(module, weights, quantization)
    _check(_parameters(module), weights)
    dtype = _stored_dtype(weights) if wanted == "auto" else wanted
    module.load_weights(
        [
            (name, weight.astype(DTYPES[dtype]) if mx.issubdtype(weight.dtype, mx.floating) else weight)
            for name, weight in weights.items()
        ]
    )
    module.eval()  # no dropout
    try:
        mx.eval(_parameters(module))
    except RuntimeError as error:
        raise ModelError(f"the weights cannot be loaded: {error}") from error
    return dtype


def memory_bytes(*modules: Module) -> int:
    """Of their weights, on the device."""
    return sum(weight.nbytes for module in modules for weight in _parameters(module).values())


def _parameters(module: Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def _quantize(module: Module, weights: Mapping[str, mx.array], quantization: Mapping[str, Any]) -> None:
    """Make quantised layers of those whose weights are."""

    def how(path: str, layer: Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights or not hasattr(layer, "to_quantized"):
            return False
        own = quantization.get(path)
        return dict(own) if isinstance(own, dict) else True

    default = {name: quantization[name] for name in ("group_size", "bits", "mode") if name in quantization}
    try:
        quantize(module, class_predicate=how, **default)
    except (ValueError, TypeError) as error:
        raise ModelError(f"the quantization of config.json does not fit the model: {error}") from error


def _check(parameters: Mapping[str, mx.array], weights: Mapping[str, mx.array]) -> None:
    if lacking := sorted(parameters.keys() - weights.keys()):
        raise ModelError(f"the files lack {len(lacking)} of the model's weights, such as {lacking[0]}")
    if unknown := sorted(weights.keys() - parameters.keys()):
        raise ModelError(f"the files hold {len(unknown)} weights that the model does not have, such as {unknown[0]}")
    for name, parameter in parameters.items():
        weight = weights[name]
        if weight.shape != parameter.shape:
            raise ModelError(f"{name} is {weight.shape} in the files, and {parameter.shape} by config.json")
        # FP8, for one, is read as integers.
        if mx.issubdtype(weight.dtype, mx.floating) != mx.issubdtype(parameter.dtype, mx.floating):
            raise ModelError(f"{name} is stored as {weight.dtype}, which the model cannot use")


def _stored_dtype(weights: Mapping[str, mx.array]) -> DType:
    names = {dtype: name for name, dtype in DTYPES.items()}
    scales = {name: weight for name, weight in weights.items() if name.endswith(".scales")}
    sizes: dict[DType, int] = {}
    for weight in (scales or weights).values():
        if weight.dtype in names:
            name = names[weight.dtype]
            sizes[name] = sizes.get(name, 0) + weight.nbytes
    return max(sizes, key=lambda name: sizes[name], default="float32")
