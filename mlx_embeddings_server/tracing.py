"""Spans of the request that is being answered, where it is traced; else nothing, at the cost of a look.

What they are made with is not named here: it is an extra (`otel.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Final, Protocol

Value = str | int

INPUTS: Final = "mlx_embeddings.inputs"  # an attribute: how many


class Span(Protocol):
    """A part of a request. What is set on it must not come from the caller's inputs."""

    @property
    def headers(self) -> Mapping[str, str]:
        """That tell another server which trace it is part of."""

    def set(self, name: str, value: Value) -> None: ...


class Tracer(Protocol):
    """Makes spans."""

    def span(self, name: str, attributes: Mapping[str, Value], *, is_client: bool) -> AbstractContextManager[Span]:
        """While it is entered the spans that are begun are its parts. An exception is told by its kind alone."""

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Spans of what has just ended, one after the other."""


class _NoSpan:
    headers: Mapping[str, str] = {}

    def set(self, name: str, value: Value) -> None:
        pass


_NOTHING: Final[AbstractContextManager[Span]] = nullcontext(_NoSpan())
_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


@contextmanager
def traced_by(tracer: Tracer) -> Iterator[None]:
    token = _tracer.set(tracer)
    try:
        yield
    finally:
        _tracer.reset(token)


def span(
    name: str, attributes: Mapping[str, Value] = MappingProxyType({}), *, is_client: bool = False
) -> AbstractContextManager[Span]:
    """A part of the request, from here to the end of the block. `is_client`: what another server does of it."""
    tracer = _tracer.get()
    return _NOTHING if tracer is None else tracer.span(name, attributes, is_client=is_client)


def stages(**seconds: float) -> None:
    """Parts that have just ended, in their order, by name."""
    if (tracer := _tracer.get()) is not None:
        tracer.stages(seconds)
