"""The server with a model that does what its texts say, for what no real model does on demand. Also run as a script.

A text's vector is a function of the text alone. `work SECONDS ...` takes that long, `die ...` ends the worker's thread,
`lost ...` loses the device, `fail ...` raises, `nan ...` gives a NaN. All other words are only a name.
The environment's SCRIPTED_RELOAD says what loading again does: `slow` takes two seconds, `fails` never succeeds.
"""

import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Backend, Item, LoadOptions, ModelInfo, Prepared, Truncate
from mlx_embeddings_backends.detect import Choice
from mlx_embeddings_backends.errors import DeviceLost
from mlx_embeddings_server.serve import serve
from mlx_embeddings_server.settings import load_settings
from tests.server import Server

DIMENSIONS = 8


def vector(text: str) -> NDArray[np.float32]:
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIMENSIONS).astype(np.float32)


class ScriptedBackend(Backend):
    """A word is a token."""

    info = ModelInfo(
        backend="scripted",
        device="cpu",
        dtype="float32",
        dimensions=DIMENSIONS,
        max_tokens=512,
        vocabulary_size=1,
        normalize=False,
        batch_tokens=64,
    )

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        return [Prepared(str(item.content), tokens=len(str(item.content).split())) for item in items]

    def collate(self, batch: Sequence[Prepared]) -> list[str]:
        return [prepared.payload for prepared in batch]

    def run(self, batch: list[str]) -> NDArray[np.float32]:
        rows = np.stack([vector(text) for text in batch])
        for row, text in enumerate(batch):
            match text.split()[:2]:
                case ["work", seconds]:
                    time.sleep(float(seconds))
                case ["die", *_]:
                    raise SystemExit(text)
                case ["lost", *_]:
                    raise DeviceLost(text)
                case ["fail", *_]:
                    raise ValueError(text)
                case ["nan", *_]:
                    rows[row, 0] = np.nan
        return rows


class ScriptedLoad:
    """Counts its calls: only the first is sure to succeed."""

    def __init__(self, reload: str) -> None:
        self.reload = reload
        self.calls = 0

    def __call__(self, choice: Choice, folder: Path, options: LoadOptions) -> Backend:
        self.calls += 1
        if self.calls > 1 and self.reload == "fails":
            raise RuntimeError("the device is still gone")
        if self.calls == 2 and self.reload == "slow":
            time.sleep(2)
        return ScriptedBackend()


def scripted_server(folder: Path, *, reload: str = "", **settings: object) -> Server:
    """A server whose one model is `toy`; `folder` is an empty one."""
    toy = folder / "toy"
    toy.mkdir()
    (toy / "config.json").write_text('{"model_type": "bert"}')
    variables = {f"MLX_EMBEDDINGS_{name.upper()}": str(value) for name, value in settings.items()}
    root = str(Path(__file__).parents[1])
    return Server(
        command=(__file__,),
        environment={
            "PYTHONPATH": root,
            "SCRIPTED_RELOAD": reload,
            "MLX_EMBEDDINGS_MODEL": str(toy),
            "MLX_EMBEDDINGS_PORT": "0",
            **variables,
        },
    )


if __name__ == "__main__":
    serve(load_settings(), load=ScriptedLoad(os.environ["SCRIPTED_RELOAD"]))
