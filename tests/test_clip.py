"""CLIP and SigLIP in transformers' format against transformers itself, from tiny checkpoints."""

import base64
import json
import pickle
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, CLIPModel, SiglipImageProcessor, SiglipModel

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, EncodedImage, Item
from mlx_embeddings_backends.errors import (
    InputTooLong,
    InvalidImage,
    InvalidTokenId,
    MissingEndToken,
    ModelError,
    UnsupportedModel,
)
from tests.checkpoints import WORDS
from tests.clip_checkpoints import IMAGES, PICTURES, TEXTS, Evil, clip_folder, clip_images, clip_texts, png
from tests.mlx_checkpoints import TEXT_TOKENS, changed_json, siglip
from tests.parity import Rows, cosines, distance, embed, embed_singly, load
from tests.threaded import ThreadedServer

TOLERANCE = 1e-5  # of any component of a unit vector, in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    return load(folder)


def test_texts_and_images_equal_transformers(backend: Backend, folder: Path) -> None:
    for items, expected in ((TEXTS, clip_texts(folder, TEXTS, truncation=True)), (IMAGES, clip_images(folder))):
        rows = embed(backend, items, "end")
        np.testing.assert_allclose(rows, expected, atol=1e-4)  # not normalised: that is left to the caller
        assert distance(rows, expected) < TOLERANCE
        assert distance(rows, embed_singly(backend, items, "end")) < TOLERANCE
        assert cosines(rows[:1], rows[1:2]) < 0.995  # or anything would equal anything
    info = backend.info
    assert (info.modalities, info.output, info.normalize, info.dimensions) == (("text", "image"), "dense", True, 24)
    assert [each.group for each in backend.prepare([Item("the"), IMAGES[0]])] == ["text", "image"]
    backend.warm_up()


