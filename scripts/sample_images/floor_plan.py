"""The floor plan of a flat."""

import math

from PIL import Image

from .canvas import GREY, INK, LANDSCAPE, NAVY, PALE, Page, Point

METRE, WEST, NORTH = 92, 90, 230  # pixels a metre, and where the flat's north-west corner is


def at(x: float, y: float) -> Point:
    return WEST + x * METRE, NORTH + y * METRE


def door(page: Page, hinge: Point, along: Point, into: Point, width: float = 0.85) -> None:
    """A gap in the wall from `hinge` in the direction `along`, with the leaf open `into` a room."""
    (x, y), (end_x, end_y) = at(*hinge), at(hinge[0] + along[0] * width, hinge[1] + along[1] * width)
    leaf = at(hinge[0] + into[0] * width, hinge[1] + into[1] * width)
    page.line((x, y), (end_x, end_y), fill="white", width=18)
    page.line((x, y), leaf, fill=GREY, width=4)
    start, end = sorted(math.degrees(math.atan2(down, across)) % 360 for across, down in (along, into))
    page.arc(x, y, width * METRE, *((start, end) if end - start == 90 else (end, start + 360)), GREY)


def draw() -> Image.Image:
    page = Page(LANDSCAPE, "#fcfcfa")
    rooms = (
        ("Living room", 0, 0, 5.2, 4.6, "#f6ead7"), ("Kitchen", 5.2, 0, 8.6, 4.6, "#e3efe9"),
        ("Study", 8.6, 0, 12.4, 3.2, "#e6ebf4"), ("Bathroom", 8.6, 3.2, 12.4, 5.8, "#dcebf2"),
        ("Hall", 0, 4.6, 8.6, 5.8, "#f3f1ec"), ("Bedroom 1", 0, 5.8, 4.4, 9.2, "#efe5ee"),
        ("Bedroom 2", 4.4, 5.8, 8.6, 9.2, "#efe5ee"), ("Workshop", 8.6, 5.8, 12.4, 9.2, "#efeadf"),
    )  # fmt: skip
    for _, left, top, right, bottom, colour in rooms:
        page.box(*at(left, top), *at(right, bottom), fill=colour)
    for _, left, top, right, bottom, _ in rooms:
        (west, north), (east, south) = at(left, top), at(right, bottom)
        page.box(west - 4, north - 4, east + 4, south + 4, outline=INK, width=8)
    (west, north), (east, south) = at(0, 0), at(12.4, 9.2)
    page.box(west - 8, north - 8, east + 8, south + 8, outline=INK, width=16)
    page.box(*at(0.4, -1.25), *at(4.8, -0.12), fill="#eef3ea", outline=GREY, width=3)
    page.text(*at(2.6, -0.6), "Balcony 4.4 x 1.2 m", 20, GREY, "ms")
    furniture(page)
    windows = ((1.2, 0, 2.8, 0), (6.2, 0, 7.8, 0), (9.6, 0, 11.4, 0), (12.4, 4, 12.4, 5), (1.4, 9.2, 3, 9.2))
    for left, top, right, bottom in (*windows, (5.6, 9.2, 7.2, 9.2), (12.4, 6.8, 12.4, 8.2), (0, 1.4, 0, 3)):
        page.line(at(left, top), at(right, bottom), fill=INK, width=20)
        page.line(at(left, top), at(right, bottom), fill="white", width=16)
        page.line(at(left, top), at(right, bottom), fill="#5b8db8", width=3)
    east_, west_, north_, south_ = (1, 0), (-1, 0), (0, -1), (0, 1)
    for hinge, along, into in (
        ((0, 4.8), south_, east_), ((3.4, 4.6), west_, north_), ((5.6, 4.6), east_, north_),
        ((8.6, 4.9), south_, east_), ((0.5, 5.8), east_, south_), ((5.2, 5.8), east_, south_),
        ((8.6, 1.8), south_, east_), ((3.6, 0), east_, south_), ((8.6, 7), north_, east_),
    ):  # fmt: skip
        door(page, hinge, along, into)
    for name, left, top, right, bottom, _ in rooms:
        x, y = at((left + right) / 2, (top + bottom) / 2)
        page.text(x, y - 2, name, 24, INK, "ms", bold=True)
        page.text(x, y + 26, f"{right - left:.1f} x {bottom - top:.1f} m", 19, GREY, "ms")
    title_block(page, [(name, (right - left) * (bottom - top)) for name, left, top, right, bottom, _ in rooms])
    return page.finished()


