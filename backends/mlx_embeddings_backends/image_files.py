"""Image files cut down to what the first frame's pixels come from: the other parts may cost a decoder much.

Each function takes a file with the right first bytes and returns one that decodes to the same pixels. What they find
broken they raise `LookupError`, `ValueError` or `struct.error` for, and `InvalidImage` where the reason is clear.
"""

import struct
from typing import Final, NamedTuple

from mlx_embeddings_backends.errors import InvalidImage

ORIENTATION: Final = 274  # the tag of EXIF, which is TIFF's

_PNG_CHUNKS: Final = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")

_BITS, _COMPRESSION, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT, _TILE_PLACES = 258, 259, 262, 322, 323, 324
# Those above, and what else baseline TIFF has for pixels, with CCITT's, LZW's and JPEG's.
_TIFF_TAGS: Final = {
    254, 256, 257, _BITS, _COMPRESSION, _PHOTOMETRIC, 266, 273, ORIENTATION, 277, 278, 279, 284, 292, 293, 317, 320,
    _TILE_WIDTH, _TILE_HEIGHT, _TILE_PLACES, 325, 338, 339, 347, 529, 530, 531, 532,
}  # fmt: skip
_TIFF_COMPRESSIONS: Final = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}  # none, CCITT, LZW, JPEG, Deflate, PackBits
_MOST_BEFORE_A_FRAME: Final = 1_000_000  # bytes of a GIF: going through them takes 30 ms
_MOST_VALUES: Final = 200_000  # of one tag, such as the places of strips or tiles
_MOST_TILED: Final = 400_000_000  # pixels of all tiles together


class Tag(NamedTuple):
    """An entry of a TIFF directory."""

    number: int
    kind: int
    length: int  # of its values, as many as there are
    value: bytes  # four bytes, or the place of more


def png_image(data: bytes) -> bytes:
    """Without texts and profiles: each may unpack to a megabyte, and there may be thousands."""
    kept, place = [data[:8]], 8
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if name in _PNG_CHUNKS:
            kept.append(data[place : place + length + 12])
        place += length + 12
    return b"".join(kept)


def gif_frame(data: bytes) -> bytes:
    """Without comments before the first frame: in blocks of a byte they take forty times their size in memory."""
    header = 13 + (6 << (data[10] & 7) if data[10] & 0x80 else 0)
    control, place = b"", header
    while data[place] == 0x21:
        start = place
        place += 2
        while data[place]:
            place += 1 + data[place]
            if place - header > _MOST_BEFORE_A_FRAME:
                raise InvalidImage(0, "the GIF file has a megabyte of comments before its first frame")
        place += 1
        if data[start + 1] == 0xF9:
            control = data[start:place]
    return data[:header] + control + data[place:]


def tiff_page(data: bytes) -> bytes:
    """With no directory but the first, and of that the tags of pixels only; it is put at the end."""
    order, directory = tiff_directory(data)
    tags = {tag.number: tag for tag in directory if tag.number in _TIFF_TAGS}
    value = {number: short_or_long(order, tag) for number, tag in tags.items()}
    if value.get(_COMPRESSION, 1) not in _TIFF_COMPRESSIONS:
        raise InvalidImage(0, "the TIFF file's compression is not taken: save it with LZW or Deflate")
    if value.get(_BITS) == 12 or (value.get(_BITS) == 16 and value.get(_PHOTOMETRIC) == 0):
        raise InvalidImage(0, "the TIFF file's 12 bit or inverted 16 bit grey is not taken: save it with 8 bits")
    if any(tag.length > _MOST_VALUES for tag in tags.values()):
        raise InvalidImage(0, "the TIFF file has too many strips or tiles")
    if _TILE_PLACES in tags:
        width, height = value[_TILE_WIDTH], value[_TILE_HEIGHT]
        if width is None or height is None:
            raise ValueError("tiles of no size")
        # Tiles are unpacked whole, however little of them lies within the image.
        if tags[_TILE_PLACES].length * width * height > _MOST_TILED:
            raise InvalidImage(0, "the TIFF file's tiles are far larger than its image")
    start = len(data) + len(data) % 2
    entries = b"".join(struct.pack(f"{order}HHI4s", *tag) for _, tag in sorted(tags.items()))
    return b"".join(
        (
            data[:4],
            struct.pack(f"{order}I", start),
            data[8:].ljust(start - 8, b"\0"),
            struct.pack(f"{order}H", len(tags)),
            entries,
            bytes(4),  # no next directory
        )
    )


def tiff_directory(data: bytes) -> tuple[str, list[Tag]]:
    """The byte order as `struct` has it, and the first directory, of a TIFF file or EXIF data."""
    order = {b"II*\0": "<", b"MM\0*": ">"}[data[:4]]
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    table = data[start + 2 : start + 2 + 12 * count]
    return order, [Tag(*entry) for entry in struct.iter_unpack(f"{order}HHI4s", table[: len(table) // 12 * 12])]


def short_or_long(order: str, tag: Tag) -> int | None:
    """The value of a tag that is one unsigned number of 16 or 32 bits. None: it is something else."""
    layout = {3: "H2x", 4: "I"}.get(tag.kind)
    return None if layout is None or tag.length != 1 else int(struct.unpack(order + layout, tag.value)[0])
