"""ColQwen2.5's inputs: the formats it was trained with, around texts and images, as colpali-engine builds them."""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from mlx_embeddings_backends.base import EncodedImage, Item, PatchGrid, Prepared, Truncate
from mlx_embeddings_backends.colqwen.batch import ColQwenBatch, ColQwenInput, collate
from mlx_embeddings_backends.colqwen.checkpoint import ColQwenConfig
from mlx_embeddings_backends.colqwen.images import read_settings
from mlx_embeddings_backends.colqwen.resize import resize_bicubic
from mlx_embeddings_backends.errors import InputError, ReservedTokenId, UnsupportedModel
from mlx_embeddings_backends.files import read_tokenizer
from mlx_embeddings_backends.images import decode
from mlx_embeddings_backends.tokenization import TextTokenizer, Tokens

Resize = Callable[[Image.Image, tuple[int, int]], NDArray[np.uint8]]  # to (height, width)

PROMPTS: Final = {"query": "Query: ", "document": ""}
IMAGE_TEXT: Final = "Describe the image."
QUERY_SUFFIX: Final = ("<|endoftext|>",) * 10  # query augmentation: room in which the model may expand the query
VISION_TOKENS: Final = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_VISION_TOKEN: Final = re.compile("|".join(map(re.escape, VISION_TOKENS)))


class ColQwenProcessor:
    """Items to `ColQwenInput`s, and these to a batch. Files come from `folder`, or where it lacks them from `base`.

    `resize` takes an RGB image and (height, width). Its methods may be called from any thread.
    """

    def __init__(
        self,
        folder: Path,
        base: Path | None,
        config: ColQwenConfig,
        *,
        max_image_tokens: int | None = None,
        resize: Resize = resize_bicubic,
    ) -> None:
        self.config = config
        self.settings = read_settings(folder, base, config.vision, max_image_tokens=max_image_tokens)
        self._resize = resize
        self._folders = [folder] if base is None else [folder, base]
        tokenizer = read_tokenizer(self._folders)
        if max(tokenizer.get_vocab().values()) >= config.text.vocab_size:
            raise UnsupportedModel("tokenizer.json has more tokens than config.json's vocab_size")
        self._tokens = {name: _token_id(tokenizer, name) for name in (*QUERY_SUFFIX, *VISION_TOKENS)}
        if self._tokens["<|image_pad|>"] != config.image_token_id:
            raise UnsupportedModel("config.json's image_token_id is not tokenizer.json's <|image_pad|>")
        self._before_image = tokenizer.encode("<|im_start|>user\n<|vision_start|>").ids
        self._after_text = tokenizer.encode("<|im_end|><|endoftext|>").ids
        self._suffix = [self._tokens[name] for name in QUERY_SUFFIX]
        self._reserved_ids = {config.image_token_id, config.video_token_id, config.vision_start_token_id}
        self._texts = self._text_tokenizer(tokenizer)

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        """In order. Raises an `InputError`; then none of the items is prepared."""
        images = {
            place: self._pixels(item.content, place)
            for place, item in enumerate(items)
            if isinstance(item.content, EncodedImage)
        }
        texts = [_text_of(item) for item in items]
        around = [self._around(item, images.get(place)) for place, item in enumerate(items)]
        tokens = self._encode(texts, truncate, [len(before) + len(after) for before, after in around])
        made = []
        for place, (each, (before, after)) in enumerate(zip(tokens, around, strict=True)):
            ids = np.concatenate([before, each.ids, after], dtype=np.int64, casting="unsafe")  # [] would be floats
            made.append(self._prepared(ids, images.get(place), truncated=each.truncated))
        return made

    def collate(self, batch: Sequence[Prepared]) -> ColQwenBatch:
        """All arrays that the forward pass needs, for any mixture of texts and images."""
        return collate(
            [prepared.payload for prepared in batch],
            settings=self.settings,
            vision=self.config.vision,
            pad_token_id=self._tokens["<|endoftext|>"],
        )

    def _prepared(self, ids: NDArray[np.int64], pixels: NDArray[np.uint8] | None, *, truncated: bool) -> Prepared:
        if pixels is None:
            return Prepared(ColQwenInput(ids), tokens=len(ids), truncated=truncated)
        grid = (pixels.shape[0] // self.settings.patch_size, pixels.shape[1] // self.settings.patch_size)
        offset, merge = len(self._before_image), self.settings.merge_size
        return Prepared(
            ColQwenInput(ids, pixels, grid, offset),
            tokens=len(ids),
            truncated=truncated,
            patches=PatchGrid(rows=grid[0] // merge, columns=grid[1] // merge, offset=offset),
        )

    def _pixels(self, image: EncodedImage, place: int) -> NDArray[np.uint8]:
        """Resized, [height, width, 3]."""
        try:
            decoded = decode(image.data)
            return self._resize(decoded, self.settings.smart_resize(decoded.height, decoded.width))
        except InputError as error:
            raise error.within(range(place, place + 1)) from error

    def _around(self, item: Item, pixels: NDArray[np.uint8] | None) -> tuple[list[int], list[int]]:
        """The tokens that stand before and after those of the item's text."""
        if pixels is not None:
            merged = pixels.shape[0] * pixels.shape[1] // (self.settings.patch_size * self.settings.merge_size) ** 2
            image = [self.config.image_token_id] * merged
            return [*self._before_image, *image, self._tokens["<|vision_end|>"]], self._after_text
        if isinstance(item.content, tuple) or item.role == "document":
            return [], []
        return [], self._suffix

    def _encode(self, items: Sequence[Item], truncate: Truncate, reserved: Sequence[int]) -> list[Tokens]:
        for place, item in enumerate(items):
            if isinstance(item.content, tuple) and (taken := self._reserved_ids.intersection(item.content)):
                raise ReservedTokenId(place, min(taken), self.config.text.vocab_size)
        spelled = {place for place, item in enumerate(items) if _spells_vision_token(item)}
        if not spelled:
            return self._texts.encode(items, truncate, reserved)
        made: dict[int, Tokens] = {}
        for texts, places in (
            (self._texts, [place for place in range(len(items)) if place not in spelled]),
            (self._spelled_texts, sorted(spelled)),
        ):
            try:
                tokens = texts.encode([items[p] for p in places], truncate, [reserved[p] for p in places])
            except InputError as error:
                raise error.within(places) from error
            made.update(zip(places, tokens, strict=True))
        return [made[place] for place in range(len(items))]

    @cached_property
    def _spelled_texts(self) -> TextTokenizer:
        """For texts that spell out a vision token: there, special tokens are letters like any others.

        In other texts they stay what they are, as in colpali-engine, which refuses these.
        """
        tokenizer = read_tokenizer(self._folders)
        tokenizer.encode_special_tokens = True
        return self._text_tokenizer(tokenizer)

    def _text_tokenizer(self, tokenizer: Tokenizer) -> TextTokenizer:
        text = self.config.text
        return TextTokenizer(tokenizer, max_tokens=text.max_position_embeddings, vocabulary_size=text.vocab_size)


def _text_of(item: Item) -> Item:
    """The item's text or token ids; an image's text where there is one, and without a prompt."""
    if isinstance(item.content, EncodedImage):
        return Item(item.content.text or IMAGE_TEXT)
    return item


def _spells_vision_token(item: Item) -> bool:
    return isinstance(item.content, str) and _VISION_TOKEN.search(item.prompt + item.content) is not None


def _token_id(tokenizer: Tokenizer, name: str) -> int:
    token_id = tokenizer.token_to_id(name)
    if token_id is None:
        raise UnsupportedModel(f"tokenizer.json has no token {name}")
    return token_id
