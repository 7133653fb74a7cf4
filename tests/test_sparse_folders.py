"""Which folders are sparse encoders, what of them is refused and in which words, and no code run."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Normalize

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_server.engine.engine import Engine
from tests.checkpoints import bare_encoder, sentence_transformer
from tests.parity import load
from tests.sparse_checkpoints import inference_free, masked_language_model, splade, static, use_json_of_weights


def test_a_language_model_is_a_text_encoder_unless_it_is_called_sparse(tmp_path: Path) -> None:
    folder = masked_language_model(tmp_path, "bert")
    assert detect.choose(folder).target == detect.SENTENCE_TRANSFORMER
    assert detect.choose(folder, kind="embeddings").target == detect.SENTENCE_TRANSFORMER
    assert detect.choose(folder, kind="sparse-embeddings").target == detect.SPARSE_ENCODER


def test_models_without_sparse_embeddings_are_not_called_sparse(tmp_path: Path) -> None:
    for folder in (bare_encoder(tmp_path / "bare"), sentence_transformer(tmp_path / "dense")):
        with pytest.raises(UnsupportedModel, match="gives no sparse embeddings"):
            detect.choose(folder, kind="sparse-embeddings")


def test_other_language_models_are_unverified(tmp_path: Path) -> None:
    folder = splade(tmp_path, "longformer")
    with pytest.raises(UnsupportedModel, match="'longformer sparse_encoder': --allow-unverified"):
        detect.choose(folder)
    choice = detect.choose(folder, allow_unverified=True)
    assert (choice.target, choice.verified) == (detect.SPARSE_ENCODER, False)
    with pytest.raises(UnsupportedModel, match="use --backend torch"):
        detect.choose(splade(tmp_path / "bert"), "mlx")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def start(folder: Path) -> None:
    """As the server does."""
    Engine("tiny", lambda: load(folder), queue_tokens=10_000).load()


@pytest.mark.parametrize("kind", ["evil_module.Transformer", "sentence_transformers.modules.CNN", "os.system"])
def test_classes_of_a_router_are_looked_at(kind: str, tmp_path: Path) -> None:
    folder = inference_free(tmp_path)
    config = json.loads((folder / "router_config.json").read_text())
    types = {name: kind if "Static" in name else own for name, own in config["types"].items()}
    edit(folder / "router_config.json", types=types)
    with pytest.raises(UnsupportedModel, match=f"names '{kind}'; known modules: Transformer"):
        detect.choose(folder)
    # An empty file sends the library to another one.
    (folder / "config.json").write_text((folder / "router_config.json").read_text())
    (folder / "router_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=f"names '{kind}'; known modules: Transformer"):
        detect.choose(folder)


def test_a_router_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = inference_free(tmp_path)
    edit(folder / "router_config.json", types={"../bare": "sentence_transformers.base.modules.Transformer"})
    with pytest.raises(UnsupportedModel, match="outside the model's folder"):
        detect.choose(folder)


def test_a_router_that_knows_no_way_for_a_text_is_refused(tmp_path: Path) -> None:
    folder = inference_free(tmp_path, default_route=None, allow_empty_key=False)
    with pytest.raises(UnsupportedModel, match="no route for a text of no role"):
        load(folder)


@pytest.mark.parametrize("path", ["/etc/idf.json", "../idf.json", "other.json"])
def test_weights_are_read_from_the_folder_only(path: str, tmp_path: Path) -> None:
    folder = static(tmp_path)
    use_json_of_weights(folder)
    (tmp_path / "idf.json").write_text("{}")
    edit(folder / "config.json", path=path)
    with pytest.raises(ModelError, match=f"takes its weights from '{path}', which the folder does not have"):
        start(folder)


def test_a_normalisation_is_refused_by_name(tmp_path: Path) -> None:
    folder = splade(tmp_path, after=[Normalize()])
    with pytest.raises(UnsupportedModel, match="made of Transformer, SpladePooling, Normalize: known are"):
        start(folder)


def test_modules_in_an_order_that_is_not_known(tmp_path: Path) -> None:
    folder = splade(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, modules[1]]))
    with pytest.raises(UnsupportedModel, match="made of Transformer, SpladePooling, SpladePooling: known are"):
        start(folder)


def test_a_transformer_without_its_language_model_is_refused(tmp_path: Path) -> None:
    folder = splade(tmp_path)
    edit(folder / "sentence_bert_config.json", transformer_task="feature-extraction")
    with pytest.raises(UnsupportedModel, match="for 'feature-extraction': .*only 'fill-mask' is known"):
        start(folder)


@pytest.mark.parametrize(
    ("model_type", "part"),
    [("bert", "cls.predictions.transform"), ("distilbert", "vocab_"), ("xlm-roberta", "lm_head")],
)
def test_a_head_that_is_missing_is_not_made_up(model_type: str, part: str, tmp_path: Path) -> None:
    folder = splade(tmp_path, model_type)
    weights = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in weights.items() if not name.startswith(part)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"the files lack \d of the model's weights, such as {part}"):
        start(folder)


class RunsCode:
    """Its pickle calls `os.mkdir(path)` when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("make", [splade, static], ids=["splade", "static"])
def test_pickled_weights_run_no_code(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, proof = make(tmp_path), tmp_path / "unpickled"
    weights = {**load_file(folder / "model.safetensors"), "evil": RunsCode(proof)}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        start(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(proof), protocol=2))
    with pytest.raises(ModelError, match="pickle"):
        start(folder)
    assert not proof.exists()


@pytest.mark.parametrize("make", [splade, static], ids=["splade", "static"])
@pytest.mark.parametrize("keep", [0, 100, 500])
def test_weights_that_were_cut_short(make: Callable[[Path], Path], keep: int, tmp_path: Path) -> None:
    folder = make(tmp_path)
    os.truncate(folder / "model.safetensors", keep)
    with pytest.raises(ModelError) as caught:
        start(folder)
    assert "afetensor" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weights",
    [{}, {"weight": torch.ones(3)}, {"weight": torch.ones(300, 2)}, {"weight": torch.ones(400), "more": torch.ones(1)}],
)
def test_static_weights_of_another_shape(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = static(tmp_path)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match="SparseStaticEmbedding"):
        start(folder)


@pytest.mark.parametrize(
    "changes",
    [{"default_prompt_name": "x"}, {"max_active_dims": 0}, {"max_active_dims": "5"}, {"max_active_dims": True}],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = splade(tmp_path)
    edit(folder / "config_sentence_transformers.json", **changes)
    with pytest.raises(ModelError, match=next(iter(changes))):
        start(folder)


def test_no_limit_of_tokens_is_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="set max_seq_length"):
        load(static(tmp_path, model_max_length=None))
