"""Try POST /embed of a running server: embed texts and images, and show how alike they are.

uv run python scripts/test_embed_api.py "a photo of a dog" "a red car"
uv run python scripts/test_embed_api.py --url https://NAME.ngrok-free.app --key KEY "a photo of a dog"
uv run python scripts/test_embed_api.py "a lake at dusk" "a floor plan" --images images/lake_at_dusk.jpg

It needs httpx alone. Exit status 1: the server was not to be had, or refused; the message says why.
"""

import argparse
import base64
import operator
import sys
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_S = 120
SHOWN_NUMBERS = 4
LABEL_WIDTH = 48

Vector = list[float]


class TryError(Exception):
    """What went wrong, and what to do."""


def main() -> None:
    options = parse()
    vectors: list[Vector] = []
    try:
        if options.texts:
            vectors += embed(options, "texts", options.texts)
        if options.images:
            vectors += embed(options, "images", [as_input(image) for image in options.images])
    except TryError as error:
        sys.exit(str(error))
    show_similarity(vectors, [*options.texts, *options.images])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8888", help="the server's address (default: %(default)s)")
    parser.add_argument("--key", help="the server's --api-key; one that has none ignores it")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="FILE", help="files or http(s) URLs, after the texts"
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    options = parser.parse_args()
    if not options.texts and not options.images:
        parser.error("name a text or --images: there is nothing to embed")
    options.url = options.url.rstrip("/").removesuffix("/embed") + "/embed"
    return options


def as_input(image: str) -> str:
    if image.startswith(("http://", "https://")):
        return image
    try:
        return base64.b64encode(Path(image).read_bytes()).decode()
    except OSError as error:
        raise TryError(f"{image}: {error.strerror}") from error


def embed(options: argparse.Namespace, field: str, inputs: list[str]) -> list[Vector]:
    """One vector of length 1 for each input, its shape and first numbers printed. Raises `TryError`."""
    reply = post(options.url, {field: inputs, "normalize": True}, options.key)
    try:
        vectors: list[Vector] = reply.json()["embeddings"]
        several = isinstance(vectors[0][0], list)
        dimensions = len(vectors[0])
    except (ValueError, LookupError, TypeError) as error:
        raise TryError(f"{options.url} answered without embeddings: {reply.text[:200]}") from error
    if several:
        raise TryError(f"{options.url} gives a multi-vector to each input; examples/openai_client.py compares such")
    print(f"{options.url}: {field}, shape ({len(vectors)}, {dimensions})")
    cut = reply.headers.get("x-embeddings-truncated", "").split(",")
    for place, vector in enumerate(vectors):
        numbers = " ".join(f"{number:8.4f}" for number in vector[:SHOWN_NUMBERS])
        print(f"  {numbers} ...{'  (was too long, and cut)' if str(place) in cut else ''}")
    return vectors


def post(url: str, body: dict[str, Any], key: str | None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT_S)
    except httpx.ConnectError as error:
        start = "uv run mlx-embeddings-server --model openai/clip-vit-base-patch32"
        raise TryError(f"Nothing answers at {url} ({error}). Start a server, or give --url:\n  {start}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TryError(f"{url}: {error or type(error).__name__}") from error
    if not reply.is_success:
        raise TryError(f"{url} answered {reply.status_code}: {message_of(reply)}")
    return reply


def message_of(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["detail"])
    except (ValueError, LookupError, TypeError):
        return reply.text[:200] or reply.reason_phrase


def show_similarity(vectors: list[Vector], labels: list[str]) -> None:
    """Each with each: the vectors have length 1, so that their dot product is the cosine."""
    print("\nsimilarity")
    print("    " + " ".join(f"{number:7}" for number in range(1, len(labels) + 1)))
    for number, (row, label) in enumerate(zip(vectors, labels, strict=True), start=1):
        cosines = (sum(map(operator.mul, row, column)) for column in vectors)
        shown = " ".join(label.split())
        shown = shown if len(shown) <= LABEL_WIDTH else shown[: LABEL_WIDTH - 3] + "..."
        print(f"{number:4}" + " ".join(f"{cosine:7.3f}" for cosine in cosines) + f"  {shown}")


if __name__ == "__main__":
    main()
