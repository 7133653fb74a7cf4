"""A page of a ferry company's annual report, with a bar chart and a line chart."""

from PIL import Image

from .canvas import AMBER, GREY, INK, MONTHS, NAVY, PALE, PORTRAIT, RED, TEAL, Page

ROUTES: dict[str, tuple[str, tuple[int, ...]]] = {
    "North": (NAVY, (148, 236, 391, 205)),
    "Middle": (TEAL, (96, 142, 228, 131)),
    "South": (AMBER, (61, 88, 117, 74)),
}


def passengers(page: Page) -> None:
    page.text(100, 556, "Passengers by quarter and route, thousands", 24, INK, bold=True)
    for place, (name, (colour, _)) in zip((760, 890, 1030), ROUTES.items(), strict=True):
        page.box(place, 538, place + 20, 558, fill=colour, radius=3)
        page.text(place + 30, 556, name, 20, GREY)
    for level in range(0, 401, 100):
        page.line((160, 1000 - level), (1140, 1000 - level), fill=PALE if level else GREY, width=2)
        page.text(146, 1007 - level, f"{level}", 19, GREY, "rs")
    for quarter in range(4):
        left = 190 + 242 * quarter
        for bar, (colour, counts) in enumerate(ROUTES.values()):
            page.box(left + 68 * bar, 1000 - counts[quarter], left + 68 * bar + 58, 1000, fill=colour)
            page.text(left + 68 * bar + 29, 988 - counts[quarter], f"{counts[quarter]}", 18, INK, "ms")
        page.text(left + 97, 1036, f"Quarter {quarter + 1}", 20, INK, "ms")


def punctuality(page: Page) -> None:
    page.text(100, 1126, "Departures on time, per cent", 24, INK, bold=True)
    for level in range(80, 101, 5):
        base = 1400 - (level - 80) * 11
        page.line((160, base), (1140, base), fill=PALE if level > 80 else GREY, width=2)
        page.text(146, base + 7, f"{level}", 19, GREY, "rs")
    years = {
        "2029": ("#9aa3ad", (88, 87, 90, 92, 93, 92, 90, 89, 91, 90, 86, 84)),
        "2030": (RED, (91, 90, 93, 95, 97, 96, 95, 96, 97, 95, 93, 91)),
    }
    for year, (colour, rates) in years.items():
        points = [(192 + 80 * month, 1400 - (rate - 80) * 11) for month, rate in enumerate(rates)]
        page.line(*points, fill=colour, width=5)
        for x, y in points:
            page.circle(x, y, 7, fill="white", outline=colour, width=4)
        page.text(points[-1][0] + 14, points[-1][1] + 26, year, 20, colour, bold=True)
    for month, name in enumerate(MONTHS):
        page.text(192 + 80 * month, 1434, name, 19, GREY, "ms")


def draw() -> Image.Image:
    page = Page(PORTRAIT)
    page.text(100, 92, "HAVBRO LINES", 20, NAVY, bold=True)
    page.text(1140, 92, "Annual report 2030 · Traffic", 20, GREY, "rs")
    page.line((100, 112), (1140, 112), fill=NAVY, width=3)
    page.text(100, 196, "The northern route carries the summer", 46, INK, bold=True)
    total = sum(sum(counts) for _, counts in ROUTES.values())
    page.paragraph(
        100, 246, 1040, "More people than ever before crossed the sound with us. The new ferry Eider doubled the "
        "sailings to Skarvik from May on, and every fifth passenger of the year went north between July and September.",
        23, GREY,
    )  # fmt: skip
    cards = (
        (f"{total / 1000:.2f} million", "passengers, 11 % up"),
        ("94.1 %", "departures on time"),
        ("7", "ferries, 2 of them electric"),
    )
    for left, (figure, caption) in zip((100, 455, 810), cards, strict=True):
        page.box(left, 356, left + 330, 476, fill="#eef2f6", radius=10)
        page.text(left + 24, 416, figure, 38, NAVY, bold=True)
        page.text(left + 24, 454, caption, 20, GREY)
    passengers(page)
    punctuality(page)
    page.paragraph(
        100, 1506, 1040, "Fog closed the harbour of Skarvik on nine days in November and December; without them 95.3 "
        "per cent of the departures would have been on time. Punctuality counts a sailing that leaves within five "
        "minutes of the timetable. Children under four travel free and are not counted as passengers.", 21,
    )  # fmt: skip
    page.line((100, 1660), (1140, 1660), fill=PALE)
    page.text(
        100,
        1696,
        "Source: ticket gates and harbour log. The southern route was closed from 3 to 16 February.",
        18,
        GREY,
    )
    page.text(1140, 1696, "14", 18, GREY, "rs")
    return page.finished()
