"""What is made of a checkpoint's own files: which are taken, which are refused and in which words, and no code run."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, LoadOptions
from mlx_embeddings_backends.errors import MissingDependency, ModelError, UnsupportedModel
from mlx_embeddings_server.engine.engine import Engine
from tests.checkpoints import HIDDEN, bare_encoder, dense, sentence_transformer
from tests.parity import load

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}


def write(folder: Path, name: str, content: object) -> Path:
    """JSON, or a text as it is."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def start_engine(load: Callable[[], Backend]) -> Engine:
    """As the server does, with what the model raises made into a `ModelError`."""
    engine = Engine("tiny", load, queue_tokens=10_000)
    engine.load()
    return engine


@pytest.mark.parametrize("model_type", detect.TEXT_ENCODERS)
def test_known_architectures_go_to_torch(model_type: str, tmp_path: Path) -> None:
    choice = detect.choose(write(tmp_path, "config.json", {"model_type": model_type}))
    assert (choice.target, choice.backend) == (detect.SENTENCE_TRANSFORMER, "torch")


@pytest.mark.parametrize("prefix", ["sentence_transformers.models", "sentence_transformers.base.modules.transformer"])
def test_modules_are_known_by_their_class_wherever_the_library_keeps_it(prefix: str, tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"model_type": "bert"})
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    write(tmp_path, "modules.json", [{**TRANSFORMER, "type": f"{prefix}.Transformer"}, pooling])
    assert detect.choose(tmp_path).backend == "torch"


def test_the_transformer_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "0_Transformer/config.json", {"model_type": "distilbert"})
    write(tmp_path, "modules.json", [{**TRANSFORMER, "path": "0_Transformer"}])
    assert detect.choose(tmp_path).backend == "torch"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "wav2vec2"}, ["'wav2vec2'", "Known: albert, bert,", "xlm-roberta"]),
        ({}, ["None", "Known: albert, bert,"]),
        ({"model_type": "new", "auto_map": {"AutoModel": "modeling.New"}}, ["'new'", "brings its own code", "Known:"]),
        (
            {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
            ["BertForSequenceClassification has 2 labels", "a classifier"],
        ),
        ("{", ["config.json is not JSON"]),
    ],
)
def test_configurations_that_are_refused(config: object, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        detect.choose(write(tmp_path, "config.json", config))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("config", [[], "null", 3, {"model_type": ["bert"]}, {"model_type": 3, "architectures": 3}])
def test_json_of_another_shape_is_refused_like_any_other(config: object, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel):
        detect.choose(write(tmp_path, "config.json", config))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no config.json"),
        ({"adapter_config.json": {"peft_type": "LORA"}}, "no config.json"),
        ({"modules.json": [TRANSFORMER]}, "no config.json"),
        ({"modules.json": "[{"}, "modules.json is not JSON"),
        ({"modules.json": {}}, "not a list of modules"),
        ({"modules.json": []}, "not a list of modules"),
        ({"modules.json": ["Transformer"]}, "not a list of modules"),
        ({"modules.json": [{**TRANSFORMER, "type": "sentence_transformers.models.Pooling"}]}, "must be a Transformer"),
    ],
)
def test_folders_that_are_no_checkpoint(files: dict[str, object], words: str, tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(UnsupportedModel, match=words):
        detect.choose(tmp_path)


@pytest.mark.parametrize(
    "kind",
    ["os.system", "sentence_transformers.models.CLIPModel", "evil_module.Transformer", "Transformer", "", 3, None],
)
def test_a_class_that_is_not_known_is_named(kind: object, tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"model_type": "bert"})
    write(tmp_path, "modules.json", [TRANSFORMER, {"path": "1", "type": kind}])
    with pytest.raises(UnsupportedModel, match=f"modules.json names '{kind}'; known modules: Transformer, Pooling"):
        detect.choose(tmp_path)


@pytest.mark.parametrize("kind", ["evil_module.Evil", "sentence_transformers.evil_module.Pooling"])
def test_python_files_of_the_folder_are_never_imported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, proof = sentence_transformer(tmp_path), tmp_path / "imported"
    write(folder, "evil_module.py", f"open({str(proof)!r}, 'w')\nclass Evil: ...\nPooling = Evil\n")
    modules = json.loads((folder / "modules.json").read_text())
    write(folder, "modules.json", [*modules, {"idx": 2, "name": "2", "path": "2_Evil", "type": kind}])
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises((UnsupportedModel, ModelError)):
        start_engine(lambda: load(folder))
    assert not proof.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("path", ["../outside", "/etc", "1/../../outside"])
