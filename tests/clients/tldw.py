"""Embed by the tldw server's API, as a user's own script does: `python tests/clients/tldw.py URL KEY HEADER`.

Its class does what that server's documentation shows; it prints the vectors that it got, as JSON.
"""

import json
import sys
from typing import Any

import requests


class EmbeddingsClient:
    def __init__(self, base_url: str, api_key: str, header: str) -> None:
        self.base_url = base_url
        value = api_key if header == "X-API-KEY" else f"Bearer {api_key}"
        self.headers = {header: value, "Content-Type": "application/json"}

    def create_embeddings(
        self, input: Any, model: str = "text-embedding-3-small", dimensions: int | None = None
    ) -> list[list[float]]:
        body = {"input": input, "model": model}
        if dimensions:
            body["dimensions"] = dimensions
        response = requests.post(f"{self.base_url}/api/v1/embeddings", json=body, headers=self.headers)
        response.raise_for_status()
        return [each["embedding"] for each in response.json()["data"]]


def main() -> None:
    client = EmbeddingsClient(*sys.argv[1:])
    found = {
        "text": client.create_embeddings("hello, world!"),
        "texts": client.create_embeddings(["text1", "text2", "text3"], dimensions=512),
        "ids": client.create_embeddings([15339, 11, 1917, 0]),
        "lists of ids": client.create_embeddings(
            [[15339, 11, 1917, 0], [1115, 374, 264, 1296], [315, 279, 40188, 5446]], dimensions=12
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
