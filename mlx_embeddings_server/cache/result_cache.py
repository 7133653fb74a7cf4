"""Item by item: what is kept is not computed, and what is being computed is waited for."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mlx_embeddings_backends.base import Item, Truncate
from mlx_embeddings_backends.errors import InputError, InputTooLong
from mlx_embeddings_server.cache.keys import keys_of
from mlx_embeddings_server.cache.memory import MemoryLayer
from mlx_embeddings_server.cache.shared import SharedLayer
from mlx_embeddings_server.cache.values import Value
from mlx_embeddings_server.engine.worker import WorkerLost
from mlx_embeddings_server.errors import Unavailable
from mlx_embeddings_server.providers.base import ProviderBusy, ProviderFailed, Timings, Vectors
from mlx_embeddings_server.tracing import span

# The one provider call for what has to be computed.
Compute = Callable[[Sequence[Item]], Awaitable[Vectors]]
# What those that wait for another request's computation hear of it. An exception is theirs as well; after "failed" they
# compute for themselves, since that may be of the other request alone.
Fate = Value | ProviderFailed | ProviderBusy | WorkerLost | Literal["failed", "left"]

_NOTHING_DONE = Timings(0.0, 0.0, 0.0)
_CLEANING_PAUSE = 60.0  # seconds
# Bytes that are copied before other requests get their turn, in about 3 ms. What is around a value takes as long as
# `_VALUE_COST` of them.
_AT_ONCE = 4_000_000
_VALUE_COST = _AT_ONCE // 256


class Identified(Protocol):
    """A model. None: its vectors are not to be kept."""

    @property
    def identity(self) -> bytes | None: ...


@dataclass(slots=True)
class Counts:
    """Inputs, since the start."""

    memory_hits: int = 0
    memory_misses: int = 0
    shared_hits: int = 0
    shared_misses: int = 0
    joined: int = 0  # waited for another request's computation


@dataclass(frozen=True, slots=True)
class _Request:
    identity: bytes
    generation: int
    model: Identified
    items: Sequence[Item]
    places: Mapping[bytes, Sequence[int]]  # of each key's items
    compute: Compute


class ResultCache:
    """For one event loop."""

    def __init__(self, memory: MemoryLayer, shared: SharedLayer | None = None) -> None:
        self._memory = memory
        self._shared = shared
        self._counts = Counts()
        self._flights: dict[bytes, asyncio.Future[Fate]] = {}
        self._generation = 0  # how often it was cleared: what began in an older one is not kept

    async def embed(self, model: Identified, items: Sequence[Item], truncate: Truncate, compute: Compute) -> Vectors:
        """What `compute` gives for all items, though it is asked only for those that are neither kept nor under way.

        Raises what `compute` raises, which is never kept.
        """
        identity, generation = model.identity, self._generation
        if identity is None:
            return await compute(items)
        places: dict[bytes, list[int]] = {}
        with span("cache lookup", {"cache.layer": "memory"}) as looking:
            keys = await keys_of(identity, items, truncate)
            for place, key in enumerate(keys):
                places.setdefault(key, []).append(place)
            found = self._kept(places)
            looking.set("cache.hits", len(found))
        self._counts.memory_hits += len(found)
        self._counts.memory_misses += len(places) - len(found)
        timings = _NOTHING_DONE
        if len(found) < len(places):
            request = _Request(identity, generation, model, items, places, compute)
            timings = await self._find(request, found)
        values = [found[key] for key in keys]
        return Vectors([value.row for value in values], [value.account for value in values], timings)

    def _kept(self, keys: Mapping[bytes, object]) -> dict[bytes, Value]:
        found = ((key, self._memory.get(key)) for key in keys)
        return {key: value for key, value in found if value is not None}

    async def _find(self, request: _Request, found: dict[bytes, Value]) -> Timings:
        """Fill `found` with all that it lacks."""
        timings = _NOTHING_DONE
        unlucky: set[bytes] = set()  # they failed in another request, whose fault it may be: not waited for again
        while wanted := [key for key in request.places if key not in found]:
            flights = {key: self._flights[key] for key in wanted if key in self._flights and key not in unlucky}
            if own := [key for key in wanted if key not in flights]:
                timings = _added(timings, await self._lead(request, own, found))
            if not flights:
                continue
            await asyncio.wait(flights.values())  # which, unlike awaiting them, leaves them be when this is cancelled
            for key, flight in flights.items():
                match flight.result():
                    case "failed":
                        unlucky.add(key)
                    case "left":
                        found |= self._kept({key: None})
                    case Value() as value:
                        found[key] = value
                        self._counts.joined += 1
                    case failure:
                        raise copy(failure)  # each has its own traceback
        return timings

    async def _lead(self, request: _Request, own: Sequence[bytes], found: dict[bytes, Value]) -> Timings:
        """Look for `own` in the second layer and compute the rest, while other requests wait for them."""
        loop = asyncio.get_running_loop()
        flights: dict[bytes, asyncio.Future[Fate]] = {
            key: loop.create_future() for key in own if key not in self._flights
        }
        self._flights |= flights
        fate: Fate = "failed"
        left = own
        try:
            if self._shared is not None:
                with span("cache lookup", {"cache.layer": self._shared.name}) as looking:
                    shared = await self._shared.get(own)
                    looking.set("cache.hits", len(shared))
                await self._settle(request, shared.items(), flights, found)
                left = [key for key in own if key not in shared]
                self._counts.shared_hits += len(shared)
                self._counts.shared_misses += len(left)
            if not left:
                return _NOTHING_DONE
            return await self._compute(request, left, flights, found)
        except asyncio.CancelledError:
            fate = "left"
            raise
        except (ProviderFailed, ProviderBusy) as failure:  # asking again would fail, after as long a wait
            fate = copy(failure)
            raise
        except WorkerLost as failure:
            if len(left) == 1:  # of several, one killed the worker, and the others are none the worse
                fate = copy(failure)
            raise
        finally:
            for key, flight in flights.items():
                if not flight.done():
                    self._land(key, flight, fate)

    async def _compute(
        self,
        request: _Request,
        keys: Sequence[bytes],
        flights: Mapping[bytes, asyncio.Future[Fate]],
        found: dict[bytes, Value],
    ) -> Timings:
        try:
            vectors = await request.compute([request.items[request.places[key][0]] for key in keys])
        except InputError as error:
            _name_all(error, [request.places[key] for key in keys])
            raise
        rows = zip(keys, vectors.rows, vectors.accounts, strict=True)
        lent = ((key, Value.lent(row, account)) for key, row, account in rows)
        await self._settle(request, lent, flights, found)
        if self._shared is not None and self._are_wanted(request):
            self._shared.put({key: found[key] for key in keys})
        return vectors.timings

    async def _settle(
        self,
        request: _Request,
        values: Iterable[tuple[bytes, Value]],
        flights: Mapping[bytes, asyncio.Future[Fate]],
        found: dict[bytes, Value],
    ) -> None:
        """Keep values, as many as there is room for in all, and hand them to those that wait."""
        count = size = cost = 0
        is_right, is_wanted = self._are_right(request), self._are_wanted(request)
        for key, value in values:
            if cost > _AT_ONCE:
                cost = 0
                await asyncio.sleep(0)
                is_right, is_wanted = self._are_right(request), self._are_wanted(request)
            cost += _VALUE_COST
            if is_wanted and self._memory.has_room_for(count + 1, size + value.nbytes):
                count, size, cost = count + 1, size + value.nbytes, cost + value.nbytes
                value = value.kept()
                self._memory.put(key, value)
            found[key] = value
            if is_right and key in flights:
                self._land(key, flights[key], value)

    def _are_right(self, request: _Request) -> bool:
        """Not where the model was loaded anew meanwhile, from files that have changed."""
        return request.model.identity == request.identity

    def _are_wanted(self, request: _Request) -> bool:
        """Right, and of after the cache was cleared."""
        return request.generation == self._generation and self._are_right(request)

    def _land(self, key: bytes, flight: asyncio.Future[Fate], fate: Fate) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        flight.set_result(fate)

    async def clear(self) -> int:
        """Remove all entries of all layers: how many there were. Raises `Unavailable`, where a layer cannot be."""
        held = self._memory.keys()
        self._forget()
        if self._shared is None:
            return len(held)
        try:
            removed = await self._shared.clear(held)
        except self._shared.errors as error:
            raise Unavailable(
                f"this server's own cache is cleared, and the layer in {self._shared.name} cannot be cleared now: "
                "try again later",
                code="cache_unavailable",
            ) from error
        self._forget()  # what was read from the layer before it was cleared
        return len(held) + removed

    def _forget(self) -> None:
        """What is under way is for those alone that wait for it already."""
        self._generation += 1
        self._memory.clear()
        self._flights = {}

    def stats(self) -> dict[str, Any]:
        """What /health shows: `hits` and `misses` are those of all layers together, in inputs."""
        memory, counts, shared = self._memory, self._counts, self._shared
        stats: dict[str, Any] = {
            "size": len(memory),
            "max_size": memory.max_entries,
            "bytes": memory.nbytes,
            "max_bytes": memory.max_bytes,
            "ttl_seconds": memory.ttl,
            "hits": counts.memory_hits + counts.joined + counts.shared_hits,
            "misses": counts.memory_misses - counts.joined - counts.shared_hits,
            "layers": {"memory": {"hits": counts.memory_hits, "misses": counts.memory_misses}},
            "joined": counts.joined,
        }
        if shared is not None:
            stats["layers"][shared.name] = {
                "hits": counts.shared_hits,
                "misses": counts.shared_misses,
                "failures": shared.failures,
            }
        return stats

    async def clean(self) -> None:
        """For ever: drop what is too old, of which an idle server would keep the memory."""
        while True:
            await asyncio.sleep(_CLEANING_PAUSE)
            self._memory.expire()

    async def aclose(self) -> None:
        if self._shared is not None:
            await self._shared.aclose()


def _added(first: Timings, second: Timings) -> Timings:
    return Timings(
        first.tokenize_seconds + second.tokenize_seconds,
        first.queue_seconds + second.queue_seconds,
        first.inference_seconds + second.inference_seconds,
    )


def _name_all(error: InputError, places: Sequence[Sequence[int]]) -> None:
    """Let `error` name the request's items, where those that were computed stand for all that are equal to them."""
    if isinstance(error, InputTooLong):
        error.lengths = [(place, tokens) for index, tokens in error.lengths for place in places[index]]
    else:
        error.within([several[0] for several in places])
