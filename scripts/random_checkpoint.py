"""Write a checkpoint with random weights: its vectors mean nothing, its speed is that of its size.

`python scripts/random_checkpoint.py KIND FOLDER [--scale S]`, where KIND is

- colqwen2.5: 1.0 is the size of vidore/colqwen2.5-v0.2 (3.8 billion parameters, 7.5 GB), less shrinks widths and
  depths. The tokenizer is the tests' small one.
- specter2: FOLDER/base, BERT of allenai/specter2_base's size, and FOLDER/proximity, an adapter of it. The tokenizer is
  all-MiniLM-L6-v2's.
- clip: open_clip's ViT-B-32.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, Qwen2_5_VLConfig, Qwen2_5_VLModel

from mlx_embeddings_backends import hub

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "colqwen2_5" / "checkpoint"
SEQUENTIAL_BOTTLENECK = {
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "reduction_factor": 16,
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
}
HEAD = 128  # dimensions of a head of the language model; the vision tower's have 80


def configuration(scale: float) -> dict[str, Any]:
    """Qwen2.5-VL-3B's sizes, scaled: widths and depths by the same factor."""
    base: dict[str, Any] = json.loads((TOKENIZER / "config.json").read_text())["vlm_config"]
    heads, vision_heads = max(2, round(16 * scale)), max(2, round(16 * scale))
    text = base["text_config"] | {
        "hidden_size": HEAD * heads,
        "intermediate_size": 688 * heads,
        "num_hidden_layers": max(2, round(36 * scale)),
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128_000,
    }
    depth = max(4, round(32 * scale))
    vision = base["vision_config"] | {
        "depth": depth,
        "hidden_size": 80 * vision_heads,
        "intermediate_size": 214 * vision_heads,
        "out_hidden_size": text["hidden_size"],
        "num_heads": vision_heads,
        "fullatt_block_indexes": list(range(depth // 4 - 1, depth, depth // 4)),
    }
    return {**base, **text, "model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision}


def write_colqwen(folder: Path, scale: float) -> None:
    config = configuration(scale) | {"architectures": ["ColQwen2_5"]}
    with torch.device("meta"):
        shapes = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config)).state_dict()
    weights = {name: torch.randn(value.shape).mul_(0.02).bfloat16() for name, value in shapes.items()}
    weights["custom_text_proj.weight"] = torch.randn(128, config["text_config"]["hidden_size"]).mul_(0.02).bfloat16()
    weights["custom_text_proj.bias"] = torch.zeros(128).bfloat16()
    for file in TOKENIZER.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save(weights, folder / "model.safetensors")


def write_specter2(folder: Path) -> None:
    minilm, base, adapter = hub.resolve("all-MiniLM-L6-v2").path, folder / "base", folder / "proximity"
    base.mkdir(exist_ok=True)
    adapter.mkdir(exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm / file, base)
    config = BertConfig()  # BERT-base
    BertModel(config).save_pretrained(base)
    dim, bottleneck = config.hidden_size, config.hidden_size // 16
    weights = {}
    for layer in range(config.num_hidden_layers):
        name = f"bert.encoder.layer.{layer}.output.adapters.[PRX]"
        weights[f"{name}.adapter_down.0.weight"] = torch.randn(bottleneck, dim) * 0.02
        weights[f"{name}.adapter_down.0.bias"] = torch.zeros(bottleneck)
        weights[f"{name}.adapter_up.weight"] = torch.randn(dim, bottleneck) * 0.02
        weights[f"{name}.adapter_up.bias"] = torch.zeros(dim)
    torch.save(weights, adapter / "pytorch_adapter.bin")
    described = {"model_type": "bert", "model_name": str(base.resolve()), "name": "[PRX]", "hidden_size": dim}
    (adapter / "adapter_config.json").write_text(json.dumps(described | {"config": SEQUENTIAL_BOTTLENECK}, indent=1))


def write_clip(folder: Path) -> None:
    model = open_clip.create_model("ViT-B-32")
    described = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=1))
    save(model.state_dict(), folder / "open_clip_model.safetensors")


def save(weights: dict[str, torch.Tensor], file: Path) -> None:
    save_file(weights, file, metadata={"format": "pt"})
    print(f"{file}: {sum(value.numel() for value in weights.values()) / 1e6:.0f} million parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("colqwen2.5", "specter2", "clip"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=0.25, help="of Qwen2.5-VL-3B (%(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    options.folder.mkdir(parents=True, exist_ok=True)
    match options.kind:
        case "colqwen2.5":
            write_colqwen(options.folder, options.scale)
        case "specter2":
            write_specter2(options.folder)
        case "clip":
            write_clip(options.folder)


if __name__ == "__main__":
    main()
