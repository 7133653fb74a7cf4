"""scripts/test_embed_api.py as users run it."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from tests.clip_checkpoints import open_clip_folder
from tests.server import Server

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "test_embed_api.py"
KEY = "sesame"
TEXTS = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
# Of these texts, in sentence-transformers' documentation.
PUBLISHED = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = open_clip_folder(tmp_path_factory.mktemp("clip"))
    with Server("--model", str(folder), "--api-key", KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def refusal(*arguments: str) -> str:
    ended = run(*arguments)
    assert ended.returncode == 1 and ended.stdout == "" and "Traceback" not in ended.stderr
    return ended.stderr


def matrix(output: str) -> NDArray[np.float64]:
    """The table behind the word similarity; every row of it is as wide as its head."""
    head, *rows = output.partition("similarity\n")[2].splitlines()
    assert head.split() == [str(number + 1) for number in range(len(rows))]
    return np.array([[float(cell) for cell in row[: len(head)].split()[1:]] for row in rows])


@pytest.mark.parametrize("path", ["", "/", "/embed"])
def test_it_shows_shapes_numbers_and_the_similarity_of_texts(server: Server, path: str) -> None:
    ended = run("--url", server.url + path, *TEXTS)
    assert ended.returncode == 0 and ended.stderr == ""
    assert "texts, shape (3, 384)" in ended.stdout
    assert re.search(r"^ +0\.0192 +0\.1201 +0\.1596 ", ended.stdout, re.MULTILINE)  # as the documentation has them
    assert_allclose(matrix(ended.stdout), PUBLISHED, atol=0.001)
    assert [line.endswith(text) for line, text in zip(ended.stdout.splitlines()[-3:], TEXTS, strict=True)] == [True] * 3


def test_a_text_that_was_cut_is_told(server: Server) -> None:
    ended = run("--url", server.url, "short", "long " * 400)
    assert re.findall(r"cut", ended.stdout) == ["cut"]
    assert re.search(r"^ .*too long, and cut\)\n\n", ended.stdout, re.MULTILINE)  # the last of them


def test_images_stand_beside_texts(clip: Server) -> None:
    images = ["images/lake_at_dusk.jpg", "images/floor_plan.png"]
    ended = run("--url", clip.url, "--key", KEY, "a lake", "--images", *images)
    assert ended.returncode == 0, ended.stderr
    assert "texts, shape (1, 24)" in ended.stdout and "images, shape (2, 24)" in ended.stdout
    table = matrix(ended.stdout)
    assert_allclose(np.diag(table), 1, atol=0.001)
    assert_allclose(table, table.T)
    assert images[1] in ended.stdout.splitlines()[-1]


def test_what_the_server_refuses_is_told(server: Server, clip: Server) -> None:
    assert "400: texts[0] is an empty string" in refusal("--url", server.url, "")
    assert "401: the API key is missing or wrong" in refusal("--url", clip.url, "--key", "wrong", "a lake")
    assert "takes text only" in refusal("--url", server.url, "--images", "images/floor_plan.png")
    assert "404" in refusal("--url", f"{server.url}/elsewhere", "a lake")


def test_what_cannot_be_had_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    told = refusal("--url", nowhere, "a lake")
    assert "Nothing answers at" in told and "uv run mlx-embeddings-server --model" in told
    assert "images/none.png: No such file" in refusal("--url", nowhere, "--images", "images/none.png")
    assert "missing an 'http://'" in refusal("--url", "localhost:8888", "a lake")
    assert run("--url", nowhere).returncode == 2
