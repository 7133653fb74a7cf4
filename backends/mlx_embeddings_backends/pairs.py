"""A query and a document as one sequence of tokens, as the checkpoint's own tokenizer joins them.

Only the document is ever cut, so that all documents are scored against the whole query. sentence-transformers cuts the
longer of the two, which is the same as long as that is the document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from mlx_embeddings_backends.base import Backend, Item, Pair, Prepared, Truncate
from mlx_embeddings_backends.errors import InputTooLong, QueryTooLong
from mlx_embeddings_backends.tokenization import chunks

# Tokens by which a part of a text may have more than it has as a part: its first and last word, and what is put before.
_BORDER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class PairTokens:
    """A pair, special tokens included."""

    ids: NDArray[np.int64]  # [tokens]
    types: NDArray[np.int64]  # [tokens], of which of the two texts each is, as the tokenizer numbers them


class PairTokenizer:
    """Wraps a `tokenizers.Tokenizer`, which it takes over: its own truncation and padding are switched off."""

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens  # of a pair, special tokens included

    def prepare(self, items: Sequence[Item], truncate: Truncate) -> list[Prepared]:
        """Items of pairs, each with its prompt before the query, in order; payloads are `PairTokens`.

        Raises `InputTooLong`; `QueryTooLong` where the query leaves no room for a token of the document.
        """
        prepared: list[Prepared] = []
        too_long: list[tuple[int, int]] = []
        for index, encoding in enumerate(self._encodings(items, truncate)):
            whole = PairTokens(np.array(encoding.ids, dtype=np.int64), np.array(encoding.type_ids, dtype=np.int64))
            tokens = len(whole.ids)
            fitting = whole if tokens <= self.max_tokens else self._cut(whole, encoding, truncate)
            if fitting is None:
                too_long.append((index, tokens))
            else:
                prepared.append(Prepared(fitting, len(fitting.ids), truncated=len(fitting.ids) < tokens))
        if too_long:
            kind = QueryTooLong if self._query_fills(items[too_long[0][0]]) else InputTooLong
            raise kind(too_long, self.max_tokens, prompt_fills=truncate != "none")
        return prepared

    def _query_fills(self, item: Item) -> bool:
        pair = enough(self._tokenizer, Pair(cast("Pair", item.content).query, ""), self.max_tokens, "none")
        [encoding] = self._tokenizer.encode_batch_fast([(item.prompt + pair.query, "")])
        return len(encoding.ids) >= self.max_tokens

    def _encodings(self, items: Sequence[Item], truncate: Truncate) -> Iterator[Encoding]:
        """A few at a time: a token takes 400 bytes until it is an id."""
        for chunk in chunks(items):
            texts = []
            for item in chunk:
                pair = enough(self._tokenizer, cast("Pair", item.content), self.max_tokens, truncate)
                texts.append((item.prompt + pair.query, pair.document))
            # The fast variant leaves out the offsets.
            yield from self._tokenizer.encode_batch_fast(texts)

    def _cut(self, pair: PairTokens, encoding: Encoding, truncate: Truncate) -> PairTokens | None:
        """With as much of the document as there is room for; None where that is nothing, or nothing may be cut."""
        document = [place for place, text in enumerate(encoding.sequence_ids) if text == 1]
        room = self.max_tokens - (len(pair.ids) - len(document))
        if truncate == "none" or room <= 0:
            return None
        dropped = document[room:] if truncate == "end" else document[:-room]
        return PairTokens(np.delete(pair.ids, dropped), np.delete(pair.types, dropped))


def enough(tokenizer: Tokenizer, pair: Pair, max_tokens: int, truncate: Truncate) -> Pair:
    """The pair, or of its very long texts as much as surely exceeds `max_tokens`."""
    query = _enough(tokenizer, pair.query, max_tokens, from_end=False)
    return Pair(query, _enough(tokenizer, pair.document, max_tokens, from_end=truncate == "start"))


def _enough(tokenizer: Tokenizer, text: str, max_tokens: int, *, from_end: bool) -> str:
    step, tokens = max_tokens * 64, 0  # a token of 64 characters is rare
    if len(text) <= step:
        return text
    for at in range(0, len(text), step):
        stop = len(text) - at
        part = text[max(stop - step, 0) : stop] if from_end else text[at : at + step]
        [encoding] = tokenizer.encode_batch_fast([part], add_special_tokens=False)
        tokens += max(len(encoding.ids) - _BORDER_TOKENS, 0)
        if tokens > max_tokens:
            return text[max(stop - step, 0) :] if from_end else text[: at + step]
    return text


def warm_up(backend: Backend) -> None:
    """`Backend.warm_up` for one that takes pairs."""
    for count, words in ((1, 8), (8, 64)):
        pair = Item(Pair("warm", "warm " * words))
        backend.run(backend.collate(backend.prepare([pair] * count, truncate="end")))
