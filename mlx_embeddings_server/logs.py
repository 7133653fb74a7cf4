"""The log, on stderr: for people, or one JSON object a line."""

import logging
from typing import Literal

import orjson


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; and the exception, if there was one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry).decode()


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Our own from level INFO, everything else from WARNING."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("mlx_embeddings_server", "mlx_embeddings_backends"):
        logging.getLogger(name).setLevel(logging.INFO)
