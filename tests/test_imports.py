"""What may not be imported where, shown by taking it away."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

BLOCK = """
import gc, importlib, os, pkgutil, sys

gc.disable()  # which would look through all that is imported, again and again
sys.modules.update(dict.fromkeys({blocked!r}))  # importing what is None there fails
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not {without!r}.intersection(module.name.split(".")):
        importlib.import_module(module.name)
os._exit(0)  # without taking it all apart
"""


TENSORS = ["torch", "mlx", "transformers", "sentence_transformers"]
FRAMEWORK = ["fastapi", "starlette", "uvicorn", "pydantic", "mlx_embeddings_server"]


@pytest.mark.parametrize(
    ("package", "blocked", "without"),
    [
        # The server, whole, without any tensor library, and without what only models elsewhere or the pooling of tokens
        # need, which would make every start longer. asgi makes an app as it is imported, and that wants a model.
        ("mlx_embeddings_server", [*TENSORS, "stamina", "circuitbreaker", "scipy"], {"asgi"}),
        # The models without the web framework, and each backend without the other's library.
        ("mlx_embeddings_backends", [*FRAMEWORK, "mlx", "mlx_embeddings", "mlx_vlm"], {"mlx"}),
        ("mlx_embeddings_backends", [*FRAMEWORK, "torch", "transformers", "sentence_transformers"], {"torch"}),
    ],
)
def test_imports_without(package: str, blocked: Sequence[str], without: set[str]) -> None:
    script = BLOCK.format(package=package, blocked=blocked, without=without)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
