"""open_clip, imported without what it does to the rest of the process."""

import importlib
import os
from typing import Any, Final

_PARALLELISM: Final = "TOKENIZERS_PARALLELISM"


def _import() -> Any:
    before = os.environ.get(_PARALLELISM)
    try:
        return importlib.import_module("open_clip")
    finally:
        # It has the tokenizers of all models work on one core only.
        if before is None:
            os.environ.pop(_PARALLELISM, None)
        else:
            os.environ[_PARALLELISM] = before


open_clip = _import()
