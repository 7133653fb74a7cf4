"""The first page of a paper: two columns, an equation, a figure and a table."""

from PIL import Image

from .canvas import GREY, INK, NAVY, PORTRAIT, RED, TEAL, Page, length

ABSTRACT = """
Networks that forecast the sea level at a harbour look back over weeks of gauge readings, though a storm surge is
forgotten within a day while the spring tide returns after fifteen. We let every attention head learn a half-life: the
weight of a reading is halved each time that span has passed. On ten years of readings from 41 gauges the error of a
48-hour forecast falls from 9.2 to 6.8 centimetres, and a third of the heads can be left out. The learnt half-lives
gather near 6, 12.4 and 355 hours, which are the spans of surge, tide and spring-neap cycle.
"""
INTRODUCTION = """
Harbour masters plan by the water under the keel. The tide itself has been predicted by hand for two centuries,
as a sum of harmonics; what is left, the surge, is the work of wind and pressure and does not repeat. A network that is
to forecast both has to remember at two speeds. Recurrent networks blur them, and plain attention spreads its weight
over readings that no longer matter. Earlier work adds a fixed penalty for distance [3, 7]. It was made for sentences,
in which near words matter most; at the coast a reading from one tide ago matters more than one from three hours ago.
"""
METHOD = """
Let q and k be queries and keys of readings at the times t. The weight that reading i gives to reading j is the usual
softmax, multiplied by a decay:
"""
METHOD_2 = """
where d is the size of a head and h its half-life, which is learnt as a logarithm and starts between one hour and
thirty days. Figure 1 shows three of them. The decay costs one multiplication for each pair. Heads of which the
half-life falls under ten minutes see only the present, and are taken away after training.
"""
TRAINING = """
Ours has six layers of eight heads and reads thirty days of hourly levels, wind and pressure. It trains for four
hours on one GPU. The years 2018 to 2027 are for training; of each month the last three days are kept for validation, so
that no storm is on both sides. Gauges are centred on their own mean, as their zeros were set at different times.
"""
RESULTS = """
Table 1 compares the error at five harbours. The gain is largest at Skarvik, where the sound is narrow and surges
are steep. Without wind as an input the order stays the same, but every error grows by a quarter.
"""


def half_life_figure(page: Page, left: float, top: float) -> None:
    page.line((left, top), (left, top + 190), (left + 440, top + 190), fill=INK, width=2)
    for hours, colour in ((6, RED), (12.4, TEAL), (355, NAVY)):
        curve = [(left + x, top + 190 - 180 * 0.5 ** (x * 48 / 440 / hours)) for x in range(0, 441, 4)]
        page.line(*curve, fill=colour, width=4)
    for name, colour, x, y in (("h = 355", NAVY, 340, 0), ("h = 12.4", TEAL, 150, 76), ("h = 6", RED, 30, 148)):
        page.text(left + x, top + y, name, 17, colour)
    for hours in range(0, 49, 12):
        page.text(left + hours * 440 / 48, top + 214, f"{hours} h", 16, GREY, "ms")
    page.text(left - 8, top + 18, "1", 16, GREY, "rs")
    page.paragraph(left - 20, top + 250, 480, "Figure 1. What is left of a weight after so many hours.", 17, GREY)


def decay_formula(page: Page, x: float, y: float) -> None:
    """a_ij = softmax_j(q_i k_j / sqrt d) * 2^(-(t_i - t_j) / h): pieces side by side, indexes lower and smaller."""
    for piece, size, drop in (
        ("a", 24, 0), ("ij", 15, 7), (" = softmax", 22, 0), ("j", 15, 7), (" ( q", 22, 0), ("i", 15, 7),
        (" · k", 22, 0), ("j", 15, 7), (" / ", 22, 0), ("d", 22, 0), (" ) · 2", 22, 0), ("-(t", 15, -11),
        ("i", 11, -7), (" - t", 15, -11), ("j", 11, -7), (") / h", 15, -11),
    ):  # fmt: skip
        if piece == "d":
            page.line((x - 1, y - 8), (x + 4, y - 10), (x + 9, y + 2), (x + 14, y - 22), (x + 32, y - 22), width=1.5)
            x += 16
        page.text(x, y + drop, piece, size)
        x += length(piece, size) + 1
    page.text(x + 34, y, "(1)", 20)


def draw() -> Image.Image:
    page = Page(PORTRAIT)
    page.text(620, 150, "Attention with a Half-Life:", 44, INK, "ms", bold=True)
    page.text(620, 204, "Forecasting Sea Level at Two Speeds", 44, INK, "ms", bold=True)
    page.text(620, 262, "Runa Halvorsen    Tomasz Brandt    Ada Okonjo-Lind", 24, INK, "ms")
    page.text(620, 296, "Coastal Computing Group, University of Port Ellery", 20, GREY, "ms")
    page.text(620, 366, "Abstract", 22, INK, "ms", bold=True)
    page.paragraph(210, 404, 820, ABSTRACT, 19.5, justify=True)
    left, right, width = 110, 640, 490
    page.text(left, 652, "1  Introduction", 24, INK, bold=True)
    y = page.paragraph(left, 692, width, INTRODUCTION, 19.5, justify=True)
    page.text(left, y + 30, "2  Method", 24, INK, bold=True)
    y = page.paragraph(left, y + 70, width, METHOD, 19.5, justify=True)
    decay_formula(page, left + 30, y + 24)
    y = page.paragraph(left, y + 80, width, METHOD_2, 19.5, justify=True)
    page.paragraph(left, y + 12, width, TRAINING, 19.5, justify=True)

    half_life_figure(page, right + 20, 640)
    page.text(right, 966, "3  Results", 24, INK, bold=True)
    y = page.paragraph(right, 1006, width, RESULTS, 19.5, justify=True)
    rows = [("Harbour", "Plain", "Fixed", "Ours")]
    rows += [
        ("Skarvik", "14.1", "12.7", "8.9"),
        ("Port Ellery", "9.6", "9.0", "7.2"),
        ("Midsound", "8.3", "7.7", "6.4"),
    ]
    rows += [("Grey Holm", "7.4", "7.1", "5.9"), ("Ellery Point", "6.6", "6.2", "5.6")]
    for number, row in enumerate(rows):
        base = y + 40 + 36 * number
        for place, cell in zip((right + 10, right + 270, right + 370, right + 470), row, strict=True):
            page.text(place, base, cell, 19, INK, "ls" if place < 700 else "rs", bold=number == 0 or cell == row[3])
        if number in (0, 1, len(rows) - 1):
            edge = base - 26 if number == 0 else base - 25 if number == 1 else base + 14
            page.line((right, edge), (right + width, edge), width=2)
    caption = "Table 1. Error of the 48-hour forecast in centimetres (root mean square), test years 2028 and 2029."
    y = page.paragraph(right, y + 40 + 36 * len(rows) + 14, width, caption, 17, GREY)
    page.text(right, y + 36, "4  Limits", 24, INK, bold=True)
    page.paragraph(
        right, y + 76, width, "A harbour without ten years of readings gains nothing: its half-lives stay where they "
        "started. Ice stops a gauge, and we left such weeks out. Waves are not forecast at all.", 19.5, justify=True,
    )  # fmt: skip
    page.text(620, 1700, "1", 19, GREY, "ms")
    return page.finished()
