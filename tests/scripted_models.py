"""A server of several models that do what files in their folders say. Also run as a script.

In a model's folder, `script.json` may hold `seconds` (of a load) and `memory` (bytes that its weights take);
a file `broken` makes loads fail. Each load adds a line to `loads`. Inputs are tests.scripted's.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_embeddings_backends.base import Backend, LoadOptions
from mlx_embeddings_backends.detect import Choice
from mlx_embeddings_server.serve import serve
from mlx_embeddings_server.settings import load_settings
from tests.scripted import ScriptedBackend
from tests.server import Server


def load(choice: Choice, folder: Path, options: LoadOptions) -> Backend:
    script = json.loads((folder / "script.json").read_bytes())
    with (folder / "loads").open("a") as file:
        file.write("load\n")
    time.sleep(script.get("seconds", 0))
    if (folder / "broken").exists():
        raise RuntimeError("the file is there")
    backend = ScriptedBackend()
    backend.info = replace(backend.info, memory_bytes=script.get("memory", 0))
    return backend


def loads(folder: Path, name: str) -> int:
    """How often the model was loaded so far."""
    file = folder / name / "loads"
    return len(file.read_text().splitlines()) if file.exists() else 0


def models_file(folder: Path, models: Mapping[str, Mapping[str, Any]], **settings: Any) -> Path:
    """`models` has each one's entry in the file; `script` in it goes to its folder. `folder` is an empty one."""
    entries = {}
    for name, given in models.items():
        own = folder / name
        own.mkdir()
        (own / "config.json").write_text('{"model_type": "bert"}')
        (own / "script.json").write_text(json.dumps(given.get("script", {})))
        entries[name] = {"name": str(own)} | {key: value for key, value in given.items() if key != "script"}
    file = folder / "models.yaml"
    file.write_text(json.dumps({"models": entries, **settings}))  # JSON is YAML
    return file


def models_server(folder: Path, models: Mapping[str, Mapping[str, Any]], **settings: Any) -> Server:
    return Server("--config", str(models_file(folder, models, **settings)), command=("-m", "tests.scripted_models"))


if __name__ == "__main__":
    import sys

    from mlx_embeddings_server.main import argument_parser

    flags = vars(argument_parser().parse_args(sys.argv[1:]))
    serve(load_settings({name: value for name, value in flags.items() if value is not None}), load=load)
