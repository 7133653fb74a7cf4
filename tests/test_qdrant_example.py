"""examples/colqwen2.5_qdrant.py and examples/openai_client.py as users run them, Qdrant inside the process."""

import base64
import importlib.util
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from qdrant_client import QdrantClient, models

from tests.server import Server

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "colqwen2.5_qdrant.py"
CHECKPOINT = ROOT / "tests" / "data" / "colqwen2_5" / "checkpoint"
QUERY = "How large is the bathroom?"


@pytest.fixture(scope="module")
def colqwen() -> Iterator[Server]:
    flags = "--backend", "mlx", "--dtype", "float32", "--max-image-tokens", "64"
    with Server("--model", str(CHECKPOINT), *flags) as server:
        yield server


def folder_of(place: Path, *names: str) -> Path:
    """A folder `pages` with some of the sample images, one of them in a subfolder."""
    folder = place / "pages"
    (folder / "more").mkdir(parents=True)
    for name in names:
        shutil.copy(ROOT / "images" / name, folder / "more" if name == names[0] else folder)
    return folder


def command(server: str, pages: Path, *arguments: str) -> list[str]:
    flags = ["--server", server, "--images", str(pages), "--embedded", str(pages.parent / "qdrant")]
    return [sys.executable, "-W", "error", str(EXAMPLE), *arguments, *flags]


def run(server: Server, pages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(server.url, pages, *arguments), capture_output=True, text=True, timeout=120, cwd=pages.parent
    )


def counts(output: str) -> tuple[int, int, int, int]:
    """Pages embedded, indexed already, removed, skipped."""
    found = re.search(r"(\d+) pages embedded in [\d.]+ s, (\d+) indexed already, (\d+) removed, (\d+) skipped", output)
    assert found, output
    return int(found[1]), int(found[2]), int(found[3]), int(found[4])


def ranking(output: str) -> list[tuple[float, str]]:
    """Scores and file names, in the order shown."""
    rows = re.findall(r"^ +\d+ +(-?[\d.]+)  (\S+)$", output, re.MULTILINE)
    return [(float(score), Path(path).name) for score, path in rows]


def embed(server: Server, item: object, **fields: object) -> NDArray[np.float64]:
    reply = server.embed([item], "checkpoint", **fields)
    assert reply.status_code == 200, reply.text
    return np.array(reply.json()["data"][0]["embedding"])


def as_input(path: Path) -> dict[str, str]:
    return {"image": base64.b64encode(path.read_bytes()).decode()}


def points(pages: Path) -> list[tuple[dict[str, Any], dict[str, NDArray[np.float64]]]]:
    """Payload and vectors of every page in the collection."""
    with closing(QdrantClient(path=str(pages.parent / "qdrant"))) as qdrant:
        records, _ = qdrant.scroll("pages", limit=100, with_vectors=True)
    vectors: list[Any] = [record.vector for record in records]
    return [
        (record.payload or {}, {name: np.array(rows) for name, rows in named.items()})
        for record, named in zip(records, vectors, strict=True)
    ]


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("colqwen_qdrant_example", EXAMPLE)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


