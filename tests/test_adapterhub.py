"""AdapterHub's adapters: which configs and weights are taken, and in which words the others are refused."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlx_embeddings_backends import adapterhub, detect
from mlx_embeddings_backends.base import LoadOptions
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.torch import pickles
from tests.checkpoints import bare_encoder
from tests.conftest import DATA
from tests.test_detect import RunsCode

SPECTER2 = DATA / "specter2"
BASE = json.loads((SPECTER2 / "base" / "config.json").read_bytes())
DOWN = "bert.encoder.layer.1.output.adapters.specter2_proximity.adapter_down.0"
UP = "bert.encoder.layer.1.output.adapters.specter2_proximity.adapter_up"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of an adapter, to be changed."""
    return Path(shutil.copytree(SPECTER2 / "specter2_proximity", tmp_path / "adapter"))


def read(folder: Path, base: Mapping[str, Any] = BASE) -> adapterhub.Adapter[Tensor]:
    return adapterhub.read({"mine": folder}, base, pickles.read)["mine"]


def change(folder: Path, **changes: Any) -> None:
    """Set keys of the config within adapter_config.json, or take out those that are `...`."""
    outer = json.loads((folder / "adapter_config.json").read_bytes())
    config = outer["config"] | changes
    outer["config"] = {name: value for name, value in config.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(outer))


def change_outer(folder: Path, **changes: Any) -> None:
    outer = json.loads((folder / "adapter_config.json").read_bytes()) | changes
    outer = {name: value for name, value in outer.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(outer))


