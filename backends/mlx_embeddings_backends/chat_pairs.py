"""A query and a document as one text that a chat template has written, as tokens.

Only the document is ever cut: what the template writes around it asks the question that the model is to answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from tokenizers import Encoding, Tokenizer

from mlx_embeddings_backends.base import Item, Pair, Prepared, Truncate
from mlx_embeddings_backends.errors import InputTooLong, QueryTooLong
from mlx_embeddings_backends.pairs import PairTokens, enough
from mlx_embeddings_backends.tokenization import chunks

# A prompt and a pair -> the text that the model reads, special tokens written out.
Render = Callable[[str, Pair], str]


@dataclass(frozen=True, slots=True)
class Frame:
    """What the template writes around a document."""

    head: str
    tail: str
    tail_ids: list[int]  # as they are behind a document that they do not merge with


class ChatPairTokenizer:
    """Wraps a `tokenizers.Tokenizer`, which it takes over: its own truncation and padding are switched off."""

    def __init__(self, tokenizer: Tokenizer, render: Render, *, max_tokens: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._render = render
        self.max_tokens = max_tokens  # of a pair with all that is around it

    def prepare(self, items: Sequence[Item], truncate: Truncate) -> list[Prepared]:
        """Items of pairs, in order; payloads are `PairTokens`, all of one type. What a template does with a prompt is
        its own affair.

        Raises `InputTooLong`; `QueryTooLong` where the rest leaves no room for a token of the document.
        """
        prepared: list[Prepared] = []
        too_long: list[tuple[int, int]] = []
        frames: dict[tuple[str, str], Frame | None] = {}
        for index, (prompt, query, text, whole) in enumerate(self._encodings(items, truncate)):
            tokens, ids = len(whole), whole
            if tokens > self.max_tokens and truncate != "none":
                if (prompt, query) not in frames:
                    frames[prompt, query] = self.frame(prompt, query)
                ids = self._cut(text, frames[prompt, query], truncate)
            if len(ids) > self.max_tokens or (tokens and not ids):
                too_long.append((index, tokens))
            else:
                made = np.array(ids, dtype=np.int64)
                prepared.append(Prepared(PairTokens(made, np.zeros_like(made)), len(ids), truncated=ids is not whole))
        if too_long:
            kind = QueryTooLong if self._query_fills(items[too_long[0][0]]) else InputTooLong
            raise kind(too_long, self.max_tokens, prompt_fills=truncate != "none")
        return prepared

    def _query_fills(self, item: Item) -> bool:
        pair = enough(self._tokenizer, Pair(cast("Pair", item.content).query, ""), self.max_tokens, "none")
        return len(self._encode(self._render(item.prompt, pair)).ids) >= self.max_tokens

    def frame(self, prompt: str, query: str) -> Frame | None:
        """None: what the template does with a document is more than to write it down, once."""
        first, second = (self._render(prompt, Pair(query, document)) for document in ("0", "1"))
        places = [place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other]
        if len(places) != 1 or len(first) != len(second) or (first[places[0]], second[places[0]]) != ("0", "1"):
            return None
        end = places[0] + 1
        encoding = self._encode(first)
        tail_ids = encoding.ids[_before(encoding, end) :]
        return Frame(first[: places[0]], first[end:], tail_ids)

    def _encodings(self, items: Sequence[Item], truncate: Truncate) -> Iterator[tuple[str, str, str, list[int]]]:
        """Each item's prompt and query, the text and its ids. A few at a time: a token takes 400 bytes until it is an
        id."""
        for chunk in chunks(items):
            pairs = [enough(self._tokenizer, cast("Pair", item.content), self.max_tokens, truncate) for item in chunk]
            texts = [self._render(item.prompt, pair) for item, pair in zip(chunk, pairs, strict=True)]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for item, pair, text, encoding in zip(chunk, pairs, texts, encodings, strict=True):
                yield item.prompt, pair.query, text, encoding.ids

    def _encode(self, text: str) -> Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _cut(self, text: str, frame: Frame | None, truncate: Truncate) -> list[int]:
        """With as much of the document as there is room for; empty where that is nothing."""
        if frame is None or not (text.startswith(frame.head) and text.endswith(frame.tail)):
            return []
        start, end = len(frame.head), len(text) - len(frame.tail)
        encoding = self._encode(text)
        first = sum(begin < start for begin, _ in encoding.offsets)  # of the tokens that begin in the document
        last = _before(encoding, end)
        if truncate == "end":
            room = self.max_tokens - first - len(frame.tail_ids)
            return encoding.ids[: first + min(room, last - first)] + frame.tail_ids if room > 0 else []
        if first and encoding.offsets[first - 1][1] > start and text[encoding.offsets[first - 1][0] : start].isspace():
            first -= 1  # the white space before a word, which the word that comes to stand there has too
        kept = self.max_tokens - (len(encoding.ids) - last) - len(encoding.ids[:first])
        return encoding.ids[:first] + encoding.ids[first:last][-kept:] + encoding.ids[last:] if kept > 0 else []


def _before(encoding: Encoding, end: int) -> int:
    """How many tokens are through by the character `end`."""
    return sum(stop <= end for _, stop in encoding.offsets)
