"""Embed three texts with the official OpenAI client and show how alike they are.

uv run mlx-embeddings-server --model sentence-transformers/all-MiniLM-L6-v2 &
uv run python examples/openai_client.py
"""

import argparse

import numpy as np
from openai import OpenAI

TEXTS = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8888/v1", help="default: %(default)s")
    parser.add_argument("--api-key", default="none", help="the server's --api-key, if it has one")
    parser.add_argument("texts", nargs="*", default=TEXTS)
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key=options.api_key)
    model = client.models.list().data[0].id
    reply = client.embeddings.create(model=model, input=options.texts)
    vectors = np.array([item.embedding for item in reply.data])  # [texts, dimensions]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    print(f"{model}: {vectors.shape[1]} dimensions, {reply.usage.prompt_tokens} tokens")
    for text, row in zip(options.texts, vectors @ vectors.T, strict=True):
        print("  ".join(f"{similarity:6.3f}" for similarity in row), text)


if __name__ == "__main__":
    main()
