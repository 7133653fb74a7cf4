"""Text to token ids, as the checkpoint's own tokenizer does it, with the length checked and cutting made explicit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mlx_embeddings_backends.base import Item, Truncate
from mlx_embeddings_backends.errors import EmptyInput, InputTooLong, InvalidTokenId


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one item, int64, [tokens]."""

    ids: NDArray[np.int64]
    truncated: bool = False


class TextTokenizer:
    """Wraps a `tokenizers.Tokenizer`, which it takes over: its own truncation and padding are switched off.

    `max_tokens` counts special tokens. Token ids given by the caller are used as they are: no special token is added.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int, vocabulary_size: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.vocabulary_size = vocabulary_size
        probe = tokenizer.encode("a")
        before, after = _special_token_counts(probe.special_tokens_mask)
        self._prefix = probe.ids[:before]
        self._suffix = probe.ids[len(probe.ids) - after :]

    def encode(self, items: Sequence[Item], truncate: Truncate) -> list[Tokens]:
        """Tokenise in one call. Raises `InputTooLong`, `InvalidTokenId` or `EmptyInput`."""
        texts = [item.prompt + item.content for item in items if isinstance(item.content, str)]
        # The fast variant leaves out the offsets, which only cutting needs.
        encodings = iter(self._tokenizer.encode_batch_fast(texts) if texts else [])
        ids = [
            next(encodings).ids if isinstance(item.content, str) else self._checked(index, item.content)
            for index, item in enumerate(items)
        ]
        for index, each in enumerate(ids):
            if not each:
                raise EmptyInput(index)
        too_long = [(index, len(each)) for index, each in enumerate(ids) if len(each) > self.max_tokens]
        if too_long and truncate == "none":
            raise InputTooLong(too_long, self.max_tokens)
        cut = {index: self._cut(items[index], ids[index], truncate) for index, _ in too_long}
        if hopeless := [(index, length) for index, length in too_long if not cut[index]]:
            raise InputTooLong(hopeless, self.max_tokens, prompt_fills=True)
        return [
            Tokens(np.array(cut.get(index, each), dtype=np.int64), truncated=index in cut)
            for index, each in enumerate(ids)
        ]

    def count_before_end(self, prompt: str) -> int:
        """Tokens of a prompt on its own, with the special tokens before it and without those after it."""
        encoding = self._tokenizer.encode(prompt)
        return len(encoding.ids) - _special_token_counts(encoding.special_tokens_mask)[1]

    def _checked(self, index: int, ids: tuple[int, ...]) -> list[int]:
        for token_id in ids:
            if not 0 <= token_id < self.vocabulary_size:
                raise InvalidTokenId(index, token_id, self.vocabulary_size)
        return list(ids)

    def _cut(self, item: Item, ids: list[int], truncate: Truncate) -> list[int]:
        """Cut the content to fit; the special tokens around it stay, and so does the prompt before it.

        Empty where these leave no room for content.
        """
        length, prompt_tokens = len(ids), 0
        if isinstance(item.content, str):
            encoding = self._tokenizer.encode(item.prompt + item.content)
            before, after = _special_token_counts(encoding.special_tokens_mask)
            content_starts = [start for start, _ in encoding.offsets[before : length - after]]
            prompt_tokens = sum(start < len(item.prompt) for start in content_starts)
        else:
            before = len(self._prefix) if ids[: len(self._prefix)] == self._prefix else 0
            after = len(self._suffix) if ids[length - len(self._suffix) :] == self._suffix else 0
        start, end = before + prompt_tokens, length - after
        head, content, tail = ids[:start], ids[start:end], ids[end:]
        room = self.max_tokens - len(head) - len(tail)
        if room <= 0:
            return []
        return head + (content[:room] if truncate == "end" else content[-room:]) + tail


def _special_token_counts(mask: Sequence[int]) -> tuple[int, int]:
    """How many special tokens the template puts before and after the content."""
    content = [place for place, special in enumerate(mask) if not special]
    if not content:
        return len(mask), 0
    return content[0], len(mask) - 1 - content[-1]
