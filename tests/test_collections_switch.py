"""Requests that a re-embedding overtakes: the collection's new model answers them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.auth.caller import ANONYMOUS
from mlx_embeddings_server.collection_service import CollectionService
from mlx_embeddings_server.errors import ApiError
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.settings import load_settings
from mlx_embeddings_server.stores.base import Document
from tests.scripted_models import load
from tests.stores import re_embed, run


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[tuple[CollectionService, Models, str]]:
    """A collection `notes` of the model `a`, beside which there is `b`."""
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "bert"}')
        (folder / name / "script.json").write_text("{}")
    models = {name: {"name": str(folder / name)} for name in "ab"}
    (folder / "models.yaml").write_text(json.dumps({"models": models}))
    flags = {"config": str(folder / "models.yaml"), "collections": "qdrant", "collections_path": str(folder / "kept")}
    app = create_app(load_settings(flags), load=load)
    runtime: Runtime = app.state.runtime
    collections = runtime.collections
    assert collections is not None
    owner = collections.owner_of(ANONYMOUS)
    async with app.router.lifespan_context(app):
        await collections.create(owner, "notes", runtime.models.get("a"), {})
        await collections.upsert(owner, "notes", [Document(str(n), f"text {n}") for n in range(3)])
        await runtime.models.get("b").load()  # so that it takes no time later
        yield collections, runtime.models, owner


async def switch(collections: CollectionService, models: Models, owner: str) -> None:
    async with models.get("b") as model:
        await re_embed(collections.store, owner, "notes", collections.facts_of(model))


def test_documents_that_were_embedded_for_the_version_before_are_embedded_anew(tmp_path: Path) -> None:
    async def overtaken() -> None:
        async with opened(tmp_path) as (collections, models, owner):
            writing = asyncio.create_task(collections.upsert(owner, "notes", [Document("late", "work 1.5")]))
            await asyncio.sleep(0.3)
            await switch(collections, models, owner)
            assert not writing.done()
            done = await writing
            assert done.model.name == "b"
            stats = await collections.store.stats(owner, "notes")
            assert (stats.count, stats.collection.facts.model) == (4, "b")

    run(overtaken())


def test_a_query_that_was_embedded_for_the_version_before_is_embedded_anew(tmp_path: Path) -> None:
    async def overtaken() -> None:
        async with opened(tmp_path) as (collections, models, owner):
            asking = asyncio.create_task(collections.query(owner, "notes", "work 1.5", n_results=2))
            await asyncio.sleep(0.3)
            await switch(collections, models, owner)
            done = await asking
            assert done.model.name == "b" and len(done.result) == 2

    run(overtaken())


def test_a_collection_that_is_deleted_meanwhile_is_not_there(tmp_path: Path) -> None:
    async def overtaken() -> None:
        async with opened(tmp_path) as (collections, _, owner):
            writing = asyncio.create_task(collections.upsert(owner, "notes", [Document("late", "work 1")]))
            await asyncio.sleep(0.3)
            await collections.store.delete(owner, "notes")
            with pytest.raises(ApiError, match="notes") as raised:
                await writing
            assert raised.value.status == 404

    run(overtaken())
