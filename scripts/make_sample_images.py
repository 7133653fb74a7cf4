"""Draw the sample pages in images/: one for every kind of question that is asked of a document retriever.

    uv run python scripts/make_sample_images.py [--out DIR]

Companies, places, people and figures are made up. The same Pillow gives the same pixels: the font is the one that comes
with it, and every random number is seeded.
"""

import argparse
import importlib
from pathlib import Path
from typing import cast

from PIL import Image

OUT = Path(__file__).parent.parent / "images"
# Each is drawn by the module of its name.
FILES = (
    "invoice.png", "ferry_report.png", "rainfall_table.png", "paper.png", "floor_plan.png", "tram_map.png",
    "lake_at_dusk.jpg", "shopping_note.png",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the sample pages.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where to (%(default)s)")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        path = folder / file
        image = cast("Image.Image", importlib.import_module(f"sample_images.{path.stem}").draw())
        if path.suffix == ".jpg":
            image.save(path, quality=82, optimize=True)
        else:  # 128 colours look the same here and take a third of the space
            image.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
