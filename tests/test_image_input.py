"""What of a request is an image, and images that it brings along itself."""

import asyncio
import base64
import re
import time
import urllib.parse
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_embeddings_server.errors import InvalidRequest
from mlx_embeddings_server.inputs.images import ImageLoader
from mlx_embeddings_server.inputs.parse import Content, ImageSource, parse_input
from tests.image_bytes import encoded, scene
from tests.site import Site, distrustful

IMAGE = encoded(scene(), "PNG")
BASE64 = base64.b64encode(IMAGE).decode()
URI = f"data:image/png;base64,{BASE64}"
URL = "https://example.com/page.png"


def parsed(value: Any, *modalities: str) -> list[Content]:
    return parse_input(value, modalities=modalities or ("text", "image"), max_inputs=10)


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ({"image": URL}, ImageSource(URL)),
        ({"image": BASE64}, ImageSource(BASE64)),
        ({"image": URI, "text": "a page"}, ImageSource(URI, "a page")),
        ({"text": URL}, URL),
        ({"type": "text", "text": "a"}, "a"),
        ({"type": "image_url", "image_url": {"url": URI, "detail": "auto"}}, ImageSource(URI)),
        (URL, ImageSource(URL)),
        ("http://a/?b=c#d", ImageSource("http://a/?b=c#d")),
        ("HTTPS://EXAMPLE.COM/A", ImageSource("HTTPS://EXAMPLE.COM/A")),
        (f" {URL}\n", ImageSource(f" {URL}\n")),
        (URI, ImageSource(URI)),
        (f"\n{URI}", ImageSource(f"\n{URI}")),
        ("Data:Image/PNG,%89PNG", ImageSource("Data:Image/PNG,%89PNG")),
        ("data:image/png;base64,cut off", ImageSource("data:image/png;base64,cut off")),
        *((text, text) for text in (BASE64, f"see {URL}", f"{URL} is it", f"{URL}\n{URL}", "http://", "https:/a", " ")),
        *((text, text) for text in ("ftp://a/b.png", "data:text/plain,a", "data: image/png", "file:///a.png", "a.png")),
        ((1, 2), (1, 2)),
    ],
)
def test_what_is_an_image_and_what_a_text(value: Any, content: Content) -> None:
    if isinstance(value, tuple):
        value = list(value)
    assert parsed(value) == parsed([value]) == [content] or parsed([value]) == [content]


@pytest.mark.parametrize("text", [URL, URI, f" {URL} "])
def test_a_url_is_a_text_to_a_model_that_takes_no_images(text: str) -> None:
    assert parsed([text], "text") == [text]


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        ({"image": ""}, "empty_input", "input[0].image is an empty string"),
        ({"image": 5}, "invalid_type", "input[0].image must be a string, not an integer"),
        ({"image": None}, "invalid_type", "input[0].image must be a string, not null"),
        ({"image": {"url": URL}}, "invalid_type", "input[0].image must be a string, not an object"),
        ({"image": URL, "text": ""}, "empty_input", "input[0].text is an empty string"),
        ({"image": URL, "text": 5}, "invalid_type", "input[0].text must be a string, not an integer"),
        (
            {"image": URL, "weight": 1},
            "invalid_type",
            '{"text": ...} or {"image": ...}, it has the keys \'image, weight',
        ),
        ({}, "invalid_type", "input[0] must be"),
        ({"type": "image_url"}, "invalid_type", "'type'"),
        ({"type": "image_url", "image_url": URL}, "invalid_type", "'type, image_url'"),
        ({"type": "image_url", "image_url": {"url": 5}}, "invalid_type", "input[0].image must be a string"),
        ({"type": "text", "text": ["a"]}, "invalid_type", "input[0].text must be a string"),
        ({"image": URL, "title": "a"}, "unsupported_modality", "input[0] is a paper"),
    ],
)
def test_items_that_are_none(value: Any, code: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed([value])
    assert (caught.value.param, caught.value.code) == ("input", code)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("modality", "value", "message"),
    [
        ("text", {"image": URL}, "input has an image, and this model takes text only"),
        ("text", {"image": URL, "text": "a"}, "input has an image, and this model takes text only"),
        ("text", {"type": "image_url", "image_url": {"url": URL}}, "input has an image"),
        ("image", "a text", "input has a text, and this model takes images only"),
        ("image", [[1, 2]], "input[0] has a text, and this model takes images only"),
        ("image", [1, 2], "input has a text, and this model takes images only"),
        ("image", {"text": "a"}, "input has a text, and this model takes images only"),
        ("image", {"image": URL, "text": "a"}, "input has a text, and this model takes images only"),
    ],
)
def test_what_the_model_does_not_take(modality: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(value, modality)
    assert caught.value.code == "unsupported_modality"
    assert caught.value.message.startswith(message)


def load(*sources: str) -> list[bytes]:
    return asyncio.run(distrustful().load_all([(source, f"input[{place}]") for place, source in enumerate(sources)]))


def test_every_way_to_bring_an_image_along() -> None:
    wrapped = base64.encodebytes(IMAGE).decode()
    url_safe = base64.urlsafe_b64encode(IMAGE).decode()
    escaped = urllib.parse.quote(IMAGE, safe="")
    ways = [
        *(BASE64, f" {BASE64}\n", BASE64.rstrip("="), wrapped, wrapped.replace("\n", "\r\n\t "), url_safe),
        *(URI, f"DATA:IMAGE/PNG;BASE64,{BASE64}", f"data:;base64,{BASE64}", f"data:image/png;base64,{wrapped}"),
        f"data:image/jpeg;name=a.png;base64,{url_safe}",
        f"data:image/png;base64,{urllib.parse.quote(BASE64, safe='')}",
        *(f"data:image/png,{escaped}", "data:," + re.sub("%..", lambda each: each[0].lower(), escaped)),
    ]
    assert load(*ways) == [IMAGE] * len(ways)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 20), st.integers(0, 3))
