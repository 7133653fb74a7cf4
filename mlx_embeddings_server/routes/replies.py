"""What the replies of all routes that embed have in common."""

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
from fastapi import Response

from mlx_embeddings_server.ranking import Ranking
from mlx_embeddings_server.service import Embeddings


def json_reply(content: Any, headers: Mapping[str, str] | None = None, *, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json", headers=headers)


async def joined(parts: Iterator[bytes]) -> bytes:
    """One body; where it is large, other requests get their turn after each megabyte."""
    body, turn = bytearray(), 0
    for part in parts:
        body += part
        if len(body) - turn > 1_000_000:
            turn = len(body)
            await asyncio.sleep(0)
    return bytes(body)


def embedding_headers(result: Embeddings, dimensions_policy: str) -> dict[str, str]:
    return account_headers(result) | {"X-Embeddings-Dimensions-Policy": dimensions_policy}


def account_headers(result: Embeddings | Ranking) -> dict[str, str]:
    timings = (
        ("tokenize", result.timings.tokenize_seconds),
        ("queue", result.timings.queue_seconds),
        ("inference", result.timings.inference_seconds),
    )
    headers = {
        "Server-Timing": ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in timings),
        "X-Embeddings-Provider": result.provider,
    }
    if result.truncated:
        headers["X-Embeddings-Truncated"] = ",".join(map(str, result.truncated))
    return headers


def usage(result: Embeddings | Ranking) -> dict[str, Any]:
    counts: dict[str, Any] = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
    if result.truncated:
        counts["truncated_inputs"] = result.truncated
    return counts
