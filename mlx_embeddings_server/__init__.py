"""An OpenAI-compatible embeddings server for MLX and torch."""

from importlib.metadata import version

__version__ = version("mlx-embeddings-server")
