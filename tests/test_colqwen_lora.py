"""LoRA adapters for ColQwen2.5: merged as PEFT merges them, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlx_embeddings_backends.colqwen import lora
from mlx_embeddings_backends.colqwen.checkpoint import canonical_name
from mlx_embeddings_backends.errors import UnsupportedModel

TARGETS = ["q_proj", "down_proj", "custom_text_proj"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 6), "k_proj": nn.Linear(8, 6)})
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(10, 8, bias=False)})


class Model(nn.Module):
    """Modules named and nested as colpali-engine's are, with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
        self.custom_text_proj = nn.Linear(8, 4)


def by_canonical_name(model: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = model.state_dict()
    return {str(canonical_name(name)): weight.clone() for name, weight in weights.items()}


def make_adapter(folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter that PEFT saves in `folder`. Returns the base's weights, and those that PEFT merges it into."""
    torch.manual_seed(0)
    base = Model()
    weights = by_canonical_name(base)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **options})
    adapted: Any = get_peft_model(base, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    adapted.save_pretrained(folder)
    return weights, by_canonical_name(adapted.merge_and_unload())


def merge(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    plan = lora.read(folder)
    lora.merge(weights, load_file(plan.file), plan, widen=Tensor.float, narrow=lambda merged: merged.float())
    return weights


def rename(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def set_option(folder: Path, **options: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["custom_text_proj"]},
        {
            "rank_pattern": {"custom_text_proj": 2},
            "alpha_pattern": {"layers.1.mlp.down_proj": 7, r"^language_model\.layers\.0\.self_attn\.q_proj": 11},
        },
        {"rank_pattern": {"q_proj|k_proj": 1}, "init_lora_weights": "gaussian"},
    ],
)
def test_weights_are_those_that_peft_merges(options: dict[str, Any], tmp_path: Path) -> None:
    weights, expected = make_adapter(tmp_path, **options)
    before = {name: weight.clone() for name, weight in weights.items()}
    merged = merge(tmp_path, weights)
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)
    changed = {name for name, weight in merged.items() if not torch.equal(weight, before[name])}
    assert len(changed) == (6 if "modules_to_save" in options else 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("language_model.", "model."),  # transformers 4
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("custom_text_proj", "embedding_proj_layer").replace("language_model", "vlm.model"),
    ],
)
def test_names_of_other_versions(change: Callable[[str], str], tmp_path: Path) -> None:
    weights, expected = make_adapter(tmp_path)
    rename(tmp_path, change)
    for name, weight in merge(tmp_path, weights).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


def test_an_update_of_bfloat16_weights_is_rounded_once(tmp_path: Path) -> None:
    weights, _ = make_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    halves = {name: weight.bfloat16() for name, weight in weights.items()}
    plan = lora.read(tmp_path)
    target, a, b = plan.updates[0].target, plan.updates[0].a, plan.updates[0].b
    exact = halves[target].double() + 5 / 3 * tensors[b].double() @ tensors[a].double()
    lora.merge(halves, tensors, plan, widen=Tensor.float, narrow=lambda merged: merged.bfloat16())
    assert halves[target].dtype == torch.bfloat16
    assert torch.equal(halves[target], exact.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"an_option_of_next_year": 0.5}, "an_option_of_next_year"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 4}, "rank 4"),
        ({"lora_alpha": "5"}, "alpha"),
        ({"rank_pattern": {"(a+)+": 3}}, "only names"),
        ({"rank_pattern": {"[": 3}}, "only names"),
        ({"alpha_pattern": {"q_proj\\": 3}}, "alpha_pattern"),
        ({"alpha_pattern": [3]}, "alpha_pattern"),
    ],
)
def test_what_is_not_plain_lora_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_adapter(tmp_path)
    set_option(tmp_path, **options)
    with pytest.raises(UnsupportedModel, match=message):
        lora.read(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lora_A.weight", "lora_embedding_A", "neither lora_A nor lora_B"),
        ("lora_A.weight", "lora_C.weight", "neither lora_A nor lora_B"),
        ("base_model.model.custom_text_proj", "base_model.model.classifier", "classifier"),
        ("down_proj.lora_A.weight", "down.lora_A.weight", "only one of"),
    ],
)
def test_names_that_are_not_known_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    make_adapter(tmp_path)
    rename(tmp_path, lambda name: name.replace(old, new))
    with pytest.raises(UnsupportedModel, match=message):
        lora.read(tmp_path)


def test_two_updates_of_one_weight_are_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    old = "base_model.model.language_model.layers.0"
    again = {name.replace(old, "base_model.model.model.layers.0"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | again, file)
    with pytest.raises(UnsupportedModel, match="twice"):
        lora.read(tmp_path)


def test_a_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights, _ = make_adapter(tmp_path)
    name = "language_model.layers.1.mlp.down_proj.weight"
    wider = {**weights, name: torch.zeros(8, 11)}
    with pytest.raises(UnsupportedModel, match=r"\[8, 10\].*\[8, 11\]"):
        merge(tmp_path, wider)
    del weights[name]
    with pytest.raises(UnsupportedModel, match=name):
        merge(tmp_path, weights)


def test_files_that_are_missing_pickled_or_broken(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"no tensors")
    with pytest.raises(UnsupportedModel, match="not a safetensors file"):
        lora.read(tmp_path)
    file.unlink()
    with pytest.raises(UnsupportedModel, match="has no adapter_model.safetensors"):
        lora.read(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(UnsupportedModel, match="pickle"):
        lora.read(tmp_path)
