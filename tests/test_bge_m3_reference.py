"""The vectors that BGE-M3 is held to are FlagEmbedding's, which a script runs in an environment of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import DATA
from tests.reference_script import ROOT, output_of, torch_versions

SCRIPT = ROOT / "scripts" / "bge_m3_reference.py"
COMMITTED = DATA / "bge_m3"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes, run from a folder that is not the project's."""
    return output_of(SCRIPT, tmp_path_factory.mktemp("bge_m3"))


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
    of_project, of_script = torch_versions(SCRIPT)
    assert of_project == of_script