@pytest.mark.parametrize("eos", [2, None])
def test_the_end_of_a_text_is_found_whatever_the_config_calls_it(eos: int | None, folder: Path, tmp_path: Path) -> None:
    """Older configs name a token that is not the end, and transformers then takes the one of the largest id."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    text = json.loads((copy / "config.json").read_bytes())["text_config"]
    changed_json(copy / "config.json", text_config=text | {"eos_token_id": eos or text["eos_token_id"]})
    rows = embed(load(copy), TEXTS[:2] * 2)
    assert distance(rows, clip_texts(copy, TEXTS[:2] * 2)) < TOLERANCE
    changed_json(copy / "config.json", text_config=text | {"eos_token_id": 7})
    with pytest.raises(ModelError, match=f"eos_token_id is 7, and {text['eos_token_id']} ends the tokenizer's texts"):
        load(copy)


def test_quick_gelu_is_openais_formula(folder: Path, tmp_path: Path) -> None:
    """The default where a config is silent, as OpenAI's own checkpoints' configs are."""
    silent = Path(shutil.copytree(folder, tmp_path / "silent"))
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    config = json.loads((folder / "config.json").read_bytes())
    for copy, activation in ((silent, None), (plain, "gelu")):
        towers = {}
        for tower in ("text_config", "vision_config"):
            settings = config[tower] | {"hidden_act": activation}
            towers[tower] = {name: each for name, each in settings.items() if each is not None}
        changed_json(copy / "config.json", **towers)
    texts, images = embed(load(silent), TEXTS[:2]), embed(load(silent), IMAGES)
    assert distance(texts, embed(load(plain), TEXTS[:2])) > 100 * TOLERANCE
    assert distance(images, embed(load(plain), IMAGES)) > 100 * TOLERANCE

    class Formula(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (1 + torch.exp(-1.702 * x))

    model: Any = CLIPModel.from_pretrained(plain)
    for module in model.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = Formula()
    tokenizer: Any = AutoTokenizer.from_pretrained(plain)
    with torch.inference_mode():
        inputs = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
        expected = np.asarray(model.eval().get_text_features(**inputs).pooler_output)
    assert distance(texts, expected) < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 50}},
        {"resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
        {"size": {"height": 40, "width": 36}},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [100, 110, 120], "image_std": [50, 60, 70]},
        {"do_resize": False},
    ],
)
def test_images_are_prepared_as_the_image_processor_says(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = next(name for name in ("preprocessor_config.json", "processor_config.json") if (copy / name).exists())
    changed_json(copy / file, **settings)
    assert distance(embed(load(copy), IMAGES), clip_images(copy)) < TOLERANCE


def test_half_precision_products_keep_the_vectors(folder: Path) -> None:
    backend = load(folder, "bfloat16")
    for items, expected in ((TEXTS[:2], clip_texts(folder, TEXTS[:2])), (IMAGES, clip_images(folder))):
        rows = embed(backend, items)
        assert rows.dtype == np.float32
        assert cosines(rows, expected).min() >= 0.9995
        assert distance(rows, expected) > 1e-4  # or nothing was in half precision


def test_too_long_a_text(backend: Backend, folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    long = " ".join(WORDS[:40])
    whole = tokenizer(long)["input_ids"]
    with pytest.raises(InputTooLong) as caught:
        backend.prepare([IMAGES[0], Item(long)])
    assert (caught.value.lengths, caught.value.max_tokens) == ([(1, len(whole))], 24)
    [end] = backend.prepare([Item(long)], "end")
    assert end.truncated and end.payload.tolist() == tokenizer(long, truncation=True)["input_ids"]
    [start] = backend.prepare([Item(long)], "start")
    assert start.payload.tolist() == [whole[0], *whole[-23:]]


def test_what_an_input_may_be(backend: Backend, folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the fox")["input_ids"]
    expected = clip_texts(folder, ["the fox"])
    for given in (ids, ids + [tokenizer.pad_token_id] * 9):
        assert distance(embed(backend, [Item(tuple(given))]), expected) < TOLERANCE
    with pytest.raises(MissingEndToken) as endless:
        backend.prepare([IMAGES[0], Item(tuple(ids[:-1]))])
    assert endless.value.index == 1
    with pytest.raises(InvalidTokenId):
        backend.prepare([Item((*ids, len(tokenizer)))])
    image = IMAGES[0].content
    assert isinstance(image, EncodedImage)
    with pytest.raises(InvalidImage, match="a text or an image"):
        backend.prepare([Item(EncodedImage(image.data, text="a fox"))])
    strip = PICTURES[0].resize((5000, 1))
    with pytest.raises(InvalidImage, match="5000 x 1"):
        backend.prepare([Item(EncodedImage(png(strip)))])
    assert distance(embed(backend, [Item("fox", prompt="the ")]), expected) < TOLERANCE


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({each: weight for each, weight in weights.items() if each != name}, folder / "model.safetensors")

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def prepared(**changes: Any) -> Callable[[Path], None]:
    """By other settings of the image processor; None takes one out."""
    return lambda folder: changed_json(folder / "preprocessor_config.json", **changes)


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        for name, value in changes.items():
            config[name] = config[name] | value if isinstance(config.get(name), dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("visual_projection.weight"), "lack 1 of the model's weights, such as visual_projection.weight"),
        (without("text_model.final_layer_norm.bias"), "such as text_model.final_layer_norm.bias"),
        (cut, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (configured(text_config={"hidden_size": 64}), r"\[24, 32\], where config.json asks for \[24, 64\]"),
        (configured(text_config={"hidden_size": "many"}), "cannot be loaded"),
        (configured(vision_config={"num_attention_heads": 5}), "cannot be loaded"),
        (configured(text_config={"hidden_act": "swoosh"}), "cannot be loaded"),
        (configured(quantization_config={"quant_method": "mine"}), "quantised"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: [file.unlink() for file in folder.glob("*processor_config.json")], "no preprocessor_config"),
        (prepared(image_std=[0, 1, 1]), "makes no sense"),
        (prepared(crop_size=None, do_center_crop=False), "images fail"),
        (prepared(crop_size={"height": 20, "width": 20}), "images fail"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_is_refused(
    change: Callable[[Path], object], message: str, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(copy)
    with pytest.raises(ModelError, match=message):
        load(copy)


def test_a_tokenizer_of_older_files(folder: Path, tmp_path: Path, backend: Backend) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = json.loads((copy / "tokenizer.json").read_bytes())["model"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copy / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    np.testing.assert_array_equal(embed(load(copy), TEXTS, "end"), embed(backend, TEXTS, "end"))


def test_a_pickle_with_more_than_tensors_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"logit_scale": Evil()}, protocol=2))
    with pytest.raises(UnsupportedModel, match="more than tensors in it, which could run any code"):
        load(copy)
    assert not Path("evil").exists()


def test_nothing_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    called: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: called.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address: called.append(address))
    embed(load(folder), TEXTS[:2])
    assert not called


def siglip_rows(folder: Path) -> tuple[Rows, Rows]:
    """transformers' own, its texts filled up to the full length with the end token and attended to."""
    model: Any = SiglipModel.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    processor: Any = SiglipImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
        pixels = processor(PICTURES, return_tensors="pt")["pixel_values"]
        texts = model.float().eval().get_text_features(ids["input_ids"]).pooler_output
        return np.asarray(texts), np.asarray(model.get_image_features(pixels).pooler_output)


def test_siglip(tmp_path: Path) -> None:
    folder = siglip(tmp_path)
    assert detect.choose(folder, "torch").target.endswith("torch.clip:TransformersClip")
    backend, half = load(folder), load(folder, "bfloat16")
    texts, images = siglip_rows(folder)
    pairs: list[tuple[Sequence[str | Item], Rows]] = [(TEXTS, texts), (IMAGES, images)]
    for items, expected in pairs:
        rows = embed(backend, items, "end")
        assert distance(rows, expected) < TOLERANCE
        assert distance(rows, embed_singly(backend, items, "end")) < TOLERANCE
        assert cosines(embed(half, items, "end"), expected).min() >= 0.9995
    assert (backend.info.dimensions, backend.info.max_tokens) == (32, TEXT_TOKENS)
    backend.warm_up()


def test_texts_and_images_over_http(folder: Path) -> None:
    images = [{"image": "data:image/png;base64," + base64.b64encode(png(image)).decode()} for image in PICTURES]
    with ThreadedServer(model=[str(folder)], served_model_name=["clip"], dtype="float32", device="cpu") as server:
        reply = server.embed([*images, *TEXTS[:2]], "clip")
        assert reply.status_code == 200, reply.text
        rows = np.array([each["embedding"] for each in reply.json()["data"]], np.float32)
        [model] = server.client.get("/v1/models").json()["data"]
    assert distance(rows, np.concatenate([clip_images(folder), clip_texts(folder, TEXTS[:2])])) < TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert (model["modalities"], model["dimensions"], model["max_tokens"]) == (["text", "image"], 24, 24)
