"""Models of two towers, one for texts and one for images, whose vectors lie in one space: CLIP and SigLIP."""

import io
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from PIL import Image

from mlx_embeddings_backends.base import Backend, EncodedImage, Item, Prepared, Truncate
from mlx_embeddings_backends.errors import InputError, InvalidImage, MissingEndToken, ModelError
from mlx_embeddings_backends.images import decode
from mlx_embeddings_backends.tokenization import Tokens

LARGEST_RATIO: Final = 100  # of an image's sides


class Tokenizer(Protocol):
    """`tokenization.TextTokenizer`, or what stands before it."""

    def encode(self, items: Sequence[Item], truncate: Truncate) -> list[Tokens]: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [batch, tokens], or pixels [batch, height, width, 3]."""

    kind: Literal["text", "image"]
    inputs: NDArray[Any]


class DualEncoder(Backend):
    """What is the same in every library. A batch is of texts or of images, never of both."""

    _tokenizer: Tokenizer
    _pad_id: int
    _pads_fully: bool  # texts are padded to `max_tokens` whatever their length, as some were in training
    _end_id: int | None = None  # of the token whose vector becomes the text's
    _image_tokens: int  # that the vision tower makes of an image

    @abstractmethod
    def _preprocess(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB of any size -> [height, width, 3] of the model's own."""

    def _join(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
        """-> [batch, height, width, 3]. Called from any thread."""
        return np.stack(images)

    @abstractmethod
    def _forward(self, batch: Batch) -> NDArray[np.float32]:
        """-> [batch, dimensions]"""

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        places = [index for index, item in enumerate(items) if not isinstance(item.content, EncodedImage)]
        try:
            tokens = iter(self._encode([items[index] for index in places], truncate))
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

    def _encode(self, items: Sequence[Item], truncate: Truncate) -> list[Tokens]:
        tokens = self._tokenizer.encode(items, truncate)
        if self._end_id is not None:
            for index, each in enumerate(tokens):
                if self._end_id not in each.ids:  # the caller's own
                    raise MissingEndToken(index, self._end_id)
        return tokens

    def _prepare_image(self, index: int, image: EncodedImage) -> Prepared:
        if image.text is not None:
            raise InvalidImage(index, "the model embeds a text or an image, not both as one: send them as two inputs")
        try:
            return Prepared(self._preprocess(decode(image.data)), tokens=self._image_tokens, group="image")
        except InputError as error:
            raise error.within([index]) from None

    def collate(self, batch: Sequence[Prepared]) -> Batch:
        payloads = [prepared.payload for prepared in batch]
        if batch[0].group == "image":
            return Batch("image", self._join(payloads))
        longest = max(map(len, payloads))
        # Lengths that come up again: kernels and buffers are made for each.
        length = self.info.max_tokens if self._pads_fully else min(-(-longest // 8) * 8, self.info.max_tokens)
        ids = np.full((len(payloads), length), self._pad_id, dtype=np.int64)
        for row, payload in zip(ids, payloads, strict=True):
            row[: len(payload)] = payload
        if ids.max() >= self.info.vocabulary_size:  # a GPU would be lost to it, or read whatever lies behind its table
            raise ModelError("the checkpoint's tokenizer gives token ids that its model does not have")
        return Batch("text", ids)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        # The queue counts a text's own tokens, the device works on the padding too: short texts come in great numbers.
        length = batch.inputs.shape[1] if batch.kind == "text" else self._image_tokens
        rows = max(1, self.info.batch_tokens // length)
        starts = range(0, len(batch.inputs), rows)
        return np.concatenate([self._forward(Batch(batch.kind, batch.inputs[at : at + rows])) for at in starts])

    def warm_up(self) -> None:
        super().warm_up()
        self.run(self.collate(self.prepare([Item(blank_image())])))


def blank_image() -> EncodedImage:
    """One that is not square, so that it is scaled and cropped as others are."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "white").save(file, "PNG")
    return EncodedImage(file.getvalue())


def refuse_strips(image: Image.Image) -> None:
    """For models that scale by the shorter side: a strip of few pixels would take gigabytes. Raises `InvalidImage`."""
    if max(image.size) > LARGEST_RATIO * min(image.size):
        width, height = image.size
        raise InvalidImage(0, f"it is {width} x {height}: one side may be {LARGEST_RATIO} times the other")


def end_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id of the token that it puts behind every text."""
    encoding = tokenizer.encode("a")
    return int(encoding.ids[-1]) if encoding.special_tokens_mask[-1] else None
