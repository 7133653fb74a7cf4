"""SigLIP on MLX against transformers' own features, from a tiny checkpoint."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
import torch
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import SiglipConfig, SiglipModel, SiglipTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mlx_embeddings_backends.base import Backend, DType, EncodedImage, Item
from mlx_embeddings_backends.errors import (
    EmptyInput,
    InputTooLong,
    InvalidImage,
    InvalidTokenId,
    ModelError,
    UnsupportedModel,
)
from mlx_embeddings_backends.mlx.siglip import Siglip
from tests import parity
from tests.checkpoints import WORDS
from tests.mlx_checkpoints import IMAGE_SIZE, TEXT_TOKENS, changed_json, quantised, rewritten, siglip
from tests.parity import Rows, cosines, distance, embed, embed_singly

TOLERANCE = 1e-5  # of any component of a unit vector, in float32
TEXTS = ["the", "quick brown fox", "the quick brown fox jumps over a lazy dog", "Golden Ship!"]


def load(folder: Path, dtype: DType | Literal["auto"] = "float32") -> Backend:
    return parity.load(folder, dtype, backend="mlx")


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth, so that how it is made smaller matters, but not for one pixel in the wrong place."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(0, (90, 60)), picture(1, (IMAGE_SIZE, IMAGE_SIZE)), picture(2, (17, 200))]


def png(image: Image.Image) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, "PNG")
    return EncodedImage(file.getvalue())


IMAGES = [Item(png(image)) for image in PICTURES]


def reference(folder: Path) -> Any:
    model: Any = SiglipModel.from_pretrained(folder)
    return model.float().eval()


def expected_texts(folder: Path, texts: Sequence[str] = TEXTS) -> Rows:
    """Padded to the full length with the end token, which the model attends to: there is no mask."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>")
    ids = [(each.ids + [end] * TEXT_TOKENS)[:TEXT_TOKENS] for each in tokenizer.encode_batch(list(texts))]
    with torch.inference_mode():
        return np.asarray(reference(folder).get_text_features(torch.tensor(ids)).pooler_output)


