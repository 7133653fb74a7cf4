"""Which rerankers are taken, which are refused and in which words, and no code of theirs run."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from tests.checkpoints import HIDDEN
from tests.parity import load
from tests.rerank_checkpoints import change, cross_encoder, reranker


def write(folder: Path, name: str, content: object) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder


ONE_LABEL = {"id2label": {"0": "LABEL_0"}}


@pytest.mark.parametrize("model_type", detect.CROSS_ENCODERS)
def test_one_label_makes_a_reranker(model_type: str, tmp_path: Path) -> None:
    name = {"architectures": ["AnyForSequenceClassification"], "model_type": model_type}
    choice = detect.choose(write(tmp_path, "config.json", {**name, **ONE_LABEL}))
    assert (choice.target, choice.backend, choice.verified) == (detect.CROSS_ENCODER, "torch", True)
    assert detect.choose(write(tmp_path, "config.json", {**name, "num_labels": 1})).target == detect.CROSS_ENCODER
    with pytest.raises(UnsupportedModel, match="'cross_encoder': use --backend torch"):
        detect.choose(tmp_path, "mlx")
    for labels in ({}, {"num_labels": 2}, {"id2label": {"0": "no", "1": "yes"}}, {**ONE_LABEL, "id2label": {}}):
        write(tmp_path, "config.json", {**name, **labels})
        with pytest.raises(UnsupportedModel, match=r"AnyForSequenceClassification has [02] labels, it is a classifier"):
            detect.choose(tmp_path, allow_unverified=True)


def test_a_reranker_that_no_test_holds_to_its_reference_has_to_be_asked_for(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3", **ONE_LABEL}
    write(tmp_path, "config.json", config)
    with pytest.raises(UnsupportedModel, match="'qwen3 cross_encoder': --allow-unverified"):
        detect.choose(tmp_path)
    choice = detect.choose(tmp_path, allow_unverified=True)
    assert (choice.target, choice.verified) == (detect.CROSS_ENCODER, False)
    write(tmp_path, "config.json", {**config, "model_type": "new", "auto_map": {"AutoModel": "modeling.New"}})
    with pytest.raises(UnsupportedModel, match="brings its own code"):
        detect.choose(tmp_path, allow_unverified=True)


def test_rerankers_of_other_modules_are_refused_by_name(tmp_path: Path) -> None:
    bare = str(reranker(tmp_path / "bare"))
    head = Dense(HIDDEN, 1, module_output_name="scores")
    CrossEncoder(modules=[Transformer(bare), Pooling(HIDDEN, "cls"), head], device="cpu").save_pretrained(
        str(tmp_path / "model"), create_model_card=False
    )
    with pytest.raises(UnsupportedModel, match="this CrossEncoder is made of Transformer, Pooling, Dense: of rerank"):
        detect.choose(tmp_path / "model")
    folder = cross_encoder(tmp_path / "one")
    modules = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    write(folder, "modules.json", [*modules, {"idx": 1, "name": "1", "path": "1_LogitScore", "type": kind}])
    (folder / "1_LogitScore").mkdir()
    write(folder / "1_LogitScore", "config.json", {"true_token_id": 1})
    with pytest.raises(UnsupportedModel, match="config.json is of a .*, and modules.json puts LogitScore behind it"):
        detect.choose(folder)
    kind = "sentence_transformers.models.Pooling"
    write(folder, "modules.json", [*modules, {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind}])
    with pytest.raises(UnsupportedModel, match="modules.json puts Pooling behind it"):
        detect.choose(folder)


@pytest.mark.parametrize("name", ["evil_module.Evil", "torch.hub.load", "torch.nn.Tanh", "builtins.eval", 3, ["Evil"]])
@pytest.mark.parametrize("saved", [True, False], ids=["sentence-transformers", "config.json"])
def test_another_activation_is_refused_and_never_imported(
    name: object, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, proof = cross_encoder(tmp_path), tmp_path / "imported"
    if saved:
        change(folder, "config_sentence_transformers.json", activation_fn=name)
    else:
        change(folder, "config_sentence_transformers.json", activation_fn=None)
        change(folder, "config.json", sbert_ce_default_activation_function=name)
    (folder / "evil_module.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: ...\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(UnsupportedModel, match="the checkpoint's activation is .*: known are torch.nn.Identity"):
        load(folder)
    assert not proof.exists() and "evil_module" not in sys.modules


def without(*names: str) -> Callable[[Path], object]:
    def break_it(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({name: each for name, each in weights.items() if name not in names}, folder / "model.safetensors")

    return break_it


def misshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "classifier.weight": torch.zeros(3, HIDDEN)}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def unpickle(folder: Path) -> None:
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": Path("no tensor")}, folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (without("classifier.weight", "classifier.bias"), "the files lack 2 of .* such as classifier.weight"),
    "no pooler": (without("bert.pooler.dense.bias"), "lack 1 of the model's weights, such as bert.pooler.dense.bias"),
    "another shape": (misshape, "weights have other shapes than config.json asks for"),
    "cut short": (cut, "the checkpoint cannot be loaded: .*header"),
    "pickle": (unpickle, "a pickle with more than tensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json that can be read"),
    "sizes that do not fit": (lambda folder: change(folder, "config.json", num_attention_heads=5), "not a multiple"),
    "chat template": (
        lambda folder: change(folder, "tokenizer_config.json", chat_template="{{ messages }}"),
        "takes text, message: only text is known",
    ),
    "two labels": (lambda folder: change(folder, "config.json", id2label=None), "has 2 labels, it is a classifier"),
    "quantised": (
        lambda folder: change(folder, "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "the weights are quantised",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoints_are_refused_in_one_line(how: str, tmp_path: Path) -> None:
    break_it, words = BROKEN[how]
    folder = reranker(tmp_path)
    break_it(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_token_types_that_the_model_has_no_rows_for(tmp_path: Path) -> None:
    folder = reranker(tmp_path, type_vocab_size=1)
    with pytest.raises(ModelError, match="the tokenizer gives 2 token types, and config.json says type_vocab_size 1"):
        load(folder)


def test_a_transformer_that_was_saved_for_another_task(tmp_path: Path) -> None:
    folder = cross_encoder(tmp_path)
    (folder / "sentence_bert_config.json").unlink()
    with pytest.raises(UnsupportedModel, match="the transformer gives 'token_embeddings': only 'scores' is known"):
        load(folder)
