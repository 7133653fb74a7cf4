"""examples/hybrid_search.py and examples/javascript as users run them, with tiny models of random weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.all_kinds import models_file
from tests.threaded import ThreadedServer

EXAMPLES = Path(__file__).parents[1] / "examples"
JAVASCRIPT = EXAMPLES / "javascript"
QUESTION = "When does the boat sail?"
NOTICES = [json.loads(line) for line in (EXAMPLES / "town_notices.jsonl").read_text().splitlines()]

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedServer]:
    file = models_file(tmp_path_factory.mktemp("models"))
    with ThreadedServer(file) as server:
        yield server


def run(*command: str, cwd: Path | None = None, url: str = "") -> str:
    environment = {**os.environ, "EMBEDDINGS_URL": f"{url}/v1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def search(server: ThreadedServer, dense: str, sparse: str, rerank: str) -> list[tuple[float, str]]:
    example = str(EXAMPLES / "hybrid_search.py")
    models = ("--dense", dense, "--sparse", sparse, "--rerank", rerank)
    output = run(sys.executable, "-W", "error", example, "--url", f"{server.url}/v1", *models, QUESTION)
    return [(float(line[:7]), line[9:]) for line in output.splitlines()]


def of_notices(server: ThreadedServer, model: str) -> dict[str, float]:
    """Every notice's relevance, as the server tells it for all of them at once."""
    documents = [f"{notice['title']}: {notice['text']}" for notice in NOTICES]
    body = {"model": model, "query": QUESTION, "documents": documents, "truncate": True}
    reply = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60)
    return {documents[each["index"]]: each["relevance_score"] for each in reply.json()["results"]}


@pytest.mark.parametrize(
    ("dense", "sparse", "rerank"), [("dense", "sparse", "reranker"), ("bge-m3", "bge-m3", "pages")]
)
def test_three_notices_are_found_in_the_rerankers_order(
    server: ThreadedServer, dense: str, sparse: str, rerank: str
) -> None:
    found = search(server, dense, sparse, rerank)
    assert len(found) == 3
    scores = of_notices(server, rerank)
    for score, text in found:
        assert abs(scores[text] - score) < 1e-3
    assert [score for score, _ in found] == sorted((score for score, _ in found), reverse=True)


def test_a_model_that_is_not_served_is_told(server: ThreadedServer) -> None:
    example = str(EXAMPLES / "hybrid_search.py")
    command = (sys.executable, example, "--url", f"{server.url}/v1", "--dense", "x", "--sparse", "y", "--rerank", "z")
    done = subprocess.run([*command, QUESTION], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the model 'x' is not served here" in done.stderr


@needs_node
def test_fetch_finds_what_python_finds(server: ThreadedServer) -> None:
    output = run("node", str(JAVASCRIPT / "fetch.js"), "dense", "sparse", "reranker", QUESTION, url=server.url)
    found = [line.split("  ", 1)[1] for line in output.splitlines()]
    # Fusion's ties may fall either way: what is found is among the best of both, in the reranker's order.
    assert len(found) == 3
    scores = of_notices(server, "reranker")
    assert [scores[text] for text in found] == sorted((scores[text] for text in found), reverse=True)
    assert len(set(found) & {text for _, text in search(server, "dense", "sparse", "reranker")}) >= 2


@needs_node
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_openais_client_for_javascript(server: ThreadedServer, tmp_path: Path) -> None:
    folder = shutil.copytree(JAVASCRIPT, tmp_path / "javascript", ignore=shutil.ignore_patterns("node_modules"))
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder)
    output = run(
        "node", "openai.js", "dense", "the quick fox", "the quick fox", "silent music", cwd=folder, url=server.url
    )
    first, *rows = output.splitlines()
    assert first.startswith("dense: 32 dimensions, ")
    table = [[float(number) for number in re.findall(r"-?\d\.\d{3}", row)] for row in rows]
    assert [len(row) for row in table] == [3, 3, 3]
    assert table[0][1] == 1.0 and table[0][2] < 1.0
