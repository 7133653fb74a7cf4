"""Makes pooled.safetensors: what colpali-engine's hierarchical pooling gives of the expected vectors.

Run with colpali-engine 0.3.18, torch 2.13.0, scipy 1.17.1, outside this project's environment, whose torch is too new
for that package: `python tests/data/colqwen2_5/make_pooled.py`.
"""

from pathlib import Path

from colpali_engine.compression.token_pooling import HierarchicalTokenPooler  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent
NAMES = ("image_0", "image_1", "page_resized", "query_1")
FACTORS = (2, 3, 5)


def main() -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    pooler = HierarchicalTokenPooler()
    pooled = {
        f"{name}.factor_{factor}": pooler.pool_embeddings([expected[name]], pool_factor=factor)[0]
        for name in NAMES
        for factor in FACTORS
    }
    save_file(pooled, FOLDER / "pooled.safetensors")


if __name__ == "__main__":
    main()
