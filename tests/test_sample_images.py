"""The committed sample pages are what the script draws."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "images"
# Turned letters and JPEG go through floating point and vector instructions, which other processors round differently.
TOLERANCE = 0.0 if platform.machine() in ("x86_64", "AMD64") else 0.5
FORMATS = (".png", ".jpg")


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("redrawn")
    command = [sys.executable, "-W", "error", str(ROOT / "scripts" / "make_sample_images.py"), "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in FORMATS)


def test_the_script_draws_the_committed_files_and_no_other(redrawn: Path) -> None:
    assert len(names(redrawn)) >= 7
    assert names(redrawn) == names(COMMITTED)


def test_the_pixels_are_the_committed_ones(redrawn: Path) -> None:
    for name in names(COMMITTED):
        with Image.open(redrawn / name) as drawn, Image.open(COMMITTED / name) as committed:
            assert drawn.size == committed.size, name
            apart = np.abs(np.asarray(drawn.convert("RGB"), float) - np.asarray(committed.convert("RGB"), float))
        assert apart.mean() <= TOLERANCE, name


def test_pages_are_of_both_orientations_and_small() -> None:
    sizes = set()
    for name in names(COMMITTED):
        assert (COMMITTED / name).stat().st_size < 250_000, name
        with Image.open(COMMITTED / name) as page:
            sizes.add(page.size)
    assert sizes == {(1240, 1754), (1754, 1240)}
    assert sum((COMMITTED / name).stat().st_size for name in names(COMMITTED)) < 1_500_000
