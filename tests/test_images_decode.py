"""Files of six formats to upright RGB on white, against pixels known beforehand."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mlx_embeddings_backends.images import decode
from tests.image_bytes import FORMATS, encoded, exif, png, png_chunk, scene, tiff

# pytest makes an error of what the module itself keeps from being printed.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL.TiffImagePlugin")


def pixels(data: bytes) -> NDArray[np.int16]:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int16)


def on_white(image: Image.Image) -> NDArray[np.int16]:
    """The definition, in floating point."""
    layer = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = layer[..., 3:] / 255
    return np.round(layer[..., :3] * alpha + 255 * (1 - alpha)).astype(np.int16)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("TIFF", mode, {"compression": "tiff_lzw"}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "YCbCr")),
        *(("TIFF", "RGB", {"compression": name}) for name in (None, "tiff_deflate", "tiff_adobe_deflate", "packbits")),
        *(("TIFF", "1", {"compression": name}) for name in ("group3", "group4", "tiff_ccitt")),
        *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("WEBP", mode, {"lossless": True, "exact": True}) for mode in ("RGB", "RGBA")),
        *(("GIF", mode, {}) for mode in ("1", "L", "P")),
    ],
)
def test_lossless_files_decode_to_their_pixels(kind: str, mode: str, options: dict[str, Any]) -> None:
    image = scene(mode)
    data = encoded(image, kind, **options)
    if kind == "BMP" and mode == "RGBA":
        image = image.convert("RGB")  # the fourth byte of a plain BMP is unused
    assert np.abs(pixels(data) - on_white(image)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_decode_to_nearly_their_pixels(mode: str) -> None:
    image = Image.new("RGB", (64, 48), (200, 80, 40)).convert(mode)
    for data in (encoded(image, "JPEG", quality=95), encoded(image, "JPEG", quality=95, progressive=True)):
        assert np.abs(pixels(data) - on_white(image)).max() <= 3


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "expected"),
    [  # the grey or colour that is transparent is given in samples of the file's own depth
        (1, 0, b"\x40", b"\0\1", [0, 255, 0]),
        (2, 0, b"\x18", b"\0\2", [0, 85, 255]),
        (4, 0, b"\x02\x30", b"\0\2", [0, 255, 51]),
        (8, 0, b"\x00\x02\x30", b"\0\2", [0, 255, 48]),
        (16, 0, b"\x00\xff\x80\x00\x12\x34", b"\x80\0", [0, 255, 18]),
        (8, 2, b"\0\0\0\1\2\3\7\7\7", b"\0\1\0\2\0\3", [0, 255, 7]),
        (16, 2, b"\0\0\0\0\0\0\1\0\2\0\3\0\7\0\7\0\7\0", b"\1\0\2\0\3\0", [0, 255, 7]),
        (16, 4, b"\x00\x00\xff\xff\x00\x00\x00\x00\x30\x00\xff\xff", None, [0, 255, 48]),
    ],
)
def test_png_transparency_at_every_depth(
    depth: int, colour: int, row: bytes, transparent: bytes | None, expected: list[int]
) -> None:
    chunks = () if transparent is None else (png_chunk(b"tRNS", transparent),)
    decoded = pixels(png((3, 1), depth, colour, b"\0" + row, *chunks))
    assert decoded[0, :, 0].tolist() == expected


def test_palettes_with_transparency() -> None:
    palette = png_chunk(b"PLTE", bytes((10, 20, 30, 40, 50, 60, 70, 80, 90)))
    decoded = pixels(png((3, 1), 8, 3, b"\0\0\1\2", palette, png_chunk(b"tRNS", bytes((255, 0, 51)))))
    assert decoded[0].tolist() == [[10, 20, 30], [255, 255, 255], [218, 220, 222]]
    image = scene("P")
    corner = image.getpixel((0, 0))
    assert pixels(encoded(image, "GIF", transparency=corner))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_are_cut_to_eight(order: str) -> None:
    grey = struct.pack(f"{order}3H", 0x0102, 0x8000, 0xFFFF)
    tags = {256: 3, 257: 1, 258: (3, 1, 16), 259: (3, 1, 1), 262: (3, 1, 1), 273: 8, 278: 1, 279: 6}
    assert pixels(tiff(tags, grey, order))[0, :, 0].tolist() == [1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_put_upright(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    tag = Image.Exif()
    tag[274] = orientation
    data = encoded(scene(), kind, exif=tag, **options)
    opened = Image.open(io.BytesIO(data))
    opened.load()
    expected = ImageOps.exif_transpose(opened)
    assert expected.size == ((24, 40) if orientation > 4 else (40, 24))
    np.testing.assert_array_equal(pixels(data), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0II*\0", exif(9), exif(6)[:-10], b"Exif\0\0" + b"\xff" * 80]
)
def test_an_orientation_that_cannot_be_read_is_none(block: bytes) -> None:
    image = scene()
    np.testing.assert_array_equal(pixels(encoded(image, "JPEG", exif=block)), pixels(encoded(image, "JPEG")))


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_the_first_of_several_frames_is_taken(kind: str, options: dict[str, Any]) -> None:
    first, second = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
    data = encoded(first, kind, save_all=True, append_images=[second] * 20, **options)
    assert np.unique(pixels(data).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_profiles_texts_and_comments_change_nothing() -> None:
    image = scene()
    junk = bytes(range(256)) * 20
    plain = pixels(encoded(image, "PNG"))
    for kind, options in (
        ("PNG", {"icc_profile": junk}),
        ("TIFF", {"icc_profile": junk, "description": "a page", "compression": "tiff_lzw"}),
        ("WEBP", {"icc_profile": junk, "xmp": junk, "lossless": True}),
    ):
        np.testing.assert_array_equal(pixels(encoded(image, kind, **options)), plain)
    commented = encoded(scene("P"), "GIF", comment=b"made by hand")
    np.testing.assert_array_equal(pixels(commented), pixels(encoded(scene("P"), "GIF")))


def test_tiles_and_pages_of_a_tiff() -> None:
    tile = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tags = {256: 20, 257: 10, 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1), 322: 16, 323: (3, 1, 16)}
    packed = zlib.compress(tile.tobytes())
    places = struct.pack("<4I", 8, 8, len(packed), len(packed))
    data = tiff(tags | {324: (4, 2, 8 + len(packed)), 325: (4, 2, 16 + len(packed))}, packed + places)
    np.testing.assert_array_equal(pixels(data)[..., 0], np.hstack((tile, tile))[:10, :20])


def test_a_page_costs_little_more_than_its_bare_decoding() -> None:
    page = encoded(Image.effect_noise((1654, 2339), 40).convert("RGB"), "JPEG", quality=85)  # A4 at 200 dpi

    def seconds(read: Callable[[bytes], Image.Image]) -> float:
        started = time.perf_counter()
        read(page)
        return time.perf_counter() - started

    def bare(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    times = [(seconds(decode), seconds(bare)) for _ in range(7)]
    assert min(ours for ours, _ in times) < 1.5 * min(theirs for _, theirs in times)


def test_many_threads_decode_at_once() -> None:
    files = [encoded(scene(), kind) for kind in FORMATS] * 5
    expected = [pixels(data) for data in files]
    found: list[list[NDArray[np.int16]]] = []
    threads = [threading.Thread(target=lambda: found.append([pixels(data) for data in files])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert all(np.array_equal(*pair) for each in found for pair in zip(each, expected, strict=True))