def test_base64_and_escapes_read_back(data: bytes, place: int, cut: int) -> None:
    data = IMAGE + data + bytes(cut)
    text = base64.b64encode(data).decode()
    wrapped = text[:place] + "\n" + text[place:]
    start = urllib.parse.quote(IMAGE)
    filling = (1 << 16) - 100 - place - len(start)
    half_escaped = start + "a" * filling + "%00%ff" * 40
    unescaped = IMAGE + b"a" * filling + b"\0\xff" * 40
    assert load(text, wrapped, f"data:,{half_escaped}") == [data, data, unescaped]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("page.png", "it is neither an http(s) URL, nor a data URI, nor base64"),
        ("/etc/passwd", "the file is no JPEG"),  # base64, as it happens
        ("file:///etc/passwd", "it is neither"),
        ("ftp://example.com/a.png", "it is neither"),
        (" ", "the file is no JPEG"),
        ("naïve", "it is neither"),
        ("AAAA=AAA", "it is neither"),
        ("A", "it is neither"),
        (BASE64[:-5] + "!", "it is neither"),
        (base64.b64encode(b"<svg/>").decode(), "the file is no JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        ("data:image/png;base64,", "the file is no JPEG"),
        ("data:image/png;base64", "it is neither"),
        ("data:image/png;base64,AAA!", "the data URI is broken"),
        ("data:image/png;base64,%ff%ff", "the data URI is broken"),
        ("data:image/svg+xml,%3Csvg/%3E", "the file is no JPEG"),
        (f"data:{'x' * 2000},", "it is neither"),
        ("A" * 28_000_000, "the file is larger than 20 MB"),
        (f"data:,{'a' * 21_000_000}", "the file is larger than 20 MB"),
    ],
    ids=lambda value: re.sub(r"\W+", " ", value)[:30],
)
def test_sources_that_lead_to_no_image(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load(URI, source)
    error = caught.value
    assert (error.param, error.code) == ("input", "invalid_image")
    assert error.message.startswith(f"input[1] is no image that can be taken: {message}")
    assert len(error.message) < 200


@given(
    st.text(max_size=100), st.sampled_from(["", "data:", "data:image/png,", "data:image/png;base64,", "data:image/"])
)
def test_no_string_raises_anything_else(text: str, start: str) -> None:
    try:
        load(start + text)
    except InvalidRequest as error:
        assert error.code in ("invalid_image", "image_fetch_failed")


def test_the_event_loop_stays_free() -> None:
    large, escaped = IMAGE.ljust(19_000_000, b"\1"), IMAGE * 40_000
    sources = [base64.encodebytes(large).decode(), "data:," + urllib.parse.quote(escaped)]

    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(large))
        for start in range(0, len(large), 1_000_000):
            writer.write(large[start : start + 1_000_000])
            await writer.drain()
            await asyncio.sleep(0.02)

    async def lag(until: asyncio.Task[list[bytes]]) -> float:
        longest = 0.0
        while not until.done():
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - started)
        return longest

    async def run() -> float:
        loader = ImageLoader(allow_private=True, max_total_bytes=len(large))
        async with Site({"/": trickle}) as site:
            work = asyncio.create_task(loader.load_all([(each, "input") for each in (*sources, site.url)]))
            longest = await lag(work)
            assert await work == [large, escaped, large]
        await loader.aclose()
        return longest

    started = time.perf_counter()
    urllib.parse.unquote_to_bytes(sources[1])
    decoding = time.perf_counter() - started  # which takes longer on a slow machine, as everything does
    # The best of three: other processes make a loop wait too.
    assert min(asyncio.run(run()) for _ in range(3)) < decoding / 2
