"""SPECTER2's vectors are those of AdapterHub's own library, which a script runs in an environment of its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, Item, LoadOptions
from tests.parity import Rows
from tests.reference_script import ROOT, output_of, torch_versions

SCRIPT = ROOT / "scripts" / "specter2_reference.py"
COMMITTED = ROOT / "tests" / "data" / "specter2"
ADAPTERS = {"proximity": "specter2_proximity", "adhoc_query": "specter2_adhoc_query"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes, run from a folder that is not the project's."""
    return output_of(SCRIPT, tmp_path_factory.mktemp("specter2"))


@pytest.fixture(scope="module")
def expected(reference: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((reference / "expected.json").read_text())
    return found


@pytest.fixture(scope="module", params=["torch", "mlx"])
def backend(request: pytest.FixtureRequest, reference: Path) -> Backend:
    choice = detect.choose(reference / "base", request.param, has_adapters=True)
    adapters = {name: reference / folder for name, folder in ADAPTERS.items()}
    return detect.load(choice, reference / "base", LoadOptions(device="cpu", dtype="float32", adapters=adapters))


def embed(backend: Backend, items: Sequence[Item]) -> Rows:
    """In batches that each hold one group, in the order given."""
    rows = np.empty((len(items), backend.info.dimensions), dtype=np.float32)
    prepared = backend.prepare(items, truncate="end")
    for group in {item.group for item in prepared}:
        places = [place for place, item in enumerate(prepared) if item.group == group]
        rows[places] = np.asarray(backend.run(backend.collate([prepared[place] for place in places])))
    return rows


def test_vectors_are_those_of_adapterhub(backend: Backend, expected: Mapping[str, Any]) -> None:
    """Papers and queries mixed; titles alone, words unknown to the tokenizer, and texts longer than the model reads."""
    asked = [(text, name, place) for place, text in enumerate(expected["texts"]) for name in ADAPTERS]
    rows = embed(backend, [Item(text, adapter=name) for text, name, _ in asked])
    reference = np.array([expected[ADAPTERS[name]][place] for _, name, place in asked])
    assert float(np.abs(rows - reference).max()) <= 1e-5


def test_the_adapters_tell_the_vectors_apart(expected: Mapping[str, Any]) -> None:
    """What the test above asks for is more than the base, or another adapter, could give."""
    base, *adapted = (np.array(expected[name]) for name in ("base", *ADAPTERS.values()))
    assert base.shape == (len(expected["texts"]), 64)
    for rows, others in ((base, adapted[0]), (base, adapted[1]), (adapted[0], adapted[1])):
        assert float(np.abs(rows - others).max(axis=1).min()) > 0.1


def test_the_committed_checkpoint_is_what_the_script_makes(reference: Path, expected: Mapping[str, Any]) -> None:
    for file in ("vocab.txt", "tokenizer.json"):
        assert (reference / "base" / file).read_text() == (COMMITTED / "base" / file).read_text()
    weights, committed = (load_file(folder / "base" / "model.safetensors") for folder in (reference, COMMITTED))
    assert weights.keys() == committed.keys()
    for name in weights:
        np.testing.assert_allclose(weights[name], committed[name], atol=1e-6, err_msg=name)
    earlier = json.loads((COMMITTED / "expected.json").read_text())
    places = [expected["texts"].index(text) for text in earlier["texts"]]
    for name in ("base", *ADAPTERS.values()):
        np.testing.assert_allclose(np.array(expected[name])[places], earlier[name], atol=1e-5, err_msg=name)


def test_the_script_runs_on_the_torch_of_the_project() -> None:
    """Another would be gigabytes more to download for whoever runs it."""
    of_project, of_script = torch_versions(SCRIPT)
    assert of_project == of_script