Indexed = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def indexed(colqwen: Server, tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    """A folder with four pages and a broken one, and how a first run over it went."""
    pages = folder_of(
        tmp_path_factory.mktemp("indexed"), "tram_map.png", "floor_plan.png", "invoice.png", "lake_at_dusk.jpg"
    )
    (pages / "broken.png").write_bytes((pages / "invoice.png").read_bytes()[:3000])
    (pages / "notes.txt").write_text("no image, and not looked at")
    return pages, run(colqwen, pages, QUERY, "--save-maps", "maps", "--limit", "4")


def test_a_broken_image_is_skipped_and_named_and_the_rest_indexed(indexed: Indexed) -> None:
    pages, ended = indexed
    assert ended.returncode == 3, ended.stderr
    assert counts(ended.stdout) == (4, 0, 0, 1) and len(ranking(ended.stdout)) == 4
    assert re.search(rf"^Skipped {pages / 'broken.png'}: .+", ended.stderr, re.MULTILINE)


def test_pages_are_ranked_by_maxsim_and_a_second_run_embeds_nothing(colqwen: Server, indexed: Indexed) -> None:
    pages, first = indexed
    query = embed(colqwen, QUERY, input_type="query")
    expected = []
    for _, name in ranking(first.stdout):
        scores = query @ embed(colqwen, as_input(next(pages.rglob(name))), input_type="document").T
        expected.append(float(scores.max(axis=1).sum()))
    assert expected == sorted(expected, reverse=True) and len(expected) == 4
    assert [score for score, _ in ranking(first.stdout)] == pytest.approx(expected, abs=0.006)

    second = run(colqwen, pages, QUERY, "--one-stage")
    assert counts(second.stdout) == (0, 4, 0, 1)
    assert "one stage" in second.stdout and "two stages" in first.stdout
    assert ranking(second.stdout) == ranking(first.stdout)


def test_qdrant_holds_the_vectors_and_their_means_by_rows_and_columns(colqwen: Server, indexed: Indexed) -> None:
    stored = points(indexed[0])
    assert len(stored) == 4
    for payload, vectors in stored:
        page, grid = as_input(Path(payload["file"])), payload["grid"]
        whole = embed(colqwen, page, input_type="document")
        np.testing.assert_allclose(vectors["original"], whole, atol=1e-6)
        others = len(whole) - grid["rows"] * grid["columns"]
        for pool in ("rows", "columns"):
            means = embed(colqwen, page, input_type="document", pool=pool)
            assert len(means) == grid[pool] and len(vectors[pool]) == len(means) + others
            np.testing.assert_allclose(vectors[pool][grid["offset"] :][: len(means)], means, atol=1e-5)


def test_maps_are_drawn_over_the_pages(indexed: Indexed) -> None:
    pages, ended = indexed
    best = [name for _, name in ranking(ended.stdout)]
    drawn = sorted((pages.parent / "maps" / "how-large-is-the-bathroom").iterdir())
    assert [path.name for path in drawn] == [f"{rank}_{Path(name).stem}.png" for rank, name in enumerate(best, 1)]
    for path, name in zip(drawn, best, strict=True):
        with Image.open(path) as map, Image.open(next(pages.rglob(name))) as page:
            assert map.size == page.size
            assert np.abs(np.asarray(map, int) - np.asarray(page.convert("RGB"), int)).mean() > 1


def test_changed_new_and_deleted_files_are_followed(colqwen: Server, tmp_path: Path) -> None:
    pages = folder_of(tmp_path, "tram_map.png", "invoice.png", "floor_plan.png")
    run(colqwen, pages, QUERY)
    shutil.copy(ROOT / "images" / "paper.png", pages / "invoice.png")
    shutil.copy(ROOT / "images" / "shopping_note.png", pages / "note.png")
    (pages / "floor_plan.png").unlink()
    ended = run(colqwen, pages, QUERY)
    assert ended.returncode == 0 and counts(ended.stdout) == (2, 1, 1, 0)
    stored = {Path(payload["file"]).name: vectors["original"] for payload, vectors in points(pages)}
    assert set(stored) == {name for _, name in ranking(ended.stdout)} == {"tram_map.png", "invoice.png", "note.png"}
    changed = embed(colqwen, as_input(pages / "invoice.png"), input_type="document")
    np.testing.assert_allclose(stored["invoice.png"], changed, atol=1e-6)


def test_a_map_is_red_where_a_patch_is_like_a_word_of_the_query(tmp_path: Path) -> None:
    Image.new("RGB", (300, 800), "white").save(tmp_path / "page.png")
    prefix, word, padding, other = np.eye(128, dtype=np.float32)[:4]
    page = np.stack([word, *[other] * 12, word])  # 4 rows of 3 patches between two other vectors
    page[1], page[2], page[11] = prefix, padding, word  # the first two patches, and the middle one of the last row
    grid = {"rows": 4, "columns": 3, "offset": 1}
    payload = {"file": str(tmp_path / "page.png"), "grid": grid}
    hit = models.ScoredPoint(id=1, version=1, score=1, payload=payload, vector={"original": page.tolist()})
    query = np.stack([prefix, prefix, word, *[padding] * 10])
    load_example().save_maps(tmp_path, "???", query, [hit])
    with Image.open(tmp_path / "query" / "1_page.png") as map:
        drawn = np.asarray(map, int)
    redness = drawn[..., 0] - drawn[..., 1:].max(axis=2)
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert abs(y - 700) <= 50 and abs(x - 150) <= 25
    assert (drawn[:400] == 255).all()


def test_an_interrupted_run_goes_on_where_it_was(colqwen: Server, tmp_path: Path) -> None:
    pages, count = tmp_path / "pages", 60
    pages.mkdir()
    for number in range(count):
        Image.new("RGB", (60, 60), (number, 90, 200)).save(pages / f"{number:03}.png")
    arguments = command(colqwen.url, pages, QUERY, "--batch-size", "1")
    # A shell that runs the tests in the background has them ignore SIGINT, and what they start too.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        storage, deadline = tmp_path / "qdrant" / "collection" / "pages" / "storage.sqlite", time.monotonic() + 60
        while not stored_points(storage) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "run it again" in said and "Traceback" not in said
    ended = run(colqwen, pages, QUERY, "--batch-size", "32")
    embedded, known, _, _ = counts(ended.stdout)
    assert known > 0 and embedded + known == count


def stored_points(storage: Path) -> int:
    if not storage.exists():
        return 0
    with closing(sqlite3.connect(f"file:{storage}?mode=ro", uri=True, timeout=10)) as database:
        try:
            return int(database.execute("SELECT count(*) FROM points").fetchone()[0])
        except sqlite3.OperationalError:  # the table is not there yet
            return 0


def test_a_collection_of_another_model_is_refused(colqwen: Server, tmp_path: Path) -> None:
    pages = folder_of(tmp_path, "tram_map.png")
    with closing(QdrantClient(path=str(tmp_path / "qdrant"))) as qdrant:
        qdrant.create_collection("pages", metadata={"model": "another/model", "dimensions": 128})
    ended = run(colqwen, pages, QUERY)
    assert ended.returncode == 1 and "another/model" in ended.stderr and "--collection" in ended.stderr


def test_a_text_model_is_refused_with_the_command_that_helps(server: Server, tmp_path: Path) -> None:
    ended = run(server, folder_of(tmp_path, "tram_map.png"), QUERY)
    assert ended.returncode == 1
    assert "sentence-transformers/all-MiniLM-L6-v2" in ended.stderr and "multi-vector" in ended.stderr
    assert "uv run mlx-embeddings-server --model vidore/colqwen2.5-v0.2" in ended.stderr


def test_where_nothing_listens_the_commands_that_help_are_told(colqwen: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    for server, complaint in ((nowhere, "No embeddings server answers"), (colqwen.url, "No Qdrant answers")):
        arguments = [sys.executable, str(EXAMPLE), QUERY, "--server", server, "--qdrant", nowhere]
        ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        for words in (complaint, "uv run mlx-embeddings-server --model", "scripts/qdrant-docker.sh", "--embedded"):
            assert words in ended.stderr


def test_a_query_after_embedded_is_not_taken_for_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--embedded", QUERY])
    with pytest.raises(SystemExit, match="2"):
        load_example().parse()
    assert "write the query before --embedded" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["text", "images"])
def test_the_openai_example_shows_similarities(model: str, server: Server, request: pytest.FixtureRequest) -> None:
    used: Server = request.getfixturevalue("colqwen") if model == "images" else server
    arguments = [sys.executable, "-W", "error", str(ROOT / "examples" / "openai_client.py"), "--url", f"{used.url}/v1"]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    rows = re.findall(r"^(?: *-?[\d.]+)+(?= \D)", ended.stdout, re.MULTILINE)
    table = np.array([[float(cell) for cell in row.split()] for row in rows if "." in row])
    if model == "text":
        np.testing.assert_allclose(table, table.T)
        np.testing.assert_allclose(np.diag(table), 1)
        return
    documents = [as_input(ROOT / "images" / name) for name in ("floor_plan.png", "tram_map.png")]
    for row, query in zip(table, ("How large is the bathroom?", "Where do I change for the airport?"), strict=True):
        maxsim = [(embed(used, query) @ embed(used, page).T).max(axis=1).sum() for page in documents]
        np.testing.assert_allclose(row, maxsim, atol=0.001)
