"""An OpenAI-compatible API: its connections, its limits, its retries and its circuit."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final

import httpx
import orjson
from pydantic import SecretStr

from mlx_embeddings_server import __version__
from mlx_embeddings_server.providers.base import (
    InputRefused,
    KeyRejected,
    NoSuchModel,
    ProviderBusy,
    ProviderFailed,
    ShuttingDown,
)
from mlx_embeddings_server.providers.circuit import Circuit
from mlx_embeddings_server.providers.reply import Reply, parse, refusal
from mlx_embeddings_server.tracing import INPUTS, span

log = logging.getLogger(__name__)

Content = str | tuple[int, ...]

# Bytes of a reply: a vector of 16,384 numbers takes 24 each at most where they are written out.
_REPLY_BYTES: Final = 64 * 1024
_REPLY_BYTES_EACH: Final = 400_000
_ERROR_BYTES: Final = 16 * 1024  # of a reply that is none: what is said first
_INLINE_BYTES: Final = 100_000  # a larger one is parsed off the event loop

_FIRST_PAUSE: Final = 0.25  # seconds before the first retry, doubled with each
_LONGEST_PAUSE: Final = 8.0  # a provider that asks for a longer one is not waited for
_LONGEST_RETRY_AFTER: Final = 3600.0  # that is told on


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How an API is reached. Times in seconds."""

    name: str
    url: str  # without /embeddings
    key: SecretStr | None = None
    timeout: float = 60.0  # of a request there, retries included
    connect_timeout: float = 5.0
    batch_size: int = 100  # inputs of a request there
    max_in_flight: int = 8  # requests there at once
    retries: int = 2
    failure_threshold: int = 5  # in a row: the circuit opens
    recovery: float = 30.0  # until it is half-open


