"""examples/openclip_service.ipynb as a reader runs it, but for the cell that would open a tunnel."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from numpy.testing import assert_allclose
from PIL import Image

from tests.clip_checkpoints import open_clip_folder

NOTEBOOK = Path(__file__).parent.parent / "examples" / "openclip_service.ipynb"
IMAGES, TEXTS, DIMENSIONS = 5, 5, 24
# The cosines again, by /v1/embeddings.
BY_OPENAI = """
import json
items = [{"text": text} for text in texts]
items += [{"image": base64.b64encode((folder / name).read_bytes()).decode()} for name in names]
body = {"model": Path(MODEL).name, "input": items, "truncate": "end"}
rows = np.array([each["embedding"] for each in client.post("/v1/embeddings", json=body).json()["data"]])
print(json.dumps({"shown": similarity.tolist(), "expected": (rows[:5] @ rows[5:].T).tolist()}))
"""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONWARNINGS", "default")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_clip_folder(tmp_path_factory.mktemp("clip"))


def notebook() -> Any:
    """Without the cells tagged `tunnel`."""
    read: Any = nbformat.read(NOTEBOOK, as_version=4)
    read.cells = [cell for cell in read.cells if "tunnel" not in cell.metadata.get("tags", [])]
    return read


def run(book: Any, folder: Path) -> dict[str, Any]:
    """The outputs of each cell that is code, by its id."""
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}


def printed(outputs: Any) -> str:
    assert not [each for each in outputs if each.get("name") == "stderr"], outputs
    return "".join(each.text for each in outputs if each.output_type == "stream")


def test_it_embeds_texts_and_pictures_and_shows_how_alike_they_are(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL", str(checkpoint))
    book = notebook()
    stop = next(place for place, cell in enumerate(book.cells) if cell.id == "stop")
    book.cells.insert(stop, nbformat.v4.new_code_cell(BY_OPENAI, id="by_openai"))
    outputs = run(book, NOTEBOOK.parent)
    assert f"({TEXTS}, {DIMENSIONS})" in printed(outputs["texts"])
    assert f"({IMAGES}, {DIMENSIONS})" in printed(outputs["images"])
    cosines = json.loads(printed(outputs["by_openai"]))
    assert_allclose(cosines["shown"], cosines["expected"], atol=1e-3)
    assert np.ptp(cosines["shown"]) > 0.01
    assert printed(outputs["heatmap"]) == ""
    [heatmap] = [each.data["image/png"] for each in outputs["heatmap"]]
    with Image.open(io.BytesIO(base64.b64decode(heatmap))) as image:
        assert image.width > 600 and image.height > 300
        colours = image.convert("RGB").getcolors(1 << 20)
        assert colours is not None and len(colours) > 25
    assert printed(outputs["stop"]).endswith("exit status 0\n")


def test_a_server_that_does_not_start_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", str(tmp_path))  # no checkpoint
    book = notebook()
    with pytest.raises(CellExecutionError) as caught:
        run(book, tmp_path)
    assert "The server did not start" in str(caught.value) and "config.json" in str(caught.value)
    last = [cell.id for cell in book.cells if cell.cell_type == "code" and cell.execution_count][-1]
    assert last == "start"


def test_it_is_saved_without_outputs_and_one_cell_of_it_opens_a_tunnel() -> None:
    book: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert book.metadata.kernelspec.name == "python3"
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count]
    assert [cell.id for cell in code if "ngrok" in cell.source] == ["tunnel"]
    assert next(cell for cell in code if cell.id == "tunnel").metadata == {"tags": ["tunnel"]}
