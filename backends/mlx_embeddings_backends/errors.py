"""What can go wrong with a model. Load-time errors say what to type; input errors say which item was at fault."""

from collections.abc import Sequence
from typing import Self


class ModelError(Exception):
    """A model cannot be served. The message is written for the person who typed the command."""


class ModelNotFound(ModelError):
    """The id or path leads to no checkpoint that can be had here."""


class UnsupportedModel(ModelError):
    """The checkpoint's own files describe something that no backend runs."""


class MissingDependency(ModelError):
    """The chosen backend needs a package that is not installed."""


class InputError(Exception):
    """An item that the model cannot take. `index` is its place in the list given to `prepare`."""

    index = 0

    def within(self, places: Sequence[int]) -> Self:
        """The same error, where the items given to `prepare` were those at `places` of a longer list."""
        self.index = places[self.index]
        return self


class InputTooLong(InputError):
    """Items longer than the model takes, where cutting them was not asked for, or would leave none of the text.

    `lengths` holds (index, tokens) for each such item; `max_tokens` is the model's limit; `prompt_fills` says that the
    prompt and the special tokens alone reach it.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], max_tokens: int, *, prompt_fills: bool = False) -> None:
        super().__init__(f"{len(lengths)} inputs exceed {max_tokens} tokens")
        self.lengths = list(lengths)
        self.max_tokens = max_tokens
        self.prompt_fills = prompt_fills

    def within(self, places: Sequence[int]) -> Self:
        self.lengths = [(places[index], tokens) for index, tokens in self.lengths]
        return self


class QueryTooLong(InputTooLong):
    """Pairs whose query leaves no room for a token of the document, which is the only one that may be cut."""


class InvalidTokenId(InputError):
    """A token id outside [0, vocabulary_size)."""

    def __init__(self, index: int, token_id: int, vocabulary_size: int) -> None:
        super().__init__(f"token id {token_id} is outside the vocabulary of {vocabulary_size}")
        self.index = index
        self.token_id = token_id
        self.vocabulary_size = vocabulary_size


class ReservedTokenId(InvalidTokenId):
    """A token id that stands for a part of an image: only the model's own image format may place it."""


class MissingEndToken(InputError):
    """Token ids given by the caller without the one whose vector the model takes for the whole text's."""

    def __init__(self, index: int, token_id: int) -> None:
        super().__init__(f"the token ids lack {token_id}, which ends a text")
        self.index = index
        self.token_id = token_id


class EmptyInput(InputError):
    """A text of which the tokenizer leaves nothing, such as white space alone."""

    def __init__(self, index: int) -> None:
        super().__init__("the text gives no tokens")
        self.index = index


class InvalidImage(InputError):
    """Bytes that are no image, or one that is not taken. The message is for the caller."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class DeviceLost(Exception):
    """The device no longer computes: the model must be loaded anew before anything else runs."""
