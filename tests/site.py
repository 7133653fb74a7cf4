"""A web site of a test's own, on 127.0.0.1, that answers in ways a web server would not; and how to fetch from it."""

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from mlx_embeddings_server.errors import InvalidRequest
from mlx_embeddings_server.inputs.images import ImageLoader

# What a page answers: the whole of it, or something that writes it.
Page = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


def reply(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return reply(b"", status, Location=location, Set_Cookie="visited=yes")


@dataclass(frozen=True, slots=True)
class Visit:
    """A request that came in."""

    path: str
    headers: Mapping[str, str]


class Site:
    """`async with Site({"/a.png": page}) as site:` serves until the block ends."""

    def __init__(self, pages: Mapping[str, Page], certificate: ssl.SSLContext | None = None) -> None:
        self.pages = pages
        self.visits: list[Visit] = []
        self.left: list[str] = []  # the pages whose visitors went away, or had it all
        self.most_at_once = 0
        self._certificate = certificate
        self._open = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=self._certificate)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    @property
    def paths(self) -> list[str]:
        return [visit.path for visit in self.visits]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        path = ""
        try:
            request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            path = request.split(" ")[1]
            self.visits.append(Visit(path, dict(line.split(": ", 1) for line in lines if line)))
            page = self.pages[path]
            writing = asyncio.ensure_future(self._write(page, writer))
            gone = asyncio.ensure_future(reader.read())
            await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
            for each in (writing, gone):
                each.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError):
            pass  # a client that does not come in, or goes before its time, is the client's affair
        finally:
            self._open -= 1
            self.left.append(path)
            writer.close()

    async def _write(self, page: Page, writer: asyncio.StreamWriter) -> None:
        if isinstance(page, bytes):
            writer.write(page)
            await writer.drain()
        else:
            await page(writer)


class Names:
    """A resolver that knows some hosts: for each, the answers one after the other, the last for ever."""

    def __init__(self, **hosts: list[str]) -> None:
        self.answers = {
            host.replace("_", "."): [[address] for address in addresses] for host, addresses in hosts.items()
        }
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.answers:
            raise OSError("no such name")
        answers = self.answers[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


class Detour(httpx.AsyncBaseTransport):
    """The internet: whatever address is asked for, a site answers. Notes the addresses."""

    def __init__(self, site: Site, transport: httpx.AsyncHTTPTransport | None = None) -> None:
        self.addresses: list[str] = []
        self._site = site
        self._transport = transport or httpx.AsyncHTTPTransport(trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.addresses.append(request.url.host)
        request.url = request.url.copy_with(host="127.0.0.1", port=self._site.port)
        return await self._transport.handle_async_request(request)

    async def aclose(self) -> None:
        await self._transport.aclose()


@asynccontextmanager
async def loader(**options: Any) -> AsyncIterator[ImageLoader]:
    """One that trusts every address, unless told otherwise."""
    made = ImageLoader(**{"allow_private": True, "max_total_bytes": 100_000_000} | options)
    try:
        yield made
    finally:
        await made.aclose()


async def refusal(images: ImageLoader, *urls: str) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await images.load_all([(url, f"input[{place}]") for place, url in enumerate(urls)])
    error = caught.value
    assert error.param == "input" and error.message.startswith("input[") and "\n" not in error.message
    return error


async def fetched(images: ImageLoader, url: str) -> bytes:
    [file] = await images.load_all([(url, "input")])
    return file


@functools.cache
def distrustful() -> ImageLoader:
    """One for all examples: each would load the certificates."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        assert host.isascii() and host and 0 < port < 65536
        return ["127.0.0.1"]

    return ImageLoader(allow_private=False, max_total_bytes=1, resolve=resolve)
