"""Images from the internet, and from nowhere else: the callers choose the URL, so it must not reach what only we can.

A host is resolved here, all of its addresses are checked, and the connection goes to one of them as it was checked: no
second look-up could answer otherwise. Names stay what the Host header and the certificate are about. Every port is
taken: what a public address offers there, the caller can have by himself.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx

from mlx_embeddings_backends.errors import InvalidImage
from mlx_embeddings_backends.images import MAX_BYTES, file_format
from mlx_embeddings_server import __version__
from mlx_embeddings_server.errors import quoted

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # host and port to addresses; raises OSError or UnicodeError

_DEADLINE: Final = 5.0  # seconds for one image: looking up, connecting, redirects and the body
_CONNECT_TIMEOUT: Final = 2.0  # seconds for one of a host's addresses, so that the next has its turn
_MOST_REDIRECTS: Final = 3
_MOST_ADDRESSES: Final = 4
_CONCURRENT_FETCHES: Final = 32
_CONCURRENT_LOOKUPS: Final = 16

_PORTS: Final = {"http": 80, "https": 443}
_HEADERS: Final = {
    "User-Agent": f"mlx-embeddings-server/{__version__}",
    "Accept": "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff",
    "Accept-Encoding": "identity",
    "Connection": "close",
}

# IPv6 unicast of the internet; of it not: protocol assignments with Teredo, 6to4 (both carry an IPv4 address) and
# documentation. NAT64 is how hosts without IPv4 reach it: its last 32 bits are judged.
_UNICAST_IPV6: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_REFUSED: Final = tuple(
    map(
        ipaddress.ip_network,
        # And addresses that look public to older Pythons, or are: Oracle's and Azure's metadata services.
        ("2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20", "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"),
    )
)

# The same for a host that is not there: callers are not to learn what our own network has.
_NOT_PUBLIC: Final = (
    "its host has no public address; images from a private network need --allow-private-image-urls on the server"
)


class FetchFailed(Exception):
    """The image cannot be had. The message says why, for the caller."""


class ByteBudget:
    """What the images of one request may have together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._left = size

    def spend(self, size: int) -> None:
        """Raises `InvalidImage`."""
        self._left -= size
        if self._left < 0:
            raise InvalidImage(
                0, f"the request's images are together larger than {self.size} bytes: send several requests"
            )


class ImageFetcher:
    """GET, with no cookies, keys, proxies or connections kept. One for a server; to be closed.

    `resolve` looks a host up, and `transport` speaks HTTP to an address: it gets URLs that name one instead of a host.
    """

    def __init__(
        self,
        *,
        allow_private: bool,
        resolve: Resolve | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._allow_private = allow_private
        self._resolve = resolve or self._look_up
        self._transport = transport or httpx.AsyncHTTPTransport(
            trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )
        self._slots = asyncio.Semaphore(_CONCURRENT_FETCHES)
        # Threads of its own: a look-up that hangs outlives its fetch, and would take the event loop's from others.
        self._lookups = ThreadPoolExecutor(_CONCURRENT_LOOKUPS, thread_name_prefix="resolve")

    async def fetch(self, url: str, budget: ByteBudget) -> bytes:
        """The image file. Raises `FetchFailed`, and `InvalidImage` for what is none or too large."""
        try:
            async with self._slots, asyncio.timeout(_DEADLINE):
                return await self._follow(_parse(url), budget)
        except TimeoutError as error:
            raise FetchFailed(f"it took longer than {_DEADLINE:.0f} s") from error
        except httpx.InvalidURL as error:
            raise FetchFailed("it is not a valid URL") from error
        except httpx.HTTPError as error:
            raise FetchFailed("its server broke off, or does not speak HTTP") from error

    async def aclose(self) -> None:
        await self._transport.aclose()
        self._lookups.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, url: httpx.URL, budget: ByteBudget) -> bytes:
        for _ in range(1 + _MOST_REDIRECTS):
            response = await self._get(url)
            try:
                if not response.has_redirect_location:
                    return await _read(response, budget)
                url = _parse(url.join(response.headers["Location"]))
            finally:
                await response.aclose()
        raise FetchFailed(f"it has more than {_MOST_REDIRECTS} redirects")

    async def _get(self, url: httpx.URL) -> httpx.Response:
        host = url.raw_host.decode("ascii")
        for address in await self._addresses(host, url.port or _PORTS[url.scheme]):
            request = httpx.Request(
                "GET",
                url.copy_with(host=address),
                headers={"Host": url.netloc.decode("ascii"), **_HEADERS},
                extensions={"sni_hostname": host.rstrip("."), "timeout": {"connect": _CONNECT_TIMEOUT}},
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        raise FetchFailed("its server cannot be reached, or its certificate is not valid")

    async def _addresses(self, host: str, port: int) -> Sequence[str]:
        """Those of the host, if all may be connected to."""
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses or not (self._allow_private or all(map(is_public, addresses))):
            raise FetchFailed(_NOT_PUBLIC)
        return addresses[:_MOST_ADDRESSES]

    async def _look_up(self, host: str, port: int) -> list[str]:
        def look_up() -> list[str]:
            return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]

        return await asyncio.get_running_loop().run_in_executor(self._lookups, look_up)


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet, and to no one's own network or machine."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed in _NAT64:
            parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        elif parsed not in _UNICAST_IPV6 or parsed.scope_id is not None:
            return False
    return parsed.is_global and not parsed.is_multicast and not any(parsed in network for network in _REFUSED)


def _parse(url: str | httpx.URL) -> httpx.URL:
    parsed = httpx.URL(url)
    if parsed.scheme not in _PORTS:
        raise FetchFailed("only http and https are fetched")
    if parsed.userinfo:
        raise FetchFailed("a user name or password is not sent")
    if not parsed.host or not 0 < (parsed.port or 80) < 65536:
        raise httpx.InvalidURL("no host, or a port that is none")
    return parsed


async def _read(response: httpx.Response, budget: ByteBudget) -> bytes:
    if response.status_code != 200:
        raise FetchFailed(f"its server answered with status {response.status_code}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise FetchFailed(f"its server sent it with Content-Encoding {quoted(encoding)}, which was not asked for")
    announced = response.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) > MAX_BYTES:
        raise _too_large()
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_BYTES:
            raise _too_large()
        budget.spend(len(chunk))
    try:
        file_format(bytes(body[:64]))
    except InvalidImage:
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise InvalidImage(0, "its server sent a web page (text/html), no image file") from None
        raise
    return bytes(body)


def _too_large() -> InvalidImage:
    return InvalidImage(0, f"the file is larger than {MAX_BYTES // 1_000_000} MB")