def furniture(page: Page) -> None:
    for left, top, right, bottom in (
        (0.3, 1.2, 1.15, 3.2), (0.3, 1.2, 0.55, 3.2), (1.35, 1.8, 1.8, 2.7), (4.75, 1.4, 5.05, 3.0),
        (3.75, 3.1, 4.85, 3.9), (5.8, 0.15, 8.5, 0.7), (7.95, 0.7, 8.5, 3.2), (6.6, 0.25, 7.3, 0.6),
        (9.6, 0.15, 11.4, 0.75), (12.0, 0.4, 12.3, 2.9), (9.7, 2.45, 11.6, 3.1), (10.3, 3.35, 12.2, 4.05),
        (10.4, 3.43, 12.1, 3.97), (9.3, 3.3, 9.9, 3.7), (11.95, 5.2, 12.3, 5.6), (6.7, 5.4, 8.3, 5.72),
        (2.3, 5.95, 4.3, 7.1), (3.85, 6.05, 4.2, 6.48), (3.85, 6.57, 4.2, 7.0), (3.8, 7.8, 4.3, 9.0),
        (6.5, 5.95, 8.5, 6.9), (8.05, 6.1, 8.4, 6.75), (5.6, 8.55, 7.2, 9.1), (4.5, 7.4, 5.0, 8.9),
        (9.2, 8.45, 12.2, 9.1), (9.9, 5.95, 12.2, 6.25),
    ):  # fmt: skip
        page.box(*at(left, top), *at(right, bottom), fill="white", outline="#8a929c", width=2, radius=7)
    chairs = (4.05, 2.9), (4.55, 2.9), (4.05, 4.1), (4.55, 4.1), (10.5, 1.0), (6.4, 8.3), (10.4, 8.2)
    hob = (8.1, 1.5), (8.36, 1.5), (8.1, 1.8), (8.36, 1.8)
    for radius, places in ((0.16, chairs), (0.1, hob), (0.2, [(11.75, 5.4)])):
        for place in places:
            page.circle(*at(*place), radius * METRE, fill="white", outline="#8a929c")


def title_block(page: Page, areas: list[tuple[str, float]]) -> None:
    page.text(78, 84, "Flat 3B, second floor", 42, INK, bold=True)
    left, right = 1320, 1676
    page.text(left, 84, "14 Lantern Street", 26, NAVY, bold=True)
    page.text(left, 118, "Port Ellery, to let from 1 June", 20, GREY)
    page.line((left, 216), (right, 216), fill=INK)
    for row, (name, area) in enumerate([*areas, ("Total without balcony", sum(area for _, area in areas))]):
        last = row == len(areas)
        page.text(left, 262 + 42 * row, name, 21, INK, bold=last)
        page.text(right, 262 + 42 * row, f"{area:.1f} sq m", 21, INK, "rs", bold=last)
        page.line((left, 276 + 42 * row), (right, 276 + 42 * row), fill=PALE)
    page.circle(1498, 790, 62, outline=INK, width=3)
    page.polygon([(1498, 700), (1474, 800), (1498, 784), (1522, 800)], NAVY)
    page.text(1498, 690, "N", 26, INK, "ms", bold=True)
    for metre in range(3):
        page.box(left + metre * METRE, 936, left + (metre + 1) * METRE, 950, INK if metre % 2 == 0 else "white", INK)
    for metre in range(4):
        page.text(left + metre * METRE, 982, f"{metre} m" if metre else "0", 18, GREY, "ms")
    page.text(left, 1050, "Drawn by S. Oduya, 5 May 2031", 19, GREY)
    page.text(left, 1080, "Sheet 2 of 3 · 1:75", 19, GREY)
    notes = "Ceilings are 2.7 m high; the walls of the kitchen and the bathroom carry pipes and cannot be moved. "
    page.text(78, 1150, notes + "The heating is in the workshop.", 20, GREY)
