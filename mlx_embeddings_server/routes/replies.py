"""What the replies of all routes that embed have in common."""

import asyncio
from collections.abc import Iterator

from mlx_embeddings_server.service import Embeddings


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
    timings = (
        ("tokenize", result.tokenize_seconds),
        ("queue", result.queue_seconds),
        ("inference", result.inference_seconds),
    )
    headers = {
        "Server-Timing": ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in timings),
        "X-Embeddings-Provider": result.provider,
        "X-Embeddings-Dimensions-Policy": dimensions_policy,
    }
    if result.truncated:
        headers["X-Embeddings-Truncated"] = ",".join(map(str, result.truncated))
    return headers
