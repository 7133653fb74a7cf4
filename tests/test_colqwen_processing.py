"""ColQwen2.5's token formats, pixels and positions, against transformers' own."""

import io
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mlx_embeddings_backends.base import EncodedImage, Item, PatchGrid
from mlx_embeddings_backends.colqwen.batch import ColQwenBatch, ImageBatch
from mlx_embeddings_backends.colqwen.checkpoint import read_config
from mlx_embeddings_backends.colqwen.images import ImageSettings, read_settings
from mlx_embeddings_backends.colqwen.processing import ColQwenProcessor
from mlx_embeddings_backends.errors import (
    EmptyInput,
    InputTooLong,
    InvalidImage,
    InvalidTokenId,
    ReservedTokenId,
    UnsupportedModel,
)
from tests.colqwen_checkpoints import CHECKPOINT

CONFIG = read_config(CHECKPOINT)
IMAGE_PROMPT = "<|im_start|>user\n<|vision_start|>{}<|vision_end|>{}<|im_end|><|endoftext|>"


@pytest.fixture(scope="module")
def processor() -> ColQwenProcessor:
    return ColQwenProcessor(CHECKPOINT, None, CONFIG)


@pytest.fixture(scope="module")
def reference_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def noise(width: int, height: int) -> Image.Image:
    """Every level beside every other: what resizing gets wrong shows."""
    levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def encoded(image: Image.Image, text: str | None = None) -> Item:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Item(EncodedImage(file.getvalue(), text), prompt="Query: ")


def collated(processor: ColQwenProcessor, *items: Item) -> ColQwenBatch:
    return processor.collate(processor.prepare(items))


def images_of(batch: ColQwenBatch) -> ImageBatch:
    assert batch.images is not None
    return batch.images


# Texts


@pytest.mark.parametrize("text", ["what is the revenue", "Rédaction ½ 東京\n\n  tabs\t", "a<|im_end|>b <|endoftext|>"])
def test_texts_are_tokenised_as_colpali_engine_does(
    processor: ColQwenProcessor, reference_tokenizer: Any, text: str
) -> None:
    query, document, default = processor.prepare(
        [Item(text, "Query: ", "query"), Item(text, "", "document"), Item(text, "Query: ")]
    )
    assert query.payload.ids.tolist() == reference_tokenizer("Query: " + text + "<|endoftext|>" * 10).input_ids
    assert default.payload.ids.tolist() == query.payload.ids.tolist()
    assert document.payload.ids.tolist() == reference_tokenizer(text).input_ids
    assert query.tokens == len(query.payload.ids) and query.patches is None


def test_a_text_cannot_spell_out_an_image(processor: ColQwenProcessor, reference_tokenizer: Any) -> None:
    texts = ["so <|vision_start|><|image_pad|><|vision_end|> is written", "plain", "<|video_pad|>"]
    items = [Item(text, "", "document") for text in texts]
    ids = [prepared.payload.ids for prepared in processor.prepare(items)]
    assert not {349, 350, 352, 353}.intersection(np.concatenate(ids).tolist())
    assert [reference_tokenizer.decode(each) for each in ids] == texts


def test_token_ids_are_taken_as_they_are_but_for_those_of_images(processor: ColQwenProcessor) -> None:
    [prepared] = processor.prepare([Item((340, 5, 342), "Query: ", "query")])
    assert prepared.payload.ids.tolist() == [340, 5, 342]
    for wrong, error in ((352, ReservedTokenId), (353, ReservedTokenId), (349, ReservedTokenId), (384, InvalidTokenId)):
        with pytest.raises(error) as caught:
            processor.prepare([Item("fine"), Item((1, wrong))])
        assert (caught.value.index, caught.value.token_id) == (1, wrong)


def test_errors_name_the_item_among_texts_of_both_kinds(processor: ColQwenProcessor) -> None:
    with pytest.raises(InputTooLong) as long:
        processor.prepare([Item("<|image_pad|>"), Item("fine"), Item("a " * 5000)])
    assert [index for index, _ in long.value.lengths] == [2]
    with pytest.raises(EmptyInput) as empty:
        processor.prepare([Item("<|image_pad|>"), Item("<|image_pad|>"), Item("")])
    assert empty.value.index == 2


@pytest.mark.parametrize("truncate", ["end", "start"])
def test_a_long_query_keeps_its_prompt_and_its_suffix(
    processor: ColQwenProcessor, reference_tokenizer: Any, truncate: Literal["end", "start"]
) -> None:
    text = " ".join(f"item{number}" for number in range(2000))
    whole = reference_tokenizer("Query: " + text).input_ids
    prompt, content = whole[:3], whole[3:]  # the third is the space and the text's first letter
    [prepared] = processor.prepare([Item(text, "Query: ", "query")], truncate)
    ids = prepared.payload.ids.tolist()
    assert prepared.truncated and len(ids) == CONFIG.text.max_position_embeddings
    assert ids[: len(prompt)] == prompt and ids[-10:] == [340] * 10
    middle = ids[len(prompt) : -10]
    assert middle == (content[: len(middle)] if truncate == "end" else content[-len(middle) :])
    with pytest.raises(InputTooLong) as caught:
        processor.prepare([Item(text, "Query: ", "query")])
    assert caught.value.lengths == [(0, len(prompt) + len(content) + 10)]


