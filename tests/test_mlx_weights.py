"""Weights of every form into MLX, and the device: what is loaded, what is refused, and what a thread may do."""

import contextlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from mlx_embeddings_backends.base import Backend, DType, Item
from mlx_embeddings_backends.detect import MLX_TEXT_ENCODERS
from mlx_embeddings_backends.errors import MissingDependency, ModelError
from mlx_embeddings_backends.mlx.device import CACHE_LIMIT, choose_device, is_device_lost
from tests import parity
from tests.checkpoints import bare_encoder
from tests.mlx_checkpoints import WIDE, changed_json, quantised, rewritten
from tests.parity import cosines, distance, embed, embed_singly, reference
from tests.test_detect import RunsCode
from tests.test_torch_parity import TEXTS, words

TOLERANCE = 1e-5  # of any component of a unit vector, in float32


def load(folder: Path, dtype: DType | Literal["auto"] = "float32") -> Backend:
    return parity.load(folder, dtype, backend="mlx")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", MLX_TEXT_ENCODERS)
def test_half_precision_is_kept_as_it_is_stored(model_type: str, dtype: DType, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path / "full", model_type)
    half = rewritten(
        folder,
        tmp_path / "half",
        lambda weights: {name: each.to(getattr(torch, dtype)) for name, each in weights.items()},
    )
    expected = reference(folder).encode(TEXTS)
    backend = load(half, "auto")
    assert backend.info.dtype == dtype
    rows = embed(backend, TEXTS)
    assert rows.dtype == np.float32
    assert distance(rows, expected) > 1e-4  # or nothing was in half precision
    assert cosines(rows, expected).min() > 0.999
    assert cosines(rows, embed_singly(backend, TEXTS)).min() > 0.999
    # Asked for, float32 is what the stored weights are, to the last bit.
    assert load(half, "float32").info.dtype == "float32"
    assert distance(embed(load(half, "float32"), TEXTS), reference(half).encode(TEXTS)) < TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", MLX_TEXT_ENCODERS)
def test_quantised_layers_are_those_of_the_dequantised_weights(model_type: str, bits: int, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path / "full", model_type, **WIDE)
    packed, plain = quantised(folder, tmp_path, bits=bits)
    backend = load(packed, "auto")
    assert backend.info.dtype == "float32"
    expected = reference(plain).encode(TEXTS)
    assert distance(embed(backend, TEXTS), expected) < TOLERANCE
    assert distance(reference(folder).encode(TEXTS), expected) > 1e-4  # or nothing was quantised
    assert cosines(embed(load(packed, "float16"), TEXTS), expected).min() > 0.999
    assert load(packed, "float16").info.dtype == "float16"


def test_layers_quantised_each_in_its_own_way(tmp_path: Path) -> None:
    """Under the names that mlx-community's conversions have: the decoder within a model."""
    folder = rewritten(
        bare_encoder(tmp_path / "bare", "qwen3", **WIDE),
        tmp_path / "full",
        lambda weights: {f"model.{name}": each for name, each in weights.items()},
    )
    own_bits = {"model.layers.0.mlp.up_proj": 8, "model.embed_tokens": 6}
    packed, plain = quantised(folder, tmp_path, bits=4, group_size=64, own_bits=own_bits)
    expected = reference(plain).encode(TEXTS)
    assert distance(embed(load(packed), TEXTS), expected) < TOLERANCE
    changed_json(packed / "config.json", quantization={"group_size": 32, "bits": 4})
    with pytest.raises(ModelError, match="by config.json"):
        load(packed)


