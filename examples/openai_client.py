"""Embed with the official OpenAI client: texts, and images where the model takes them. Show what is alike.

uv run mlx-embeddings-server --model sentence-transformers/all-MiniLM-L6-v2 &
uv run python examples/openai_client.py "One text." "Another text."

uv run mlx-embeddings-server --model vidore/colqwen2.5-v0.2 &
uv run python examples/openai_client.py "How large is the bathroom?" --images images/*.png
"""

import argparse
import base64
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openai import OpenAI
from openai.types import CreateEmbeddingResponse

TEXTS = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
QUESTIONS = ["How large is the bathroom?", "Where do I change for the airport?"]
IMAGES = [Path(__file__).parent.parent / "images" / name for name in ("floor_plan.png", "tram_map.png")]


def as_input(image: Path) -> dict[str, str]:
    """The file itself. A URL of a page or a data URI does as well."""
    return {"image": base64.b64encode(image.read_bytes()).decode()}


def vectors_of(reply: CreateEmbeddingResponse) -> list[NDArray[np.float64]]:
    """One array [vectors, dimensions] an input, with rows of length 1. A dense model gives one vector an input."""
    arrays = []
    for item in reply.data:
        # The client makes one flat list of what came as base64. Of a multi-vector model, `shape` tells its form.
        rows = np.reshape(item.embedding, (item.model_extra or {}).get("shape", (1, -1)))
        arrays.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return arrays


def similarity(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """MaxSim: for each vector of the first the likest of the second, summed. Of single vectors it is the cosine."""
    return float((first @ second.T).max(axis=1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8888/v1", help="default: %(default)s")
    parser.add_argument("--api-key", default="none", help="the server's --api-key, if it has one")
    parser.add_argument("--images", nargs="+", type=Path, default=IMAGES, help="default: two of the sample images")
    parser.add_argument("texts", nargs="*", help="default: some of its own")
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key=options.api_key)
    model = client.models.list().data[0]
    takes_images = "image" in (model.model_extra or {}).get("modalities", ())
    texts = options.texts or (QUESTIONS if takes_images else TEXTS)
    reply = client.embeddings.create(model=model.id, input=texts)
    queries = documents = vectors_of(reply)
    print(f"{model.id}: {queries[0].shape[1]} dimensions, {reply.usage.prompt_tokens} tokens")
    if takes_images:
        inputs: Any = [as_input(image) for image in options.images]  # the client's types know texts only
        documents = vectors_of(client.embeddings.create(model=model.id, input=inputs))
        print("  ".join(image.stem for image in options.images))
    for text, query in zip(texts, queries, strict=True):
        print("  ".join(f"{similarity(query, document):6.3f}" for document in documents), text)


if __name__ == "__main__":
    main()
