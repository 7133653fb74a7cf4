"""The tram network of a town."""

from PIL import Image

from .canvas import AMBER, GREY, INK, LANDSCAPE, NAVY, PALE, RED, TEAL, Page, Point

LINES: dict[str, tuple[str, str, list[Point]]] = {
    "1": (RED, "West End - Airport", [(150, 640), (1160, 640), (1360, 440), (1560, 440)]),
    "2": (NAVY, "Fellgate - Ferry Pier", [(760, 230), (760, 790), (900, 930), (1090, 930)]),
    "3": (AMBER, "Stadium - Lido", [(330, 300), (480, 300), (650, 470), (990, 470), (1330, 810), (1560, 810)]),
    "4": (TEAL, "Oxfold - Hospital", [(150, 930), (620, 930), (760, 790), (1010, 790), (1160, 640)]),
}
# Where a station is, and where its name stands beside it: an anchor as Pillow names them.
STATIONS: dict[str, tuple[float, float, str]] = {
    "West End": (150, 640, "ms"), "Foundry": (340, 640, "ms"), "Market": (540, 640, "ms"), "Library": (1010, 640, "ms"),
    "Gasworks": (1260, 540, "lm"), "Airport": (1560, 440, "ms"), "Fellgate": (760, 230, "lm"),
    "Botanic Garden": (760, 350, "lm"), "Harbour": (900, 930, "mt"), "Ferry Pier": (1090, 930, "mt"),
    "Stadium": (330, 300, "ms"), "Mill Road": (480, 300, "ms"), "Lantern Street": (580, 400, "rm"),
    "University": (990, 470, "ms"), "Lighthouse": (1330, 810, "mt"), "Lido": (1560, 810, "mt"),
    "Oxfold": (150, 930, "ms"), "Brewery": (390, 930, "ms"), "Opera": (900, 790, "mt"),
}  # fmt: skip
CHANGES: dict[str, tuple[float, float, str]] = {
    "Cathedral": (760, 470, "ls"), "Central Station": (760, 640, "ls"), "Old Bridge": (760, 790, "rm"),
    "Hospital": (1160, 640, "lm"),
}  # fmt: skip


def name(page: Page, text: str, x: float, y: float, anchor: str, bold: bool) -> None:
    away = {"ms": (0, -24), "mt": (0, 22), "ls": (26, -16), "lm": (30, 2), "rm": (-30, 4)}[anchor]
    page.text(x + away[0], y + away[1], text, 22, INK, anchor, bold)


def draw() -> Image.Image:
    page = Page(LANDSCAPE, "#fbfbf8")
    river = ((-40, 810), (560, 810), (670, 715), (1060, 715), (1250, 890), (1450, 960), (1800, 960))
    page.line(*river, fill="#d3e6f2", width=64)
    page.text(180, 818, "River Tarn", 22, "#6f9dbd")
    page.text(1420, 968, "Ellery Sound", 22, "#6f9dbd")
    page.box(776, 300, 980, 400, fill="#deecd6", radius=12)
    page.text(80, 110, "Port Ellery trams", 46, INK, bold=True)
    page.text(80, 150, "All lines from 2 June 2031, daily from 5:10 to 0:40", 22, GREY)
    for number, (colour, _, points) in LINES.items():
        page.line(*points, fill=colour, width=14)
        for x, y in (points[0], points[-1]):
            if (x, y) not in [(station[0], station[1]) for station in CHANGES.values()]:
                page.circle(x, y, 15, fill=colour)
        end = points[0]
        page.box(end[0] - 74, end[1] - 20, end[0] - 34, end[1] + 20, fill=colour, radius=8)
        page.text(end[0] - 54, end[1] + 9, number, 26, "white", "ms", bold=True)
    for station, (x, y, anchor) in STATIONS.items():
        page.circle(x, y, 9, fill="white", outline=INK, width=3)
        name(page, station, x, y, anchor, bold=False)
    for station, (x, y, anchor) in CHANGES.items():
        page.circle(x, y, 18, fill="white", outline=INK, width=5)
        name(page, station, x, y, anchor, bold=True)
    legend(page)
    return page.finished()


def legend(page: Page) -> None:
    page.box(80, 1050, 1674, 1180, fill="white", outline=PALE, width=3, radius=14)
    every = {"1": "every 6 min", "2": "every 8 min", "3": "every 10 min", "4": "every 12 min"}
    for place, (number, (colour, ends, _)) in enumerate(LINES.items()):
        left = 116 + 300 * place
        page.box(left, 1088, left + 44, 1132, fill=colour, radius=8)
        page.text(left + 22, 1120, number, 28, "white", "ms", bold=True)
        page.text(left + 58, 1106, ends, 20, INK)
        page.text(left + 58, 1136, every[number], 20, GREY)
    page.circle(1340, 1100, 14, fill="white", outline=INK, width=4)
    page.text(1366, 1107, "change of line, lift and step-free", 19, INK)
    page.text(1328, 1142, "Night bus N2 after the last tram", 19, GREY)
    page.text(1674, 110, "A ticket of 2.40 is valid for 90 minutes", 22, GREY, "rs")
