"""A lamp maker's invoice to a library."""

import math

from PIL import Image

from .canvas import AMBER, GREY, INK, NAVY, PALE, PORTRAIT, RED, Page


def letterhead(page: Page) -> None:
    page.box(0, 0, 1240, 18, fill=AMBER)
    page.circle(166, 126, 36, fill=AMBER)
    for step in range(12):
        across, down = math.cos(step * math.pi / 6), math.sin(step * math.pi / 6)
        page.line((166 + 44 * across, 126 + 44 * down), (166 + 56 * across, 126 + 56 * down), fill=AMBER, width=5)
    page.text(246, 124, "Tarn & Fell Lighting", 42, NAVY, bold=True)
    page.text(248, 160, "Lamps for libraries since 1987", 21, GREY)
    contact = ("4 Foundry Lane, Port Ellery PE2 7KD", "accounts@tarnfell.example", "VAT no. EL 553 019 27")
    for row, line in enumerate(contact):
        page.text(1130, 104 + 30 * row, line, 19, GREY, "rs")


def addresses(page: Page) -> None:
    page.text(110, 330, "INVOICE", 66, INK, bold=True)
    facts = ("Invoice number", "TF-2031-0417"), ("Invoice date", "31 March 2031"), ("Payment due", "30 April 2031")
    for row, (name, value) in enumerate(facts):
        page.text(780, 284 + 34 * row, name, 21, GREY)
        page.text(1130, 284 + 34 * row, value, 21, INK, "rs", bold=True)
    blocks = {
        "BILL TO": ("Harbour Library", "Ms Ingrid Aaltonen", "12 Quayside", "Port Ellery PE1 1AA"),
        "DELIVER TO": ("Harbour Library, reading room", "Second floor, lift B", "12 Quayside", "Port Ellery PE1 1AA"),
    }
    for left, (title, lines) in zip((110, 640), blocks.items(), strict=True):
        page.text(left, 440, title, 18, AMBER, bold=True)
        for row, line in enumerate(lines):
            page.text(left, 476 + 32 * row, line, 22, INK, bold=row == 0)


def bill(page: Page) -> None:
    items = (
        ("Brass reading lamp, green glass shade", 24, 86.50), ("Pendant lantern, 45 cm, frosted", 6, 214.00),
        ("LED bulb E27, 7 W, warm white (box of 10)", 8, 32.90), ("Dimmer, wall mounted", 10, 41.25),
        ("Cloth-covered cable, red, per metre", 75, 3.80), ("Installation, per hour", 14, 58.00),
        ("Delivery", 1, 45.00),
    )  # fmt: skip
    page.box(110, 650, 1130, 706, fill=NAVY)
    columns = (
        ("Description", 130, "ls"), ("Quantity", 770, "rs"), ("Unit price", 940, "rs"), ("Amount EUR", 1110, "rs"),
    )  # fmt: skip
    for title, place, anchor in columns:
        page.text(place, 686, title, 20, "white", anchor, bold=True)
    for row, (name, count, price) in enumerate(items):
        base = 748 + 60 * row
        if row % 2:
            page.box(110, base - 40, 1130, base + 20, fill="#f4f6f8")
        cells = (name, f"{count}", f"{price:,.2f}", f"{count * price:,.2f}")
        for (_, place, anchor), cell in zip(columns, cells, strict=True):
            page.text(place, base, cell, 22, INK, anchor)
    net = sum(count * price for _, count, price in items)
    page.line((110, 1128), (1130, 1128), fill=GREY)
    for base, name, amount in ((1176, "Subtotal", net), (1218, "VAT 20 %", net * 0.2)):
        page.text(940, base, name, 22, GREY, "rs")
        page.text(1110, base, f"{amount:,.2f}", 22, INK, "rs")
    page.box(640, 1246, 1130, 1320, fill=AMBER, radius=8)
    page.text(664, 1293, "Total due", 28, "white", bold=True)
    page.text(1110, 1293, f"EUR {net * 1.2:,.2f}", 30, "white", "rs", bold=True)


def draw() -> Image.Image:
    page = Page(PORTRAIT)
    letterhead(page)
    addresses(page)
    bill(page)
    page.tilted(330, 1236, "SECOND REMINDER", 40, RED, 9)
    page.line((132, 1236), (524, 1174), fill=RED, width=4)
    page.line((140, 1298), (532, 1236), fill=RED, width=4)

    page.text(110, 1430, "How to pay", 24, NAVY, bold=True)
    terms = (
        "By bank transfer to Ellery Savings Bank, account EL31 0440 7719 2030 55, with the invoice number as reference."
        " Two per cent are taken off if we have your payment by 10 April. Goods stay ours until they are paid for."
        " Lamps carry a guarantee of five years; bulbs and cloth-covered cable of one."
    )
    page.paragraph(110, 1470, 1020, terms, 21)
    page.line((110, 1650), (1130, 1650), fill=PALE)
    page.text(620, 1690, "Tarn & Fell Lighting Ltd · Registered in Ellery, no. 88412 · Page 1 of 1", 18, GREY, "ms")
    return page.finished()