def change_weights(folder: Path, apply: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "pytorch_adapter.bin"
    weights = pickles.read(file)
    torch.save(apply(dict(weights)), file)


def test_what_the_library_saved_is_read_as_it_is(folder: Path) -> None:
    adapter = read(folder)
    assert adapter.non_linearity == "relu"
    assert [tuple(layer.down_weight.shape) for layer in adapter.layers] == [(16, 64)] * 3
    saved = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    middle = adapter.layers[1]
    for ours, name in (
        (middle.down_weight, f"{DOWN}.weight"),
        (middle.down_bias, f"{DOWN}.bias"),
        (middle.up_weight, f"{UP}.weight"),
        (middle.up_bias, f"{UP}.bias"),
    ):
        assert torch.equal(ours, saved[name])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("is_parallel", True, "has is_parallel true, which is not supported: it must be false"),
        ("mh_adapter", True, "has mh_adapter true, which is not supported: it must be false"),
        ("mh_adapter", ..., "lacks mh_adapter, which is not supported"),
        ("output_adapter", False, "has output_adapter false"),
        ("cross_adapter", True, "has cross_adapter true"),
        ("original_ln_before", False, "has original_ln_before false"),
        ("original_ln_before", ..., "lacks original_ln_before, for which AdapterHub takes false, which is not supp"),
        ("original_ln_after", False, "has original_ln_after false"),
        ("residual_before_ln", False, "has residual_before_ln false"),
        ("residual_before_ln", "post_add", 'has residual_before_ln "post_add"'),
        ("residual_before_ln", 1, "has residual_before_ln 1"),
        ("ln_before", True, "has ln_before true"),
        ("ln_after", True, "has ln_after true"),
        ("use_gating", True, "has use_gating true"),
        ("scaling", 4.0, "has scaling 4.0, which is not supported: it must be 1.0"),
        ("scaling", "learned", 'has scaling "learned"'),
        ("scaling", True, "has scaling true"),
        ("phm_layer", True, "has phm_layer true"),
        ("inv_adapter", "nice", 'has inv_adapter "nice", which is not supported: it must be null'),
        ("invertible_adapter", {"block_type": "nice"}, "has invertible_adapter {"),
        ("leave_out", [2], "has leave_out [2], which is not supported: it must be []"),
        ("architecture", "lora", 'has architecture "lora"'),
        ("non_linearity", "leakyrelu", 'has non_linearity "leakyrelu", which is not supported: it must be one of gelu'),
        ("non_linearity", None, "has non_linearity null"),
        ("non_linearity", ..., "has non_linearity null"),
        ("reduction_factor", 8, "adapter_down.0.weight of layer 0 as [16, 64]: by adapter_config.json it is [8, 64]"),
        ("reduction_factor", {"0": 4}, "reduction_factor {"),
        ("reduction_factor", 0, "has reduction_factor 0"),
        ("reduction_factor", float("nan"), "has reduction_factor NaN"),
        ("reduction_factor", 10**400, "has reduction_factor 1000"),
        ("reduction_factor", ..., "has reduction_factor null"),
        ("attention_type", "sent-lvl-dynamic", 'has attention_type "sent-lvl-dynamic", which is not known'),
    ],
)
def test_a_config_that_the_formula_does_not_cover_is_refused_by_name(
    key: str, value: object, message: str, folder: Path
) -> None:
    change(folder, **{key: value})
    with pytest.raises(UnsupportedModel) as caught:
        read(folder)
    assert message in str(caught.value) and str(caught.value).startswith("the adapter 'mine': ")


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"model_type": "roberta"}, 'has model_type "roberta", and its base model\'s config.json "bert"'),
        ({"hidden_size": 768}, "has hidden_size 768, and its base model's config.json 64: it was made for another"),
        ({"hidden_size": ...}, "has hidden_size null"),
        ({"config": ...}, "has config null, which is not supported"),
        ({"config": "houlsby"}, 'has config "houlsby", which is not supported: it must be an object, or one of pfeif'),
        ({"config": ["seq_bn"]}, 'has config ["seq_bn"]'),
    ],
)
def test_an_adapter_of_another_model_or_another_form_is_refused(
    outer: dict[str, Any], message: str, folder: Path
) -> None:
    change_outer(folder, **outer)
    with pytest.raises(UnsupportedModel) as caught:
        read(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", ["{", "[]", "null", '"config"'])
def test_a_config_that_is_none_is_refused(config: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(UnsupportedModel, match="the adapter 'mine': adapter_config.json is not"):
        read(folder)


def test_keys_that_older_versions_did_not_save_have_their_defaults(folder: Path) -> None:
    later = ("architecture", "cross_adapter", "dropout", "init_weights_seed", "leave_out", "phm_layer", "phm_bias")
    change(folder, **dict.fromkeys((*later, "scaling", "stochastic_depth", "use_gating", "is_parallel"), ...))
    change_outer(folder, version="3.1.1", config_id="9076f36a74755ac4")
    assert len(read(folder).layers) == 3


@pytest.mark.parametrize("name", ["pfeiffer", "seq_bn"])
def test_a_config_that_is_the_name_of_one(name: str, folder: Path) -> None:
    change_outer(folder, config=name)

    def narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:  # the sixteenth of 64, where these have a fourth
        cut: dict[str, Any] = {"down.0.weight": slice(4), "down.0.bias": slice(4), "up.weight": (slice(None), slice(4))}
        return {key: each[cut.get(key.partition("adapter_")[2], ...)].clone() for key, each in weights.items()}

    change_weights(folder, narrow)
    assert [tuple(layer.up_weight.shape) for layer in read(folder).layers] == [(64, 4)] * 3


def test_gelu_of_a_version_that_meant_another_function_is_refused(folder: Path) -> None:
    change(folder, non_linearity="gelu")
    assert read(folder).non_linearity == "gelu"
    change_outer(folder, version=...)
    with pytest.raises(UnsupportedModel, match="non_linearity gelu and no version"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UP}.bias": None}, "lacks adapter_up.bias of layer 1"),
        ({f"{UP}.bias": torch.zeros(63)}, "has adapter_up.bias of layer 1 as [63]: by adapter_config.json it is [64]"),
        ({f"{UP}.bias": torch.zeros(1, 64)}, "has adapter_up.bias of layer 1 as [1, 64]"),
        ({f"{UP}.bias": torch.zeros(64, dtype=torch.int64)}, "has adapter_up.bias of layer 1 as torch.int64"),
        ({f"{UP}.bias": torch.zeros(64, dtype=torch.float8_e4m3fn)}, "layer 1 as torch.float8_e4m3fn"),
        ({UP.replace("1", "3") + ".bias": torch.zeros(64)}, "of layer 3, and its base model 3 layers"),
        ({UP.replace("1", "01") + ".bias": torch.zeros(64)}, "twice, by two names"),
        ({UP.replace("1", "9" * 5000) + ".bias": torch.zeros(64)}, "which is not supported"),
        ({UP.replace("output.", "attention.output.") + ".bias": torch.zeros(64)}, "attention.output.adapters."),
        ({UP.replace("proximity", "other") + ".bias": torch.zeros(64)}, "twice, by two names"),
        (
            {UP.replace("proximity", "other") + ".bias": torch.zeros(64), f"{UP}.bias": None},
            "has weights of 2 adapters: only one is supported",
        ),
        ({f"{UP}.scaling": torch.ones(1)}, "scaling', which is not supported"),
        ({"bert.pooler.dense.bias": torch.zeros(64)}, "has 'bert.pooler.dense.bias', which is not supported"),
    ],
)
def test_weights_that_are_not_just_the_adapters_are_refused(
    changes: dict[str, Tensor | None], message: str, folder: Path
) -> None:
    change_weights(folder, lambda weights: {k: each for k, each in (weights | changes).items() if each is not None})
    with pytest.raises(UnsupportedModel) as caught:
        read(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "bert.", "module.bert."])
