"""Hybrid search: dense and sparse vectors find candidates, a reranker puts them in order. Qdrant runs inside.

Serve three models of your choice from one file (see models.example.yaml), and name them here:

uv run mlx-embeddings-server --config models.yaml &
uv run python examples/hybrid_search.py --dense minilm --sparse splade --rerank reranker "When does the boat sail?"

One BGE-M3 gives dense and sparse vectors in one call: --dense bge-m3 --sparse bge-m3.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from qdrant_client import QdrantClient, models

COLLECTION = "notices"
NOTICES = Path(__file__).parent / "town_notices.jsonl"
CANDIDATES = 10


class Server:
    """What of the server is used here."""

    def __init__(self, url: str, api_key: str, dense: str, sparse: str, rerank: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=300)
        self.dense, self.sparse, self.reranker = dense, sparse, rerank

    def embed(self, texts: Sequence[str], input_type: str) -> list[tuple[list[float], models.SparseVector]]:
        """A dense and a sparse vector of each text."""
        fields = {"input": texts, "input_type": input_type, "truncate": "end"}
        if self.dense == self.sparse:  # one forward pass
            reply = self._post("embeddings", {"model": self.dense, "outputs": ["dense", "sparse"], **fields})
            return [(item["embedding"], _sparse(item["sparse_embedding"])) for item in reply["data"]]
        dense = self._post("embeddings", {"model": self.dense, **fields})["data"]
        sparse = self._post("embed_sparse", {"model": self.sparse, **fields})["data"]
        return [(a["embedding"], _sparse(b["embedding"])) for a, b in zip(dense, sparse, strict=True)]

    def rerank(self, query: str, documents: Sequence[str]) -> list[tuple[int, float]]:
        """Places in `documents` and their relevance, the best first."""
        body = {"model": self.reranker, "query": query, "documents": documents, "truncate": "end"}
        return [(each["index"], each["relevance_score"]) for each in self._post("rerank", body)["results"]]

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = self.http.post(f"/{route}", json=body)
        if reply.is_error:
            raise SystemExit(f"{reply.url} answered {reply.status_code}: {reply.text}")
        content: dict[str, Any] = reply.json()
        return content


def _sparse(value: dict[str, Any]) -> models.SparseVector:
    return models.SparseVector(indices=value["indices"], values=value["values"])


def index(qdrant: QdrantClient, server: Server, notices: Sequence[dict[str, Any]]) -> None:
    vectors = server.embed([f"{notice['title']}: {notice['text']}" for notice in notices], "document")
    qdrant.create_collection(
        COLLECTION,
        vectors_config={"dense": models.VectorParams(size=len(vectors[0][0]), distance=models.Distance.COSINE)},
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )
    points = [
        models.PointStruct(id=notice["id"], vector={"dense": dense, "sparse": sparse}, payload=notice)
        for notice, (dense, sparse) in zip(notices, vectors, strict=True)
    ]
    qdrant.upsert(COLLECTION, points)


def search(qdrant: QdrantClient, server: Server, query: str, limit: int) -> list[tuple[float, dict[str, Any]]]:
    """The best of both kinds by reciprocal rank fusion, then in the reranker's order."""
    [(dense, sparse)] = server.embed([query], "query")
    found = qdrant.query_points(
        COLLECTION,
        prefetch=[
            models.Prefetch(query=dense, using="dense", limit=CANDIDATES),
            models.Prefetch(query=sparse, using="sparse", limit=CANDIDATES),
        ],
        query=models.FusionQuery(fusion=models.Fusion.RRF),
        limit=CANDIDATES,
    ).points
    notices = [point.payload or {} for point in found]
    ranked = server.rerank(query, [f"{notice['title']}: {notice['text']}" for notice in notices])
    return [(score, notices[place]) for place, score in ranked[:limit]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8888/v1", help="default: %(default)s")
    parser.add_argument("--api-key", default="none", help="the server's --api-key, if it has one")
    parser.add_argument("--dense", required=True, metavar="MODEL", help="served name of a model of dense vectors")
    parser.add_argument("--sparse", required=True, metavar="MODEL", help="of sparse vectors; may be the same (BGE-M3)")
    parser.add_argument("--rerank", required=True, metavar="MODEL", help="of a reranker, or any model of vectors")
    parser.add_argument("--limit", type=int, default=3, help="notices to show (%(default)s)")
    parser.add_argument("query")
    options = parser.parse_args()

    server = Server(options.url, options.api_key, options.dense, options.sparse, options.rerank)
    qdrant = QdrantClient(":memory:")
    notices = [json.loads(line) for line in NOTICES.read_text().splitlines()]
    index(qdrant, server, notices)
    for score, notice in search(qdrant, server, options.query, options.limit):
        print(f"{score:7.4f}  {notice['title']}: {notice['text']}")


if __name__ == "__main__":
    main()
