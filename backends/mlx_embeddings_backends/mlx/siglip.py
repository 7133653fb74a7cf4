"""SigLIP on MLX: texts and images as vectors of one space (https://arxiv.org/abs/2303.15343)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray
from PIL import Image

from mlx_embeddings_backends.base import LoadOptions, ModelInfo
from mlx_embeddings_backends.dual_encoder import Batch, DualEncoder
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_optional_object
from mlx_embeddings_backends.mlx.device import (
    DTYPES,
    batch_tokens,
    choose_device,
    device_errors,
    fill,
    memory_bytes,
    read_weights,
    use_device,
)
from mlx_embeddings_backends.mlx.encoders import Config, activation, refuse
from mlx_embeddings_backends.mlx.library import library
from mlx_embeddings_backends.siglip_text import read_siglip_tokenizer

IN_PROJECTION = "vision_model.head.attention.in_proj"


class Siglip(Module):
    """Both towers, of mlx-embeddings' layers, under the names that transformers saves their weights by."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        siglip = library("siglip")
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        refuse(vision, vision_use_head=True, num_channels=3)
        self.text_model = siglip.SiglipTextTransformer(_known(siglip.TextConfig, text))
        self.vision_model = siglip.SiglipVisionTransformer(_known(siglip.VisionConfig, vision))
        for tower, own in ((self.text_model, text), (self.vision_model, vision)):
            for layer in tower.encoder.layers:
                layer.mlp.activation_fn = activation(own.get("hidden_act", "gelu_pytorch_tanh"))
        self.vision_model.head.mlp.activation_fn = activation(vision.get("hidden_act", "gelu_pytorch_tanh"))

    def embed_texts(self, ids: mx.array) -> mx.array:
        """[batch, tokens] -> [batch, dimensions], as transformers' get_text_features has them."""
        return mx.array(self.text_model(ids)[1])

    def embed_images(self, pixels: mx.array) -> mx.array:
        """[batch, height, width, 3] -> [batch, dimensions], as transformers' get_image_features has them."""
        return mx.array(self.vision_model(pixels)[1])


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


class MlxSiglip(DualEncoder):
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
        self._tokenizer, self._pad_id = read_siglip_tokenizer(
            folder, positions=positions, vocabulary_size=vocabulary_size
        )
        self._pads_fully = True
        self._image_tokens = self._model.vision_model.embeddings.num_patches
        self.info = ModelInfo(
            backend="mlx",
            device=device,
            dtype=dtype,
            dimensions=_dimensions(self._model),
            max_tokens=self._tokenizer.max_tokens,
            vocabulary_size=vocabulary_size,
            normalize=True,
            batch_tokens=batch_tokens(device),
            modalities=("text", "image"),
            memory_bytes=memory_bytes(self._model),
        )

    def _preprocess(self, image: Image.Image) -> NDArray[np.uint8]:
        return self._pixels.resize(image)

    def _join(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        return self._pixels.normalize(np.stack(images))

    def _forward(self, batch: Batch) -> NDArray[np.float32]:
        with device_errors():
            if batch.kind == "text":
                vectors = self._model.embed_texts(mx.array(batch.inputs.astype(np.int32)))
            else:
                vectors = self._model.embed_images(mx.array(batch.inputs).astype(self._dtype))
            vectors = vectors.astype(mx.float32)  # [batch, dimensions]
            mx.eval(vectors)
            return np.array(vectors)


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


def _dimensions(model: Siglip) -> int:
    text, vision = model.text_model.head.weight.shape[0], model.vision_model.head.probe.shape[-1]
    if text != vision:
        raise UnsupportedModel(f"texts have {text} dimensions, and images {vision}")
    return int(text)
