"""Clients of Text Embeddings Inference (TEI), pointed at POST /embed: Chroma's, huggingface_hub's and LangChain's."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from chromadb.config import Settings
from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from tests.server import Server

LANGCHAIN = Path(__file__).parent / "clients" / "langchain_tei.py"
NO_INDEX = r"client error \(Connect\)|dns error|operation timed out|Network connectivity is disabled"
TEXTS = ["Dogs bark at the mailman.", "The stock market fell today.", "He plays the violin.\nShe sings."]
LONG = " ".join(f"number {number}" for number in range(200))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """All these clients heed the environment's proxies; none is between them and this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def openai_rows(server: Server, texts: list[str], **fields: Any) -> NDArray[np.float32]:
    reply = server.embed(texts, **fields)
    assert reply.status_code == 200, reply.text
    return np.array([each["embedding"] for each in reply.json()["data"]], dtype=np.float32)


# Chroma


@pytest.fixture
def embed(server: Server) -> Iterator[HuggingFaceEmbeddingServer]:
    embed = HuggingFaceEmbeddingServer(url=f"{server.url}/embed")
    yield embed
    embed._session.close()  # nothing else does, and that is a ResourceWarning


def test_chromas_embedding_server_gets_the_vectors(server: Server, embed: HuggingFaceEmbeddingServer) -> None:
    vectors = embed(TEXTS)
    assert_array_equal(np.array(vectors), openai_rows(server, TEXTS))
    assert_array_equal(np.array(embed.embed_query(TEXTS[:1])), openai_rows(server, TEXTS[:1]))


def test_a_chroma_collection_stores_and_finds(server: Server, embed: HuggingFaceEmbeddingServer) -> None:
    chroma: Any = chromadb.EphemeralClient(Settings(anonymized_telemetry=False))  # its types lack `with`
    with chroma as client:
        collection = client.create_collection("sentences", embedding_function=embed)
        collection.add(ids=["dogs", "stocks", "music"], documents=TEXTS)
        stored = collection.get(ids=["dogs", "stocks", "music"], include=["embeddings"])["embeddings"]
        assert_allclose(np.array(stored), openai_rows(server, TEXTS), atol=1e-6)
        questions = ["puppies and mail carriers", "a musical instrument", "share prices"]
        found = collection.query(query_texts=questions, n_results=1)
    assert found["ids"] == [["dogs"], ["music"], ["stocks"]]


# huggingface_hub


@pytest.mark.parametrize("path", ["/embed", "/", ""])
def test_hugging_faces_client_gets_the_vectors(server: Server, path: str) -> None:
    with InferenceClient(model=server.url + path) as client:
        assert_array_equal(client.feature_extraction(TEXTS), openai_rows(server, TEXTS))
        assert_array_equal(client.feature_extraction(TEXTS[0]), openai_rows(server, TEXTS[:1]))


def test_hugging_faces_client_sends_its_parameters(server: Server) -> None:
    with InferenceClient(model=f"{server.url}/embed", token="ignored") as client:
        raw = client.feature_extraction(TEXTS[0], normalize=False)
        left = client.feature_extraction(LONG, truncate=True, truncation_direction="left")
        short = client.feature_extraction(TEXTS[0], dimensions=64)
        with pytest.raises(BadRequestError, match=r"inputs\[0\] has \d+ tokens, the model takes 256"):
            client.feature_extraction(LONG, truncate=False)
    assert_allclose(raw / np.linalg.norm(raw), openai_rows(server, TEXTS[:1]), atol=1e-6)
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    assert_array_equal(left, openai_rows(server, [LONG], truncate="start"))
    assert_array_equal(short, openai_rows(server, TEXTS[:1], dimensions=64))


# LangChain


def uv(command: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = ["uv", command, "--locked", "--no-progress", "--python", sys.executable, "--script", str(LANGCHAIN)]
    return subprocess.run([*line, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not the project's; LangChain's client is installed in its own environment."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not on PATH: it makes the environment of tests/clients/langchain_tei.py")
    folder = tmp_path_factory.mktemp("langchain")
    made = uv("sync", folder)
    if made.returncode != 0:
        said = " ".join(made.stderr.split())  # uv breaks lines anywhere
        if re.search(NO_INDEX, said):
            pytest.skip(f"the packages of tests/clients/langchain_tei.py.lock cannot be had: {said[-300:]}")
        pytest.fail(made.stderr)
    return folder


@pytest.mark.parametrize("path", ["/embed", ""])
def test_langchains_endpoint_embeddings_get_the_vectors(server: Server, path: str, elsewhere: Path) -> None:
    ended = uv("run", elsewhere, server.url + path, *TEXTS)
    assert ended.returncode == 0, ended.stderr
    vectors = json.loads(ended.stdout)
    expected = openai_rows(server, [text.replace("\n", " ") for text in TEXTS])  # which is what LangChain makes of them
    assert_allclose(vectors["documents"], expected, atol=1e-6)
    assert_allclose(vectors["awaited"], expected, atol=1e-6)
    assert_allclose(vectors["query"], expected[0], atol=1e-6)
