"""Images by URL: how they are fetched, and how it ends otherwise; against sites on real sockets."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from tests.image_bytes import encoded, scene
from tests.site import Site, fetched, loader, redirect, refusal, reply

IMAGE = encoded(scene(), "PNG")


def test_an_image_is_fetched_without_anything_of_ours() -> None:
    async def run() -> None:
        pages = {
            "/a.png?size=2": redirect("/b.png"),
            "/b.png": reply(IMAGE, Content_Type="application/octet-stream"),
        }
        async with Site(pages) as site, loader() as images:
            assert await fetched(images, f" {site.url}/a.png?size=2#top\n") == IMAGE
            assert await fetched(images, f"{site.url}/b.png") == IMAGE
            assert site.paths == ["/a.png?size=2", "/b.png", "/b.png"]
            for visit in site.visits:
                assert visit.headers["Host"] == f"127.0.0.1:{site.port}"
                assert visit.headers["User-Agent"].startswith("mlx-embeddings-server/")
                assert visit.headers["Accept-Encoding"] == "identity"
                assert not {"Cookie", "Authorization", "Referer"} & visit.headers.keys()

    asyncio.run(run())


def test_a_body_in_chunks() -> None:
    start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (IMAGE[:7], IMAGE[7:])) + b"0\r\n\r\n"

    async def run() -> None:
        async with Site({"/": start + chunks}) as site, loader() as images:
            assert await fetched(images, site.url) == IMAGE

    asyncio.run(run())


def test_three_redirects_are_followed_of_every_kind() -> None:
    pages = {
        "/0": redirect("/1", "301 Moved Permanently"),
        "/1": redirect("2", "307 Temporary Redirect"),
        "/2": redirect("?x", "308 Permanent Redirect"),
        "/2?x": reply(IMAGE),
    }

    async def run() -> None:
        async with Site(pages) as site, loader() as images:
            assert await fetched(images, f"{site.url}/0") == IMAGE

    asyncio.run(run())


def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["::1", "127.0.0.1"]  # the site listens on the second only

    async def run() -> None:
        async with Site({"/": reply(IMAGE)}) as site, loader(resolve=resolve) as images:
            assert await fetched(images, f"http://images.test:{site.port}/") == IMAGE

    asyncio.run(run())


# What does not come back as an image.


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + IMAGE)
    while True:
        writer.write(bytes(1_000_000))
        await writer.drain()


BAD: list[tuple[Any, str, str]] = [
    (reply(b"", "404 Not Found"), "image_fetch_failed", "its server answered with status 404"),
    (reply(IMAGE, "500 Oops"), "image_fetch_failed", "status 500"),
    (reply(IMAGE, "206 Partial Content"), "image_fetch_failed", "status 206"),
    (reply(b"", "302 Found"), "image_fetch_failed", "status 302"),
    (reply(IMAGE, Content_Encoding="gzip"), "image_fetch_failed", "Content-Encoding 'gzip', which was not asked for"),
    (reply(IMAGE, Content_Encoding="br, gzip"), "image_fetch_failed", "Content-Encoding"),
    (reply(b""), "invalid_image", "the file is no JPEG, PNG, WebP, GIF, BMP or TIFF image"),
    (reply(b"plain words", Content_Type="image/png"), "invalid_image", "the file is no JPEG"),
    (reply(b"<html>", Content_Type="text/html; charset=utf-8"), "invalid_image", "a web page (text/html)"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 20000001\r\n\r\n" + IMAGE, "invalid_image", "larger than 20 MB"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n" % (b"9" * 5000), "image_fetch_failed", "its server broke off"),
    (endless, "invalid_image", "larger than 20 MB"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n" + IMAGE, "image_fetch_failed", "its server broke off"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", "image_fetch_failed", "broke off"),
    (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "image_fetch_failed", "its server broke off"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "image_fetch_failed", "its server broke off, or does not speak HTTP"),
    (b"", "image_fetch_failed", "its server broke off"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "image_fetch_failed", "its server broke off"),
]


@pytest.mark.parametrize(("page", "code", "message"), BAD)
def test_answers_that_are_no_image(page: Any, code: str, message: str) -> None:
    async def run() -> None:
        async with Site({"/secret": page}) as site, loader() as images:
            error = await refusal(images, f"{site.url}/secret")
            assert error.code == code and message in error.message
            assert error.message.startswith(f"input[0] from '{site.url}/secret' ")

    asyncio.run(run())


def test_nobody_there_and_no_such_name() -> None:
    async def run() -> None:
        async with Site({}) as site:
            url = site.url
        async with loader() as images:
            error = await refusal(images, url)
            assert (error.code, "its server cannot be reached" in error.message) == ("image_fetch_failed", True)
            for host in ("nowhere.invalid", "a" * 70 + ".test", "a..b"):
                assert "no public address" in (await refusal(images, f"http://{host}/")).message

    asyncio.run(run())


def test_no_fetch_takes_longer_than_five_seconds() -> None:
    async def silence(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(600):
            writer.write(b"x")
            await asyncio.sleep(0.1)

    async def drip_headers(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(600):
            writer.write(b"X-%d: y\r\n" % number)
            await asyncio.sleep(0.1)

    async def late_redirect(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2)
        writer.write(redirect("/late"))
        await writer.drain()

    async def resolve(host: str, port: int) -> Sequence[str]:
        if host == "slow.test":
            await asyncio.sleep(60)
        return ["127.0.0.1"]

    async def run() -> None:
        pages = {"/silence": silence, "/drip": drip, "/headers": drip_headers, "/late": late_redirect}
        async with Site(pages) as site, loader(resolve=resolve) as images:
            urls = [f"{site.url}{path}" for path in pages] + ["http://slow.test/"]
            started = time.perf_counter()
            for error in await asyncio.gather(*(refusal(images, url) for url in urls)):
                assert error.code == "image_fetch_failed" and "it took longer than 5 s" in error.message
            assert 4.9 < time.perf_counter() - started < 6
            assert site.paths.count("/late") == 3

    asyncio.run(run())


# Several images of one request.


def test_one_bad_url_of_three_ends_the_others() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        async with Site({"/slow": slow, "/bad": reply(b"", "404 Not Found")}) as site, loader() as images:
            started = time.perf_counter()
            error = await refusal(images, f"{site.url}/slow", f"{site.url}/bad", f"{site.url}/slow?2")
            assert error.message.startswith("input[1] ") and "404" in error.message
            await asyncio.sleep(0.1)
            assert "/slow" in site.left and time.perf_counter() - started < 2

    asyncio.run(run())


def test_a_request_that_is_given_up_ends_its_fetches() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        async with Site({"/slow": slow}) as site, loader() as images:
            work = asyncio.create_task(fetched(images, f"{site.url}/slow"))
            while not site.visits:
                await asyncio.sleep(0.01)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            await asyncio.sleep(0.1)
            assert site.left == ["/slow"]

    asyncio.run(run())


def test_order_is_kept_equal_sources_are_fetched_once_and_eight_at_once() -> None:
    files = {f"/{number}": IMAGE + bytes([number]) for number in range(20)}

    def page(file: bytes) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
        async def write(writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep((file[-1] % 3) / 50)
            writer.write(reply(file))
            await writer.drain()

        return write

    async def run() -> None:
        async with Site({path: page(file) for path, file in files.items()}) as site, loader() as images:
            sources = [(site.url + path, "input") for path in files]
            assert await images.load_all(sources * 2) == list(files.values()) * 2
            assert sorted(site.paths) == sorted(files)
            assert 2 <= site.most_at_once <= 8

    asyncio.run(run())


def test_the_images_of_a_request_share_a_limit() -> None:
    file = IMAGE.ljust(60_000, b"\0")

    async def run() -> None:
        pages = {"/1": reply(file), "/2": reply(file)}
        async with Site(pages) as site, loader(max_total_bytes=100_000) as images:
            assert await fetched(images, f"{site.url}/1") == file
            assert await fetched(images, f"{site.url}/2") == file
            error = await refusal(images, f"{site.url}/1", f"{site.url}/2")
            assert (error.code, "together larger than 100000 bytes" in error.message) == ("invalid_image", True)

    asyncio.run(run())


def test_the_url_in_a_message_is_short_and_has_no_password() -> None:
    async def run() -> None:
        async with loader() as images:
            error = await refusal(images, f"http://user:secret@images.test/{'x' * 5000}")
            assert error.message.startswith("input[0] from 'http://images.test/xxx")
            assert "secret" not in error.message and len(error.message) < 250
            assert "not a valid URL" in (await refusal(images, f"http://images.test/{'x' * 70_000}")).message

    asyncio.run(run())