# Images


@pytest.mark.parametrize("text", [None, "Page 3 of the report: what does it say?"])
def test_an_image_stands_in_the_format_of_the_training(
    processor: ColQwenProcessor, reference_tokenizer: Any, text: str | None
) -> None:
    [prepared] = processor.prepare([encoded(noise(84, 140), text)])
    expected = IMAGE_PROMPT.format("<|image_pad|>" * 15, text or "Describe the image.")
    assert prepared.payload.ids.tolist() == reference_tokenizer(expected).input_ids
    assert prepared.patches == PatchGrid(rows=5, columns=3, offset=4)
    assert prepared.payload.ids[4:19].tolist() == [352] * 15
    assert prepared.tokens == len(prepared.payload.ids)


def test_a_long_text_beside_an_image_is_cut_and_the_image_is_not(processor: ColQwenProcessor) -> None:
    item = encoded(noise(84, 140), "a b c d " * 2000)
    with pytest.raises(InputTooLong):
        processor.prepare([item])
    [prepared] = processor.prepare([item], "end")
    assert prepared.truncated and prepared.tokens == CONFIG.text.max_position_embeddings
    assert (prepared.payload.ids == 352).sum() == 15 and prepared.payload.ids[-2:].tolist() == [342, 340]


@pytest.mark.parametrize("size", [(224, 140), (84, 112), (56, 56), (1260, 476)])
def test_patches_equal_those_of_transformers(processor: ColQwenProcessor, size: tuple[int, int]) -> None:
    image = noise(*size)  # no size that must change
    expected = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)(image, return_tensors="np")
    images = images_of(collated(processor, encoded(image)))
    np.testing.assert_allclose(images.patches, expected["pixel_values"], rtol=0, atol=1e-6)
    assert images.grids.tolist() == expected["image_grid_thw"].tolist()


@pytest.mark.parametrize(
    "size", [(827, 1169), (1169, 827), (233, 301), (40, 30), (1, 1), (3, 500), (644, 924), (644, 1500)]
)
def test_resized_pixels_equal_torchvisions(processor: ColQwenProcessor, size: tuple[int, int]) -> None:
    """colpali-engine takes transformers' default processor, which resizes with torchvision."""
    image = noise(*size)
    expected = Qwen2VLImageProcessor.from_pretrained(CHECKPOINT)(image, return_tensors="pt")
    images = images_of(collated(processor, encoded(image)))
    np.testing.assert_allclose(images.patches, expected["pixel_values"].numpy(), rtol=0, atol=1e-6)
    assert images.grids.tolist() == expected["image_grid_thw"].tolist()


def test_an_image_that_shrinks_to_a_tenth_is_nearly_torchvisions() -> None:
    settings = read_settings(CHECKPOINT, None, CONFIG.vision, max_image_tokens=12)
    processor = ColQwenProcessor(CHECKPOINT, None, CONFIG, max_image_tokens=12)
    image = noise(1200, 900)
    reference = Qwen2VLImageProcessor.from_pretrained(CHECKPOINT, max_pixels=settings.max_pixels)
    expected = reference(image, return_tensors="pt")["pixel_values"].numpy()
    differences = np.abs(images_of(collated(processor, encoded(image))).patches - expected)
    assert differences.max() < 1.01 / 255 / 0.26 and (differences > 1e-6).mean() < 1e-3


def test_sizes_are_those_of_transformers(processor: ColQwenProcessor) -> None:
    settings, random = processor.settings, np.random.default_rng(0)
    for height, width in (10 ** random.uniform(0, 3.9, (2000, 2))).astype(int).tolist():
        if max(height, width) <= 200 * min(height, width):
            limits = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
            assert settings.smart_resize(height, width) == smart_resize(height, width, 28, **limits)


def test_an_image_that_is_none_or_a_strip_is_refused_by_its_place(processor: ColQwenProcessor) -> None:
    for wrong in (Item(EncodedImage(b"GIF89a, not")), encoded(noise(2010, 10))):
        with pytest.raises(InvalidImage) as caught:
            processor.prepare([Item("a text"), encoded(noise(56, 56)), wrong])
        assert caught.value.index == 2
    processor.prepare([encoded(noise(2000, 10))])


