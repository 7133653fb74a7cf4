"""CLIP and SigLIP in transformers' format: texts and images as vectors of one space."""

import pickle
import sys
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, float32
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, SiglipImageProcessor, SiglipModel
from transformers.utils.logging import disable_progress_bar

from mlx_embeddings_backends.base import LoadOptions, ModelInfo
from mlx_embeddings_backends.dual_encoder import end_token, refuse_strips
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_object
from mlx_embeddings_backends.siglip_text import read_siglip_tokenizer
from mlx_embeddings_backends.tokenization import TextTokenizer
from mlx_embeddings_backends.torch.devices import (
    TORCH_DTYPES,
    batch_tokens,
    choose_device,
    choose_dtype,
    memory_bytes,
)
from mlx_embeddings_backends.torch.mixed_precision import use_mixed_products
from mlx_embeddings_backends.torch.two_towers import TorchDualEncoder

_CLASSES: Final[dict[str, tuple[Any, Any]]] = {
    "clip": (CLIPModel, CLIPImageProcessor),
    "siglip": (SiglipModel, SiglipImageProcessor),
}
# Before transformers wrote it down rightly, CLIP's configs had this; the token of the largest id is then the end.
_UNTRUE_EOS: Final = 2
# What transformers raises for files that make no model, image processor or tokenizer.
_BROKEN: Final = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, SafetensorError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


class TransformersClip(TorchDualEncoder):
    """CLIP and SigLIP as transformers has them."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        self._device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, self._device)
        kind = str(read_object(folder / "config.json").get("model_type"))
        self._model = _load(folder, _CLASSES[kind][0])
        text, vision = self._model.text_model, self._model.vision_model
        vocabulary_size, positions = text.embeddings.token_embedding.num_embeddings, text.config.max_position_embeddings
        if kind == "siglip":
            tokenizer, self._pad_id = read_siglip_tokenizer(
                folder, positions=positions, vocabulary_size=vocabulary_size
            )
            self._pads_fully, dimensions = True, text.head.out_features
        else:
            tokenizer, self._end_id = _clip_tokenizer(folder, text.config, vocabulary_size)
            self._pad_id, self._pads_fully = self._end_id, False  # nothing before the end sees what is behind it
            dimensions = self._model.config.projection_dim
        self._tokenizer = tokenizer
        self._image_tokens = vision.embeddings.num_patches + (kind == "clip")
        self._processor = self._read_processor(folder, _CLASSES[kind][1])
        if dtype != "float32":
            use_mixed_products(self._model, TORCH_DTYPES[dtype])
        self._model.to(self._device)
        self.info = ModelInfo(
            backend="torch",
            device=str(self._device),
            dtype=dtype,
            dimensions=dimensions,
            max_tokens=tokenizer.max_tokens,
            vocabulary_size=vocabulary_size,
            normalize=True,
            batch_tokens=batch_tokens(self._device),
            modalities=("text", "image"),
            memory_bytes=memory_bytes(self._model),
        )
        self._try_out()

    def _read_processor(self, folder: Path, kind: Any) -> Any:
        if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            raise ModelError("the checkpoint has no preprocessor_config.json, which says what becomes of an image")
        try:
            processor = kind.from_pretrained(folder, local_files_only=True)
            self._normalize_by(
                processor.image_mean if processor.do_normalize else [0.0] * 3,
                processor.image_std if processor.do_normalize else [1.0] * 3,
                levels=1 / processor.rescale_factor if processor.do_rescale else 1.0,
            )
        except _BROKEN as error:
            raise ModelError(f"preprocessor_config.json makes no sense: {error}") from error
        return processor

    def _preprocess(self, image: Image.Image) -> NDArray[np.uint8]:
        if self._processor.size.shortest_edge:
            refuse_strips(image)
        made = self._processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        return np.ascontiguousarray(made["pixel_values"][0].transpose(1, 2, 0))

    def _embed_texts(self, ids: Tensor) -> Tensor:
        return cast("Tensor", self._model.get_text_features(ids).pooler_output)

    def _embed_images(self, pixels: Tensor) -> Tensor:
        return cast("Tensor", self._model.get_image_features(pixels).pooler_output)


def _load(folder: Path, kind: Any) -> Any:
    """On the CPU, in float32 whatever the files hold. Runs no code of theirs, and unpickles tensors only."""
    if read_object(folder / "config.json").get("quantization_config"):
        raise UnsupportedModel("the weights are quantised, by quantization_config in config.json: use the original")
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, dtype=float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except pickle.UnpicklingError as error:
        raise UnsupportedModel(
            "the weights are a pickle with more than tensors in it, which could run any code: convert it to safetensors"
        ) from error
    except _BROKEN as error:
        raise ModelError(f"the checkpoint cannot be loaded: {error}") from error
    # What the files lack, or have in another size, is now of random numbers.
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, asked = mismatched[0]
        raise ModelError(f"{name} is {list(found)}, where config.json asks for {list(asked)}")
    if lacking := sorted(report["missing_keys"]):
        raise ModelError(f"the files lack {len(lacking)} of the model's weights, such as {lacking[0]}")
    return model.eval().requires_grad_(False)


def _clip_tokenizer(folder: Path, config: Any, vocabulary_size: int) -> tuple[TextTokenizer, int]:
    """And the id of the token that ends a text, whose vector becomes the text's. Raises `ModelError`."""
    files = ("tokenizer.json",), ("vocab.json", "merges.txt")
    if not any(all((folder / name).is_file() for name in names) for names in files):  # transformers makes one up then
        raise ModelError(
            "the checkpoint has no tokenizer.json: save its tokenizer with transformers' `save_pretrained`"
        )
    try:
        own = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ModelError(f"the checkpoint's tokenizer cannot be read: {error}") from error
    if not getattr(own, "is_fast", False):
        raise UnsupportedModel("the checkpoint's tokenizer has no tokenizer.json, and none can be made of its files")
    end_id = end_token(own.backend_tokenizer)
    if end_id is None:
        raise UnsupportedModel("the checkpoint's tokenizer puts no token behind a text, whose vector would be taken")
    if config.eos_token_id not in (end_id, _UNTRUE_EOS):
        raise ModelError(f"config.json: eos_token_id is {config.eos_token_id}, and {end_id} ends the tokenizer's texts")
    positions = config.max_position_embeddings
    tokenizer = TextTokenizer(
        own.backend_tokenizer, max_tokens=min(own.model_max_length, positions), vocabulary_size=vocabulary_size
    )
    return tokenizer, end_id
