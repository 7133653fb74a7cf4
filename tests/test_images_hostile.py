"""Image files that are none, or would cost the server much: each is refused with one line, or decoded all the same."""

import functools
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_embeddings_backends.errors import InvalidImage
from mlx_embeddings_backends.images import MAX_BYTES, decode, file_format
from tests.image_bytes import FORMATS, bmp, encoded, png, png_chunk, scene, tiff

# pytest makes errors of warnings that the module itself keeps from being printed, which a test below looks at.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:::PIL.{module}") for module in ("Image", "TiffImagePlugin", "GifImagePlugin")
]


def reason(data: bytes) -> str:
    with pytest.raises(InvalidImage) as caught:
        decode(data)
    message = str(caught.value)
    assert caught.value.index == 0 and "\n" not in message and "PIL" not in message and len(message) < 120
    return message


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"hello", b"<html></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"PK\3\4",
        b"RIFF\0\0\0\0WAVE", b"GIF88a", b"II+\0", b"\xff\xd8", b"P6 1 1 255 abc", b"\0\0\1\0", b"8BPS\0\1",
        b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0\0\0\x1cftypavif", b"\0\0\0\x0cjP  \r\n\x87\n", b"/* XPM */",
    ],
)  # fmt: skip
def test_other_files_are_refused_by_their_first_bytes(data: bytes) -> None:
    assert reason(data) == "the file is no JPEG, PNG, WebP, GIF, BMP or TIFF image"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_off_is_refused(kind: str) -> None:
    data = encoded(scene(size=(200, 150)), kind)
    decode(data)
    for size in (20, len(data) // 3, len(data) // 2):
        assert "broken or cut off" in reason(data[:size])


def test_a_file_over_the_limit_is_refused_whatever_it_is() -> None:
    data = encoded(scene(), "JPEG")
    decode(data.ljust(MAX_BYTES, b"\0"))
    assert reason(data.ljust(MAX_BYTES + 1, b"\0")) == "the file is larger than 20 MB"
    with pytest.raises(InvalidImage):
        file_format(bytes(MAX_BYTES + 1))


def lossless_webp(width: int, height: int) -> bytes:
    """A file that says it has that size."""
    data = encoded(scene(), "WEBP", lossless=True)
    return data[:21] + struct.pack("<I", (width - 1) | (height - 1) << 14) + data[25:]


HUGE: list[Callable[[int, int], bytes]] = [
    lambda width, height: encoded(Image.new("L", (width, height)), "JPEG"),
    lambda width, height: png((width, height), 8, 0, bytes(height * (width + 1))),
    lambda width, height: lossless_webp(width, height),
    lambda width, height: (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2\x4c\1\0;"
    ),
    lambda width, height: bmp(width, height, 24, b""),
    lambda width, height: encoded(Image.new("1", (width, height)), "TIFF", compression="group4"),
    lambda width, height: tiff({256: width, 257: height, 258: (3, 1, 8), 262: (3, 1, 1), 273: 8, 279: 1}, b"\0"),
]


@pytest.mark.parametrize("make", HUGE)
def test_more_than_fifty_megapixels_are_refused_before_they_are_decoded(make: Callable[[int, int], bytes]) -> None:
    data = make(10_000, 6_000)  # 60 megapixels
    started = time.thread_time()
    assert reason(data) == "the image has 10000 x 6000 pixels, the limit is 50 megapixels"
    assert time.thread_time() - started < 0.1


@pytest.mark.parametrize("size", [(65_535, 65_535), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1)])
def test_absurd_sizes_are_refused(size: tuple[int, int]) -> None:
    width, height = size
    tags = {256: width, 257: height, 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1), 273: 8, 279: 1}
    for data in (png(size, 8, 0, b""), tiff(tags, b"\0"), bmp(width % 2**31, height % 2**31, 24, b"")):
        assert "pixels" in reason(data) or "broken" in reason(data)
    frame = b"," + struct.pack("<HHHHB", 60_000, 60_000, 5_000, 5_000, 0) + b"\2\2\x4c\1\0;"
    assert "megapixels" in reason(b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + frame)


