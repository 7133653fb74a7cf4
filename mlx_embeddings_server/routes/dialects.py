"""In which API's shape a caller is told what went wrong."""

from typing import Any, Final

from starlette.types import Scope

from mlx_embeddings_server.errors import ApiError, embed_body, openai_body, tldw_body

# "/" is where clients go that are told TEI's address alone.
EMBED_PATHS: Final = ("/embed", "/")
_TLDW: Final = "/api/v1/embeddings"
# OpenAI's official clients send it with every request. They show messages that are in their own API's place alone.
_OPENAI_CLIENT: Final = b"x-stainless-lang"


def error_body(scope: Scope, error: ApiError) -> dict[str, Any]:
    """By the route, and where two APIs have the same one, by the client."""
    path = scope["path"]
    if path in EMBED_PATHS and scope["method"] == "POST":
        return embed_body(error)
    if scope.get("state", {}).get("is_tei"):  # a route knows it when it has read the body
        return embed_body(error)
    is_tldw = path == _TLDW or path.startswith(f"{_TLDW}/")
    if is_tldw and not any(name == _OPENAI_CLIENT for name, _ in scope["headers"]):
        return tldw_body(error)
    return openai_body(error)
