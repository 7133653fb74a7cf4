"""What gives vectors, wherever it is: the contract, what comes of it, and how one that is elsewhere can fail."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mlx_embeddings_backends.base import Item, PatchGrid, Row, Truncate

REMOTE = "remote"  # the device of a model that is elsewhere


@dataclass(frozen=True, slots=True)
class Account:
    """What is known of an item beside its vectors."""

    tokens: int
    truncated: bool
    patches: PatchGrid | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Of one request."""

    tokenize_seconds: float  # preprocessing of images included
    queue_seconds: float
    inference_seconds: float


@dataclass(frozen=True, slots=True)
class Vectors:
    """Raw vectors of the items, in their order, and what they took."""

    rows: list[Row]  # of each item
    accounts: list[Account]
    timings: Timings


class Provider(Protocol):
    """A model as a source of vectors."""

    @property
    def name(self) -> str:
        """`local`, or what the file calls the API that has the model."""

    async def embed(self, items: Sequence[Item], truncate: Truncate) -> Vectors:
        """Raises an `InputError`, or what the kind of provider fails with."""


class ProviderFailed(Exception):
    """Another server did not give vectors, and not because of the caller's inputs.

    The message is for callers: it names the provider, and tells nothing of keys and addresses, nor what was answered.
    """

    counts = True  # towards opening the provider's circuit

    def __init__(
        self, message: str, *, is_temporary: bool = False, may_retry: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary  # it may do later
        self.may_retry = may_retry  # it may do at once
        self.retry_after = retry_after  # seconds


class KeyRejected(ProviderFailed):
    """The provider does not take this server's key."""


class NoSuchModel(ProviderFailed):
    """The provider does not have the model: its other models are none the worse."""

    counts = False


class OtherDimensions(ProviderFailed):
    """Vectors of another size than the model's. Who is wrong may be the file here."""

    counts = False


class CircuitOpen(ProviderFailed):
    """The provider failed too often and is left alone for a while: it was not asked."""

    counts = False


class ShuttingDown(Exception):
    """This server ends, and the provider has not answered yet."""


class ProviderBusy(Exception):
    """As many requests as may be are under way, and none ended in time. The message is for callers."""


class InputRefused(Exception):
    """The provider says that the inputs are wrong: the caller's fault. The message is an excerpt of what it says.

    `lengths` has (place, tokens) of those that are too long, where it says which, and `max_tokens` what it takes.
    """

    def __init__(
        self, message: str, *, is_too_long: bool = False, lengths: Sequence[tuple[int, int]] = (), max_tokens: int = 0
    ) -> None:
        super().__init__(message)
        self.is_too_long = is_too_long
        self.lengths = list(lengths)
        self.max_tokens = max_tokens
