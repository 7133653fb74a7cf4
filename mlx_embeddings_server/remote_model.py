"""A model of another server, under a name of this one's: nothing to load, and its vectors' size to be learnt."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable
from typing import Literal, Self

from mlx_embeddings_backends.base import Item, ModelInfo
from mlx_embeddings_server.cache.keys import canonical
from mlx_embeddings_server.errors import NotFound, quoted
from mlx_embeddings_server.failures import as_api_errors
from mlx_embeddings_server.providers.base import REMOTE, InputRefused, NoSuchModel, Vectors
from mlx_embeddings_server.providers.endpoint import Endpoint
from mlx_embeddings_server.providers.remote import RemoteProvider
from mlx_embeddings_server.registry import ModelSpec

_PROBE = "dimensions"  # a text that is embedded where nothing else says how large vectors are


class RemoteModel:
    """What the service and the routes need of a model, as `model.Model` has it. Used on the event loop."""

    found = None
    files = None
    download = None
    engine = None
    memory_bytes = 0
    is_loaded = True

    def __init__(self, name: str, spec: ModelSpec, endpoint: Endpoint, *, is_listed: bool = True) -> None:
        """`is_listed`: by the file. Else a caller named it, who may be wrong."""
        self.name = name
        self.spec = spec
        self.is_listed = is_listed
        self.label = name if is_listed else f"{spec.provider}:other"  # what callers type is no label
        self.created = int(time.time())
        self.endpoint = endpoint
        self._provider = self._new_provider()
        self._info: ModelInfo | None = None
        self._probing: asyncio.Task[Vectors] | None = None

    @property
    def state(self) -> Literal["ready", "unavailable"]:
        return "unavailable" if self.endpoint.circuit.state == "open" else "ready"

    @property
    def reason(self) -> str | None:
        """Why it is not ready, in words."""
        return f"its provider {self.endpoint.name!r} keeps failing" if self.state == "unavailable" else None

    @property
    def identity(self) -> bytes | None:
        """Vectors are taken to be what the model of that name, and of vectors of that size, gives there."""
        place = self.endpoint.settings.url, self.spec.source, self._provider.dimensions
        return hashlib.sha256(canonical(place)).digest()

    @property
    def provider(self) -> RemoteProvider:
        return self._provider

    @property
    def known_info(self) -> ModelInfo | None:
        """None: its vectors' size is not configured, and none have come yet."""
        if self._info is None and (dimensions := self._provider.dimensions) is not None:
            self._info = ModelInfo(
                backend=self.endpoint.name,
                device=REMOTE,
                dtype="float32",
                dimensions=dimensions,
                max_tokens=self.spec.max_tokens or 0,  # 0: not known
                vocabulary_size=0,
                normalize=False,  # its vectors are taken as they are
                batch_tokens=0,
                prompts=self.spec.prompts,
            )
        return self._info

    @property
    def info(self) -> ModelInfo:
        info = self.known_info
        assert info is not None, "the model has to be in use"
        return info

    async def __aenter__(self) -> Self:
        """Know the size of its vectors. Raises an `ApiError`."""
        if self.known_info is None:
            # One for all that wait for it: each by itself would take its time after the others'.
            if self._probing is None or self._probing.done():
                self._probing = asyncio.ensure_future(self._provider.embed([Item(_PROBE)], "none"))
                self._probing.add_done_callback(lambda done: done.cancelled() or done.exception())  # all may have left
            await self._probed(asyncio.shield(self._probing))
        return self

    async def __aexit__(self, *failure: object) -> None:
        pass

    async def load(self) -> None:
        """Ask for a vector, to see whether it answers, and how large its vectors are now. Raises an `ApiError`."""
        provider = self._new_provider()
        await self._probed(provider.embed([Item(_PROBE)], "none"))
        # Requests that are under way keep the size that they began with.
        self._provider, self._info = provider, None

    async def unload(self) -> None:
        """There is nothing here."""

    def _new_provider(self) -> RemoteProvider:
        return RemoteProvider(self.endpoint, self.spec.source, self.spec.dimensions)

    async def _probed(self, probe: Awaitable[Vectors]) -> None:
        with as_api_errors("input", ()):
            try:
                await probe
            except (NoSuchModel, InputRefused) as error:
                if not self.is_listed:
                    raise NotFound(
                        f"the provider {self.endpoint.name!r} has no model {quoted(self.spec.source)} for texts",
                        param="model",
                        code="model_not_found",
                    ) from error
                raise NoSuchModel(
                    f"the provider {self.endpoint.name!r} has no model {self.spec.source!r} for texts, or its url "
                    "is wrong"
                ) from error
