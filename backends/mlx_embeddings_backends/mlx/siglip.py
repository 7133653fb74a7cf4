"""SigLIP on MLX: texts and images as vectors of one space (https://arxiv.org/abs/2303.15343)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Regex, Tokenizer, normalizers

from mlx_embeddings_backends.base import Backend, EncodedImage, Item, LoadOptions, ModelInfo, Prepared, Truncate
from mlx_embeddings_backends.errors import InputError, InvalidImage, ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_optional_object, read_tokenizer
from mlx_embeddings_backends.images import decode
from mlx_embeddings_backends.mlx.device import (
    DTYPES,
    batch_tokens,
    choose_device,
    device_errors,
    fill,
    read_weights,
    use_device,
)
from mlx_embeddings_backends.mlx.encoders import Config, activation, refuse
from mlx_embeddings_backends.mlx.library import library
from mlx_embeddings_backends.tokenization import TextTokenizer

IN_PROJECTION = "vision_model.head.attention.in_proj"


@dataclass(frozen=True, slots=True)
class Batch:
    kind: Literal["text", "image"]
    inputs: NDArray[np.int32] | NDArray[np.float32]  # ids [batch, max_tokens], or pixels [batch, height, width, 3]


class Siglip(Module):
    """Both towers, of mlx-embeddings' layers, under the names that transformers saves their weights by."""

    def __init__(self, config: Config) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        siglip = library("siglip")
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        refuse(vision, vision_use_head=True, num_channels=3)
        self.text_model = siglip.SiglipTextTransformer(_known(siglip.TextConfig, text))
        self.vision_model = siglip.SiglipVisionTransformer(_known(siglip.VisionConfig, vision))
        for tower, own in ((self.text_model, text), (self.vision_model, vision)):
            for layer in tower.encoder.layers:
                layer.mlp.activation_fn = activation(own.get("hidden_act", "gelu_pytorch_tanh"))
        self.vision_model.head.mlp.activation_fn = activation(vision.get("hidden_act", "gelu_pytorch_tanh"))

    def __call__(self, batch: Batch, dtype: mx.Dtype) -> mx.array:
        """-> [batch, dimensions], as transformers' get_text_features and get_image_features have them."""
        inputs = mx.array(batch.inputs)
        if batch.kind == "text":
            _, vectors = self.text_model(inputs)
        else:
            _, vectors = self.vision_model(inputs.astype(dtype))
        return mx.array(vectors)


