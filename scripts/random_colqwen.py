"""Write a ColQwen2.5 checkpoint with random weights: its vectors mean nothing, its speed is that of its size.

`python scripts/random_colqwen.py FOLDER [--scale S]`: 1.0 is the size of vidore/colqwen2.5-v0.2 (3.8 billion
parameters, 7.5 GB); less shrinks widths and depths. The tokenizer is the tests' small one.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "colqwen2_5" / "checkpoint"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=0.25, help="of Qwen2.5-VL-3B (%(default)s)")
    options = parser.parse_args()

    config = configuration(options.scale) | {"architectures": ["ColQwen2_5"]}
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config)).state_dict()
    weights = {name: torch.randn(value.shape).mul_(0.02).bfloat16() for name, value in shapes.items()}
    weights["custom_text_proj.weight"] = torch.randn(128, config["text_config"]["hidden_size"]).mul_(0.02).bfloat16()
    weights["custom_text_proj.bias"] = torch.zeros(128).bfloat16()
    options.folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, options.folder)
    (options.folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, options.folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{options.folder}: {sum(value.numel() for value in weights.values()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