def test_images_of_no_size_are_refused() -> None:
    jpeg = encoded(scene(), "JPEG")
    start = jpeg.index(b"\xff\xc0") + 5
    flat = jpeg[:start] + bytes(4) + jpeg[start + 4 :]
    empty_tiff = tiff({256: 0, 257: 0, 258: (3, 1, 8), 262: (3, 1, 1), 273: 8, 279: 1}, b"\0")
    for data in (png((0, 0), 8, 0, b""), png((5, 0), 8, 0, b""), bmp(0, 0, 24, b""), empty_tiff, flat):
        assert "broken" in reason(data)


@pytest.mark.parametrize(("mode", "kind"), [("I", "TIFF"), ("F", "TIFF")])
def test_samples_of_thirty_two_bits_are_refused(mode: str, kind: str) -> None:
    assert "32 bits" in reason(encoded(Image.new(mode, (4, 4)), kind))


PAGE = {256: 100, 257: 100, 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1)}


@pytest.mark.parametrize(
    ("tags", "message"),
    [  # each of these once took Pillow seconds or gigabytes, or came out wrong
        ({322: 46_000, 323: 46_000, 324: 8, 325: 1}, "tiles are far larger"),
        ({256: 200_000, 257: 1, 322: 16, 323: 3_000_000, 324: (4, 12_500, 8), 325: (4, 12_500, 8)}, "tiles are far"),
        ({322: (16, 1, 8), 323: 16, 324: 8, 325: 1}, "broken"),
        ({323: 16, 324: 8, 325: 1}, "broken"),
        ({259: (3, 1, 1), 322: 1, 323: 1, 324: (4, 4_900_000, 8)}, "too many strips or tiles"),
        ({259: (3, 1, 34_925), 273: 8, 279: 1}, "compression"),  # LZMA
        ({259: (3, 1, 6), 273: 8, 279: 1}, "compression"),  # JPEG of the old kind
        ({258: (3, 1, 16), 262: (3, 1, 0), 259: (3, 1, 1), 273: 8, 279: 1}, "16 bit grey"),
        ({258: (3, 1, 12), 259: (3, 1, 1), 273: 8, 279: 1}, "12 bit"),
    ],
)
def test_tiffs_that_cost_more_than_they_show_are_refused(tags: dict[int, Any], message: str) -> None:
    assert message in reason(tiff(PAGE | tags, bytes(1000)))


