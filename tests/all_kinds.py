"""A file of five models, one of each kind, and one that cannot be loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.checkpoints import sentence_transformer
from tests.conftest import DATA
from tests.rerank_checkpoints import reranker
from tests.sparse_checkpoints import splade

COLQWEN = DATA / "colqwen2_5"
BGE_M3 = DATA / "bge_m3"
KINDS = ("dense", "sparse", "reranker", "pages", "bge-m3")


def models_file(folder: Path, **settings: Any) -> Path:
    """models.yaml in `folder`, and the checkpoints that are made for it."""
    broken = sentence_transformer(folder / "broken")
    for weights in broken.rglob("model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    models: dict[str, dict[str, Any]] = {
        "dense": {"name": sentence_transformer(folder / "dense", prompts={"query": "query: "}), "aliases": ["d"]},
        "sparse": {"name": splade(folder / "sparse"), "type": "sparse-embeddings"},
        "reranker": {"name": reranker(folder / "reranker"), "type": "rerank"},
        "pages": {"name": shutil.copytree(COLQWEN / "checkpoint", folder / "pages")},
        "bge-m3": {"name": shutil.copytree(BGE_M3 / "checkpoint", folder / "bge-m3")},
        "broken": {"name": broken},
    }
    content = {"backend": "torch", "dtype": "float32", **settings, "models": models}
    file = folder / "models.yaml"
    file.write_text(json.dumps(content, default=str))  # JSON is YAML
    return file
