"""BERT's tokenizer where there is no tokenizer.json, beside transformers' own."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import BertTokenizer

from mlx_embeddings_backends.base import Item
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.files import make_bert_tokenizer
from tests import parity
from tests.conftest import DATA
from tests.mlx_checkpoints import changed_json

TEXTS = [
    "Attention is all you need[SEP]the Model of 3 papers.",
    "[CLS] [SEP][sep] [MASK]model[PAD] [UNK] [unused0]",
    "naïve Éö ÀÇ façade\u0301, 中文の語 한국어 ы",
    "un\tbroken\r\nlines \u200b\u00a0 and\x00 control\x07s",
    "a" * 120 + " x_y-z@example.org (3.14%) “quoted” …",
    "q",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("tokenizer.json")
    return Path(shutil.copytree(DATA / "specter2" / "base", tmp_path / "base", ignore=ignored))


def ids(folder: Path) -> list[list[int]]:
    backend = parity.load(folder, backend="mlx")
    return [prepared.payload.tolist() for prepared in backend.prepare([Item(text) for text in TEXTS])]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"added_tokens_decoder": None},
        {"added_tokens_decoder": None, "sep_token": None},
        {"sep_token": "[MASK]", "cls_token": "the"},
        {"unk_token": "[PAD]"},
    ],
    ids=str,
)
def test_it_is_made_of_the_vocabulary_as_transformers_makes_it(changes: dict[str, object], folder: Path) -> None:
    changed_json(folder / "tokenizer_config.json", **changes)
    if changes.get("added_tokens_decoder", ...) is None:
        (folder / "special_tokens_map.json").unlink()
    library = BertTokenizer.from_pretrained(folder)
    assert ids(folder) == library(TEXTS)["input_ids"]


def test_a_vocabulary_alone_is_enough(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    assert ids(folder) == BertTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]


def test_special_tokens_that_take_the_space_before_them(folder: Path) -> None:
    """As older versions saved them."""
    changed_json(folder / "tokenizer_config.json", added_tokens_decoder=None)
    changed_json(folder / "special_tokens_map.json", sep_token={"content": "[SEP]", "lstrip": True, "rstrip": False})
    assert ids(folder) == BertTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]


def test_tokens_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"[NEW]": 222}))
    with pytest.raises(ModelError, match="special tokens that its vocab.txt has not"):
        make_bert_tokenizer(folder)
    (folder / "added_tokens.json").unlink()
    changed_json(folder / "tokenizer_config.json", additional_special_tokens=["[NEW]"])
    with pytest.raises(ModelError, match="special tokens that its vocab.txt has not"):
        make_bert_tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"the\nof\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_vocabulary_is_refused(content: bytes, folder: Path) -> None:
    (folder / "vocab.txt").write_bytes(content)
    with pytest.raises(ModelError, match="vocab.txt"):
        make_bert_tokenizer(folder)