class Endpoint:
    """One for all models of the API. To be closed on the event loop that it was used on."""

    def __init__(self, settings: EndpointSettings) -> None:
        import stamina  # most servers have no provider, and need not wait for it

        self.settings = settings
        self.circuit = Circuit(settings.name, settings.failure_threshold, settings.recovery)
        headers = {"User-Agent": f"mlx-embeddings-server/{__version__}", "Accept": "application/json"}
        headers |= {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if settings.key is not None:
            headers["Authorization"] = f"Bearer {settings.key.get_secret_value()}"
        url = httpx.URL(f"{settings.url}/embeddings")
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(settings.timeout, connect=settings.connect_timeout),
            limits=httpx.Limits(max_connections=settings.max_in_flight),
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none is kept: all callers share the client
            # A proxy of the environment is for what is elsewhere.
            trust_env=url.host not in ("localhost", "127.0.0.1", "::1"),
        )
        self._url = url
        self._slots = asyncio.Semaphore(settings.max_in_flight)
        self._waiting: set[asyncio.Timeout] = set()
        self._is_stopped = False
        self._retrying = stamina.AsyncRetryingCaller(
            attempts=1 + settings.retries,
            timeout=None,
            wait_initial=_FIRST_PAUSE,
            wait_max=_LONGEST_PAUSE,
            wait_jitter=_FIRST_PAUSE,
        )

    @property
    def name(self) -> str:
        return self.settings.name

    def stop(self) -> None:
        """End what waits, with `ShuttingDown`. On the event loop."""
        self._is_stopped = True
        for waiting in self._waiting:
            waiting.reschedule(asyncio.get_running_loop().time())

    async def aclose(self) -> None:
        await self._client.aclose()

    async def embed(self, model: str, inputs: Sequence[Content]) -> tuple[Reply, float]:
        """Vectors of `batch_size` inputs at most, all texts or all token ids; and the seconds until it was their turn.

        Raises `ProviderFailed`, `ProviderBusy`, `InputRefused` or `ShuttingDown`.
        """
        started = time.perf_counter()
        self.circuit.check()  # before it waits for others, which may be the one that tries
        try:
            async with self._timeout():
                await self._slots.acquire()
        except TimeoutError:
            raise ProviderBusy(f"the provider {self.name!r} has been busy for {self.settings.timeout:g} s") from None
        waited = time.perf_counter() - started
        try:
            with self.circuit.call():
                return await self._within_time(model, inputs), waited
        except ProviderFailed as error:
            log.warning("%s", error)
            raise
        finally:
            self._slots.release()

    async def _within_time(self, model: str, inputs: Sequence[Content]) -> Reply:
        body = orjson.dumps({"model": model, "input": inputs, "encoding_format": "base64"})
        deadline = time.monotonic() + self.settings.timeout

        def pause_before_retry(error: Exception) -> bool | float:
            if not isinstance(error, ProviderFailed) or not error.may_retry or self.circuit.state == "open":
                return False
            if error.retry_after is None or error.retry_after < _FIRST_PAUSE:
                return True
            left = min(_LONGEST_PAUSE, deadline - time.monotonic())
            return error.retry_after if error.retry_after < left else False

        try:
            async with self._timeout():
                return await self._retrying(pause_before_retry, lambda: self._ask(body, len(inputs)))
        except TimeoutError:
            raise ProviderFailed(
                f"the provider {self.name!r} gave no answer in {self.settings.timeout:g} s", is_temporary=True
            ) from None

    @asynccontextmanager
    async def _timeout(self) -> AsyncIterator[None]:
        """Raises `TimeoutError`, or `ShuttingDown`."""
        try:
            async with asyncio.timeout(0 if self._is_stopped else self.settings.timeout) as waiting:
                self._waiting.add(waiting)
                try:
                    yield
                finally:
                    self._waiting.discard(waiting)
        except TimeoutError:
            if self._is_stopped:
                raise ShuttingDown from None
            raise

    async def _ask(self, body: bytes, count: int) -> Reply:
        """Once. What httpx says may hold the address: it is for the log."""
        try:
            async with self._asking(body, count) as response:
                if response.status_code != 200:
                    raise self._failure(response, await _beginning(response))
                content = await self._read(response, _REPLY_BYTES + count * _REPLY_BYTES_EACH)
        except httpx.TimeoutException as error:
            message = f"the provider {self.name!r} cannot be reached, or gave no answer in time"
            is_connecting = isinstance(error, httpx.ConnectTimeout)
            raise ProviderFailed(message, is_temporary=True, may_retry=is_connecting) from None
        except httpx.HTTPError as error:
            log.info("the provider %s: %s: %s", self.name, type(error).__name__, error)
            message = f"the provider {self.name!r} cannot be reached, or broke off"
            raise ProviderFailed(message, is_temporary=True, may_retry=True) from None
        if len(content) > _INLINE_BYTES:
            return await asyncio.to_thread(parse, self.name, content, count)
        return parse(self.name, content, count)

    @asynccontextmanager
    async def _asking(self, body: bytes, count: int) -> AsyncIterator[httpx.Response]:
        """As a part of the request's trace, which goes on there."""
        about: dict[str, str | int] = {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.provider.name": self.name,
            INPUTS: count,
        }
        with span(f"embeddings {self.name}", about, is_client=True) as asking:
            async with self._client.stream("POST", self._url, content=body, headers=asking.headers) as response:
                asking.set("http.response.status_code", response.status_code)
                yield response

    async def _read(self, response: httpx.Response, most: int) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ProviderFailed(f"the provider {self.name!r} answered in an encoding that was not asked for")
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > most:
                raise ProviderFailed(f"the provider {self.name!r} answered more than {most} bytes")
        return bytes(content)

    def _failure(self, response: httpx.Response, beginning: bytes) -> ProviderFailed | InputRefused:
        said = f"the provider {self.name!r} answered {response.status_code}"
        match response.status_code:
            case 400 | 413 | 422:
                key = self.settings.key
                return refusal(beginning, None if key is None else key.get_secret_value())
            case 401 | 403:
                return KeyRejected(
                    f"the provider {self.name!r} refuses this server's key, which whoever runs the server has to put "
                    "right; your own key is not concerned"
                )
            case 404:
                return NoSuchModel(f"{said}: it has no such model, or its url is wrong")
            case 429:
                return ProviderFailed(
                    f"{said}: it is asked too often",
                    is_temporary=True,
                    may_retry=True,
                    retry_after=_retry_after(response),
                )
            case status if status >= 500:
                return ProviderFailed(said, is_temporary=True, may_retry=True, retry_after=_retry_after(response))
            case status if 300 <= status < 400:
                return ProviderFailed(f"{said}, which leads elsewhere, and it is not followed there")
        return ProviderFailed(said)


async def _beginning(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) >= _ERROR_BYTES:
            break
    return bytes(content[:_ERROR_BYTES])


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, from a number of them or a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdecimal():
        return min(float(value[:10]), _LONGEST_RETRY_AFTER)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER)
