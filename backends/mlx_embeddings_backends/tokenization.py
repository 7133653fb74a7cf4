"""Text to token ids, as the checkpoint's own tokenizer does it, with the length checked and cutting made explicit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mlx_embeddings_backends.base import Item, Pair, Prepared, Truncate
from mlx_embeddings_backends.errors import EmptyInput, InputTooLong, InvalidTokenId


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one item, int64, [tokens]."""

    ids: NDArray[np.int64]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """What all items of a batch have in common."""

    adapter: str | None = None
    unpooled_tokens: int = 0  # at the start, which pooling leaves out: those of an INSTRUCTOR's prompt


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

    def encode(self, items: Sequence[Item], truncate: Truncate, reserved: Sequence[int] = ()) -> list[Tokens]:
        """In the order of the items. Raises `InputTooLong`, `InvalidTokenId` or `EmptyInput`.

        `reserved` counts, for each item, the tokens that the caller puts around it: they take of `max_tokens` too.
        """
        reserved = reserved or [0] * len(items)
        tokens: list[Tokens] = []
        too_long: list[tuple[int, int]] = []
        for index, (text, ids) in enumerate(self._ids(items, truncate, reserved)):
            if text is None:
                self._check_vocabulary(index, ids)
            if not ids:
                raise EmptyInput(index)
            kept: Sequence[int] = ids
            room = self.max_tokens - reserved[index]
            if len(ids) > room:
                kept = [] if truncate == "none" else self._cut(ids, text, len(items[index].prompt), truncate, room)
            if not kept:
                too_long.append((index, len(ids) + reserved[index]))
            tokens.append(Tokens(np.array(kept, dtype=np.int64), truncated=len(kept) < len(ids)))
        if too_long:
            raise InputTooLong(too_long, self.max_tokens, prompt_fills=truncate != "none")
        return tokens

    def _ids(
        self, items: Sequence[Item], truncate: Truncate, reserved: Sequence[int]
    ) -> Iterator[tuple[str | None, Sequence[int]]]:
        """Each item's text, if it has one, and its ids. A few at a time: a token takes 400 bytes until it is an id."""
        rooms = iter([self.max_tokens - each for each in reserved])
        for chunk in chunks(items):
            texts = [self._beginning_or_end(item, truncate) for item in chunk]
            # The fast variant leaves out the offsets, which only cutting needs.
            encodings = iter(self._tokenizer.encode_batch_fast([text for text in texts if text is not None]))
            for item, text in zip(chunk, texts, strict=True):
                room = next(rooms)
                if not isinstance(item.content, str) or text is None:
                    yield None, cast("tuple[int, ...]", item.content)
                    continue
                ids = next(encodings).ids
                is_part = len(text) < len(item.prompt) + len(item.content)
                if is_part and len(ids) <= room:  # white space, say, of which no tokens are made
                    text = item.prompt + item.content
                    ids = self._tokenizer.encode(text).ids
                yield text, ids

    def _beginning_or_end(self, item: Item, truncate: Truncate) -> str | None:
        """The text, or of a very long one as much as must exceed `max_tokens`: a token of 64 characters is rare."""
        if not isinstance(item.content, str):
            return None
        most = self.max_tokens * 64
        if len(item.content) <= most:
            return item.prompt + item.content
        return item.prompt + (item.content[-most:] if truncate == "start" else item.content[:most])

    def count_before_end(self, prompt: str) -> int:
        """Tokens of a prompt on its own, with the special tokens before it and without those after it."""
        encoding = self._tokenizer.encode(prompt)
        return len(encoding.ids) - _special_token_counts(encoding.special_tokens_mask)[1]

    def _check_vocabulary(self, index: int, ids: Sequence[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocabulary_size:
                raise InvalidTokenId(index, token_id, self.vocabulary_size)

    def _cut(
        self, ids: Sequence[int], text: str | None, prompt_length: int, truncate: Truncate, room: int
    ) -> Sequence[int]:
        """Cut the content to fit into `room`; the special tokens around it stay, and so does the prompt before it.

        Empty where these leave no room for content.
        """
        length, prompt_tokens = len(ids), 0
        if text is not None:
            encoding = self._tokenizer.encode(text)
            before, after = _special_token_counts(encoding.special_tokens_mask)
            content_starts = [start for start, _ in encoding.offsets[before : length - after]]
            prompt_tokens = sum(start < prompt_length for start in content_starts)
        else:
            before = len(self._prefix) if list(ids[: len(self._prefix)]) == self._prefix else 0
            after = len(self._suffix) if list(ids[length - len(self._suffix) :]) == self._suffix else 0
        start, end = before + prompt_tokens, length - after
        head, content, tail = list(ids[:start]), list(ids[start:end]), list(ids[end:])
        room -= len(head) + len(tail)
        if room <= 0:
            return []
        return head + (content[:room] if truncate == "end" else content[-room:]) + tail


def prepare_texts(
    tokenizer: TextTokenizer,
    items: Sequence[Item],
    truncate: Truncate,
    *,
    adapters: Sequence[str] = (),
    pools_prompt: bool = True,
) -> list[Prepared]:
    """What text encoders make of items for their queue: token ids, and the `Group` of each.

    `adapters` are the model's, the default first. Raises an `InputError`; and a `ValueError` for an adapter that the
    model has not: nobody gets another one's vectors.
    """
    groups = {}
    for prompt, adapter in {(item.prompt, item.adapter) for item in items}:
        if adapter is not None and adapter not in adapters:
            raise ValueError(f"the model has no adapter {adapter!r}")
        groups[prompt, adapter] = Group(
            adapter or next(iter(adapters), None),
            0 if pools_prompt or not prompt else tokenizer.count_before_end(prompt),
        )
    return [
        Prepared(each.ids, len(each.ids), each.truncated, groups[item.prompt, item.adapter])
        for item, each in zip(items, tokenizer.encode(items, truncate), strict=True)
    ]


def pad(
    items: Sequence[NDArray[np.int64]], pad_id: int, max_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids of each item -> [batch, tokens], and where there are real ones. Padding is on the right.

    Of few lengths, up to `max_tokens`, so that kernels and buffers that are made for one come up again.
    """
    lengths = np.array([len(ids) for ids in items])
    longest = min(-(-int(lengths.max()) // 8) * 8, max_tokens)
    ids = np.full((len(items), longest), pad_id, dtype=np.int64)
    mask = np.arange(longest) < lengths[:, None]
    ids[mask] = np.concatenate(items)
    return ids, mask


def chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The items in runs of some 250,000 characters."""
    start, characters = 0, 0
    for end, item in enumerate(items, 1):
        content = item.content
        own = len(content.query) + len(content.document) if isinstance(content, Pair) else len(cast("str", content))
        characters += len(item.prompt) + own
        if characters >= 250_000 or end == len(items):
            yield items[start:end]
            start, characters = end, 0


def _special_token_counts(mask: Sequence[int]) -> tuple[int, int]:
    """How many special tokens the template puts before and after the content."""
    content = [place for place, special in enumerate(mask) if not special]
    if not content:
        return len(mask), 0
    return content[0], len(mask) - 1 - content[-1]
