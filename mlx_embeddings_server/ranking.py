"""rerank(): a query and documents to scores, by whatever kind of model it is."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import EncodedImage, Item, Pair, Role, Truncate
from mlx_embeddings_server.errors import InvalidInput
from mlx_embeddings_server.failures import as_api_errors
from mlx_embeddings_server.inputs.parse import Content
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.options import EmbedOptions, check_truncate, prompt_of, wrong_type
from mlx_embeddings_server.pooling import normalized
from mlx_embeddings_server.providers.base import Timings, Vectors
from mlx_embeddings_server.request_record import note_inputs
from mlx_embeddings_server.service import EmbeddingService

_QUERY_TOO_LONG = (
    "has more tokens than the {} that the model takes, and only documents are ever cut: send a shorter one"
)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores in the order of the documents, and the account of what they took."""

    scores: NDArray[np.float32]  # [documents]
    prompt_tokens: int
    truncated: list[int]  # indexes of the documents that were cut
    provider: str
    timings: Timings

    def best(self, count: int | None) -> list[int]:
        """Indexes of the documents, the best first; of equal ones the first."""
        return [int(index) for index in np.argsort(-self.scores, kind="stable")[:count]]


class RankingService:
    """Stands on the embedding service. All errors that it raises are `ApiError`s."""

    def __init__(self, embedding: EmbeddingService) -> None:
        self._embedding = embedding

    async def rerank(
        self,
        model: Model,
        query: Content,
        documents: Sequence[Content],
        *,
        truncate: Truncate | None = None,
        raw_scores: bool = False,
        field: str = "documents",
    ) -> Ranking:
        """A reranker's relevance, or with `raw_scores` what it was made of; late interaction's MaxSim; or a cosine."""
        note_inputs(model.name, len(documents))
        check_truncate(model, truncate)
        match model.info.output:
            case "rerank":
                vectors = await self._score_pairs(model, query, documents, truncate, field)
                scores = np.concatenate(cast("list[NDArray[np.float32]]", vectors.rows))
                if model.info.score_activation == "sigmoid" and not raw_scores:
                    scores = sigmoid(scores)
                accounts = vectors.accounts
            case "sparse":
                raise wrong_type(model, "gives sparse vectors: ask /v1/embed_sparse")
            case _:
                vectors = await self._embed(model, query, documents, truncate, field)
                if vectors.accounts[0].truncated:
                    raise InvalidInput("query", _QUERY_TOO_LONG.format(model.info.max_tokens), code="input_too_long")
                rows = [normalized(np.atleast_2d(row)) for row in cast("list[NDArray[np.float32]]", vectors.rows)]
                scores = await asyncio.to_thread(max_sim, rows[0], rows[1:])
                accounts = vectors.accounts[1:]
        prompt_tokens = sum(account.tokens for account in vectors.accounts)
        self._embedding.account(model, len(documents), prompt_tokens)
        return Ranking(
            scores=scores,
            prompt_tokens=prompt_tokens,
            truncated=[index for index, account in enumerate(accounts) if account.truncated],
            provider=model.provider.name,
            timings=vectors.timings,
        )

    async def _score_pairs(
        self,
        model: Model,
        query: Content,
        documents: Sequence[Content],
        truncate: Truncate | None,
        field: str,
    ) -> Vectors:
        for content in (query, *documents):
            if not isinstance(content, str):
                raise wrong_type(model, "scores texts, and images are no texts: rerank these with a model for images")
        # Put before the query: what the server's file says, or what the checkpoint does without being asked.
        prompt = model.spec.prompts.get("query") or prompt_of(model.info, EmbedOptions())
        items = [Item(Pair(cast("str", query), cast("str", document)), prompt) for document in documents]
        return await self._embedding.run(model, items, truncate, as_api_errors(field, range(len(items))))

    async def _embed(
        self,
        model: Model,
        query: Content,
        documents: Sequence[Content],
        truncate: Truncate | None,
        field: str,
    ) -> Vectors:
        """The query's vectors, then the documents', of one request."""
        [question] = await self._embedding.load_images([query], "query")
        pages = await self._embedding.load_images(documents, field)
        items = [_item(model, question, "query"), *(_item(model, page, "document") for page in pages)]
        return await self._embedding.run(model, items, truncate, as_api_errors(field, range(1, len(items))))


def _item(model: Model, content: str | tuple[int, ...] | EncodedImage, role: Role) -> Item:
    prompt = prompt_of(model.info, EmbedOptions(input_type=role)) if isinstance(content, str) else ""
    return Item(content, prompt, role)


def sigmoid(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", 1 / (1 + np.exp(-scores.astype(np.float64)))).astype(np.float32)


def max_sim(query: NDArray[np.float32], documents: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Late interaction's score (Khattab and Zaharia, 2020): each query vector's best product, summed.

    Of one vector each it is the product of the two. `query`: [vectors, dimensions], as each document is.
    """
    return np.array([(query @ document.T).max(axis=1).sum() for document in documents], dtype=np.float32)