def test_a_module_outside_the_folder_is_refused(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(tmp_path, "outside/config.json", {"model_type": "bert", "activation_function": "torch.nn.Identity"})
    for module in (TRANSFORMER, {"type": "sentence_transformers.models.Dense"}):
        write(folder, "modules.json", [{**module, "path": path}])
        with pytest.raises(UnsupportedModel, match="outside the model's folder"):
            detect.choose(folder)


@pytest.mark.parametrize("name", ["evil_module.Evil", "torch.hub.load", "torchvision.ops.MLP", "builtins.eval", None])
def test_an_activation_that_is_not_of_torch_nn_is_refused(name: str | None, tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path, after=[dense(HIDDEN, 8)])
    config = json.loads((folder / "2_Dense" / "config.json").read_text())
    write(folder, "2_Dense/config.json", {**config, "activation_function": name})
    with pytest.raises(UnsupportedModel, match=f"the activation {name!r}"):
        detect.choose(folder)


def test_mlx_says_what_to_use_instead(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"model_type": "t5"})
    with pytest.raises(UnsupportedModel, match="'t5': use --backend torch"):
        detect.choose(tmp_path, backend="mlx")
    assert detect.choose(tmp_path, backend="torch").reason == "asked for"
    assert detect.choose(tmp_path).reason == "the MLX backend has no 't5'"


@pytest.mark.parametrize(
    ("system", "machine", "backend"),
    [("Darwin", "arm64", "mlx"), ("Darwin", "x86_64", "torch"), ("Linux", "aarch64", "torch")],
)
def test_apple_silicon_chooses_mlx_for_what_it_has(
    system: str, machine: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    write(tmp_path, "config.json", {"model_type": "bert"})
    assert detect.choose(tmp_path).backend == "torch"  # which takes tokenizers of other files
    (tmp_path / "vocab.txt").touch()
    assert detect.choose(tmp_path).backend == backend
    write(tmp_path, "config.json", {"model_type": "modernbert"})
    assert detect.choose(tmp_path).backend == "torch"
    (tmp_path / "tokenizer.json").touch()
    assert detect.choose(tmp_path).backend == backend
    assert detect.choose(write(tmp_path, "config.json", {"model_type": "t5"})).backend == "torch"


@pytest.mark.parametrize(("model_type", "backend"), [("lfm2", "mlx"), ("wav2vec2", "torch")])
def test_what_no_test_holds_to_its_reference_has_to_be_asked_for(model_type: str, backend: str, tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"model_type": model_type})
    with pytest.raises(UnsupportedModel, match=f"'{model_type}': --allow-unverified"):
        detect.choose(tmp_path, backend)
    assert not detect.choose(tmp_path, backend, allow_unverified=True).verified


def test_own_code_is_not_run_when_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"model_type": "new", "auto_map": {"AutoModel": "modeling.New"}})
    with pytest.raises(UnsupportedModel, match="brings its own code"):
        detect.choose(tmp_path, allow_unverified=True)


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "colqwen2",
            "architectures": ["ColQwen2ForRetrieval"],
            "vlm_config": {"model_type": "qwen2_5_vl"},
        },
        {"model_type": "colqwen2_5", "vlm_config": {"model_type": "qwen2_5_vl"}},
        {"model_type": "qwen2_5_vl", "architectures": ["ColQwen2_5"]},
    ],
)
def test_colqwen_goes_by_several_names(config: object, tmp_path: Path) -> None:
    write(tmp_path, "config.json", config)
    assert detect.choose(tmp_path).target.endswith("torch.colqwen2_5:TorchColQwen2_5")
    assert detect.choose(tmp_path, "mlx").target.endswith("mlx.colqwen2_5:MlxColQwen2_5")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "colqwen2", "vlm_config": {"model_type": "qwen2_vl"}},  # ColQwen2
        {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},  # answers in words
    ],
)
def test_what_resembles_colqwen_is_not_taken_for_it(config: object, tmp_path: Path) -> None:
    write(tmp_path, "config.json", config)
    for backend in ("torch", "mlx"):
        with pytest.raises(UnsupportedModel, match="does not know"):
            detect.choose(tmp_path, backend)


