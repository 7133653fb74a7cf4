"""Image files to pixels: the one place that decides which bytes are an image that is taken."""

import contextlib
import ctypes
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
)

from mlx_embeddings_backends.errors import InvalidImage
from mlx_embeddings_backends.image_files import (
    ORIENTATION,
    gif_frame,
    png_image,
    short_or_long,
    tiff_directory,
    tiff_page,
)

MAX_BYTES: Final = 20_000_000
MAX_PIXELS: Final = 50_000_000

# Pixels that a progressive JPEG's scans may go over, together: tens of bytes in the file are a pass over the image.
_MOST_SCANNED: Final = 40 * MAX_PIXELS
_SCAN: Final = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")

_SIGNATURES: Final = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WebP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
}
_PLUGINS: Final[dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_CUT_DOWN: Final[dict[str, Callable[[bytes], bytes]]] = {"PNG": png_image, "GIF": gif_frame, "TIFF": tiff_page}

# What Pillow's parsers raise on broken files, as fuzzing finds; a warning where warnings are made errors.
_BROKEN: Final = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, Warning, struct.error, zlib.error,
)  # fmt: skip

_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes) -> Image.Image:
    """RGB, upright, on white where it is transparent; the first frame of several. May be called from any thread.

    Raises `InvalidImage` with index 0. Colour profiles are not applied.
    """
    name = file_format(data)
    try:
        # Not Image.open: it warns of large images before their size can be asked for.
        image = _PLUGINS[name](io.BytesIO(_CUT_DOWN[name](data) if name in _CUT_DOWN else data))
        _check_cost(name, image, data)
        image.load()
        if name == "PNG":
            _scale_transparency(image, depth=data[24])
        return _upright(_on_white(image), image.info.get("exif", b""))
    except Image.DecompressionBombError as error:
        raise _too_many_pixels("far too many") from error
    except _BROKEN as error:
        raise InvalidImage(0, f"the {name} file is broken or cut off") from error


def file_format(data: bytes) -> str:
    """What the first bytes say it is. Raises `InvalidImage` for what is not taken, and for more than `MAX_BYTES`."""
    if len(data) > MAX_BYTES:
        raise InvalidImage(0, f"the file is larger than {MAX_BYTES // 1_000_000} MB")
    for name, signature in _SIGNATURES.items():
        if signature.match(data):
            return name
    raise InvalidImage(0, "the file is no JPEG, PNG, WebP, GIF, BMP or TIFF image")


def _check_cost(name: str, image: ImageFile.ImageFile, data: bytes) -> None:
    """By what the header says. Raises `InvalidImage`."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(f"{width} x {height}")
    if name == "JPEG" and len(_SCAN.findall(data)) * width * height > _MOST_SCANNED:
        raise InvalidImage(0, "the JPEG file has too many scans for its size: save it anew")
    if name == "BMP" and image.tile[0].codec_name == "bmp_rle":
        # Decoded in Python, pixel by pixel: a kilobyte can take ten seconds.
        raise InvalidImage(0, "the BMP file is run-length encoded: save it without compression")


def _too_many_pixels(size: str) -> InvalidImage:
    return InvalidImage(0, f"the image has {size} pixels, the limit is {MAX_PIXELS // 1_000_000} megapixels")


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Pillow brings samples of `depth` bits to 8, but not the grey or the colour that PNG calls transparent."""
    value = image.info.get("transparency")
    if image.mode == "L" and isinstance(value, int) and depth in (2, 4):
        image.info["transparency"] = value * 255 // (2**depth - 1)
    elif isinstance(value, tuple) and depth == 16:
        image.info["transparency"] = tuple(sample >> 8 for sample in value)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        samples = np.asarray(image)
        grey = (samples >> 8).astype(np.uint8)
        grey[samples == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise InvalidImage(0, "the image has samples of 32 bits, or signed ones: save it with 8 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer)
    return white


def _upright(image: Image.Image, exif: bytes) -> Image.Image:
    """By EXIF's orientation, where it can be read. A TIFF has been turned by Pillow, and has no `exif`."""
    transpose = None
    with contextlib.suppress(LookupError, struct.error):
        order, directory = tiff_directory(exif.removeprefix(b"Exif\0\0"))
        values = (short_or_long(order, tag) for tag in directory if tag.number == ORIENTATION)
        transpose = _UPRIGHT.get(next(values, None) or 1)
    return image if transpose is None else image.transpose(transpose)


def _keep_quiet() -> None:
    """What is wrong with a caller's file is said in the reply, not in the server's log."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # libtiff writes to stderr by itself. It goes on to where Pillow has linked it in out of reach.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


_keep_quiet()
