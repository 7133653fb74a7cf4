"""What is known of a request while it is answered, for the log, traces and limits: filled in where it becomes known."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class RequestRecord:
    """Nothing in it is what the caller sent, but for what is short and sane.

    That are the id, and the name of a model that no list has, where a provider takes any.
    """

    id: str
    model: str | None = None  # that was asked last, by its served name
    inputs: int | None = None
    tokens: int | None = None  # of all that it has computed
    trace_id: str | None = None  # where the request is traced


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


@contextmanager
def recording(record: RequestRecord) -> Iterator[None]:
    """What runs inside finds it, and so do tasks and threads that take the context along."""
    token = _current.set(record)
    try:
        yield
    finally:
        _current.reset(token)


def current_record() -> RequestRecord | None:
    """Of the request that is being answered here."""
    return _current.get()


def current_id() -> str | None:
    record = _current.get()
    return None if record is None else record.id


def note_inputs(model: str, inputs: int) -> None:
    """Nothing, where there is no request."""
    if (record := _current.get()) is not None:
        record.model, record.inputs = model, inputs


def add_tokens(tokens: int) -> None:
    """Nothing, where there is no request."""
    if (record := _current.get()) is not None:
        record.tokens = (record.tokens or 0) + tokens
