"""A checkpoint's small files, read with errors for the person who typed the command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from mlx_embeddings_backends.errors import ModelError, UnsupportedModel

# Of a BERT whose files say nothing else.
BERT_TOKENS: Final = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")}
# Keys of tokenizer_config.json that may hold tokens beyond those.
_MORE_TOKENS: Final = ("additional_special_tokens", "extra_special_tokens", "never_split")


def read_json(file: Path) -> Any:
    """Raises `UnsupportedModel`."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UnsupportedModel(f"the model's folder has no {file.name}") from None
    except ValueError as error:
        raise UnsupportedModel(f"{file.name} is not JSON: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises `UnsupportedModel`."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{file.name} is not a JSON object")
    return content


def read_optional_object(file: Path) -> dict[str, Any]:
    """The same, but empty where there is no such file."""
    return read_object(file) if file.exists() else {}


def read_tokenizer(folders: Sequence[Path], *, remedy: str = "") -> Tokenizer:
    """tokenizer.json of the first folder that has one. Raises `ModelError`; `remedy` ends the sentence that says so."""
    for folder in folders:
        file = folder / "tokenizer.json"
        if not file.is_file():
            continue
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelError(f"tokenizer.json cannot be read: {error}") from error
    raise ModelError(
        f"the checkpoint has no tokenizer.json: save its tokenizer with transformers' `save_pretrained`{remedy}"
    )


def special_tokens(folder: Path) -> dict[str, str]:
    """The tokens that have a name, such as `sep_token`, as transformers finds them in the tokenizer's JSON files."""
    return {name: token.content for name, token in _named_tokens(folder).items()}


def make_bert_tokenizer(folder: Path) -> Tokenizer:
    """Of vocab.txt and the tokenizer's JSON files, as transformers' BertTokenizer makes it. Raises `ModelError`.

    The normalizer's options are left to the caller, as they are where there is a tokenizer.json.
    """
    config = read_optional_object(folder / "tokenizer_config.json")
    named = {name: AddedToken(text, special=True) for name, text in BERT_TOKENS.items()} | _named_tokens(folder)
    listed = config.get("added_tokens_decoder") or {}
    listed = [token for token in listed.values() if isinstance(token, dict)] if isinstance(listed, dict) else []
    added = {token.content: token for token in (*named.values(), *map(_added_token, listed))}
    try:
        vocabulary = models.WordPiece.read_file(str(folder / "vocab.txt"))
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=named["unk_token"].content))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"vocab.txt cannot be read: {error}") from error
    others = (folder / "added_tokens.json").exists() or any(map(config.get, _MORE_TOKENS))
    if others or not added.keys() <= vocabulary.keys():
        raise ModelError("the checkpoint has no tokenizer.json, and special tokens that its vocab.txt has not")
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_tokens(list(added.values()))
    sep, cls = ((named[name].content, vocabulary[named[name].content]) for name in ("sep_token", "cls_token"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    return tokenizer


def _named_tokens(folder: Path) -> dict[str, AddedToken]:
    config = read_optional_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_optional_object(folder / "special_tokens_map.json")
    named = {name: token for name, token in config.items() if name.endswith("_token") and token}
    return {name: _added_token(token) for name, token in named.items() if isinstance(token, str | dict)}


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    """As one of these files has it: a text, or an object."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(str(token.get("content")), special=True, **flags)


def weight_files(folder: Path) -> list[Path]:
    """safetensors, else PyTorch's pickles: the file of the usual name, else those that an index names.

    Else all safetensors that there are, as some MLX checkpoints have them. Raises `ModelError`.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json")
        if files := sorted(folder.glob("*.safetensors")):
            return files
    raise ModelError("the model's folder has no weights: no safetensors, and no pytorch_model.bin")


def _indexed(index: Path) -> list[Path]:
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index.name} is no index of weights")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        is_weights = Path(name).name == name and name.endswith((".safetensors", ".bin"))
        if not is_weights or not (index.parent / name).is_file():
            raise ModelError(f"{index.name} names {name!r}, which is no file of weights in the model's folder")
    return [index.parent / name for name in names]
