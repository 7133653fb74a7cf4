"""Checkpoints as they are found for MLX: other dtypes, quantised layers, older names and layouts, and a tiny SigLIP."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.checkpoints import shake, tokenizer

IMAGE_SIZE = 30  # which the patches do not fill
PATCH_SIZE = 8
TEXT_TOKENS = 20
# For group sizes of 32 and 64.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}


def rewritten(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of the checkpoint with other weights."""
    shutil.copytree(folder, target)
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target / "model.safetensors")
    return target


def changed_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object, or take out those that are None."""
    content = json.loads(file.read_bytes()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def quantised(
    folder: Path, target: Path, *, bits: int, group_size: int = 32, own_bits: Mapping[str, int] | None = None
) -> tuple[Path, Path]:
    """Two copies: one with its matrices quantised, as MLX's converters write it, and one with them dequantised.

    `own_bits` says which layers have another number of bits.
    """
    own_bits = own_bits or {}
    packed: dict[str, mx.array] = {}
    plain: dict[str, mx.array] = {}
    for name, weight in _read(folder).items():
        layer = name.removesuffix(".weight")
        if weight.ndim != 2 or name == layer or weight.shape[1] % group_size:
            packed[name] = plain[name] = weight
            continue
        own = own_bits.get(layer, bits)
        matrix, scales, biases = mx.quantize(weight, group_size, own)
        packed |= {f"{layer}.weight": matrix, f"{layer}.scales": scales, f"{layer}.biases": biases}
        plain[name] = mx.dequantize(matrix, scales, biases, group_size, own)
    overrides = {layer: {"group_size": group_size, "bits": own} for layer, own in own_bits.items()}
    for kind, weights in (("packed", packed), ("plain", plain)):
        shutil.copytree(folder, target / kind)
        mx.save_safetensors(str(target / kind / "model.safetensors"), weights)
    quantization = {"group_size": group_size, "bits": bits, **overrides}
    changed_json(target / "packed" / "config.json", quantization=quantization)
    return target / "packed", target / "plain"


def _read(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


def older_layout(folder: Path) -> Path:
    """sentence-transformers 2's: the transformer in a folder of its own, older names, and a flag for each pooling."""
    transformer = folder / "0_Transformer"
    transformer.mkdir()
    for file in [file for file in folder.iterdir() if file.is_file() and "modules" not in file.name]:
        if file.name != "config_sentence_transformers.json":
            file.rename(transformer / file.name)
    (transformer / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    modules = json.loads((folder / "modules.json").read_bytes())
    modules[0]["path"] = "0_Transformer"
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = folder / "1_Pooling" / "config.json"
    mode, dim = (json.loads(pooling.read_bytes())[name] for name in ("pooling_mode", "embedding_dimension"))
    names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{flag}": name in mode for name, flag in names.items()}
    pooling.write_text(json.dumps({"word_embedding_dimension": dim, **flags}))
    return folder


def siglip(folder: Path, **text_config: Any) -> Path:
    """A random SigLIP with its image processor, and a tokenizer whose padding is its end token, as SigLIP's is."""
    own = tokenizer("t5", model_max_length=TEXT_TOKENS, pad_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
    config: Any = SiglipConfig(
        text_config={**sizes, **ids, "vocab_size": len(own), "max_position_embeddings": TEXT_TOKENS, **text_config},
        vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = SiglipModel(config)
        shake(model)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return folder
