"""ColQwen2.5 on MLX, against colpali-engine's vectors and transformers' Qwen2.5-VL. On the CPU, where MLX runs too."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from mlx_embeddings_backends.base import EncodedImage, Item, LoadOptions, PatchGrid
from mlx_embeddings_backends.colqwen.checkpoint import canonical_names, read_config
from mlx_embeddings_backends.errors import ModelError
from tests.colqwen_checkpoints import (
    CHECKPOINT,
    CONFIGS,
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

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from mlx_embeddings_backends.mlx.colqwen2_5 import MlxColQwen2_5

Rows = list[NDArray[np.float32]]
ITEMS, VECTORS = reference_items(), reference_vectors()


def load(folder: Path, **options: Any) -> MlxColQwen2_5:
    return MlxColQwen2_5(folder, LoadOptions(device="cpu", **options))


@pytest.fixture(scope="module")
def model() -> MlxColQwen2_5:
    return load(CHECKPOINT)


@pytest.mark.parametrize("name", ITEMS)
def test_each_item_alone_equals_the_reference(model: MlxColQwen2_5, name: str) -> None:
    [row] = embed(model, [ITEMS[name]])
    assert row.dtype == np.float32 and least_cosine(row, VECTORS[name]) > 0.999999


def test_texts_and_images_of_all_sizes_in_one_batch_equal_the_reference(model: MlxColQwen2_5) -> None:
    assert worst(model) > 0.999999
    assert worst(model, list(reversed(ITEMS))) > 0.999999
    assert worst(model, ["image_1", "query_0", "image_0"]) > 0.999999


def test_rows_of_a_batch_equal_rows_alone(model: MlxColQwen2_5) -> None:
    items = [*ITEMS.values(), Item((5, 6, 7))]
    for together, item in zip(embed(model, items), items, strict=True):
        np.testing.assert_allclose(together, embed(model, [item])[0], rtol=0, atol=2e-4)


def test_what_the_server_is_told(model: MlxColQwen2_5) -> None:
    info = model.info
    assert (info.backend, info.device, info.dtype, info.output) == ("mlx", "cpu", "float32", "multi_vector")
    assert (info.dimensions, info.max_tokens, info.vocabulary_size, info.normalize) == (128, 4096, 384, True)
    assert info.modalities == ("text", "image")
    assert dict(info.prompts) == {"query": "Query: ", "document": ""} and info.default_prompt == "query"
    [prepared] = model.prepare([ITEMS["image_0"]])
    assert prepared.patches == PatchGrid(rows=5, columns=8, offset=4)
    model.warm_up()


def test_a_model_runs_on_another_thread_than_it_was_loaded_on(model: MlxColQwen2_5) -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(worst(model, ["query_0", "image_0"])))
    thread.start()
    thread.join()
    assert found and found[0] > 0.999999


# Whole windows, single ones and many, which the reference images have not


def test_windows_of_every_kind_equal_transformers(model: MlxColQwen2_5) -> None:
    sizes = [(112, 112), (224, 224), (56, 56), (448, 336), (140, 112)]
    items = [noise(*size) for size in sizes]
    for batch in (items, items[:1], items[1:2]):
        for ours, theirs in zip(embed(model, batch), transformers_vectors(model, batch), strict=True):
            assert least_cosine(ours, theirs) > 0.9999


def noise(width: int, height: int) -> Item:
    levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return Item(EncodedImage(file.getvalue()))


def transformers_vectors(model: MlxColQwen2_5, items: Sequence[Item]) -> Rows:
    """Of transformers' Qwen2.5-VL with colpali-engine's head, one item at a time; our tokens and patches go in."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(**read_config(CHECKPOINT).as_transformers())
    vlm: Any = Qwen2_5_VLModel(config)
    vlm.eval()
    weights = {name: torch.from_numpy(weight) for name, weight in reference_weights().items()}
    projection, bias = weights.pop("embedding_proj_layer.weight"), weights.pop("embedding_proj_layer.bias")
    vlm.load_state_dict(weights)
    vectors = []
    for item in items:
        batch = model.collate(model.prepare([item]))
        assert batch.images is not None
        ids = torch.from_numpy(batch.ids[:, : batch.lengths[0]])
        with torch.inference_mode():
            hidden = vlm(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(batch.images.patches),
                image_grid_thw=torch.from_numpy(batch.images.grids),
                mm_token_type_ids=(ids == 352).int(),
            ).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(hidden @ projection.T + bias, dim=-1).numpy())
    return vectors


def reference_weights() -> Weights:
    """The reference checkpoint's, by canonical name."""
    weights = load_file(CHECKPOINT / "model.safetensors")
    return {known: weights[name] for name, known in canonical_names(weights).items()}


# Every layout


@pytest.mark.parametrize(("naming", "config"), list(zip(NAMINGS, CONFIGS, strict=True)))
def test_every_layout_has_the_same_vectors(tmp_path: Path, naming: str, config: Any) -> None:
    assert worst(load(variant(tmp_path, naming=naming, config=config))) > 0.999999


