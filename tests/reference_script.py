"""Runs a script of scripts/ that makes reference vectors, in the environment of its own that its lock file names."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# uv's words where a package is not to be had. A wrong hash or a lock that is out of date has others, and fails.
_NO_PACKAGES = ("Failed to fetch", "Network connectivity is disabled", "operation timed out")


def output_of(script: Path, folder: Path) -> Path:
    """The folder that the script fills, run from `folder`. Skips the test where its packages are not to be had."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not on PATH: it makes the environment that the script needs")
    try:
        made = _uv("sync", script, folder)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package index did not give the packages of scripts/{script.name}.lock in time")
    if made.returncode != 0:
        said = " ".join(made.stderr.split())  # uv breaks lines anywhere
        if any(words in said for words in _NO_PACKAGES):
            pytest.skip(f"the packages of scripts/{script.name}.lock cannot be had: {said[-300:]}")
        pytest.fail(made.stderr)
    ran = _uv("run", script, folder, str(folder / "made"))
    assert ran.returncode == 0, ran.stderr
    return folder / "made"


def torch_versions(script: Path) -> list[set[str]]:
    """Those of the project's lock, and those of the script's."""
    return [
        {package["version"] for package in tomllib.loads(lock.read_text())["package"] if package["name"] == "torch"}
        for lock in (ROOT / "uv.lock", script.with_name(f"{script.name}.lock"))
    ]


def _uv(command: str, script: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # With the Python of the tests, torch is the very wheel that the project has in uv's cache.
    line = ["uv", command, "--locked", "--no-progress", "--python", sys.executable, "--script", str(script), *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
