"""The log, on stderr: for people, or one JSON object a line.

What exceptions say is left out, but where it is known to hold no inputs: a model or a library may quote the text that
it failed on. Their kinds and the lines of code that they came through are told.
"""

import json
import logging
import threading
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, Literal, TextIO

import orjson

from mlx_embeddings_server.request_record import current_record

# `extra` of a line whose exception is told in full: no request was about.
TOLD_IN_FULL: Final[Mapping[str, bool]] = MappingProxyType({"told_in_full": True})

# Fields of lines about a request, which `extra` may have too.
_FIELDS: Final = (
    "request_id", "request_ids", "trace_id", "method", "route", "status", "duration_ms", "caller", "model", "inputs",
    "tokens",
)  # fmt: skip


def without_words(error: BaseException) -> BaseException:
    """An exception of the same name, from the same lines of code, that says nothing, and so for those before it."""
    copies: dict[int, BaseException] = {}
    first = copies[id(error)] = _copy(error)
    at, copy = error, first
    while (cause := at.__cause__ or (None if at.__suppress_context__ else at.__context__)) is not None:
        if id(cause) in copies:
            break
        copy.__cause__ = copies[id(cause)] = _copy(cause)
        at, copy = cause, copy.__cause__
    return first


def _copy(error: BaseException) -> BaseException:
    kind = type(error)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    copy: Exception = type(kind.__name__, (Exception,), names)()
    return copy.with_traceback(error.__traceback__)


class TextFormatter(logging.Formatter):
    """For people: a line of time, level and message, and below it the exception, if there was one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        _take_out_words(record)
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message; of lines about a request what it is; and the exception, if there was one."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def format(self, record: logging.LogRecord) -> str:
        _take_out_words(record)
        entry: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = current_record()
        if request is not None:
            entry |= {"request_id": request.id} | ({} if request.trace_id is None else {"trace_id": request.trace_id})
        entry |= {name: record.__dict__[name] for name in _FIELDS if record.__dict__.get(name) is not None}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(entry, default=str).decode()
        except TypeError:  # half of a surrogate pair, which has no UTF-8
            return json.dumps(entry, default=str)


def _take_out_words(record: logging.LogRecord) -> None:
    """Of the exception of any library's line, too."""
    if record.name == "asyncio":  # the lines below the first show what failed, and with what words
        record.msg, record.args = record.getMessage().partition("\n")[0], None
    if not record.exc_info or record.exc_info[1] is None or getattr(record, "told_in_full", False):
        return
    quiet = without_words(record.exc_info[1])
    record.exc_info, record.exc_text = (type(quiet), quiet, quiet.__traceback__), None


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Our own from level INFO, everything else from WARNING."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("mlx_embeddings_server", "mlx_embeddings_backends"):
        logging.getLogger(name).setLevel(logging.INFO)
    # It tells of every retry, in words that say nothing of what is retried.
    logging.getLogger("stamina").setLevel(logging.ERROR)
    _adopt_libraries()
    warnings.showwarning = _log_warning
    threading.excepthook = _log_thread


class _LibraryLogger(logging.Logger):
    """Its lines go where all go: Hugging Face's libraries bring handlers of their own, which write another form."""

    def addHandler(self, hdlr: logging.Handler) -> None:
        if type(hdlr) is not logging.StreamHandler:
            super().addHandler(hdlr)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, True if name == "propagate" else value)


def _adopt_libraries() -> None:
    """Those that are imported already, and those that models bring later."""
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        for handler in [each for each in logger.handlers if type(each) is logging.StreamHandler]:
            logger.removeHandler(handler)
            logger.propagate = True
    logging.setLoggerClass(_LibraryLogger)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """On one line, where Python would write two."""
    logging.getLogger("py.warnings").warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)


def _log_thread(died: threading.ExceptHookArgs) -> None:
    if died.exc_value is not None and not isinstance(died.exc_value, SystemExit):
        logging.getLogger(__name__).error(
            "the thread %s died",
            "" if died.thread is None else died.thread.name,
            exc_info=(died.exc_type, died.exc_value, died.exc_traceback),
        )
