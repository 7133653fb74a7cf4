"""The vectors that BGE-M3 is held to are FlagEmbedding's, which a script runs in an environment of its own."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import DATA

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "bge_m3_reference.py"
COMMITTED = DATA / "bge_m3"
# uv's words where a package is not to be had. A wrong hash or a lock that is out of date has others, and fails.
NO_PACKAGES = ("Failed to fetch", "Network connectivity is disabled", "operation timed out")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes, run from a folder that is not the project's."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not on PATH: it makes the environment that the script needs")
    folder = tmp_path_factory.mktemp("bge_m3")
    try:
        made = uv("sync", folder)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index did not give the packages of scripts/bge_m3_reference.py.lock in time")
    if made.returncode != 0:
        said = " ".join(made.stderr.split())  # uv breaks lines anywhere
        if any(words in said for words in NO_PACKAGES):
            pytest.skip(f"the packages of scripts/bge_m3_reference.py.lock cannot be had: {said[-300:]}")
        pytest.fail(made.stderr)
    ran = uv("run", folder, str(folder / "made"))
    assert ran.returncode == 0, ran.stderr
    return folder / "made"


def uv(command: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # With the Python of the tests, torch is the very wheel that the project has in uv's cache.
    line = ["uv", command, "--locked", "--no-progress", "--python", sys.executable, "--script", str(SCRIPT), *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_committed_vectors_are_what_flagembedding_makes(reference: Path) -> None:
    assert json.loads((reference / "texts.json").read_text()) == json.loads((COMMITTED / "texts.json").read_text())
    made, committed = (load_file(folder / "expected.safetensors") for folder in (reference, COMMITTED))
    assert made.keys() == committed.keys()
    for name in made:
        np.testing.assert_allclose(made[name], committed[name], rtol=0, atol=1e-5, err_msg=name)


def test_the_committed_checkpoint_is_what_the_script_makes(reference: Path) -> None:
    ours, theirs = ({file.relative_to(folder) for file in folder.rglob("*")} for folder in (reference, COMMITTED))
    assert ours == theirs
    for file in (reference / "checkpoint").rglob("*.json"):
        assert file.read_text() == (COMMITTED / file.relative_to(reference)).read_text(), file.name
    weights, committed = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (reference, COMMITTED))
    assert weights.keys() == committed.keys()
    for name in weights:
        np.testing.assert_allclose(weights[name], committed[name], rtol=0, atol=1e-6, err_msg=name)
    for head in ("colbert_linear.pt", "sparse_linear.pt"):
        made, kept = (torch.load(folder / "checkpoint" / head, weights_only=True) for folder in (reference, COMMITTED))
        assert made.keys() == kept.keys()
        for name in made:
            torch.testing.assert_close(made[name], kept[name], rtol=0, atol=1e-3, msg=f"{head}: {name}")


def test_the_script_runs_on_the_torch_of_the_project() -> None:
    """Another would be gigabytes more to download for whoever runs it."""
    versions = [
        {package["version"] for package in tomllib.loads(lock.read_text())["package"] if package["name"] == "torch"}
        for lock in (ROOT / "uv.lock", SCRIPT.with_name(f"{SCRIPT.name}.lock"))
    ]
    assert versions[0] == versions[1]