@pytest.mark.parametrize("compression", [1, 2])
def test_bmps_with_run_lengths_are_refused(compression: int) -> None:
    """Ten million pixels, all of them left out by one end of line."""
    data = bmp(10_000_000, 4, 8 // compression, b"\1\1\0\0", compression)
    started = time.thread_time()
    assert "run-length" in reason(data)
    assert time.thread_time() - started < 0.5


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    plain = encoded(Image.new("L", (2000, 1000), 90), "JPEG", progressive=True)
    last_scan = plain[plain.rindex(b"\xff\xda") : -2]
    decode(plain)
    started = time.thread_time()
    assert "too many scans" in reason(plain[:-2] + last_scan * 2000 + plain[-2:])
    assert time.thread_time() - started < 1


def test_what_unpacks_to_gigabytes_is_left_alone() -> None:
    text = zlib.compress(bytes(1_000_000), 9)
    row = bytes(1 + 8)
    bombs = [png_chunk(name, b"a\0\0" + text) for name in (b"zTXt", b"iCCP")]
    bombs.append(png_chunk(b"iTXt", b"a\0\1\0\0\0" + text))
    fractions = {tag: (5, 400_000, 8) for tag in (282, 283, 286, 287, 30_000)}
    files = [
        *(png((8, 1), 8, 0, row, *[bomb] * 3000) for bomb in bombs),
        png((8, 1), 8, 0, row, after=b"".join(bombs * 1000)),
        tiff({256: 8, 257: 1, 258: (3, 1, 8), 262: (3, 1, 1), 273: 8, 279: 8} | fractions, bytes(19_000_000)),
    ]
    for data in files:
        started = time.thread_time()
        decode(data)
        assert time.thread_time() - started < 1


def test_a_gif_may_have_comments_but_not_megabytes_of_them() -> None:
    """In blocks of a byte they take forty times their size in memory."""

    def commented(count: int) -> bytes:
        still = b",\0\0\0\0\1\0\1\0\0\2\2\x4c\1\0;"
        return b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe" + b"\1a" * count + b"\0" + still

    assert decode(commented(400_000)).size == (1, 1)
    started = time.thread_time()
    assert "comments" in reason(commented(9_500_000))
    assert time.thread_time() - started < 0.5


# Whatever the bytes are.


@functools.cache
def seeds() -> list[bytes]:
    tag = Image.Exif()
    tag[274] = 6
    made = [
        encoded(scene(mode, (24, 17)), kind, **options)
        for kind, mode, options in (
            ("JPEG", "RGB", {"exif": tag, "icc_profile": bytes(100)}),
            ("JPEG", "CMYK", {"progressive": True}),
            ("PNG", "RGBA", {"exif": tag}),
            ("PNG", "P", {"transparency": 3}),
            ("WEBP", "RGBA", {"lossless": True, "exif": tag}),
            ("WEBP", "RGB", {}),
            ("GIF", "P", {"comment": b"hello", "transparency": 1, "save_all": True, "append_images": [scene("P")]}),
            ("BMP", "P", {}),
            ("BMP", "RGB", {}),
            ("TIFF", "RGB", {"compression": "tiff_lzw", "exif": tag}),
            ("TIFF", "L", {}),
            ("TIFF", "1", {"compression": "group4"}),
            ("TIFF", "YCbCr", {"compression": "jpeg"}),
        )
    ]
    return [*made, png((3, 1), 16, 0, bytes(7)), bmp(4, 4, 8, b"\4\1\0\0" * 4 + b"\0\1", compression=1)]


def decodes_or_is_refused(data: bytes) -> None:
    try:
        image = decode(data)
    except InvalidImage:
        reason(data)
    else:
        assert image.mode == "RGB" and image.width * image.height <= 50_000_000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"BM", b"GIF89a", b"II*\0", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X"]),
)
def test_random_bytes_raise_nothing_else(data: bytes, start: bytes) -> None:
    decodes_or_is_refused(start + data)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_files_raise_nothing_else(data: st.DataObject) -> None:
    file = bytearray(data.draw(st.sampled_from(seeds())))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(file) - 1) | st.integers(0, min(120, len(file) - 1)))
        change = data.draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\xff" * 4, bytes(4), b"\xff\xda"]))
        if data.draw(st.booleans()):
            file[place : place + len(change)] = change
        else:
            file[place : place + data.draw(st.integers(0, 8))] = change
    decodes_or_is_refused(bytes(file))


QUIET = """
import sys
from pathlib import Path
from mlx_embeddings_backends.errors import InvalidImage
from mlx_embeddings_backends.images import decode

for name in sys.argv[1:]:
    try:
        decode(Path(name).read_bytes())
    except InvalidImage:
        pass
"""


def test_nothing_is_printed_about_a_callers_file(tmp_path: Path) -> None:
    broken_exif = b"Exif\0\0" + tiff({282: (5, 9000, 8), 305: (2, 70_000, 8), 306: (2, 900, 2**31)}, bytes(100))
    noisy = [
        encoded(scene(), "JPEG", exif=broken_exif),  # Pillow warns
        HUGE[1](10_000, 9_500),
        tiff(PAGE | {273: 8, 279: 900}, b"no zlib data" * 100),  # libtiff writes
        tiff(PAGE | {277: (3, 1, 9000), 273: 8, 279: 900}, bytes(1000)),  # Pillow logs
    ]
    names = []
    for place, data in enumerate(noisy):
        (tmp_path / str(place)).write_bytes(data)
        names.append(str(tmp_path / str(place)))
    command = [sys.executable, "-W", "always", "-c", QUIET, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
