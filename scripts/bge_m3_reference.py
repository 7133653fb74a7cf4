# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "FlagEmbedding==1.3.5",
#     "torch==2.15.0", # the project's own, in uv.lock: one download serves both
#     "transformers==4.57.6", # FlagEmbedding 1.3.5 imports what transformers 5 no longer has
# ]
#
# [tool.uv]
# build-constraint-dependencies = ["setuptools==84.2.1"] # FlagEmbedding is published as source only
# exclude-dependencies = ["aiohttp", "ir-datasets", "sentence-transformers"] # which no vector takes
# ///
"""Write a tiny BGE-M3 with random weights, and what BGE-M3's own library FlagEmbedding makes of texts with it.

`uv run --script scripts/bge_m3_reference.py FOLDER [--seed N]` makes, and overwrites:

    FOLDER/checkpoint/             an XLM-R of 2 layers, 32 dimensions and 96 tokens, with the files that BAAI/bge-m3
                                   has: modules.json, colbert_linear.pt, sparse_linear.pt
    FOLDER/expected.safetensors    of the n-th text, float32: "n.dense" [32] and "n.multi_vector" [vectors, 32], both
                                   normalised; its sparse vector "n.indices", ascending, and "n.values"
    FOLDER/texts.json              the texts

Each text is run by itself, and cut to 96 tokens. A seed gives the same vectors each time. Only the package index is
asked for anything.

FlagEmbedding is by those who trained BGE-M3, so it says what the vectors are. It is no dependency of the server: it
takes no transformers of 5.x, which the server runs with, and 4.57.6 is affected by CVE-2026-4372 (a crafted config.json
runs code) and CVE-2026-5241. So it lives in this script's own environment, locked beside it, and the script reads no
model but the one that it has just written.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from FlagEmbedding import BGEM3FlagModel  # type: ignore[import-not-found]
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizerFast  # type: ignore[attr-defined]  # 4.x

HIDDEN = 32
MAX_TOKENS = 96

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
WORDS = (
    "the of and to in is that for it as was with be by on not this have from or an they which one you all there when "
    "what model paper attention language graph neural deep learning protein gene cell data method results river stone"
)
CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
PIECES = ["▁", *("▁" + word for word in WORDS.split()), "s", "ed", "ing", "er", "ly", *CHARACTERS]

TEXTS = (
    "deep learning",
    "the river and the stone, the river and the stone: the river",
    "Über the naïve 細胞 model: β-actin, of the data",
    "",
    "the data of <mask> and </s> in <unk>, the <pad> of <s> and the data",
    "q",
    "we had the data of protein and gene in cell, " * 3,
    "of a text longer than the model reads, what is in the end of it is not read: " * 4,
)

MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
)
POOLING = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
SETTINGS = {"max_seq_length": MAX_TOKENS, "do_lower_case": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    options = parser.parse_args()

    folder: Path = options.folder
    write_checkpoint(folder / "checkpoint", torch.Generator().manual_seed(options.seed))
    save_file(vectors(folder / "checkpoint"), folder / "expected.safetensors")
    (folder / "texts.json").write_text(json.dumps(TEXTS, ensure_ascii=False, indent=1) + "\n")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}: {file.stat().st_size} bytes")


def write_checkpoint(folder: Path, random: torch.Generator) -> None:
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(MODULES, indent=2))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING, indent=2))
    (folder / "sentence_bert_config.json").write_text(json.dumps(SETTINGS, indent=2))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    model = XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=MAX_TOKENS + 2,  # the first one is pad_token_id + 1
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    )
    fill(model.named_parameters(), random)
    model.save_pretrained(folder)
    for name, outputs, shift in (("colbert_linear.pt", HIDDEN, 0), ("sparse_linear.pt", 1, -0.6)):
        head = nn.Linear(HIDDEN, outputs)
        fill(head.named_parameters(), random)
        head.bias.data += shift  # some tokens are to have no weight
        torch.save(head.half().state_dict(), folder / name)  # as BAAI has them


def make_tokenizer() -> XLMRobertaTokenizerFast:
    """XLM-R's kind: pieces with a log probability each, and of these the likeliest split."""
    pieces = dict.fromkeys([*SPECIAL, *PIECES])
    made = Tokenizer(models.Unigram([(piece, -10.0 + len(piece)) for piece in pieces], unk_id=SPECIAL.index("<unk>")))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.add_special_tokens([AddedToken(name, normalized=False) for name in (*SPECIAL, "<mask>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return XLMRobertaTokenizerFast(tokenizer_object=made, model_max_length=MAX_TOKENS)


def fill(parameters: Iterable[tuple[str, nn.Parameter]], random: torch.Generator) -> None:
    """Weights large enough that no part of the model is lost in rounding."""
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=random)
            if "LayerNorm.weight" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embeddings" in name else 1.2 / parameter.shape[1] ** 0.5))


def vectors(folder: Path) -> dict[str, Tensor]:
    model = BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu")
    made: dict[str, Tensor] = {}
    for place, text in enumerate(TEXTS):
        outputs = model.encode(
            text, max_length=MAX_TOKENS, return_dense=True, return_sparse=True, return_colbert_vecs=True
        )
        weights = {int(token): float(weight) for token, weight in outputs["lexical_weights"].items()}
        made |= {
            f"{place}.dense": torch.from_numpy(outputs["dense_vecs"].copy()),
            f"{place}.multi_vector": torch.from_numpy(outputs["colbert_vecs"].copy()),
            f"{place}.indices": torch.tensor(sorted(weights), dtype=torch.int32),
            f"{place}.values": torch.tensor([weights[token] for token in sorted(weights)]),
        }
    return made


if __name__ == "__main__":
    main()
