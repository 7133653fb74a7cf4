"""Image files for tests: what Pillow writes, and what no encoder would."""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def scene(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    """No two of its corners look alike, and transparency, where there is any, varies."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    red, green, blue = rows * 255 // height, columns * 255 // width, (rows // 4 + columns // 4) % 2 * 200
    alpha = (rows + columns) * 255 // (height + width)
    image = Image.fromarray(np.stack((red, green, blue, alpha), axis=-1).astype(np.uint8), "RGBA")
    if mode == "RGBA":
        return image
    return image.convert("LA") if mode == "LA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, *chunks: bytes, after: bytes = b"") -> bytes:
    """`rows` are the scan lines, each after its filter byte. `chunks` stand before them, and `after` behind."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *chunks, pixels, after, png_chunk(b"IEND", b"")))


def tiff(tags: Mapping[int, Any], data: bytes = b"", order: str = "<") -> bytes:
    """`data` starts at byte 8. A tag is one long, or its type, its length and its value or place."""
    entries = []
    for tag, value in sorted(tags.items()):
        kind, length, content = (4, 1, value) if isinstance(value, int) else value
        short = f"{order}HHIHH" if kind == 3 and length == 1 else f"{order}HHII"
        entries.append(struct.pack(short, tag, kind, length, content, *([0] if short.endswith("HH") else [])))
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)


def bmp(width: int, height: int, bits: int, data: bytes, compression: int = 0) -> bytes:
    palette = bytes(channel for grey in range(256) for channel in (grey, grey, grey, 0)) if bits == 8 else b""
    start = 54 + len(palette)
    header = struct.pack(
        "<2sIIIIiiHHIIiiII", b"BM", start + len(data), 0, start, 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0
    )
    return header + palette + data


def exif(orientation: int) -> bytes:
    """An EXIF block with nothing but the orientation."""
    return b"Exif\0\0" + tiff({274: (3, 1, orientation)})