def test_names_that_weights_go_by_elsewhere(tmp_path: Path) -> None:
    """Within a model for masked words, as the first BERTs were converted, without a pooler, and with its own head."""

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {"cls.predictions.bias": torch.zeros(9), "bert.embeddings.position_ids": torch.arange(64)}
        for name, weight in weights.items():
            for new, old in norms.items():
                name = name.replace(new, old)
            if not name.startswith("pooler."):
                renamed[f"bert.{name}"] = weight
        return renamed

    folder = bare_encoder(tmp_path / "plain")
    renamed = rewritten(folder, tmp_path / "renamed", rename)
    assert distance(embed(load(renamed), TEXTS), reference(folder).encode(TEXTS)) < TOLERANCE


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path)
    expected = reference(folder).encode(TEXTS)
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert distance(embed(load(folder), TEXTS), expected) < TOLERANCE
    (folder / "model.safetensors.index.json").unlink()
    assert distance(embed(load(folder), TEXTS), expected) < TOLERANCE
    for name in ("../model.safetensors", "model.npz"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ModelError, match="no file of weights in the model's folder"):
            load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layer.1.output.dense.bias": None}, r"lack 1 of .* encoder.layer.1.output.dense.bias"),
        ({"encoder.layer.2.output.dense.bias": torch.zeros(32)}, "hold 1 weights that the model does not have"),
        ({"encoder.layer.1.output.dense.bias": torch.zeros(31)}, "is .31,. in the files, and .32,. by config.json"),
        ({"encoder.layer.1.output.dense.bias": torch.zeros(32, dtype=torch.float8_e4m3fn)}, "is stored as .*uint8"),
        ({"encoder.layer.1.output.dense.bias": torch.zeros(32, dtype=torch.float64)}, "float64 .* --backend torch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    def apply(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: each for name, each in (weights | change).items() if each is not None}

    with pytest.raises(ModelError, match=message):
        load(rewritten(bare_encoder(tmp_path / "whole"), tmp_path / "changed", apply))


def test_what_the_files_lack_is_said(tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path)
    (folder / "tokenizer.json").rename(tmp_path / "kept")
    with pytest.raises(ModelError, match=r"no tokenizer.json.* --backend torch"):
        load(folder)
    (tmp_path / "kept").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{} not safetensors")
    with pytest.raises(ModelError, match="model.safetensors cannot be read"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(folder)
    changed_json(folder / "config.json", hidden_size=None)
    with pytest.raises(ModelError, match="does not describe a bert"):
        load(folder)


def as_pickle(folder: Path, change: Callable[[dict[str, Tensor]], object], *, zipped: bool = True) -> Path:
    """Replace the weights by a pickle of what `change` makes of them. `zipped`: as PyTorch saves it since 1.6."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(change(weights), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder


def test_pickles_are_read_however_their_tensors_lie_in_memory(tmp_path: Path) -> None:
    """Of a model trained in parallel: transposed, parts of one block, and with a matrix that two layers share."""

    def scatter(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        block = torch.cat([weight.flatten() for weight in weights.values()])
        places = np.cumsum([0, *(weight.numel() for weight in weights.values())])
        made = {
            f"module.bert.{name}": block[start : start + weight.numel()].view(weight.shape)
            for (name, weight), start in zip(weights.items(), places, strict=False)
        }
        words = made["module.bert.embeddings.word_embeddings.weight"]
        made["module.bert.embeddings.word_embeddings.weight"] = words.T.contiguous().T
        made["module.cls.predictions.decoder.weight"] = made["module.bert.embeddings.word_embeddings.weight"]
        return {**made, "module.bert.embeddings.position_ids": torch.arange(64).expand(1, -1)}

    folder = bare_encoder(tmp_path)
    expected = reference(folder).encode(TEXTS)
    assert distance(embed(load(as_pickle(folder, scatter, zipped=False)), TEXTS), expected) < TOLERANCE


def test_pickles_keep_their_dtype(tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path / "full")
    expected = reference(folder).encode(TEXTS)
    as_pickle(folder, lambda weights: {name: each.bfloat16() for name, each in weights.items()})
    backend = load(folder, "auto")
    assert backend.info.dtype == "bfloat16"
    assert cosines(embed(backend, TEXTS), expected).min() > 0.999


def test_pickles_in_several_files(tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path)
    expected = reference(folder).encode(TEXTS)
    weights = list(load_file(folder / "model.safetensors").items())
    shards = {"pytorch_model-00001-of-00002.bin": weights[:10], "pytorch_model-00002-of-00002.bin": weights[10:]}
    for file, part in shards.items():
        torch.save(dict(part), folder / file)
    listed = {name: file for file, part in shards.items() for name, _ in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    (folder / "model.safetensors").unlink()
    assert distance(embed(load(folder), TEXTS), expected) < TOLERANCE


def test_pickles_run_no_code_and_are_refused_in_one_line(tmp_path: Path) -> None:
    folder, proof = bare_encoder(tmp_path / "model"), tmp_path / "unpickled"
    (tmp_path / "model" / "torch.py").write_text(f"open({str(proof)!r}, 'w')")
    as_pickle(folder, lambda weights: {**weights, "evil": RunsCode(proof)})
    with contextlib.chdir(folder), pytest.raises(ModelError, match=r"^pytorch_model.bin is a pickle with more .*$"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"^pytorch_model.bin cannot be read, and may be cut short: EOFError$"):
        load(folder)
    assert not proof.exists()


def test_pickles_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = as_pickle(bare_encoder(tmp_path), dict)
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    with pytest.raises(MissingDependency, match=r"pytorch_model.bin is a pickle, .*pip install torch"):
        load(folder)


def test_a_token_that_the_model_does_not_have_is_not_looked_up(tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, vocab_size=100)  # of 293 that the tokenizer has
    backend = load(folder)
    prepared = backend.prepare([Item("the"), Item("ness")])
    backend.collate(prepared[:1])
    with pytest.raises(ModelError, match="does not have"):
        backend.collate(prepared)


def test_batches_are_made_on_other_threads(tmp_path: Path) -> None:
    """Anything of MLX's that is made on one thread and evaluated on another fails."""
    backend = load(bare_encoder(tmp_path))
    items = [Item(text) for text in TEXTS]
    with ThreadPoolExecutor(1) as thread:
        batch = thread.submit(lambda: backend.collate(backend.prepare(items))).result()
    np.testing.assert_array_equal(backend.run(batch), embed(backend, TEXTS))
    with ThreadPoolExecutor(1) as worker:  # a model lives on the thread that loads it, whichever it is
        loaded = worker.submit(load, tmp_path).result()
        assert distance(worker.submit(embed, loaded, TEXTS).result(), embed(backend, TEXTS)) == 0


def test_the_cache_of_buffers_is_bounded(tmp_path: Path) -> None:
    mx.set_cache_limit(1 << 40)
    backend = load(bare_encoder(tmp_path))
    for count in (1, 8, 15, 22):
        embed(backend, [words(count)] * count)
        mx.eval(mx.zeros((500 + 10 * count) << 18))  # half a gigabyte and more, freed at once
        assert 0 < mx.get_cache_memory() <= CACHE_LIMIT


@pytest.mark.skipif(mx.metal.is_available() or mx.cuda.is_available(), reason="MLX finds a GPU here")
def test_a_device_that_is_not_here_is_refused() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    for wanted in ("mps", "cuda", "cuda:1"):
        with pytest.raises(ModelError, match=rf"--device {wanted}: MLX finds no such device here; use --device cpu"):
            choose_device(wanted)
    with pytest.raises(ModelError, match="known are"):
        choose_device("gpu")


@pytest.mark.metal
@pytest.mark.skipif(not mx.metal.is_available(), reason="MLX finds no Metal device: needs Apple silicon")
@pytest.mark.parametrize("model_type", MLX_TEXT_ENCODERS)
def test_every_architecture_on_metal(model_type: str, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    backend = parity.load(folder, "float32", "auto", "mlx")
    assert backend.info.device == "mps"
    rows = embed(backend, TEXTS)
    assert distance(rows, reference(folder).encode(TEXTS)) < 1e-3
    assert distance(rows, embed_singly(backend, TEXTS)) < 1e-3
    for dtype in ("bfloat16", "float16"):
        assert cosines(embed(parity.load(folder, dtype, "mps", "mlx"), TEXTS), rows).min() > 0.99


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[METAL] Command buffer execution failed: Caused GPU Timeout Error (0000000e:ErrorTimeout).", True),
        ("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUErrorOutOfMemory).", False),
        ("cudaStreamSynchronize(stream) failed: an illegal memory access was encountered", True),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", False),
        ("[malloc] Unable to allocate 1000000000000 bytes.", False),
        ("[matmul] Last dimension of first input with shape (1,2) must match", False),
    ],
)
def test_only_a_failed_device_is_given_up(message: str, lost: bool) -> None:
    assert is_device_lost(message) == lost
