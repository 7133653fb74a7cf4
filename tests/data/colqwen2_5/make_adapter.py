"""Makes adapter/ and adapter_expected.safetensors: a random LoRA adapter, and the reference's vectors with it.

The adapter is laid out as those of colpali-engine are: the language model's projections and the last one. Run with
colpali-engine 0.3.18, peft 0.20.0, torch 2.13.0, torchvision, transformers 5.23.0, outside this project's environment,
whose torch is too new for the first: `python tests/data/colqwen2_5/make_adapter.py`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from colpali_engine.models import ColQwen2_5, ColQwen2_5_Processor  # type: ignore[import-not-found]
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "checkpoint"
PROJECTIONS = "(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj)"


def load() -> Any:
    """The checkpoint, which names its weights as transformers does, in the class that names them in its own way."""
    model = ColQwen2_5(Qwen2_5_VLConfig(**json.loads((CHECKPOINT / "config.json").read_text())["vlm_config"]))
    weights = load_file(CHECKPOINT / "model.safetensors")
    renamed = {
        name.replace("vlm.model.", "").replace("embedding_proj_layer", "custom_text_proj"): weight
        for name, weight in weights.items()
    }
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def adapt(model: Any) -> Any:
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=4,
        lora_alpha=8,
        target_modules=f"(.*(model).*{PROJECTIONS}.*$|.*(custom_text_proj).*$)",
    )
    adapted: Any = get_peft_model(model, config)
    # PEFT writes the model's own name here, and this one was loaded from nowhere.
    adapted.peft_config["default"].base_model_name_or_path = "tests/data/colqwen2_5/checkpoint"
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.15)  # updates half as large as the weights
    return adapted.eval()


@torch.no_grad()
def main() -> None:
    model = adapt(load())
    model.save_pretrained(FOLDER / "adapter")
    (FOLDER / "adapter" / "README.md").unlink()
    processor = ColQwen2_5_Processor.from_pretrained(CHECKPOINT)
    query = "Query: " + json.loads((FOLDER / "queries.json").read_text())[0] + 10 * "<|endoftext|>"
    expected = {
        "query_0": model(**processor.process_texts([query]))[0],
        "image_1": model(**processor.process_images([Image.open(FOLDER / "image_1.png")]))[0],
    }
    save_file(expected, FOLDER / "adapter_expected.safetensors")


if __name__ == "__main__":
    main()
