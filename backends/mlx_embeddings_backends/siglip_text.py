"""SigLIP's texts: how transformers' tokenizer of that name writes them, and what fills them up."""

from pathlib import Path

from tokenizers import Regex, normalizers

from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.files import read_optional_object, read_tokenizer
from mlx_embeddings_backends.tokenization import TextTokenizer


def read_siglip_tokenizer(folder: Path, *, positions: int, vocabulary_size: int) -> tuple[TextTokenizer, int]:
    """The tokenizer, and the id of the token that fills a text up. Raises `ModelError`."""
    config = read_optional_object(folder / "tokenizer_config.json")
    tokenizer = read_tokenizer([folder])
    if config.get("tokenizer_class") == "SiglipTokenizer":
        # That class does this to a text, whether or not tokenizer.json says so. Doing it twice changes nothing.
        steps: list[normalizers.Normalizer] = [
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
        if config.get("do_lower_case", True):
            steps.insert(0, normalizers.Lowercase())
        if tokenizer.normalizer is not None:
            steps.append(tokenizer.normalizer)
        tokenizer.normalizer = normalizers.Sequence(steps)
    token = config.get("pad_token") or read_optional_object(folder / "special_tokens_map.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    pad_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if pad_id is None:
        raise ModelError("the checkpoint's tokenizer_config.json names no pad_token that its tokenizer has")
    max_tokens = int(min(config.get("model_max_length") or positions, positions))
    return TextTokenizer(tokenizer, max_tokens=max_tokens, vocabulary_size=vocabulary_size), int(pad_id)
