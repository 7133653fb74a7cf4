"""A note by hand: what to get for a birthday party."""

import math
from random import Random

from PIL import Image

from .canvas import PORTRAIT, Page, Point, length


def handwrite(page: Page, x: float, y: float, text: str, size: float, fill: str, random: Random) -> float:
    """Letters that lean, hop and turn a little, as a hand makes them. Returns where the next would stand."""
    for letter in text:
        middle, hop, growth = x + length(letter, size) / 2, random.uniform(-2, 2), random.uniform(0.96, 1.06)
        turn, slant = random.uniform(-5, 4), random.uniform(0.15, 0.25)
        page.tilted(middle, y + hop, letter, size * growth, fill, turn, slant)
        x += length(letter, size) * 1.04 + random.uniform(-0.5, 1)
    return x


def draw() -> Image.Image:
    page, random = Page(PORTRAIT, "#fdf4c6"), Random(40)
    for y in range(250, 1754, 92):
        page.line((0, y), (1240, y), fill="#b9d3e4", width=2)
    page.line((150, 0), (150, 1754), fill="#e29a9a", width=3)
    for y in (170, 877, 1584):
        page.circle(70, y, 26, fill="#d9d2b4", outline="#bdb592")
    pen, red = "#1d3f94", "#b8322f"
    handwrite(page, 190, 150, "Saturday: Maja turns 40!", 62, pen, random)
    page.line((196, 196), (520, 190), (935, 200), fill=red, width=6)
    lines = (
        ("2 kg strawberries (market, before 10)", False), ("1 l cream", True), ("6 lemons", True),
        ("flour, 3 bags", True), ("candles - the BLUE ones", False), ("borrow Ove's accordion: 555 0142", False),
        ("40 paper lanterns for the garden", False), ("pick up the cake, Brink's bakery 16:30", False),
        ("last ferry back 23:10, pier 3", False),
    )  # fmt: skip
    for row, (line, done) in enumerate(lines):
        base = 314 + 92 * row
        page.line(
            (194, base - 16), (224, base - 20), (227, base + 12), (192, base + 14), (194, base - 18), fill=pen, width=4
        )
        if done:
            page.line((198, base - 4), (208, base + 10), (240, base - 34), fill=red, width=6)
        end = handwrite(page, 262, base, line, 44, pen, random)
        if done:
            page.line((254, base + 2), ((254 + end) / 2, base - 4), (end + 8, base + 4), fill=pen, width=4)
    loop = [(690 + 445 * math.cos(turn / 20), 958 + 52 * math.sin(turn / 20) + turn / 12) for turn in range(-8, 134)]
    page.line(*loop, fill=red, width=5)
    handwrite(page, 800, 1230, "don't be late!", 40, red, random)
    page.line((930, 1190), (960, 1120), (950, 1040), fill=red, width=5)
    page.line((928, 1066), (950, 1038), (974, 1062), fill=red, width=5)
    cake(page, pen, red, random)
    return page.finished()


def cake(page: Page, pen: str, red: str, random: Random) -> None:
    def wobbly(*points: Point, fill: str = pen) -> None:
        page.line(*((x + random.uniform(-4, 4), y + random.uniform(-4, 4)) for x, y in points), fill=fill, width=5)

    wobbly((250, 1660), (252, 1500), (640, 1496), (644, 1662), (248, 1660))
    wobbly((310, 1498), (314, 1390), (580, 1388), (584, 1496))
    wobbly(*((252 + 28 * step, 1530 + 24 * (step % 2)) for step in range(15)), fill=red)
    wobbly(*((314 + 27 * step, 1416 + 20 * (step % 2)) for step in range(11)), fill=red)
    wobbly((200, 1666), (700, 1668))
    for x in (350, 400, 450, 500, 550):
        wobbly((x, 1388), (x + 2, 1318))
        page.line((x, 1306), (x - 8, 1288), (x, 1262), (x + 9, 1288), (x, 1306), fill=red, width=4)
    handwrite(page, 760, 1500, "Don't tell her!", 50, pen, random)
    handwrite(page, 760, 1590, "Budget: 150 max", 44, pen, random)
