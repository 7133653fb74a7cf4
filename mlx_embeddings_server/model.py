"""What the service and the routes need of a model, whether it runs here or elsewhere."""

from typing import Protocol, Self

from mlx_embeddings_backends.base import ModelInfo
from mlx_embeddings_server.downloads import Download
from mlx_embeddings_server.engine.engine import Engine
from mlx_embeddings_server.found import Found
from mlx_embeddings_server.providers.base import Provider
from mlx_embeddings_server.registry import ModelSpec


class Model(Protocol):
    """A `ServedModel` or a `RemoteModel`, by the name that requests call it by."""

    name: str
    label: str  # that metrics count it under
    spec: ModelSpec
    created: int

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str | None:
        """Why it is not ready, in words that tell nothing of the machine."""

    @property
    def known_info(self) -> ModelInfo | None:
        """Since it is known, whether the model is in use now or not."""

    @property
    def info(self) -> ModelInfo:
        """While the model is in use."""

    @property
    def provider(self) -> Provider:
        """While the model is in use."""

    @property
    def found(self) -> Found | None:
        """Its files here, once they are looked for; None of a model elsewhere."""

    @property
    def download(self) -> Download[Found] | None:
        """Of its files; None of a model elsewhere."""

    @property
    def files(self) -> bytes | None:
        """A hash over those that were loaded, where vectors are kept in a cache or in collections."""

    @property
    def identity(self) -> bytes | None:
        """What its vectors may be kept under; None: they are not to be kept."""

    @property
    def engine(self) -> Engine | None:
        """What computes it here, while it is loaded."""

    @property
    def is_loaded(self) -> bool: ...

    @property
    def memory_bytes(self) -> int:
        """That it takes here, or will take."""

    async def __aenter__(self) -> Self:
        """Make it usable, and keep it so. Raises an `ApiError`."""

    async def __aexit__(self, *failure: object) -> None: ...

    async def load(self) -> None:
        """Now, whenever it failed last. Raises an `ApiError`."""

    async def unload(self) -> None:
        """Once the requests that hold it are answered."""
