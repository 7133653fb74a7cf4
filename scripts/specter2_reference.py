# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "adapters==1.3.0",
#     "torch==2.15.0", # the project's own, in uv.lock: one download serves both
#     "transformers==4.57.6", # what adapters 1.3.0 takes
# ]
# ///
"""Write a tiny SPECTER2 with random weights, and its vectors as AdapterHub's own library `adapters` computes them.

`uv run --script scripts/specter2_reference.py FOLDER [--seed N]` makes, and overwrites:

    FOLDER/base/                   a BERT of 3 layers, 64 dimensions, 512 tokens, with a WordPiece tokenizer
    FOLDER/specter2_proximity/     an adapter of the config `seq_bn`, as `adapters` saves it
    FOLDER/specter2_adhoc_query/   another
    FOLDER/expected.json           "texts", and the vector of each: of the "base" alone, and with each adapter

A vector is the last hidden state of the first token, [64], float32, not normalised, of a text run by itself and cut
to 512 tokens. A seed gives the same files each time. Only the package index is asked for anything.

`adapters` is by those who defined these adapters and their files, so it says what the vectors are. It is no dependency
of the server: it takes no transformers but 4.57, from 4.57.6 on, which CVE-2026-4372 (a crafted config.json runs code)
and CVE-2026-5241 affect, and which cannot share an environment with mlx-vlm (transformers >= 5.14). So it lives in this
script's own environment, locked beside it, and the script reads no model but the one that it has just written.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from adapters import BertAdapterModel, SeqBnConfig  # type: ignore[import-not-found]
from torch import nn
from transformers import BatchEncoding, BertConfig, BertModel, BertTokenizerFast  # type: ignore[attr-defined]  # of 4.x

BASE = "allenai/specter2_base"  # an adapter's config names the model that it was trained on
ADAPTERS = ("specter2_proximity", "specter2_adhoc_query")
MAX_TOKENS = 512

CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do model paper attention language "
    "graph neural deep learning transformer protein gene cell data method results"
)
VOCABULARY = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *CHARACTERS,
    *("##" + character for character in "abcdefghijklmnopqrstuvwxyz0123456789"),
    *WORDS.split(),
]
CLAUSE = "we had the data of protein and gene in cell, "
TEXTS = (
    "Attention is all you need[SEP]the model is a new transformer with attention and no graph.",
    "deep learning",
    "Protein language model: data and method for gene and cell results in time[SEP]" + CLAUSE * 8,
    "q",
    "A paper of no abstract[SEP]",
    "Über the naïve 細胞 model[SEP]β-actin and α-helix: 3.5 ± 0.2 Å, of [MASK] data",
    "The first of two models, more than what can be read[SEP]" + CLAUSE * 100,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    options = parser.parse_args()

    folder: Path = options.folder
    random = torch.Generator().manual_seed(options.seed)
    write_base(folder / "base", random)
    for name in ADAPTERS:
        write_adapter(folder / name, folder / "base", random)
    (folder / "expected.json").write_text(json.dumps({"texts": TEXTS, **vectors(folder)}))
    for file in sorted(path for part in ("base", *ADAPTERS, "expected.json") for path in files(folder / part)):
        print(f"{file}: {file.stat().st_size} bytes")


def write_base(folder: Path, random: torch.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=MAX_TOKENS).save_pretrained(folder)
    model = BertModel(
        BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=MAX_TOKENS,
        )
    )
    fill(model.named_parameters(), random, gain=1.2)
    model.save_pretrained(folder)


def write_adapter(folder: Path, base: Path, random: torch.Generator) -> None:
    name = folder.name
    model = BertAdapterModel.from_pretrained(base)
    model.config.name_or_path = BASE
    model.add_adapter(name, config=SeqBnConfig(reduction_factor=4))
    fill(((key, value) for key, value in model.named_parameters() if f".adapters.{name}." in key), random, gain=1.0)
    model.save_adapter(folder, name, with_head=False)


def fill(parameters: Iterable[tuple[str, nn.Parameter]], random: torch.Generator, gain: float) -> None:
    """Weights large enough that no part of the model is lost in rounding: untrained adapters all but pass by."""
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=random)
            if "LayerNorm.weight" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                scale = 0.5 if "embeddings" in name else gain / parameter.shape[1] ** 0.5
                parameter.copy_(scale * noise)


def vectors(folder: Path) -> dict[str, list[list[float]]]:
    """Of each text, from the files: under "base", and under each adapter's name."""
    tokenizer = BertTokenizerFast.from_pretrained(folder / "base")
    encoded = [tokenizer(text, truncation=True, return_tensors="pt") for text in TEXTS]
    model = BertAdapterModel.from_pretrained(folder / "base").eval()
    made = {"base": first_tokens(model, encoded)}
    for name in ADAPTERS:
        model.load_adapter(str(folder / name), load_as=name, set_active=True)  # in place of the one before
        made[name] = first_tokens(model, encoded)
    return made


@torch.inference_mode()
def first_tokens(model: nn.Module, encoded: Sequence[BatchEncoding]) -> list[list[float]]:
    rows = [model(**tokens).last_hidden_state[0, 0].tolist() for tokens in encoded]  # [64] each
    return [[round(value, 7) for value in row] for row in rows]


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]


if __name__ == "__main__":
    main()