class Pixels:
    """transformers' SiglipImageProcessor on Pillow: resized to a square, scaled, and normalised."""

    def __init__(self, folder: Path, image_size: int) -> None:
        # transformers 5 saves it as a part of the processor.
        config = read_optional_object(folder / "preprocessor_config.json")
        config = config or read_optional_object(folder / "processor_config.json").get("image_processor") or {}
        if not config:
            raise ModelError("the checkpoint has no preprocessor_config.json, which says what becomes of an image")
        refuse(config, do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, do_center_crop=False)
        refuse(config, size={"height": image_size, "width": image_size}, do_pad=False)
        self.size = (image_size, image_size)
        self._resample = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))
        mean, std = (np.array(config.get(name, [0.5] * 3), np.float32) for name in ("image_mean", "image_std"))
        scaled = np.arange(256) * config.get("rescale_factor", 1 / 255)
        self._values = (
            scaled.astype(np.float32)[:, None] - mean
        ) / std  # [256, 3], of each value that a pixel can have

    def resize(self, image: Image.Image) -> NDArray[np.uint8]:
        """-> [height, width, 3]"""
        return np.asarray(image.resize(self.size, self._resample))

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[..., 3] -> the same"""
        values: NDArray[np.float32] = self._values[pixels, np.arange(3)]
        return values


class MlxSiglip(Backend):
    """Texts are padded to the full length, and the padding attended to, as in training."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        if (folder / "modules.json").exists():
            raise UnsupportedModel("the MLX backend does not know SigLIP within sentence-transformers' modules.json")
        device = choose_device(options.device)
        use_device(device)
        config = read_optional_object(folder / "config.json")
        quantization = {_own_name(name): value for name, value in (config.get("quantization") or {}).items()}
        try:
            self._model = Siglip(config)
            self._pixels = Pixels(folder, self._model.vision_model.embeddings.image_size)
            weights = _own_weights(read_weights(folder), quantization)
        except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:  # values not as expected
            raise ModelError(f"config.json and preprocessor_config.json do not describe a SigLIP: {error}") from error
        dtype = fill(self._model, weights, options.dtype, quantization)
        self._dtype = DTYPES[dtype]

        vocabulary_size, _ = self._model.text_model.embeddings.token_embedding.weight.shape
        positions, _ = self._model.text_model.embeddings.position_embedding.weight.shape
        tokenizer_config = read_optional_object(folder / "tokenizer_config.json")
        tokenizer = _tokenizer(folder, tokenizer_config)
        self._pad_id = _pad_id(folder, tokenizer_config, tokenizer)
        max_tokens = int(min(tokenizer_config.get("model_max_length") or positions, positions))
        self._tokenizer = TextTokenizer(tokenizer, max_tokens=max_tokens, vocabulary_size=vocabulary_size)
        self._patches: int = self._model.vision_model.embeddings.num_patches
        self.info = ModelInfo(
            backend="mlx",
            device=device,
            dtype=dtype,
            dimensions=_dimensions(self._model),
            max_tokens=max_tokens,
            vocabulary_size=vocabulary_size,
            normalize=True,
            batch_tokens=batch_tokens(device),
            modalities=("text", "image"),
        )

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        places = [index for index, item in enumerate(items) if not isinstance(item.content, EncodedImage)]
        try:
            tokens = iter(self._tokenizer.encode([items[index] for index in places], truncate))
        except InputError as error:
            raise error.within(places) from None
        prepared = []
        for index, item in enumerate(items):
            if isinstance(item.content, EncodedImage):
                prepared.append(self._prepare_image(index, item.content))
            else:
                each = next(tokens)
                prepared.append(Prepared(each.ids, tokens=len(each.ids), truncated=each.truncated, group="text"))
        return prepared

    def _prepare_image(self, index: int, image: EncodedImage) -> Prepared:
        if image.text is not None:
            raise InvalidImage(index, "the model embeds a text or an image, not both as one: send them as two inputs")
        try:
            pixels = self._pixels.resize(decode(image.data))
        except InputError as error:
            raise error.within([index]) from None
        return Prepared(pixels, tokens=self._patches, group="image")

    def collate(self, batch: Sequence[Prepared]) -> Batch:
        if batch[0].group == "image":
            return Batch("image", self._pixels.normalize(np.stack([prepared.payload for prepared in batch])))
        ids = np.full((len(batch), self.info.max_tokens), self._pad_id, dtype=np.int32)
        for row, prepared in enumerate(batch):
            ids[row, : len(prepared.payload)] = prepared.payload
        if ids.max() >= self.info.vocabulary_size:  # MLX would read whatever lies behind its table
            raise ModelError("the checkpoint's tokenizer gives token ids that its model does not have")
        return Batch("text", ids)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        # The queue counts a text's own tokens, the device works on the padding too: short texts come in great numbers.
        length = self.info.max_tokens if batch.kind == "text" else self._patches
        rows = max(1, self.info.batch_tokens // length)
        parts = []
        with device_errors():
            for start in range(0, len(batch.inputs), rows):
                part = Batch(batch.kind, batch.inputs[start : start + rows])
                vectors = self._model(part, self._dtype).astype(mx.float32)  # [rows, dimensions]
                mx.eval(vectors)
                parts.append(np.array(vectors))
        return np.concatenate(parts)

    def warm_up(self) -> None:
        super().warm_up()
        height, width = self._pixels.size
        self.run(Batch("image", np.zeros((1, height, width, 3), np.float32)))


def _known(kind: Any, config: Config) -> Any:
    """Those of a tower's settings that the library has; transformers' defaults are its own."""
    return kind(**{name: value for name, value in config.items() if name in kind.__dataclass_fields__})


def _own_name(name: str) -> str:
    """MLX's conversions have each tower within another of its name."""
    name = re.sub(r"^(text_model|vision_model)\.\1\.", r"\1.", name)
    return re.sub(r"\.in_proj_(weight|bias)$", r".in_proj.\1", name)


def _own_weights(weights: Mapping[str, mx.array], quantization: Mapping[str, Any]) -> dict[str, mx.array]:
    own = {_own_name(name): weight for name, weight in weights.items()}
    own = {
        name: weight for name, weight in own.items() if not re.fullmatch(r"logit_(scale|bias)|.*\.position_ids", name)
    }
    patches = "vision_model.embeddings.patch_embedding.weight"
    if patches in own and own[patches].ndim == 4 and own[patches].shape[-1] != 3:  # torch has the channels second
        own[patches] = own[patches].transpose(0, 2, 3, 1)
    if f"{IN_PROJECTION}.scales" in own:  # the library takes slices of this one
        how = quantization.get(IN_PROJECTION, quantization)
        packed, scales, biases = (own.pop(f"{IN_PROJECTION}.{part}") for part in ("weight", "scales", "biases"))
        own[f"{IN_PROJECTION}.weight"] = mx.dequantize(packed, scales, biases, how["group_size"], how["bits"])
    return own


def _tokenizer(folder: Path, config: Config) -> Tokenizer:
    tokenizer = read_tokenizer([folder])
    if config.get("tokenizer_class") == "SiglipTokenizer":
        # That class does this to a text, whether or not tokenizer.json says so. Doing it twice changes nothing.
        steps: list[normalizers.Normalizer] = [
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
        if config.get("do_lower_case", True):
            steps.insert(0, normalizers.Lowercase())
        if tokenizer.normalizer is not None:
            steps.append(tokenizer.normalizer)
        tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _pad_id(folder: Path, config: Config, tokenizer: Tokenizer) -> int:
    """Of the token that fills a text up."""
    token = config.get("pad_token") or read_optional_object(folder / "special_tokens_map.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    pad_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if pad_id is None:
        raise ModelError("the checkpoint's tokenizer_config.json names no pad_token that its tokenizer has")
    return int(pad_id)


def _dimensions(model: Siglip) -> int:
    text, vision = model.text_model.head.weight.shape[0], model.vision_model.head.probe.shape[-1]
    if text != vision:
        raise UnsupportedModel(f"texts have {text} dimensions, and images {vision}")
    return int(text)
