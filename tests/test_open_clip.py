"""open_clip's models against open_clip itself, from tiny checkpoints of each kind that it has."""

import base64
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mlx_embeddings_backends.base import Backend, EncodedImage, Item
from mlx_embeddings_backends.errors import (
    InvalidImage,
)
from tests.checkpoints import WORDS
from tests.clip_checkpoints import (
    CLIP,
    CLIPA,
    COCA,
    IMAGES,
    PICTURES,
    RESNET,
    SIGLIP,
    TEXTS,
    VISION,
    WORLDWIDE,
    Reference,
    changed_model,
    open_clip_folder,
    png,
)
from tests.parity import Rows, cosines, distance, embed, embed_singly, load
from tests.threaded import ThreadedServer

TOLERANCE = 1e-5  # of any component of a unit vector, in float32
START, END = 49406, 49407

# Settings, how images are prepared, and the kind of tokenizer that the folder brings.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "clip": (CLIP, {}, ""),
    "quick-gelu": (CLIP | {"quick_gelu": True}, {"interpolation": "bilinear"}, ""),
    "resnet": (RESNET, {}, ""),
    "siglip": (SIGLIP, {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}, "t5"),
    "clipa": (CLIPA, {"resize_mode": "longest"}, "bert"),
    "worldwide": (WORLDWIDE, {}, "xlm-roberta"),
    "coca": (COCA, {}, ""),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind."""
    config, images, tokenizer = KINDS[request.param]
    return open_clip_folder(tmp_path_factory.mktemp(request.param), config, images=images, hub_tokenizer=tokenizer)


@pytest.fixture(scope="module")
def expected(kind: Path) -> list[tuple[Sequence[Item | str], Rows]]:
    """Texts and images, with open_clip's own vectors of them."""
    reference = Reference.of(kind)
    return [(TEXTS, reference.texts()), (IMAGES, reference.images(PICTURES))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference.of(folder)


def test_texts_and_images_equal_open_clips_own(kind: Path, expected: list[tuple[Sequence[Item | str], Rows]]) -> None:
    backend = load(kind)
    for items, vectors in expected:
        rows = embed(backend, items, "end")
        np.testing.assert_allclose(rows, vectors, atol=1e-4)  # not normalised: that is left to the caller
        assert distance(rows, vectors) < TOLERANCE
        assert distance(rows, embed_singly(backend, items, "end")) < TOLERANCE
        assert cosines(rows[:1], rows[1:2]) < 0.995  # or anything would equal anything
    info = backend.info
    assert (info.modalities, info.output, info.normalize, info.dimensions) == (("text", "image"), "dense", True, 24)
    backend.warm_up()


def test_half_precision_products_keep_the_vectors(
    kind: Path, expected: list[tuple[Sequence[Item | str], Rows]]
) -> None:
    backend = load(kind, "bfloat16")
    for items, vectors in expected:
        rows = embed(backend, items, "end")
        assert rows.dtype == np.float32
        assert cosines(rows, vectors).min() >= 0.9995
    assert distance(embed(backend, TEXTS, "end"), expected[0][1]) > 1e-4  # or nothing was in half precision


def test_quick_gelu_is_openais_formula(tmp_path: Path) -> None:
    """The right weights with the wrong activation give plausible vectors that are wrong."""
    quick = open_clip_folder(tmp_path / "quick", CLIP | {"quick_gelu": True})
    rows = embed(load(quick), TEXTS), embed(load(quick), IMAGES)
    plain = changed_model(quick, tmp_path / "plain", quick_gelu=False)
    assert distance(rows[0], embed(load(plain), TEXTS)) > 100 * TOLERANCE
    assert distance(rows[1], embed(load(plain), IMAGES)) > 100 * TOLERANCE

    class Formula(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (1 + torch.exp(-1.702 * x))

    reference = Reference.of(plain)
    for module in reference.model.modules():
        if hasattr(module, "gelu"):
            module.gelu = Formula()
    assert distance(rows[0], reference.texts()) < TOLERANCE
    assert distance(rows[1], reference.images(PICTURES)) < TOLERANCE


def test_texts_and_images_never_share_a_batch(backend: Backend) -> None:
    prepared = backend.prepare([Item("the"), IMAGES[0], Item("fox")])
    assert [each.group for each in prepared] == ["text", "image", "text"]
    # A word between start and end; patches of 8 pixels in a square of 36, and the class token.
    assert [each.tokens for each in prepared] == [3, 17, 3]
    assert prepared[1].payload.dtype == np.uint8


def test_many_texts_at_once(backend: Backend, reference: Reference) -> None:
    """More than the device takes at a time, and of many lengths."""
    texts = [" ".join(WORDS[: 1 + number % 50]) for number in range(150)]
    assert len(texts) * 56 > 2 * backend.info.batch_tokens
    assert distance(embed(backend, texts)[-7:], reference.texts(texts[-7:])) < TOLERANCE


def test_images_that_are_not_taken(backend: Backend, tmp_path: Path) -> None:
    image = IMAGES[0].content
    assert isinstance(image, EncodedImage)
    with pytest.raises(InvalidImage, match="a text or an image") as both:
        backend.prepare([Item("the"), Item(EncodedImage(image.data, text="a fox"))])
    assert both.value.index == 1
    with pytest.raises(InvalidImage) as broken:
        backend.prepare([Item("the"), IMAGES[1], Item(EncodedImage(b"GIF89a and no more"))])
    assert broken.value.index == 2
    # Scaled to a height of 224 this would be of two gigapixels.
    strip = Item(EncodedImage(png(Image.new("L", (40_000, 1)))))
    with pytest.raises(InvalidImage, match="40000 x 1: one side may be 100 times the other") as thin:
        backend.prepare([IMAGES[1], strip])
    assert thin.value.index == 1
    squashing = open_clip_folder(tmp_path / "squashing", images={"resize_mode": "squash"})
    assert embed(load(squashing), [strip]).shape == (1, 24)


def test_images_of_another_shape_than_square(tmp_path: Path) -> None:
    folder = open_clip_folder(tmp_path / "wide", CLIP | {"vision_cfg": VISION | {"image_size": [24, 48]}})
    assert distance(embed(load(folder), IMAGES), Reference.of(folder).images(PICTURES)) < TOLERANCE


def test_nothing_is_downloaded_or_logged(
    kind: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    called: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: called.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address: called.append(address))
    with caplog.at_level(logging.INFO):
        embed(load(kind), TEXTS, "end")
    assert not called
    assert not [record for record in caplog.records if record.name == "root"]


@pytest.mark.parametrize("before", [None, "true"])
def test_tokenizers_of_other_models_keep_all_processors(before: str | None) -> None:
    """open_clip takes them all but one, as it is imported."""
    script = "import os, mlx_embeddings_backends.torch.open_clip\nprint(os.environ.get('TOKENIZERS_PARALLELISM'))"
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {"TOKENIZERS_PARALLELISM": before} if before else {}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(before), done.stderr


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ThreadedServer]:
    with ThreadedServer(model=[str(folder)], served_model_name=["clip"], dtype="float32", device="cpu") as server:
        yield server


def test_texts_and_images_over_http(server: ThreadedServer, reference: Reference) -> None:
    images = [{"image": base64.b64encode(png(image)).decode()} for image in PICTURES]
    reply = server.embed([TEXTS[0], *images, TEXTS[1]], "clip")
    assert reply.status_code == 200, reply.text
    rows = np.array([each["embedding"] for each in reply.json()["data"]], np.float32)
    expected = np.concatenate([reference.texts(TEXTS[:1]), reference.images(PICTURES), reference.texts(TEXTS[1:2])])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert distance(rows, expected) < TOLERANCE
    [model] = server.client.get("/v1/models").json()["data"]
    assert (model["modalities"], model["output"], model["dimensions"]) == (["text", "image"], "dense", 24)
    assert (model["max_tokens"], model["verified"]) == (77, True)


def test_what_is_wrong_is_said_over_http(server: ThreadedServer) -> None:
    endless = server.embed([[START, 320, 3712]], "clip")
    assert endless.status_code == 400
    assert endless.json()["error"]["code"] == "invalid_token_id"
    assert "lacks the token id 49407" in endless.json()["error"]["message"]
    too_long = server.embed(["word " * 100], "clip")
    assert too_long.json()["error"]["code"] == "input_too_long"
    cut = server.embed(["word " * 100], "clip", truncate="end")
    assert cut.status_code == 200
    assert cut.json()["usage"]["truncated_inputs"] == [0]
