"""`uvicorn mlx_embeddings_server.asgi:app`, for those who run uvicorn themselves; settings are the environment's."""

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.settings import load_settings

app = create_app(load_settings())
