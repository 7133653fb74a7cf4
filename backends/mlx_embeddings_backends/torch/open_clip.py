"""open_clip's models, from a folder with open_clip_config.json: texts and images as vectors of one space."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mlx_embeddings_backends.base import LoadOptions, ModelInfo
from mlx_embeddings_backends.dual_encoder import refuse_strips
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.torch.devices import (
    TORCH_DTYPES,
    batch_tokens,
    choose_device,
    choose_dtype,
    memory_bytes,
)
from mlx_embeddings_backends.torch.mixed_precision import use_mixed_products
from mlx_embeddings_backends.torch.open_clip_library import open_clip
from mlx_embeddings_backends.torch.open_clip_model import CONFIG, SENSELESS, TextTower, load_model, read_model_config
from mlx_embeddings_backends.torch.open_clip_text import read_tokenizer
from mlx_embeddings_backends.torch.two_towers import TorchDualEncoder


class OpenClip(TorchDualEncoder):
    """CLIP, SigLIP and CoCa as open_clip has them."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        self._device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, self._device)
        config, images = read_model_config(folder)
        self._model: Any = load_model(folder, config)
        self._text = TextTower(self._model)
        tokenizer = read_tokenizer(folder, config["text_cfg"], vocabulary_size=self._text.vocabulary_size)
        self._tokenizer, self._pad_id = tokenizer, tokenizer.pad_id
        self._end_id, self._pads_fully = self._text.end_id(tokenizer), self._text.needs_padding(tokenizer)
        try:
            self._read_preprocessing(images)
        except SENSELESS as error:
            raise ModelError(f"{CONFIG}: preprocess_cfg makes no sense: {error}") from error
        if dtype != "float32":
            pooling = open_clip.modified_resnet.AttentionPool2d
            use_mixed_products(self._model, TORCH_DTYPES[dtype], keep=(pooling,))
        self._model.to(self._device)
        self.info = ModelInfo(
            backend="torch",
            device=str(self._device),
            dtype=dtype,
            dimensions=config["embed_dim"],
            max_tokens=tokenizer.max_tokens,
            vocabulary_size=self._text.vocabulary_size,
            normalize=True,
            batch_tokens=batch_tokens(self._device),
            modalities=("text", "image"),
            memory_bytes=memory_bytes(self._model),
        )
        self._try_out()

    def _read_preprocessing(self, config: dict[str, Any]) -> None:
        made = open_clip.transform
        settings = made.merge_preprocess_dict(made.PreprocessCfg(), config)
        settings["size"] = self._model.visual.image_size
        steps = made.image_transform_v2(made.PreprocessCfg(**settings), is_train=False).transforms
        *self._steps, _, normalize = steps  # the last ones make a tensor of it
        self._normalize_by(normalize.mean, normalize.std)
        self._squashes = settings["resize_mode"] == "squash"
        self._image_tokens = _image_tokens(self._model.visual)

    def _preprocess(self, image: Image.Image) -> NDArray[np.uint8]:
        if not self._squashes:
            refuse_strips(image)
        for step in self._steps:
            image = step(image)
        return np.asarray(image)

    def _embed_texts(self, ids: Tensor) -> Tensor:
        return self._text(ids)

    def _embed_images(self, pixels: Tensor) -> Tensor:
        return cast("Tensor", self._model.encode_image(pixels, normalize=False))


def _image_tokens(visual: Any) -> int:
    """Patches and class token, or about as much work where a tower has none."""
    if hasattr(visual, "grid_size"):
        return int(math.prod(visual.grid_size)) + 1
    if patches := getattr(getattr(getattr(visual, "trunk", None), "patch_embed", None), "num_patches", None):
        return int(patches)
    size = visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height // 32) * int(width // 32) + 1