def expected_images(folder: Path, images: Sequence[Image.Image] = PICTURES) -> Rows:
    processor: Any = SiglipImageProcessorPil.from_pretrained(folder)
    with torch.inference_mode():
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        return np.asarray(reference(folder).get_image_features(pixels).pooler_output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    return load(folder)


def test_texts_and_images_equal_transformers(backend: Backend, folder: Path) -> None:
    for items, expected in ((TEXTS, expected_texts(folder)), (IMAGES, expected_images(folder))):
        rows = embed(backend, items)
        assert distance(rows, expected) < TOLERANCE
        np.testing.assert_allclose(rows, expected, atol=1e-4)  # not normalised: that is left to the caller
        assert distance(rows, embed_singly(backend, items)) < TOLERANCE
    info = backend.info
    assert (info.modalities, info.output, info.normalize, info.dimensions) == (("text", "image"), "dense", True, 32)
    forth, back = embed(backend, ["the quick brown fox", "fox brown quick the"])
    assert np.abs(forth - back).max() > 0.05  # or positions would not count, and nothing of them be tested


@pytest.mark.parametrize(
    "settings", [{}, {"resample": 2}, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}]
)
def test_pixels_are_those_of_the_image_processor(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    copy = rewritten(folder, tmp_path / "copy", lambda weights: weights)
    changed_json(copy / "preprocessor_config.json", **settings)
    processor: Any = SiglipImageProcessorPil.from_pretrained(copy)
    expected = processor(PICTURES, return_tensors="np")["pixel_values"]  # [images, 3, height, width]
    backend = load(copy)
    pixels = backend.collate(backend.prepare(IMAGES)).inputs
    np.testing.assert_allclose(pixels, np.moveaxis(expected, 1, -1), atol=1e-6, rtol=0)
    # As transformers 5 saves it: with the tokenizer's settings, in one file.
    image_processor = json.loads((copy / "preprocessor_config.json").read_bytes())
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": image_processor}))
    (copy / "preprocessor_config.json").unlink()
    other = load(copy)
    np.testing.assert_array_equal(pixels, other.collate(other.prepare(IMAGES)).inputs)


def test_texts_and_images_never_share_a_batch(backend: Backend) -> None:
    prepared = backend.prepare([Item("the"), IMAGES[0], Item("fox")])
    assert [each.group for each in prepared] == ["text", "image", "text"]
    # "the", its end and no padding; patches of 8 pixels in a square of 30.
    assert [each.tokens for each in prepared] == [2, 9, 2]


def test_many_texts_at_once(backend: Backend) -> None:
    """More than the device takes at a time, as each is padded: the queue counts their own tokens."""
    texts = [f"{word} {other}" for word in WORDS[:-1] for other in WORDS[:6]]
    assert len(texts) * TEXT_TOKENS > 2 * backend.info.batch_tokens
    rows = embed(backend, texts)
    assert distance(rows[-3:], embed(backend, texts[-3:])) < TOLERANCE


def test_what_an_input_may_be(backend: Backend, folder: Path) -> None:
    image = IMAGES[0].content
    assert isinstance(image, EncodedImage)
    with pytest.raises(InvalidImage, match="a text or an image") as refused:
        backend.prepare([Item("the"), Item(EncodedImage(image.data, text="a fox"))])
    assert refused.value.index == 1
    with pytest.raises(InvalidImage) as broken:
        backend.prepare([IMAGES[1], Item("the"), Item(EncodedImage(b"GIF89a and no more"))])
    assert broken.value.index == 2
    with pytest.raises(EmptyInput) as empty:
        backend.prepare([IMAGES[1], Item(())])
    assert empty.value.index == 1
    with pytest.raises(InvalidTokenId) as wrong:
        backend.prepare([IMAGES[1], IMAGES[2], Item((3, backend.info.vocabulary_size))])
    assert wrong.value.index == 2
    long = " ".join(WORDS[:30])
    with pytest.raises(InputTooLong) as too_long:
        backend.prepare([IMAGES[1], Item(long)])
    assert too_long.value.lengths == [(1, 31)]
    [cut] = backend.prepare([Item(long)], "end")
    assert cut.truncated and cut.tokens == backend.info.max_tokens == TEXT_TOKENS
    kept = " ".join(WORDS[: TEXT_TOKENS - 1])
    assert distance(embed(backend, [long], "end"), expected_texts(folder, [kept])) < TOLERANCE
    assert distance(embed(backend, [Item(tuple(cut.payload.tolist()))]), expected_texts(folder, [kept])) < TOLERANCE


def test_transformers_defaults_hold_where_the_config_is_silent(folder: Path, tmp_path: Path) -> None:
    """As in the published checkpoints, whose towers say only what is not the default."""
    with torch.device("meta"):
        expected = {name: tuple(each.shape) for name, each in SiglipModel(SiglipConfig()).named_parameters()}
    ours = dict(tree_flatten(Siglip({}).parameters()))
    shapes = {name.replace("in_proj.", "in_proj_"): each.shape for name, each in ours.items()}
    patches = "vision_model.embeddings.patch_embedding.weight"
    out, channels, height, width = expected[patches]
    assert shapes == {
        **{name: shape for name, shape in expected.items() if not name.startswith("logit_")},
        patches: (out, height, width, channels),
    }
    copy = rewritten(folder, tmp_path / "copy", lambda weights: weights)
    config = json.loads((copy / "config.json").read_bytes())
    for tower in ("text_config", "vision_config"):
        for name in ("layer_norm_eps", "hidden_act", "projection_size", "num_channels", "vision_use_head"):
            config[tower].pop(name, None)
    changed_json(copy / "config.json", **config)
    assert distance(embed(load(copy), TEXTS), expected_texts(folder)) < TOLERANCE
    assert distance(embed(load(copy), IMAGES), expected_images(folder)) < TOLERANCE


def test_another_activation_and_norm(tmp_path: Path) -> None:
    folder = siglip(tmp_path, hidden_act="gelu", layer_norm_eps=0.1)
    assert distance(embed(load(folder), TEXTS), expected_texts(folder)) < TOLERANCE
    changed_json(folder / "config.json", vision_config={"hidden_act": "mish"})
    with pytest.raises(UnsupportedModel, match="'mish' is not known"):
        load(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_as_it_is_stored(dtype: DType, folder: Path, tmp_path: Path) -> None:
    half = rewritten(
        folder,
        tmp_path / "half",
        lambda weights: {name: each.to(getattr(torch, dtype)) for name, each in weights.items()},
    )
    backend = load(half, "auto")
    assert backend.info.dtype == dtype
    for items, expected in ((TEXTS, expected_texts(folder)), (IMAGES, expected_images(folder))):
        rows = embed(backend, items)
        assert rows.dtype == np.float32
        assert distance(rows, expected) > 1e-4  # or nothing was in half precision
        assert cosines(rows, expected).min() > 0.99


def test_as_mlx_converts_it(folder: Path, tmp_path: Path) -> None:
    """Each tower within another of its name, the patches' channels last, and every matrix quantised."""

    def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        patches = "vision_model.embeddings.patch_embedding.weight"
        weights[patches] = weights[patches].permute(0, 2, 3, 1)
        renamed = {}
        for name, weight in weights.items():
            tower, _, rest = name.partition(".")
            rest = rest.replace("in_proj_", "in_proj.")
            renamed[f"{tower}.{tower}.{rest}" if rest else name] = weight
        return renamed

    assert (
        distance(embed(load(rewritten(folder, tmp_path / "mlx", convert)), IMAGES), expected_images(folder)) < TOLERANCE
    )
    packed, plain = quantised(tmp_path / "mlx", tmp_path, bits=8)
    assert (packed / "model.safetensors").stat().st_size < 0.6 * (plain / "model.safetensors").stat().st_size
    for items in (TEXTS, IMAGES):
        rows = embed(load(packed, "auto"), items)
        assert distance(rows, embed(load(plain), items)) < TOLERANCE
    assert cosines(rows, expected_images(folder)).min() > 0.999


def sentencepiece_tokenizer(folder: Path) -> SiglipTokenizer:
    """transformers' own, on a vocabulary made here; and tokenizer.json of the same, without what that class adds."""
    sentences = iter([f"{word} {other}" for word in WORDS for other in WORDS])
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=file, vocab_size=90, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(file.getvalue())
    parse: Any = sentencepiece_model_pb2  # its classes are made as it is imported
    proto = parse.ModelProto.FromString(file.getvalue())
    made = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=2))
    made.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens(["</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    changed_json(folder / "tokenizer_config.json", tokenizer_class="SiglipTokenizer", do_lower_case=True)
    return SiglipTokenizer(str(folder / "spiece.model"), model_max_length=TEXT_TOKENS)


def test_texts_are_written_as_siglips_tokenizer_writes_them(tmp_path: Path) -> None:
    """In small letters, without punctuation, each stretch of white space as one: whatever tokenizer.json says."""
    folder = siglip(tmp_path, vocab_size=90)
    tokenizer: Any = sentencepiece_tokenizer(folder)
    texts = [
        "the quick brown fox",
        "  The QUICK,\n brown   fox!? ",
        "a_b (c) [d] \\e ~f `g",
        "Café ﬁ",
        "sun-light",
    ]
    backend = load(folder)
    ids = [each.payload.tolist() for each in backend.prepare([Item(text) for text in texts], "end")]
    assert ids == tokenizer(texts, truncation=True)["input_ids"]
    padded: NDArray[np.int32] = backend.collate(backend.prepare([Item(text) for text in texts], "end")).inputs
    assert padded.tolist() == tokenizer(texts, truncation=True, padding="max_length")["input_ids"]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer.json", None, r"no tokenizer.json"),
        ("preprocessor_config.json", None, "no preprocessor_config.json"),
        ("preprocessor_config.json", {"size": {"height": 64, "width": 64}}, "does not know size"),
        ("preprocessor_config.json", {"do_normalize": False}, "does not know do_normalize"),
        ("preprocessor_config.json", {"resample": 77}, "do not describe a SigLIP"),
        ("config.json", {"vision_config": {"vision_use_head": False}}, "does not know vision_use_head"),
        ("config.json", {"text_config": {"hidden_size": "many"}}, "do not describe a SigLIP"),
        ("config.json", {"text_config": {"projection_size": 16}}, "by config.json|lack"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, "names no pad_token"),
        ("tokenizer_config.json", {"pad_token": None}, "names no pad_token"),
        ("model.safetensors", None, "no safetensors"),
    ],
)
def test_what_is_not_there_or_not_known_is_refused(
    file: str, changes: dict[str, Any] | None, message: str, folder: Path, tmp_path: Path
) -> None:
    copy = rewritten(folder, tmp_path / "copy", lambda weights: weights)
    if changes is None:
        (copy / file).unlink()
    else:
        changed_json(copy / file, **changes)
    with pytest.raises(ModelError, match=message):
        load(copy)


@pytest.mark.metal
@pytest.mark.skipif(not mx.metal.is_available(), reason="MLX finds no Metal device: needs Apple silicon")
def test_on_metal(folder: Path) -> None:
    backend = parity.load(folder, "float32", "mps", "mlx")
    backend.warm_up()
    assert distance(embed(backend, TEXTS), expected_texts(folder)) < 1e-3
    assert distance(embed(backend, IMAGES), expected_images(folder)) < 1e-3
