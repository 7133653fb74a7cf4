"""ColQwen2.5 on torch: colpali-engine's vectors, from every layout of checkpoints, and from adapters."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLImageProcessor

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Item, LoadOptions
from mlx_embeddings_backends.colqwen.batch import ColQwenInput, collate
from mlx_embeddings_backends.colqwen.checkpoint import read_config
from mlx_embeddings_backends.colqwen.images import read_settings
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.torch import qwen2_5_vision
from mlx_embeddings_backends.torch.colqwen2_5 import TorchColQwen2_5, choose_safe_dtype, resize
from tests.checkpoints import shake
from tests.colqwen_checkpoints import (
    CHECKPOINT,
    CONFIGS,
    DATA,
    NAMINGS,
    Weights,
    config_of,
    embed,
    least_cosine,
    reference_items,
    reference_vectors,
    variant,
    worst,
    write,
)

ITEMS, VECTORS = reference_items(), reference_vectors()
NORM = "vlm.model.language_model.norm.weight"

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device: needs an NVIDIA GPU and its driver"
)


def load(folder: Path, device: str = "cpu", **options: Any) -> TorchColQwen2_5:
    return TorchColQwen2_5(folder, LoadOptions(**{"device": device, "dtype": "float32", **options}))


@pytest.fixture(scope="module")
def model() -> TorchColQwen2_5:
    return load(CHECKPOINT)


@pytest.mark.parametrize("name", ITEMS)
def test_each_item_alone_equals_the_reference(model: TorchColQwen2_5, name: str) -> None:
    [row] = embed(model, [ITEMS[name]])
    assert row.dtype == np.float32 and least_cosine(row, VECTORS[name]) > 0.999999


def test_texts_and_images_of_all_sizes_in_one_batch_equal_the_reference(model: TorchColQwen2_5) -> None:
    assert worst(model) > 0.999999
    assert worst(model, list(reversed(ITEMS))) > 0.999999
    assert worst(model, ["image_1", "query_0", "image_0"]) > 0.999999


def test_rows_of_a_batch_equal_rows_alone_before_normalisation(model: TorchColQwen2_5) -> None:
    items = [*ITEMS.values(), Item((5, 6, 7))]
    for together, item in zip(embed(model, items), items, strict=True):
        [alone] = embed(model, [item])
        np.testing.assert_allclose(together, alone, rtol=0, atol=2e-4)
        assert np.abs(np.linalg.norm(alone, axis=1) - 1).min() > 0.1


@needs_cuda
@pytest.mark.cuda
def test_on_cuda() -> None:
    model = load(CHECKPOINT, "cuda")
    assert model.info.device.startswith("cuda")
    assert min(worst(model), *(worst(model, [name]) for name in ITEMS)) > 0.9999
    model.warm_up()
    assert worst(load(CHECKPOINT, "cuda", dtype="bfloat16")) > 0.99


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_the_reference(dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = load(CHECKPOINT, dtype=dtype)
    assert model.info.dtype == dtype and worst(model) > 0.99
    assert ("float16's range" in caplog.text) == (dtype == "float16")


def test_float16_is_never_chosen_by_itself() -> None:
    assert choose_safe_dtype("auto", torch.device("mps")) == "bfloat16"
    assert choose_safe_dtype("float16", torch.device("mps")) == "float16"
    assert choose_safe_dtype("auto", torch.device("cpu")) != "float16"


def test_what_the_server_is_told() -> None:
    choice = detect.choose(CHECKPOINT, "torch")
    model = detect.load(choice, CHECKPOINT, LoadOptions(device="cpu", dtype="float32", max_image_tokens=12))
    info = model.info
    assert (info.backend, info.device, info.dtype, info.output) == ("torch", "cpu", "float32", "multi_vector")
    assert (info.dimensions, info.max_tokens, info.vocabulary_size, info.normalize) == (128, 4096, 384, True)
    assert info.modalities == ("text", "image")
    assert dict(info.prompts) == {"query": "Query: ", "document": ""} and info.default_prompt == "query"
    [prepared] = model.prepare([ITEMS["image_0"]])
    assert prepared.patches is not None and prepared.patches.rows * prepared.patches.columns <= 12
    model.warm_up()


# Pixels and windows beside transformers' own


@pytest.mark.parametrize("size", [(140, 112), (300, 217), (31, 40), (900, 700)])
def test_pixels_equal_those_of_transformers(size: tuple[int, int]) -> None:
    settings = read_settings(CHECKPOINT, None, read_config(CHECKPOINT).vision, max_image_tokens=None)
    levels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = resize(Image.fromarray(levels), settings.smart_resize(*size))
    processor: Any = Qwen2VLImageProcessor.from_pretrained(CHECKPOINT)
    expected = processor([Image.fromarray(levels)], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(settings.patches(pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        [(112, 112)],  # one window
        [(224, 336)],  # whole ones
        [(56, 84), (448, 308), (140, 252), (28, 28), (448, 308)],  # of every size
    ],
)
def test_vision_features_equal_those_of_transformers(sizes: list[tuple[int, int]]) -> None:
    config = read_config(CHECKPOINT)
    settings = read_settings(CHECKPOINT, None, config.vision, max_image_tokens=None)
    random = np.random.default_rng(0)
    items = [
        ColQwenInput(
            np.full(height * width // 28**2, config.image_token_id),
            random.integers(0, 256, (height, width, 3), dtype=np.uint8),
            (height // 14, width // 14),
        )
        for height, width in sizes
    ]
    images = collate(items, settings=settings, vision=config.vision, pad_token_id=0).images
    assert images is not None
    torch.manual_seed(0)
    vlm: Any = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config.as_transformers()))
    vlm.eval()
    shake(vlm)
    with torch.inference_mode():
        grids = torch.from_numpy(images.grids)
        expected = vlm.visual(torch.from_numpy(images.patches), grid_thw=grids).pooler_output
        features = qwen2_5_vision.encode(vlm.visual, qwen2_5_vision.Images.of(images))
    assert torch.nn.functional.cosine_similarity(features, expected).min() > 0.99999
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean()))


# Every layout


@pytest.mark.parametrize(("naming", "config"), list(zip(NAMINGS, CONFIGS, strict=True)))
def test_every_layout_has_the_same_vectors(tmp_path: Path, naming: str, config: Any) -> None:
    assert worst(load(variant(tmp_path, naming=naming, config=config))) > 0.999999


def test_weights_in_several_files_and_no_preprocessor_config(tmp_path: Path) -> None:
    assert worst(load(variant(tmp_path, naming="colpali", shards=3, preprocessor=False))) > 0.999999


def test_pickled_weights(tmp_path: Path) -> None:
    folder = variant(tmp_path, naming="colpali", config="colpali")
    weights = {name: torch.from_numpy(weight) for name, weight in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert worst(load(folder)) > 0.999999


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("run-by-a-pickle"),)


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = variant(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({NORM: Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could run any code"):
        load(folder)
    assert not Path("run-by-a-pickle").exists()


# Adapters


@pytest.mark.parametrize("layout", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("naming", ["hub", "colpali"])
def test_an_adapter_on_its_base_equals_the_reference(layout: str, naming: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(DATA / "adapter", adapter)
    if layout == "transformers 4":
        file = adapter / "adapter_model.safetensors"
        save_file({name.replace(".language_model.", ".model."): each for name, each in load_file(file).items()}, file)
    model = load(adapter, base=variant(tmp_path / "base", naming=naming))
    expected = load_file(DATA / "adapter_expected.safetensors")
    assert worst(model, list(expected), expected) > 0.999999
    assert worst(model, list(expected)) < 0.5  # the base alone gives other vectors


def test_an_adapter_brings_the_projection_that_its_base_lacks(tmp_path: Path) -> None:
    weights = load_file(CHECKPOINT / "model.safetensors")
    projection = {f"base_model.model.custom_text_proj.{part}": weights.pop(f"embedding_proj_layer.{part}")
                  for part in ("weight", "bias")}  # fmt: skip
    base = write(tmp_path / "base", weights, {**config_of("colpali"), "architectures": ["Qwen2_5_VLModel"]})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(projection, adapter / "adapter_model.safetensors")
    settings = json.loads((DATA / "adapter" / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": ["custom_text_proj"]}))
    assert detect.choose(adapter, "torch", base=base).target.endswith(":TorchColQwen2_5")
    assert worst(load(adapter, base=base)) > 0.999999
    with pytest.raises(ModelError, match="embedding_proj_layer"):
        load(base)


# What is refused


def lack(weights: Weights) -> None:
    del weights["vlm.model.visual.merger.ln_q.weight"]


def add(weights: Weights) -> None:
    weights["model.layers.3.mlp.up_proj.weight"] = weights[NORM]


def double(weights: Weights) -> None:
    weights["model.norm.weight"] = weights[NORM]


def shorten(weights: Weights) -> None:
    weights[NORM] = weights[NORM][:5]


def pack(weights: Weights) -> None:
    weights[NORM] = weights[NORM].astype(np.uint32)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lack, "lack 1 of the model's weights, such as visual.merger.ln_q.weight"),
        (add, "language_model.layers.3.mlp.up_proj.weight"),
        (double, "the same one twice"),
        (shorten, r"language_model.norm.weight is \[5\]"),
        (pack, "quantised"),
    ],
)
def test_weights_that_are_not_the_models(break_: Callable[[Weights], None], message: str, tmp_path: Path) -> None:
    weights = load_file(CHECKPOINT / "model.safetensors")
    break_(weights)
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path, weights, config_of("both")))


@pytest.mark.parametrize(("key", "message"), [("quantization", "--backend mlx"), ("quantization_config", "quantised")])
def test_quantised_checkpoints(key: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path, {}, {**config_of("both"), key: {"bits": 4}}))


@pytest.mark.parametrize("shard", ["../model.safetensors", "absent.safetensors", ""])
def test_shards_that_are_not_in_the_folder(shard: str, tmp_path: Path) -> None:
    variant(tmp_path)
    folder = variant(tmp_path / "model", shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: shard}}))
    with pytest.raises(ModelError, match="no file of weights in the model's folder"):
        load(folder)


def test_files_that_are_broken_or_not_there(tmp_path: Path) -> None:
    folder = variant(tmp_path)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="not a safetensors file"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(folder)
