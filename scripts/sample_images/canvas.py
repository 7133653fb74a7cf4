"""What the pages are drawn with."""

from collections.abc import Iterable, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

PORTRAIT, LANDSCAPE = (1240, 1754), (1754, 1240)  # A4 at 150 dots an inch
SCALE = 2  # pages are drawn so much larger, and come out smooth when made small
INK, GREY, PALE, NAVY, AMBER, TEAL, RED = "#20242b", "#6b7280", "#e3e7ec", "#1f3a5f", "#d98a1f", "#2a8c82", "#b23a3a"
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]

Point = tuple[float, float]


@cache
def font(size: float) -> ImageFont.FreeTypeFont:
    loaded = ImageFont.load_default(size * SCALE)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return loaded


def length(text: str, size: float) -> float:
    return font(size).getlength(text) / SCALE


def mix(first: Sequence[int], second: Sequence[int], share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


class Page:
    """A picture in the making. Lengths are in the pixels of the finished one; (x, y) of a text is its baseline."""

    def __init__(self, size: tuple[int, int], paper: str = "white") -> None:
        self.image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), paper)
        self.draw = ImageDraw.Draw(self.image)

    def finished(self) -> Image.Image:
        return self.image.reduce(SCALE)

    def text(
        self, x: float, y: float, text: str, size: float = 22, fill: str = INK, anchor: str = "ls", bold: bool = False
    ) -> None:
        stroke = size * SCALE / 36 if bold else 0
        self.draw.text((x * SCALE, y * SCALE), text, fill, font(size), anchor, stroke_width=stroke)

    def tilted(self, x: float, y: float, text: str, size: float, fill: str, degrees: float, slant: float = 0) -> None:
        """Text turned anticlockwise about its middle, which is at (x, y), and slanted like an italic."""
        width, height = round(font(size).getlength(text)) + 60, round(size * SCALE * 2)
        tile = Image.new("L", (width, height))
        ImageDraw.Draw(tile).text((width / 2, height / 2), text, 255, font(size), "mm")
        shear = (1, slant, -slant * height / 2, 0, 1, 0)
        tile = tile.transform(tile.size, Image.Transform.AFFINE, shear, Image.Resampling.BICUBIC)
        tile = tile.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        self.image.paste(fill, (round(x * SCALE - tile.width / 2), round(y * SCALE - tile.height / 2)), tile)

    def paragraph(
        self, x: float, y: float, width: float, text: str, size: float = 22, fill: str = INK, justify: bool = False
    ) -> float:
        """Text in lines of at most `width`. Returns the baseline of the line that would follow."""
        lines: list[list[str]] = [[]]
        for word in text.split():
            if lines[-1] and length(" ".join([*lines[-1], word]), size) > width:
                lines.append([])
            lines[-1].append(word)
        for number, words in enumerate(lines):
            gap = length(" ", size)
            if justify and number < len(lines) - 1 and len(words) > 1:
                gap = (width - sum(length(word, size) for word in words)) / (len(words) - 1)
            place = x
            for word in words:
                self.text(place, y, word, size, fill)
                place += length(word, size) + gap
            y += size * 1.38
        return y

    def box(
        self, left: float, top: float, right: float, bottom: float, fill: str | tuple[int, ...] | None = None,
        outline: str | None = None, width: float = 2, radius: float = 0,
    ) -> None:  # fmt: skip
        corners = (left * SCALE, top * SCALE, right * SCALE, bottom * SCALE)
        self.draw.rounded_rectangle(corners, radius * SCALE, fill, outline, round(width * SCALE))

    def line(self, *points: Point, fill: str = INK, width: float = 2) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, fill, round(width * SCALE), joint="curve")

    def polygon(self, points: Iterable[Point], fill: str | tuple[int, ...]) -> None:
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill)

    def circle(
        self, x: float, y: float, radius: float, fill: str | None = None, outline: str | None = None, width: float = 2
    ) -> None:
        self.draw.circle((x * SCALE, y * SCALE), radius * SCALE, fill, outline, round(width * SCALE))

    def arc(self, x: float, y: float, radius: float, start: float, end: float, fill: str, width: float = 2) -> None:
        corners = ((x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE)
        self.draw.arc(corners, start, end, fill, round(width * SCALE))