def test_an_adapter_is_chosen_by_its_base(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    write(adapter, "adapter_config.json", {"base_model_name_or_path": "owner/base", "revision": "v1"})
    write(base, "config.json", {"model_type": "qwen2_5_vl", "architectures": ["ColQwen2_5"]})
    assert detect.read_adapter(adapter) == detect.Adapter("peft", "adapter", "owner/base", "v1")
    assert detect.read_adapter(base) is None
    assert "colqwen" in detect.choose(adapter, base=base).target
    write(base, "config.json", {"model_type": "bert"})
    with pytest.raises(UnsupportedModel, match="an adapter of 'bert'"):
        detect.choose(adapter, base=base)
    write(adapter, "adapter_config.json", {})
    with pytest.raises(UnsupportedModel, match="names no base model"):
        detect.read_adapter(adapter)


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    choice = detect.Choice("package_that_is_not_here.models:Model", "torch", "")
    with pytest.raises(MissingDependency, match="pip install package_that_is_not_here"):
        detect.load(choice, tmp_path, LoadOptions())


@pytest.mark.parametrize(("device", "here"), [("cuda", torch.cuda.is_available()), ("mps", False), ("cuda:99", False)])
def test_a_device_that_is_not_here(device: str, here: bool, tmp_path: Path) -> None:
    if here or (device == "mps" and torch.backends.mps.is_available()):
        pytest.skip(f"there is {device} here")
    folder = bare_encoder(tmp_path)
    with pytest.raises(ModelError, match=f"--device {device}"):
        load(folder, device=device)


@pytest.mark.parametrize("device", ["abacus", "meta", "cpu:x", ""])
def test_a_device_of_no_known_kind(device: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"--device {device}: known are auto, cpu"):
        load(bare_encoder(tmp_path), device=device)


class RunsCode:
    """Its pickle calls `os.mkdir(path)` when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("in_zip", [True, False], ids=["torch.save", "bare pickle"])
def test_pickled_weights_run_no_code(in_zip: bool, tmp_path: Path) -> None:
    folder, proof = bare_encoder(tmp_path / "model"), tmp_path / "unpickled"
    weights = {**load_file(folder / "model.safetensors"), "evil": RunsCode(proof)}
    (folder / "model.safetensors").unlink()
    if in_zip:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(proof), protocol=2))
    with pytest.raises(ModelError, match="pickle with more than tensors"):
        start_engine(lambda: load(folder))
    assert not proof.exists()


def test_pickled_weights_of_a_dense_module_run_no_code(tmp_path: Path) -> None:
    folder, proof = sentence_transformer(tmp_path, after=[dense(HIDDEN, 8, nn.Identity())]), tmp_path / "unpickled"
    weights = {**load_file(folder / "2_Dense" / "model.safetensors"), "evil": RunsCode(proof)}
    (folder / "2_Dense" / "model.safetensors").unlink()
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle with more than tensors"):
        start_engine(lambda: load(folder))
    assert not proof.exists()


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_weights_that_were_cut_short(keep: int, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path)
    os.truncate(folder / "model.safetensors", keep)
    with pytest.raises(ModelError, match=r"could not be loaded: \w*Safetensor\w*"):
        start_engine(lambda: load(folder))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("bert", "layer.1.output.dense.weight"), ("qwen3", "layers.0.mlp.gate_proj.weight"), ("nomic_bert", "weight")],
)
def test_weights_that_are_missing_are_not_made_up(model_type: str, name: str, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    weights = load_file(folder / "model.safetensors")
    lost = next(key for key in weights if key.endswith(name))
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="the files lack 1 of the model's weights, such as"):
        load(folder)


def test_a_pooler_may_be_missing(tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path)
    weights = {name: each for name, each in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load(folder).info.dimensions == HIDDEN


def test_a_model_that_loads_is_ready(tmp_path: Path) -> None:
    engine = start_engine(lambda: load(bare_encoder(tmp_path)))
    assert engine.state == "ready"
    engine.stop()
