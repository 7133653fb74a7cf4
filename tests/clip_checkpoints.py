"""Tiny random checkpoints of open_clip's and of transformers' CLIP, with what each library makes of them."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_model
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from mlx_embeddings_backends.base import EncodedImage, Item
from tests.checkpoints import WORDS, shake, tokenizer
from tests.parity import Rows

IMAGE_SIZE = 36
PATCH_SIZE = 8  # which do not fill it
WEIGHTS = "open_clip_model.safetensors"
TEXTS = [
    "fox",
    "a photo of a small dog that runs over the green grass",
    "The QUICK brown fox;  it's 42 &amp; jumps... Ünïcode 東京 🙂",
    "golden ship!",
]

VISION: dict[str, Any] = {
    "layers": 2, "width": 32, "head_width": 8, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
}  # fmt: skip
TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
CLIP: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}


def with_text(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The same model with other settings of its text tower."""
    return config | {"text_cfg": config["text_cfg"] | settings}


# A vision tower of timm's, and texts as SigLIP has them: attended to from both sides, padding too.
SIGLIP = with_text(
    CLIP | {"custom_text": True, "init_logit_bias": -10},
    context_length=16, no_causal_mask=True, pool_type="last", proj_bias=True, hf_tokenizer_name="owner/siglip",
    tokenizer_kwargs={"clean": "canonicalize"}, norm_kwargs={"eps": 1e-6}, act_kwargs={"approximate": "tanh"},
) | {
    "vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "avg", "timm_proj": "linear"},
}  # fmt: skip
COCA = with_text(CLIP | {"custom_text": True}, context_length=20, embed_cls=True, output_tokens=True) | {
    "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
    "multimodal_cfg": {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 4, "layers": 1},
}
# CLIPA: the vector of the last place, and padding where the tokenizer has put its separator.
CLIPA = with_text(
    CLIP | {"custom_text": True},
    context_length=16, pool_type="last", hf_tokenizer_name="owner/bert", tokenizer_kwargs={"strip_sep_token": True},
)  # fmt: skip
# MetaCLIP 2: a multilingual tokenizer, whose end is not the largest id.
WORLDWIDE = with_text(CLIP | {"custom_text": True}, pool_type="eos", hf_tokenizer_name="owner/xlm")
RESNET = CLIP | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64}}


def open_clip_folder(
    folder: Path, config: dict[str, Any] = CLIP, *, images: dict[str, Any] | None = None, hub_tokenizer: str = ""
) -> Path:
    """As open_clip's `push_to_hf_hub` leaves it. `hub_tokenizer` is an architecture whose tokenizer goes with it."""
    folder.mkdir(parents=True, exist_ok=True)
    if hub_tokenizer:
        options = {"pad_token": "</s>"} if hub_tokenizer == "t5" else {}
        own = tokenizer(hub_tokenizer, **options)
        own.save_pretrained(folder)
        config = with_text(config, vocab_size=len(own))
        if config["text_cfg"].get("pool_type") == "eos":
            config = with_text(config, eos_id=own.eos_token_id)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": images or {}}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = open_clip.create_model(f"local-dir:{folder}")
        shake(model)
    save_model(model, str(folder / WEIGHTS))
    return folder


def changed_model(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy with other settings in model_cfg; None takes one out."""
    shutil.copytree(folder, target)
    file = target / "open_clip_config.json"
    content = json.loads(file.read_bytes())
    content["model_cfg"] = {name: each for name, each in (content["model_cfg"] | changes).items() if each is not None}
    file.write_text(json.dumps(content))
    return target


@dataclass(frozen=True)
class Reference:
    """A checkpoint as its own library runs it, in float32 on the CPU."""

    model: Any
    preprocess: Any
    tokenizer: Any

    @classmethod
    def of(cls, folder: Path) -> "Reference":
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        return cls(model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}"))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str] = TEXTS) -> Rows:
        return np.asarray(self.model.encode_text(self.tokenizer(list(texts)), normalize=False))

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Rows:
        pixels = torch.stack([self.preprocess(image) for image in images])
        return np.asarray(self.model.encode_image(pixels, normalize=False))


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth, so that how it is scaled matters, and where it is cropped."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(0, (90, 60)), picture(1, (IMAGE_SIZE, IMAGE_SIZE)), picture(2, (17, 200)), picture(3, (41, 35))]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


IMAGES = [Item(EncodedImage(png(image))) for image in PICTURES]


def clip_tokenizer() -> CLIPTokenizer:
    """OpenAI's kind on a small vocabulary: bytes, bytes that end a word, and merges that build the words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(pieces)):
            merges["".join(pieces[:end]), pieces[end]] = None
    names = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)])
    names |= dict.fromkeys(("<|startoftext|>", "<|endoftext|>"))
    vocabulary = {name: place for place, name in enumerate(names)}
    make: Any = CLIPTokenizer
    made: CLIPTokenizer = make(vocab=vocabulary, merges=list(merges), model_max_length=24)
    return made


def clip_folder(folder: Path) -> Path:
    """A random CLIP of transformers' with its tokenizer and its image processor."""
    own = clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
    config: Any = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(own), "max_position_embeddings": 24},
        vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = CLIPModel(config)
        shake(model)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    processor: Any = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    processor.save_pretrained(folder)
    return folder


def clip_texts(folder: Path, texts: Sequence[str], **options: Any) -> Rows:
    """transformers' own features, padded and masked as its tokenizer has it."""
    own: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = CLIPModel.from_pretrained(folder)
    with torch.inference_mode():
        inputs = own(list(texts), padding=True, return_tensors="pt", **options)
        return np.asarray(model.float().eval().get_text_features(**inputs).pooler_output)


def clip_images(folder: Path, images: Sequence[Image.Image] = PICTURES) -> Rows:
    processor: Any = CLIPImageProcessor.from_pretrained(folder)
    model: Any = CLIPModel.from_pretrained(folder)
    with torch.inference_mode():
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        return np.asarray(model.float().eval().get_image_features(pixels).pooler_output)


class Evil:
    """Makes a folder of that name when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)
