"""mlx-embeddings' model files, each on its own.

Its package imports transformers before any model, and with it torch where that is installed: 10 s and 900 MB, where the
model files of text encoders and SigLIP take 0.2 s and 40 MB.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_embeddings_backends.errors import MissingDependency

_PACKAGE = "_mlx_embeddings_models"


def library(name: str) -> Any:
    """The module `mlx_embeddings.models.<name>`. Raises `MissingDependency`."""
    try:
        if _PACKAGE not in sys.modules:
            sys.modules[_PACKAGE] = _package()
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0].replace("_", "-")
        raise MissingDependency(
            f"{name} on the MLX backend needs the package {missing!r}: `pip install {missing}`"
        ) from error


def _package() -> ModuleType:
    """Of a name of its own, so that whoever imports mlx_embeddings itself still gets all of it."""
    # find_spec only locates a top-level package: none of its code is run.
    spec = importlib.util.find_spec("mlx_embeddings")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'mlx_embeddings'", name="mlx_embeddings")
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(Path(spec.submodule_search_locations[0], "models"))]
    return package