def test_weights_in_several_files_and_no_preprocessor_config(tmp_path: Path) -> None:
    assert worst(load(variant(tmp_path, naming="mlx", shards=3, preprocessor=False))) > 0.999999


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_the_reference(tmp_path: Path, dtype: Any) -> None:
    asked_for = load(CHECKPOINT, dtype=dtype)
    assert asked_for.info.dtype == dtype and worst(asked_for) > 0.99
    write(tmp_path, {}, config_of("both"))
    weights = {name: mx.array(weight).astype(getattr(mx, dtype)) for name, weight in reference_weights().items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    stored = load(tmp_path)
    assert stored.info.dtype == dtype and worst(stored) > 0.99


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_checkpoint_is_what_its_weights_stand_for(tmp_path: Path, bits: int) -> None:
    """Written as mlx-embeddings' converter does it; the patch embedding, norms and biases stay as they are."""
    quantised: dict[str, mx.array] = {}
    plain: Weights = {}
    own: dict[str, Any] = {
        "vlm.language_model.model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 8, "mode": "affine"}
    }
    for name, weight in load_file(variant(tmp_path / "plain", naming="mlx") / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if weight.ndim != 2 or not name.endswith(".weight"):
            quantised[name], plain[name] = mx.array(weight), weight
            continue
        how: dict[str, Any] = own.get(path, {"group_size": 32, "bits": bits, "mode": "affine"})
        parts = mx.quantize(mx.array(weight), **how)
        quantised |= dict(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=True))
        plain[name] = np.array(mx.dequantize(*parts, **how))
    quantization = {"group_size": 32, "bits": bits, "mode": "affine", **own}
    write(tmp_path / "quantised", {}, config_of("both") | {"quantization": quantization})
    mx.save_safetensors(str(tmp_path / "quantised" / "model.safetensors"), quantised)
    model = load(tmp_path / "quantised")
    same = load(write(tmp_path / "dequantised", plain, config_of("both")))
    assert model.info.dtype == "float32"
    for row, expected in zip(embed(model, list(ITEMS.values())), embed(same, list(ITEMS.values())), strict=True):
        assert least_cosine(row, expected / np.linalg.norm(expected, axis=1, keepdims=True)) > 0.9999
    assert worst(model) > (0.99 if bits == 8 else 0.3)


def test_an_adapter_is_added_to_its_base(tmp_path: Path) -> None:
    weights, random = reference_weights(), np.random.default_rng(0)
    changed = {
        "model.layers.1.self_attn.q_proj": "language_model.layers.1.self_attn.q_proj.weight",
        "visual.merger.mlp.2": "visual.merger.mlp.2.weight",
        "custom_text_proj": "embedding_proj_layer.weight",
    }
    adapter: Weights = {}
    for module, name in changed.items():
        rows, columns = weights[name].shape
        a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((4, columns), (rows, 4)))
        adapter |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        weights[name] = weights[name] + 8 / 4 * (b @ a)
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    merged = load(write(tmp_path / "merged", weights, config_of("both")))
    model = load(tmp_path / "adapter", base=variant(tmp_path / "base", naming="colpali", config="colpali"))
    for row, expected in zip(embed(model, list(ITEMS.values())), embed(merged, list(ITEMS.values())), strict=True):
        assert least_cosine(row, expected / np.linalg.norm(expected, axis=1, keepdims=True)) > 0.99999
    assert worst(model) < 0.9


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("lacks", "lack 1 of the model's weights, such as visual.merger.ln_q.weight"),
        ("more", "language_model.layers.3.mlp.up_proj.weight"),
        ("twice", "the same one twice"),
        ("shape", "language_model.norm.weight is"),
        ("kernel", "visual.patch_embed.proj.weight is"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(tmp_path: Path, broken: str, message: str) -> None:
    weights = load_file(CHECKPOINT / "model.safetensors")
    norm = weights["vlm.model.language_model.norm.weight"]
    match broken:
        case "lacks":
            del weights["vlm.model.visual.merger.ln_q.weight"]
        case "more":
            weights["model.layers.3.mlp.up_proj.weight"] = norm
        case "twice":
            weights["model.norm.weight"] = norm
        case "shape":
            weights["vlm.model.language_model.norm.weight"] = norm[:5]
        case "kernel":
            kernel = weights["vlm.model.visual.patch_embed.proj.weight"]
            weights["vlm.model.visual.patch_embed.proj.weight"] = np.ascontiguousarray(kernel.transpose(0, 2, 1, 3, 4))
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path, weights, config_of("both")))


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "mlx_vlm", "mlx_embeddings", "sentence_transformers"):
    sys.modules[name] = None  # importing it is an ImportError
from tests.colqwen_checkpoints import CHECKPOINT
from tests.test_mlx_colqwen import load, worst
assert worst(load(CHECKPOINT), ["query_0", "image_0"]) > 0.999999
"""


def test_neither_torch_nor_the_libraries_around_mlx_are_needed() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