def test_fewer_image_tokens_can_be_asked_for() -> None:
    processor = ColQwenProcessor(CHECKPOINT, None, CONFIG, max_image_tokens=40)
    [prepared] = processor.prepare([encoded(noise(827, 1169))])
    assert prepared.patches is not None and 30 <= prepared.patches.rows * prepared.patches.columns <= 40
    assert prepared.patches.rows > prepared.patches.columns  # a page stands upright


# Positions


def test_windows_and_positions_are_those_of_transformers(processor: ColQwenProcessor) -> None:
    sizes = [(224, 140), (84, 112), (56, 56), (1260, 476), (112, 112)]
    batch = collated(processor, Item("a query"), *(encoded(noise(*size)) for size in sizes), Item((1, 2)))
    images = images_of(batch)
    grids = torch.from_numpy(images.grids)
    index, ends = get_vision_window_index(grids, spatial_merge_size=2, window_size=112, patch_size=14)
    assert images.window_index.tolist() == index.tolist()
    assert images.window_lengths.tolist() == ends.diff().tolist()
    assert images.positions.tolist() == get_vision_position_ids(grids, 2).tolist()
    assert batch.ids.reshape(-1)[images.token_places].tolist() == [352] * len(images.token_places)
    assert (batch.ids == 352).sum() == len(images.token_places)


def test_rotary_positions_are_those_of_transformers(processor: ColQwenProcessor) -> None:
    batch = collated(
        processor, Item("a query"), *(encoded(noise(*size)) for size in ((224, 140), (84, 112), (140, 56)))
    )
    real = torch.from_numpy(np.arange(batch.ids.shape[1]) < batch.lengths[:, None])
    assert not real.all()
    with torch.device("meta"):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig(**CONFIG.as_transformers()))
    rope_index: Any = model.get_rope_index
    expected, _ = rope_index(
        torch.from_numpy(batch.ids),
        mm_token_type_ids=torch.from_numpy((batch.ids == 352).astype(np.int32)),
        image_grid_thw=torch.from_numpy(images_of(batch).grids),
        attention_mask=real,
    )
    assert (torch.from_numpy(batch.positions) == expected)[:, real].all()


# The image processor's file


def settings_with(tmp_path: Path, **changed: Any) -> ImageSettings:
    keys = json.loads((CHECKPOINT / "preprocessor_config.json").read_text()) | changed
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(keys))
    return read_settings(tmp_path, None, CONFIG.vision, max_image_tokens=None)


def same(settings: ImageSettings, other: ImageSettings) -> bool:
    blank: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
    return np.array_equal(settings.levels, other.levels) and replace(settings, levels=blank) == replace(
        other, levels=blank
    )


def test_settings_are_found_wherever_they_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = read_settings(CHECKPOINT, None, CONFIG.vision, max_image_tokens=None)
    with caplog.at_level(logging.WARNING):
        assert same(read_settings(tmp_path, CHECKPOINT, CONFIG.vision, max_image_tokens=None), known)
        assert not caplog.records
        assert same(read_settings(tmp_path, None, CONFIG.vision, max_image_tokens=None), known)
    assert "no preprocessor_config.json" in caplog.text
    inner = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())
    del inner["min_pixels"], inner["max_pixels"]
    inner["size"]["longest_edge"] = 100_000
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    found = read_settings(tmp_path, None, CONFIG.vision, max_image_tokens=None)
    assert same(found, replace(known, max_pixels=100_000))
    shutil.copy(CHECKPOINT / "preprocessor_config.json", tmp_path)
    assert same(read_settings(tmp_path, None, CONFIG.vision, max_image_tokens=None), known)


def test_pixel_limits_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    assert settings_with(tmp_path, size=None, min_pixels=None, max_pixels=5000).max_pixels == 5000
    assert settings_with(tmp_path, size={"longest_edge": 5000}, max_pixels=6000).max_pixels == 6000
    assert settings_with(tmp_path, size=None, min_pixels=None, max_pixels=None).max_pixels == 1280 * 28 * 28


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_resize", False),
        ("do_normalize", False),
        ("resample", 2),
        ("patch_size", 16),
        ("merge_size", 1),
        ("max_pixels", 10**15),
        ("max_pixels", -1),
        ("max_pixels", "602112"),
        ("min_pixels", 10**6),
        ("size", [1, 2]),
        ("image_mean", [0.5]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", ["0.5", 0.5, 0.5]),
        ("rescale_factor", "nan"),
    ],
)
def test_settings_that_are_not_known_are_refused_by_their_key(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        settings_with(tmp_path, **{key: value})


@pytest.mark.parametrize("change", ["no such token", "other id", "too many"])
def test_a_tokenizer_that_does_not_fit_the_config_is_refused(tmp_path: Path, change: str) -> None:
    made = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    config = CONFIG
    if change == "no such token":
        made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] != "<|video_pad|>"]
    elif change == "other id":
        config = replace(config, image_token_id=353)
    else:
        config = replace(config, text=replace(config.text, vocab_size=300))
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        ColQwenProcessor(tmp_path, None, config)