@pytest.mark.parametrize("name", ["[PRX]", "specter2/proximity, v1"])
def test_other_names_of_the_same_weights(name: str, prefix: str, folder: Path) -> None:
    change_weights(
        folder,
        lambda weights: {
            prefix + key.removeprefix("bert.").replace("specter2_proximity", name): each
            for key, each in weights.items()
        },
    )
    assert torch.equal(read(folder).layers[2].up_bias, read(SPECTER2 / "specter2_proximity").layers[2].up_bias)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(ModelError, match="the adapter 'mine': its folder has no weights: no adapter.safetensors, and"):
        read(folder)


# What is wrong with the file itself, on both backends.


def load(folder: Path, backend: str, base: Path = SPECTER2 / "base") -> None:
    options = LoadOptions(device="cpu", dtype="float32", adapters={"mine": folder})
    detect.load(detect.choose(base, backend, has_adapters=True), base, options)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_files_that_are_cut_short_are_named_in_one_line(backend: str, folder: Path) -> None:
    weights = pickles.read(folder / "pytorch_adapter.bin")
    os.truncate(folder / "pytorch_adapter.bin", 20_000)
    with pytest.raises(ModelError, match=r"^the adapter 'mine': pytorch_adapter.bin cannot be read, .*$") as caught:
        load(folder, backend)
    assert "\n" not in str(caught.value)
    save_file(weights, folder / "adapter.safetensors")
    load(folder, backend)  # which is preferred
    os.truncate(folder / "adapter.safetensors", 20_000)
    with pytest.raises(ModelError, match=r"^the adapter 'mine': adapter.safetensors .*$") as caught:
        load(folder, backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_pickle_runs_no_code(backend: str, folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "unpickled"
    change_weights(folder, lambda weights: {**weights, "evil": RunsCode(proof)})
    with pytest.raises(ModelError, match=r"^the adapter 'mine': pytorch_adapter.bin is a pickle with more than tens"):
        load(folder, backend)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read, and may be cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "cannot be read: it is no pickle of"),
        (pickle.dumps({"a": 1}, protocol=2), "cannot be read"),
    ],
)
def test_files_that_are_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(ModelError, match=f"^weights.bin {message}"):
        pickles.read(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list: only tensors by name"),
        ({"state_dict": {"a": torch.ones(1)}}, "holds 'state_dict', a dict: only tensors by name"),
        ({"epoch": 3}, "holds 'epoch', a int: only tensors by name"),
        ({3: torch.ones(1)}, "holds '3', a Tensor: only tensors by name"),
        pytest.param(
            {"a": torch.ones(3, 3).to_sparse()},
            "holds 'a', which is sparse",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants"),  # torch, as it reads it
        ),
        ({"a": torch.empty(3, device="meta")}, "holds 'a', which is sparse, quantised or not stored in full"),
        ({"a": torch.ones(1).expand(10**12)}, "holds 'a', which is sparse, quantised or not stored in full"),
    ],
)
def test_pickles_of_anything_but_plain_tensors_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.bin")
    with pytest.raises(UnsupportedModel, match=f"^weights.bin {message}"):
        pickles.read(tmp_path / "weights.bin")


@pytest.mark.parametrize(("backend", "model_type"), [("torch", "roberta"), ("mlx", "xlm-roberta"), ("mlx", "qwen3")])
def test_other_architectures_take_no_adapters(backend: str, model_type: str, folder: Path, tmp_path: Path) -> None:
    base = bare_encoder(tmp_path / "base", model_type)
    with pytest.raises(UnsupportedModel, match=f"--adapter is for models of the architecture bert, not '{model_type}'"):
        load(folder, backend, base)
    options = LoadOptions(device="cpu", adapters={"mine": folder})  # not even when nobody has looked before
    with pytest.raises(UnsupportedModel, match="adapter"):
        detect.load(detect.choose(base, backend), base, options)


def test_a_bert_that_our_forward_pass_does_not_cover_takes_none(folder: Path, tmp_path: Path) -> None:
    base = bare_encoder(tmp_path / "base", output_hidden_states=True)
    with pytest.raises(UnsupportedModel, match="adapters are known for a plain BERT only"):
        load(folder, "torch", base)
