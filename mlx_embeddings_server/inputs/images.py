"""Images as requests name them, by URL, data URI or base64, to the bytes of their files."""

import asyncio
import binascii
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

import httpx

from mlx_embeddings_backends.errors import InvalidImage
from mlx_embeddings_backends.images import file_format
from mlx_embeddings_server.errors import InvalidInput, quoted
from mlx_embeddings_server.inputs.fetch import ByteBudget, FetchFailed, ImageFetcher, Resolve

_FETCHES_OF_A_REQUEST: Final = 8  # at once
_LONGEST_URL: Final = 65_536  # characters, which is httpx's limit
_SLICE: Final = 1 << 16  # characters

_URL: Final = re.compile(r"https?://", re.IGNORECASE)
_DATA_URI: Final = re.compile(r"data:([^,]{0,1000}),", re.IGNORECASE)
_USER_INFO: Final = re.compile(r"(?<=://)[^/?#]*@")
_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE: Final = b" \t\r\n"


class ImageLoader:
    """What the sources of images lead to. One for a server; to be closed. All its errors are `InvalidInput`s.

    `max_total_bytes` is what one request may fetch. `resolve` and `transport` are `ImageFetcher`'s.
    """

    def __init__(
        self,
        *,
        allow_private: bool,
        max_total_bytes: int,
        resolve: Resolve | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._fetcher = ImageFetcher(allow_private=allow_private, resolve=resolve, transport=transport)
        self._max_total_bytes = max_total_bytes

    async def load_all(self, sources: Sequence[tuple[str, str]]) -> list[bytes]:
        """The files of a request's images, in order: all, or an error that ends the other fetches.

        A source stands beside its place in the request, for messages. Equal ones are loaded once. The bytes begin as a
        file of a known format does; whether they are one, `images.decode` finds out.
        """
        places: dict[str, str] = {}
        for source, where in sources:
            places.setdefault(source, where)
        files: dict[str, bytes] = {}
        waiting = iter(places.items())
        budget = ByteBudget(self._max_total_bytes)

        async def work() -> None:
            for source, where in waiting:
                files[source] = await self._load(source, where, budget)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(places), _FETCHES_OF_A_REQUEST)):
                    group.create_task(work())
        except ExceptionGroup as failed:
            first = failed.exceptions[0]
        else:
            return [files[source] for source, _ in sources]
        raise first

    async def aclose(self) -> None:
        await self._fetcher.aclose()

    async def _load(self, source: str, where: str, budget: ByteBudget) -> bytes:
        source = source.strip()
        is_url = _URL.match(source) is not None
        origin = f"from {quoted(_USER_INFO.sub('', source[:_LONGEST_URL], count=1))} " if is_url else ""
        try:
            return await (self._fetcher.fetch(source, budget) if is_url else asyncio.to_thread(_decoded, source))
        except FetchFailed as error:
            raise InvalidInput(where, f"{origin}cannot be fetched: {error}", code="image_fetch_failed") from error
        except InvalidImage as error:
            message = f"{origin}is no image that can be taken: {error}"
            raise InvalidInput(where, message, code="invalid_image") from error


def _decoded(source: str) -> bytes:
    """The bytes of a data URI or of base64. Raises `InvalidImage`."""
    uri = _DATA_URI.match(source)
    content = source[uri.end() :] if uri else source
    try:
        if uri and "%" in content:
            content = _from_percent(content).decode("latin-1")
        is_base64 = not uri or uri[1].lower().endswith(";base64")
        data = _from_base64(content) if is_base64 else content.encode("latin-1")
    except ValueError as error:
        what = "the data URI is broken" if uri else "it is neither an http(s) URL, nor a data URI, nor base64"
        raise InvalidImage(0, f"{what}: send one of these, of a JPEG, PNG, WebP, GIF, BMP or TIFF file") from error
    file_format(data)
    return data


def _from_base64(text: str) -> bytes:
    """Both alphabets, with or without padding and line breaks. Raises `ValueError`."""
    compact = text.encode("ascii").translate(_URL_SAFE, _WHITE_SPACE)
    return binascii.a2b_base64(compact + b"=" * (-len(compact) % 4), strict_mode=True)


def _from_percent(text: str) -> bytes:
    """In slices: unquoting makes an object of every escape."""
    data, start = bytearray(), 0
    while start < len(text):
        end = start + _SLICE
        escape = text.find("%", end - 2, end)  # one that the slice would cut in two
        if escape >= 0:
            end = escape
        data += unquote_to_bytes(text[start:end])
        start = end
    return bytes(data)
