"""For whoever runs the server: loading and unloading models."""

from fastapi import APIRouter, Request, Response

from mlx_embeddings_server.routes.openai import describe
from mlx_embeddings_server.routes.replies import json_reply
from mlx_embeddings_server.routes.requests import AdminRoute, disconnects_of, runtime_of

router = APIRouter(prefix="/v1/models", tags=["Models"], route_class=AdminRoute)


@router.post("/{name:path}/load")
async def load(request: Request, name: str) -> Response:
    """Load the model, whenever it failed last; answers when it is loaded."""
    model = runtime_of(request).models.asked(name)
    await model.load()
    return json_reply(describe(model))


@router.post("/{name:path}/unload")
async def unload(request: Request, name: str) -> Response:
    """Unload the model once its requests are answered, pinned or not; the next request loads it again."""
    model = runtime_of(request).models.get(name)
    await disconnects_of(request).until_gone(request, model.unload())
    return json_reply(describe(model))
