"""Collections: documents and queries to vectors of the collection's own model, and these to and from the store."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Role, Truncate
from mlx_embeddings_server.auth.caller import Access, Caller
from mlx_embeddings_server.auth.keys import KeyAccess
from mlx_embeddings_server.errors import ApiError, InvalidRequest, NotFound
from mlx_embeddings_server.inputs.parse import parse_input
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.options import EmbedOptions, outputs_of, prompt_of
from mlx_embeddings_server.service import Embeddings, EmbeddingService
from mlx_embeddings_server.settings import Settings, SettingsError
from mlx_embeddings_server.stores.base import (
    WHOLE,
    Collection,
    Document,
    EmbeddedDocument,
    EmbeddingFacts,
    Excerpt,
    Hit,
    InvalidValue,
    Metadata,
    Mismatch,
    Scalar,
    StoreError,
)
from mlx_embeddings_server.stores.checks import check_contents, check_facts, check_results, checked_where
from mlx_embeddings_server.stores.opening import open_store
from mlx_embeddings_server.stores.store import VectorStore

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Seconds between two looks whether the store answers, and between two times of dropping what crashes left in it.
_CHECK_INTERVAL = 5.0
_CLEAN_UP_INTERVAL = 3600.0


@dataclass(frozen=True, slots=True)
class Done(Generic[Result]):
    """What the store did with vectors, and the account of what they took."""

    result: Result
    model: Model
    embeddings: Embeddings


class CollectionService:
    """Decides; routes translate. All errors that it raises are `ApiError`s. Used on the event loop.

    A collection's vectors are of one model: no fallback ever stands in for it.
    """

    def __init__(self, store: VectorStore, models: Models, service: EmbeddingService, access: Access | None) -> None:
        self.store = store
        self.is_available = True  # as it was seen last
        self._models = models
        self._service = service
        self._has_users = not (access is None or isinstance(access, KeyAccess))

    def owner_of(self, caller: Caller) -> str:
        """Whose collections the caller's are. Without tokens there is one user: a key that is set later takes nothing
        from him. No token's subject leads there.
        """
        return f"user:{caller.name}" if self._has_users else "everybody"

    # What models are

    def facts_of(self, model: Model) -> EmbeddingFacts:
        """Of the vectors that the model makes. While it is in use. Raises `InvalidRequest` where it makes none."""
        [output] = outputs_of(model, EmbedOptions())
        assert output in ("dense", "multi_vector"), "others are refused"
        revision = None
        if model.found is not None:
            checkpoint = model.found.checkpoint
            revision = checkpoint.snapshot.revision
            # A folder may get other files. Of a model with a base or adapters no commit says which they are.
            if model.files is not None and (revision is None or checkpoint.base or checkpoint.adapters):
                revision = f"sha256-{model.files.hex()[:40]}"
        source, dimension = _source_of(model), model.info.dimensions
        prompt = prompt_of(model.info, EmbedOptions(input_type="document"))  # with which no commit and no hash changes
        return EmbeddingFacts(model.name, model.spec.provider, source, revision, output, dimension, prompt)

    def _candidates(self, collection: Collection) -> list[Model]:
        """Those that may have made its vectors, as far as names tell, that of its own name first; else that which has
        its name now. Raises `Mismatch`, `PermissionDenied`.
        """
        facts = collection.facts
        alike = [each for each in self._models if each.spec.provider == facts.provider and _may_be(each, facts.source)]
        try:
            named = self._models.get(facts.model)
            alike = sorted(alike, key=lambda each: each is not named) or [named]
        except NotFound as error:
            if not alike:
                raise Mismatch(
                    f"the collection {collection.name!r} holds vectors of {facts.model}, which is not served here any "
                    "more: serve it again, or use another collection",
                    code="collection_model_not_served",
                ) from error
        allow_list = self._models.allow_list
        allowed = [each for each in alike if allow_list.allows(each)]
        if not allowed:
            allow_list.check(alike[0])
        return allowed

    # What callers do

    async def create(self, owner: str, name: str, model: Model, metadata: Metadata) -> Collection:
        async with model:
            facts = self.facts_of(model)
        own = public_facts(facts)
        for key in own.keys() & metadata.keys():
            if metadata[key] != own[key]:
                raise InvalidValue(f"metadata.{key} is the server's to say, and is {own[key]!r} here", param="metadata")
        metadata = {key: value for key, value in metadata.items() if key not in own}
        return await self.store.create(owner, name, facts, metadata)

    async def upsert(
        self,
        owner: str,
        name: str,
        documents: Sequence[Document],
        *,
        asked: Model | None = None,
        truncate: Truncate | None = None,
    ) -> Done[None]:
        """Embed and store. Nothing is stored where one of them cannot be embedded.

        `asked` is the model that the caller takes the collection's to be: another one is a `Mismatch`.
        """
        check_contents(documents)

        async def store(facts: EmbeddingFacts, result: Embeddings) -> None:
            await self.store.upsert(owner, name, facts, joined(documents, result))

        inputs = [_input(each) for each in documents]
        embed = partial(self.embed, value=inputs, role="document", field="documents", truncate=truncate)
        return await self._with_vectors(owner, name, asked, embed, store)

    async def query(
        self,
        owner: str,
        name: str,
        query: Any,
        *,
        n_results: int,
        where: object = None,
        excerpt: Excerpt = WHOLE,
        asked: Model | None = None,
        truncate: Truncate | None = None,
    ) -> Done[list[Hit]]:
        """`query` is a text, or an item with a text or an image; the best documents come first."""
        check_results(n_results)
        checked_where(where)

        async def search(facts: EmbeddingFacts, result: Embeddings) -> list[Hit]:
            [vectors] = vectors_of(result)
            return await self.store.query(
                owner, name, facts, vectors, n_results=n_results, where=where, excerpt=excerpt
            )

        embed = partial(self.embed, value=query, role="query", field="query", truncate=truncate)
        return await self._with_vectors(owner, name, asked, embed, search)

    async def embed(
        self,
        model: Model,
        value: Any,
        role: Role,
        *,
        field: str,
        truncate: Truncate | None = None,
        is_cached: bool = True,
    ) -> Embeddings:
        """While the model is in use. `value` is what a request has: an item, or a list of them."""
        contents = parse_input(value, modalities=model.info.modalities, max_inputs=max(1, len(value)), field=field)
        options = EmbedOptions(input_type=role, truncate=truncate, is_cached=is_cached)
        return await self._service.embed(model, contents, options, field=field)

    async def embedded(
        self, model: Model, documents: Sequence[Document], *, truncate: Truncate | None = None
    ) -> list[EmbeddedDocument]:
        """Documents as they are stored, in one go, without the cache: they would push out what callers ask for. While
        the model is in use.
        """
        inputs = [_input(each) for each in documents]
        result = await self.embed(model, inputs, "document", field="documents", truncate=truncate, is_cached=False)
        return joined(documents, result)

    async def _with_vectors(
        self,
        owner: str,
        name: str,
        asked: Model | None,
        embed: Callable[[Model], Awaitable[Embeddings]],
        use: Callable[[EmbeddingFacts, Embeddings], Awaitable[Result]],
    ) -> Done[Result]:
        """`use` of the vectors; again, where a re-embedding gave the collection another model meanwhile."""
        found = await self.store.get(owner, name)
        while True:
            model, facts, result = await self._by_its_model(found, asked, embed)
            try:
                return Done(await use(facts, result), model, result)
            except Mismatch:
                switched = await self.store.get(owner, name)
                if switched.current.number == found.current.number:
                    raise
                found = switched

    async def _by_its_model(
        self, collection: Collection, asked: Model | None, embed: Callable[[Model], Awaitable[Embeddings]]
    ) -> tuple[Model, EmbeddingFacts, Embeddings]:
        """Raises `Mismatch` (or `InvalidRequest`) where no model that is served made the collection's vectors."""
        models = self._candidates(collection)
        if asked is not None:
            if asked not in models:
                raise Mismatch(
                    f"the collection {collection.name!r} holds vectors of {models[0].name}, not of {asked.name}",
                    param="model",
                )
            models = [asked]
        refusals: list[ApiError] = []
        for model in models:
            async with model:
                try:
                    facts = self.facts_of(model)
                    check_facts(collection.facts, facts, collection.name)
                except (InvalidRequest, Mismatch) as error:
                    refusals.append(error)
                    continue
                return model, facts, await embed(model)
        raise refusals[0]  # that of its own name

    # The store's life

    async def watch(self) -> None:
        """For ever: see whether the store answers, and drop what crashes left in it."""
        cleaned_at = -_CLEAN_UP_INTERVAL
        while True:
            try:
                if time.monotonic() - cleaned_at >= _CLEAN_UP_INTERVAL:
                    await self.store.clean_up()
                    cleaned_at = time.monotonic()
                await self.store.check()
                self._seen(is_available=True)
            except StoreError as error:
                self._seen(is_available=False, why=error.message)
            except Exception:  # whatever it was, it is looked again
                log.exception("looking whether the collections' store answers failed")
            await asyncio.sleep(_CHECK_INTERVAL)

    def _seen(self, *, is_available: bool, why: str = "") -> None:
        if is_available != self.is_available:
            log.warning("collections: %s", "the store answers again" if is_available else why)
        self.is_available = is_available

    async def aclose(self) -> None:
        """Waits for what is being done."""
        await asyncio.to_thread(self.store.close)


