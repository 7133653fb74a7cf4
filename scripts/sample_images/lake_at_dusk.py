"""A sailing boat on a lake, with the sun going down behind mountains."""

import math
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageChops, ImageFilter, ImageOps

from .canvas import LANDSCAPE, SCALE, Page, mix

(WIDTH, HEIGHT), SHORE, SUN = LANDSCAPE, 700, (1130, 520)
SHADE = (14, 20, 28)


def gradient(stops: Sequence[tuple[float, tuple[int, int, int]]], width: int, height: int) -> Image.Image:
    """From top to bottom through colours, each at a share of the height."""
    column = Image.new("RGB", (1, height))
    for y in range(height):
        share = y / (height - 1)
        (above, first), (below, second) = next(
            pair for pair in zip(stops, stops[1:], strict=False) if share <= pair[1][0]
        )
        column.putpixel((0, y), mix(first, second, (share - above) / (below - above)))
    return column.resize((width, height))


def noise(random: Random, width: int, height: int) -> Image.Image:
    return Image.frombytes("L", (width, height), random.randbytes(width * height))


def ridge(random: Random, steps: int, height: float, roughness: float) -> list[float]:
    """A mountain's outline by midpoint displacement: `2 ** steps + 1` heights."""
    outline = [random.uniform(0.3, 1) * height for _ in range(5)]
    for step in range(steps - 2):
        shift = height * roughness / 2**step
        middles = [(a + b) / 2 + random.uniform(-shift, shift) for a, b in zip(outline, outline[1:], strict=False)]
        outline = [point for pair in zip(outline, [*middles, 0], strict=True) for point in pair][:-1]
    return outline


def pine(page: Page, x: float, base: float, height: float, random: Random) -> None:
    page.polygon([(x - height * 0.015, base), (x, base - height), (x + height * 0.015, base)], SHADE)
    for tier in range(14):
        top, reach = base - height * (1 - tier * 0.065), height * (0.02 + tier * 0.0125)
        for side in (-1, 1):
            tip = x + side * reach * random.uniform(0.75, 1.15)
            droop = height * random.uniform(0.1, 0.13)
            page.polygon([(x, top), (tip, top + droop), (x, top + height * 0.08)], SHADE)


def land(page: Page, random: Random) -> None:
    """Sky, clouds and mountains, down to the shore."""
    sky = (
        (0.0, (38, 52, 96)), (0.35, (112, 92, 140)), (0.65, (232, 140, 104)), (0.85, (252, 196, 120)),
        (1.0, (255, 226, 170)),
    )  # fmt: skip
    page.image.paste(gradient(sky, WIDTH * SCALE, SHORE * SCALE))
    glow = ImageOps.invert(Image.radial_gradient("L")).resize((1800 * SCALE, 1000 * SCALE))
    glow = glow.point(lambda level: max(0, level - 75) * 1.2)  # 75 is what it has left where its frame is nearest
    page.image.paste("#ffe2a0", ((SUN[0] - 900) * SCALE, (SUN[1] - 500) * SCALE), glow)
    clouds = noise(random, 14, 26).resize((WIDTH * SCALE, 460 * SCALE), Image.Resampling.BICUBIC)
    fading = gradient([(0, (90, 90, 90)), (0.7, (255, 255, 255)), (1, (0, 0, 0))], *clouds.size).convert("L")
    clouds = ImageChops.multiply(clouds, fading).point(lambda level: max(0, level - 120) * 1.5)
    page.image.paste("#f4a58a", (0, 60 * SCALE), clouds)
    hills = (
        (260, 0.30, (158, 122, 140)), (190, 0.34, (108, 92, 120)), (120, 0.30, (66, 66, 94)), (56, 0.22, (34, 42, 60)),
    )  # fmt: skip
    for tall, roughness, colour in hills:
        outline = ridge(random, 9, tall, roughness)
        top = [(x * WIDTH / (len(outline) - 1), SHORE - max(4, rise)) for x, rise in enumerate(outline)]
        page.polygon([(0, SHORE + 2), *top, (WIDTH, SHORE + 2)], colour)


def water(page: Page) -> None:
    """The land upside down, darker towards the front, and rippled: strips pushed aside, further in front."""
    above = page.image.crop((0, 0, WIDTH * SCALE, SHORE * SCALE))
    mirror = ImageOps.flip(above).resize((WIDTH * SCALE + 100, (HEIGHT - SHORE) * SCALE))
    mirror = Image.blend(mirror, gradient([(0, (120, 84, 96)), (1, (14, 26, 48))], *mirror.size), 0.45)
    for y in range(0, mirror.height, 4):
        shift = round(math.sin(y * 0.11 + math.sin(y * 0.037) * 3) * (4 + y / 28))
        strip = mirror.crop((0, y, mirror.width, y + 4))
        mirror.paste(ImageChops.offset(strip, shift, 0), (0, y))
    mirror = mirror.crop((50, 0, mirror.width - 50, mirror.height)).filter(ImageFilter.GaussianBlur(3))
    page.image.paste(mirror, (0, SHORE * SCALE))


def boat(page: Page, x: float, y: float) -> None:
    page.polygon([(x, y - 6), (x + 4, y - 150), (x + 74, y - 14)], (246, 236, 222))
    page.polygon([(x - 6, y - 8), (x - 2, y - 128), (x - 46, y - 12)], (226, 206, 196))
    page.polygon([(x - 62, y - 4), (x + 86, y - 4), (x + 62, y + 18), (x - 44, y + 18)], (120, 44, 40))
    page.line((x + 1, y), (x + 1, y - 158), fill="#3a2a26", width=4)
    for depth in range(0, 120, 7):
        reach = 40 - depth / 4
        page.line((x - reach + depth % 3 * 5, y + 26 + depth), (x + reach, y + 26 + depth), fill="#a98f92", width=2)


def draw() -> Image.Image:
    page, random = Page(LANDSCAPE), Random(11)
    land(page, random)
    water(page)
    page.circle(*SUN, 52, fill="#fff6dc")
    for _ in range(260):  # the sun's path on the water
        down = random.random() ** 1.6
        x, y = random.gauss(SUN[0], 26 + 90 * down), SHORE + 6 + down * 420
        reach = random.uniform(4, 16) * (0.6 + 2 * down)
        page.line((x - reach, y), (x + reach, y), fill="#ffdf9e", width=1 + 2 * down)
    boat(page, 560, 806)
    page.polygon([(0, HEIGHT), (0, 1010), (190, 1050), (420, 1130), (700, 1180), (980, 1240)], SHADE)
    pines = (40, 1040, 560), (150, 1060, 420), (250, 1085, 610), (345, 1120, 330), (455, 1150, 260), (590, 1180, 170)
    for x, base, tall in pines:
        pine(page, x, base, tall, random)
    return Image.blend(page.finished(), noise(random, WIDTH, HEIGHT).convert("RGB"), 0.025)  # film grain
