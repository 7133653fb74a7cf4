"""Tokens that a request takes: counted where they are known, and told to whoever asked, for limits."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Spending:
    """Of one request."""

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens = 0


_current: ContextVar[Spending | None] = ContextVar("spending", default=None)


@contextmanager
def spending() -> Iterator[Spending]:
    """What is spent inside, also by tasks that are started there."""
    token = _current.set(Spending())
    try:
        found = _current.get()
        assert found is not None
        yield found
    finally:
        _current.reset(token)


def spend(tokens: int) -> None:
    """Nothing, where nobody counts."""
    if (current := _current.get()) is not None:
        current.tokens += tokens