def open_collections(
    settings: Settings, models: Models, service: EmbeddingService, access: Access | None
) -> CollectionService:
    """What `settings.collections` names. Blocks for a second or two. Raises `SettingsError`."""
    assert settings.collections is not None
    key = settings.collections_api_key
    store = open_store(
        settings.collections,
        folder_of(settings),
        api_key=None if key is None else key.get_secret_value(),
        timeout=settings.collections_timeout,
    )
    return CollectionService(store, models, service, access)


def folder_of(settings: Settings) -> Path:
    """Where what must not get lost is kept. Raises `SettingsError`."""
    try:
        if settings.collections_path is not None:
            return Path(settings.collections_path).expanduser()
        home = Path.home()
    except RuntimeError as error:  # containers have users without one
        raise SettingsError(f"--collections-path: give the path of a folder: {error}") from error
    own = home / "Library" / "Application Support" if sys.platform == "darwin" else home / ".local" / "share"
    return Path(os.environ.get("XDG_DATA_HOME") or own) / "mlx-embeddings-server" / "collections"


def public_facts(facts: EmbeddingFacts) -> dict[str, Scalar]:
    """What stands among a collection's metadata. The model's name is without its provider's, which is beside it."""
    model = facts.model.removeprefix(f"{facts.provider}:")
    return {"provider": facts.provider, "embedding_model": model, "embedding_dimension": facts.dimension}


def vectors_of(result: Embeddings) -> list[NDArray[np.float32]]:
    """Each input's: [dimension], or [vectors, dimension] of a multi-vector model."""
    rows, lengths = result.table.rows, result.table.lengths
    return list(rows) if lengths is None else np.split(rows, np.cumsum(lengths)[:-1])


def joined(documents: Sequence[Document], result: Embeddings) -> list[EmbeddedDocument]:
    return [
        EmbeddedDocument(document, vectors, patches)
        for document, vectors, patches in zip(documents, vectors_of(result), result.patches, strict=True)
    ]


def _source_of(model: Model) -> str:
    """The hub id; of a folder its name, so that it may be moved."""
    return model.spec.source if model.found is None else model.found.checkpoint.snapshot.name


def _may_be(model: Model, source: str) -> bool:
    """Before the first load only what the user typed is known."""
    return source in (_source_of(model), Path(model.spec.source).name)


def _input(document: Document) -> dict[str, str]:
    given = {"text": document.text, "image": document.image}
    return {name: value for name, value in given.items() if value is not None}
