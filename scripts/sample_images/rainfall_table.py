"""A dense table: a year's rain at twenty stations."""

from random import Random

from PIL import Image

from .canvas import GREY, INK, LANDSCAPE, MONTHS, NAVY, PALE, Page, mix


def draw() -> Image.Image:
    page, random = Page(LANDSCAPE), Random(2030)
    stations = {
        "Skarvik harbour": 4, "Ellery Point": 11, "Port Ellery": 18, "Midsound": 22, "Grey Holm": 35, "Tarn Bridge": 64,
        "Oxfold": 88, "Lower Fell": 120, "Brannock": 147, "Kestrel Moss": 183, "St Aldan": 205, "Upper Fell": 260,
        "Whin Dyke": 304, "Larch Hause": 352, "Cold Beck": 411, "Three Stones": 498, "High Tarn": 583,
        "Raven Seat": 677, "Fellgate Pass": 742, "Hollin Pike": 918,
    }  # fmt: skip
    page.text(70, 92, "Monthly rainfall 2030, in millimetres", 40, INK, bold=True)
    page.text(
        70,
        130,
        "Hydrological Service of Ellery · twenty stations by altitude · the wettest month of each in bold",
        22,
        GREY,
    )
    edges = [70, 300, 400, *(496 + 98 * month for month in range(12)), 1684]
    page.box(70, 160, 1684, 210, fill=NAVY)
    page.text(86, 193, "Station", 20, "white", bold=True)
    for right, title in zip(edges[2:], ["Altitude, m", *MONTHS, "Year"], strict=True):
        page.text(right - 12, 193, title, 20, "white", "rs", bold=True)
    season = (118, 96, 84, 61, 49, 44, 52, 71, 95, 131, 152, 140)
    year_of: dict[str, int] = {}
    for row, (name, altitude) in enumerate(stations.items()):
        top = 210 + 44 * row
        rain = [round(mean * (0.7 + altitude / 700) * random.uniform(0.75, 1.25)) for mean in season]
        year_of[name] = sum(rain)
        page.text(86, top + 30, name, 21, INK)
        page.text(edges[2] - 12, top + 30, f"{altitude}", 21, GREY, "rs")
        for right, amount in zip(edges[3:], rain, strict=False):
            page.box(
                right - 96, top + 1, right, top + 43, fill=mix((255, 255, 255), (96, 152, 206), min(amount / 330, 1))
            )
            page.text(right - 12, top + 30, f"{amount}", 20, INK, "rs", bold=amount == max(rain))
        page.text(edges[-1] - 12, top + 30, f"{sum(rain):,}", 21, INK, "rs", bold=True)
        page.line((70, top + 44), (1684, top + 44), fill=PALE, width=1)
    wettest, driest = max(year_of, key=year_of.__getitem__), min(year_of, key=year_of.__getitem__)
    page.paragraph(
        70, 1136, 1614, f"{wettest} had the most rain of the year ({year_of[wettest]:,} mm), {driest} the least "
        f"({year_of[driest]:,} mm). Gauges are read at 07:00; snow is melted before it is measured. The gauge of Cold "
        "Beck was moved forty metres to the east on 12 June.", 21, GREY,
    )  # fmt: skip
    page.text(1684, 1204, "Table 7", 20, GREY, "rs")
    return page.finished()
