"""Folders with open_clip_config.json that others have, that are broken, or that make no sense; and names of weights."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_embeddings_backends.base import Backend
from mlx_embeddings_backends.errors import (
    ModelError,
    UnsupportedModel,
)
from mlx_embeddings_backends.torch.open_clip_tags import pretrained_repository
from tests.checkpoints import bare_encoder, shake
from tests.clip_checkpoints import (
    CLIP,
    TEXTS,
    VISION,
    WEIGHTS,
    Evil,
    Reference,
    changed_model,
    open_clip_folder,
    with_text,
)
from tests.parity import cosines, distance, embed, embed_singly, load

TOLERANCE = 1e-5  # of any component of a unit vector, in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    return load(folder)


@pytest.mark.parametrize("pads_unseen", [True, False])
def test_a_text_tower_of_transformers(pads_unseen: bool, tmp_path: Path) -> None:
    """Its config and its tokenizer come from the folder, whatever the name that open_clip downloads it by."""
    folder = bare_encoder(tmp_path / "roberta", "roberta")
    (folder / "model.safetensors").unlink()
    if not pads_unseen:  # open_clip attends to everything but the config's padding, which is not the tokenizer's here
        own = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(own | {"pad_token_id": 3}))
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": "roberta-base", "hf_model_pretrained": False}
    config = CLIP | {"text_cfg": {**text, "hf_proj_type": "mlp", "context_length": 40}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model: Any = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    shake(model)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    expected = Reference.of(folder).texts()
    renamed = changed_model(
        folder, tmp_path / "renamed", text_cfg=config["text_cfg"] | {"hf_model_name": "roberta-base"}
    )
    backend = load(renamed)
    assert distance(embed(backend, TEXTS, "end"), expected) < TOLERANCE
    assert distance(embed_singly(backend, TEXTS, "end"), expected) < TOLERANCE
    assert cosines(embed(load(renamed, "bfloat16"), TEXTS, "end"), expected).min() > 0.999
    (renamed / "config.json").unlink()
    with pytest.raises(ModelError, match="transformers' 'roberta-base'.* put its config.json beside"):
        load(renamed)


def test_weights_in_other_files_and_layouts(folder: Path, tmp_path: Path, backend: Backend) -> None:
    expected = embed(backend, TEXTS)
    weights = load_file(folder / WEIGHTS)
    pickled = changed_model(folder, tmp_path / "pickled")
    (pickled / WEIGHTS).unlink()
    torch.save(weights, pickled / "open_clip_pytorch_model.bin")
    np.testing.assert_array_equal(embed(load(pickled), TEXTS), expected)
    # The text tower's parts by themselves, for a model that has them in a tower; and weights in half precision.
    custom = changed_model(folder, tmp_path / "custom", custom_text=True)
    np.testing.assert_array_equal(embed(load(custom), TEXTS), expected)
    save_file({name: each.half() for name, each in weights.items()}, custom / WEIGHTS)
    half = load(custom)
    assert half.info.dtype == "float32"
    assert cosines(embed(half, TEXTS), expected).min() > 0.99999
    # What transformers has under its own name is not open_clip's.
    (custom / "model.safetensors").write_bytes(b"of transformers")
    load(custom)


def test_a_pickle_with_more_than_tensors_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = changed_model(folder, tmp_path / "copy")
    (copy / WEIGHTS).unlink()
    (copy / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"visual.conv1.weight": Evil()}, protocol=2))
    with pytest.raises(UnsupportedModel, match="more than tensors in it, which could run any code"):
        load(copy)
    assert not Path("evil").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
        (lambda folder: cut(folder / WEIGHTS), "cut short"),
        (lambda folder: save_file({}, folder / WEIGHTS), "lack 6"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "open_clip_config.json").write_text('{"embed_dim": 24}'), "has no model_cfg"),
    ],
)  # fmt: skip
def test_broken_files(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    copy = changed_model(folder, tmp_path / "copy")
    change(copy)
    with pytest.raises(ModelError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("ln_final.weight"), "lack 1 of the model's weights, such as ln_final.weight"),
        (lambda weights: weights.pop("visual.conv1.weight"), "such as visual.conv1.weight"),
        (lambda weights: weights.update(more=torch.ones(1)), "1 weights that the model has not, such as more"),
        (lambda weights: weights.update({"ln_final.bias": torch.ones(3)}), r"ln_final.bias is \[3\], where .* \[32\]"),
    ],
)
def test_weights_that_are_not_the_models(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    copy = changed_model(folder, tmp_path / "copy")
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, copy / WEIGHTS)
    with pytest.raises(ModelError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": "many"}, "model_cfg.embed_dim is 'many'"),
        ({"vision_cfg": None}, "model_cfg.vision_cfg is None"),
        ({"vision_cfg": VISION | {"head_width": 5}}, "describes no model"),
        ({"vision_cfg": VISION | {"flavour": 5}}, "describes no model"),
        ({"vision_cfg": VISION | {"image_size": 44}}, r"positional_embedding is \[17, 32\], where .* \[26, 32\]"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:owner/name"}}, "no vision tower 'hf-hub:owner/name'"),
        ({"vision_cfg": VISION | {"pool_type": "none"}}, "24 dimensions, and images have 17 x 24"),
        (with_text(CLIP, heads=0), "describes no model"),
        (with_text(CLIP, context_length=50), r"positional_embedding is \[77, 32\], where .* \[50, 32\]"),
        (with_text(CLIP, hf_model_name="roberta-base"), "transformers' 'roberta-base'"),
        (with_text(CLIP, hf_tokenizer_name="owner/name"), "no tokenizer.json: put the files of .*'owner/name' beside"),
        (with_text(CLIP, tokenizer_mode="clips"), "tokenizer_mode 'clips' is not known"),
        (with_text(CLIP, tokenizer_kwargs={"reduction_mask": "random"}), "reduction_mask is not known"),
        (with_text(CLIP, tokenizer_kwargs={"clean": "up"}), "cleaning texts by 'up' is not known"),
        (with_text(CLIP, pool_type="eos", eos_id=2), "eos_id is 2, and 49407 ends"),
        (with_text(CLIP, pool_type="middle"), "describes no model"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(changed_model(folder, tmp_path / "copy", **changes))


@pytest.mark.parametrize(
    "images", [{"interpolation": "cubic"}, {"std": [0, 1, 1]}, {"mean": [0.5]}, {"mode": "CMYK"}, {"mean": "grey"}]
)
def test_images_prepared_as_nothing_known(images: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    copy = changed_model(folder, tmp_path / "copy")
    file = copy / "open_clip_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"preprocess_cfg": images}))
    with pytest.raises(ModelError, match="preprocess_cfg makes no sense"):
        load(copy)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="token ids that its model does not have"):
        load(open_clip_folder(tmp_path / "small", with_text(CLIP, vocab_size=400)))


@pytest.mark.parametrize(
    ("model", "tag", "repository"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("ViT-B-32", "LAION2B-s34B-b79K", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("ViT-B-32", "openai", "timm/vit_base_patch32_clip_224.openai"),
        ("ViT-B/32", "openai", "timm/vit_base_patch32_clip_224.openai"),
        ("ViTamin-B", "datacomp1b", "jienengchen/ViTamin-B"),
    ],
)
def test_open_clips_names_of_weights_are_repositories(model: str, tag: str, repository: str) -> None:
    assert pretrained_repository(model, tag) == repository


def test_every_name_of_weights_is_a_repository() -> None:
    for model, tag in open_clip.list_pretrained():
        owner, name = pretrained_repository(model, tag).split("/")
        assert owner and name


@pytest.mark.parametrize(
    ("model", "tag", "message"),
    [
        ("ViT-B-23", "openai", "no pretrained 'ViT-B-23': did you mean .*ViT-B-32"),
        ("owner/name", "openai", "no pretrained 'owner/name': known are RN50, .* and 9. more"),
        ("ViT-B-32", "laion2b", "no weights 'laion2b' for ViT-B-32: did you mean laion2b_e16, laion2b_s34b_b79k"),
        ("RN50x4", "mine", "no weights 'mine' for RN50x4: known are openai$"),
    ],
)
def test_names_that_open_clip_does_not_have(model: str, tag: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        pretrained_repository(model, tag)
