"""open_clip's tokenizers on the `tokenizers` library: the same ids, with the length checked and cutting made explicit.

open_clip's own BPE is in Python, and keeps what it makes of every word that it ever saw.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from mlx_embeddings_backends.base import Item, Truncate
from mlx_embeddings_backends.dual_encoder import end_token
from mlx_embeddings_backends.errors import InputError, ModelError, UnsupportedModel
from mlx_embeddings_backends.tokenization import TextTokenizer, Tokens
from mlx_embeddings_backends.torch.open_clip_library import open_clip

Clean = Callable[[str], str]

CONTEXT_LENGTH: Final = 77  # where a config gives none
_CLEANERS: Final = ("lower", "whitespace", "canonicalize")
_LONGEST_TOKEN: Final = 64  # characters: a token of more is rare
# Of its configs' tokenizer_kwargs those that are known here.
_SIMPLE_ARGUMENTS: Final = ("clean", "additional_special_tokens")
_HUB_ARGUMENTS: Final = ("clean", "strip_sep_token")
# What leaves nothing of itself. Newlines are kept apart: mojibake is mended line by line.
_BLANKS: Final = re.compile(r"[\s\x00-\x1f]{2,}")


class OpenClipTokenizer:
    """Texts cleaned in Python, then tokenised. Token ids given by the caller are used as they are."""

    def __init__(
        self, tokenizer: Tokenizer, clean: Clean, *, max_tokens: int, vocabulary_size: int, pad_id: int
    ) -> None:
        self.pad_id = pad_id
        self.max_tokens = max_tokens
        self._clean = clean
        self._tokenizer = TextTokenizer(tokenizer, max_tokens=max_tokens, vocabulary_size=vocabulary_size)
        self.replaced_ids: tuple[int, int] | None = None  # an id that the model never saw, and what stands in its place
        self.end_id = end_token(tokenizer)

    def encode(self, items: Sequence[Item], truncate: Truncate) -> list[Tokens]:
        """In the order of the items. Raises `InputTooLong`, `InvalidTokenId` or `EmptyInput`."""
        squeezed = [self._squeezed(item) for item in items]
        most = self.max_tokens * _LONGEST_TOKEN
        tokens = self._tokenizer.encode([self._cleaned(item, truncate, most) for item in squeezed], truncate)
        for place, item in enumerate(squeezed):
            is_part = isinstance(item.content, str) and len(item.content) > most
            if is_part and not tokens[place].truncated:  # of entities, say, of which little is left
                try:
                    [tokens[place]] = self._tokenizer.encode([self._cleaned(item, truncate)], truncate)
                except InputError as error:
                    raise error.within([place]) from None
        return [self._replaced(item, each) for item, each in zip(items, tokens, strict=True)]

    def _squeezed(self, item: Item) -> Item:
        """A long text without long runs of blanks, each of which would take time."""
        if not isinstance(item.content, str) or len(item.content) <= self.max_tokens * _LONGEST_TOKEN:
            return item
        content = _BLANKS.sub(lambda blanks: "\n" if "\n" in blanks[0] else " ", item.content)
        return Item(content, prompt=item.prompt)

    def _cleaned(self, item: Item, truncate: Truncate, most: int | None = None) -> Item:
        """The text as it is tokenised, of a very long one its first or last `most` characters."""
        content = item.content
        if not isinstance(content, str):
            return item
        if most is not None:
            content = content[-most:] if truncate == "start" else content[:most]
        text = self._clean(item.prompt + content)
        prompt = self._clean(item.prompt) if item.prompt else ""
        if not text.startswith(prompt):  # what follows has changed how its end is read
            prompt = ""
        return Item(text[len(prompt) :], prompt=prompt)

    def _replaced(self, item: Item, tokens: Tokens) -> Tokens:
        if self.replaced_ids is None or not isinstance(item.content, str):
            return tokens
        ids = tokens.ids.copy()
        ids[ids == self.replaced_ids[0]] = self.replaced_ids[1]
        return replace(tokens, ids=ids)


def read_tokenizer(folder: Path, config: Mapping[str, Any], *, vocabulary_size: int) -> OpenClipTokenizer:
    """By the text_cfg of open_clip_config.json: open_clip's own, or one that the folder has to hold.

    Raises `ModelError`.
    """
    max_tokens = config.get("context_length", CONTEXT_LENGTH)
    arguments = dict(config.get("tokenizer_kwargs") or {})
    name = config.get("hf_tokenizer_name")
    if unknown := sorted(arguments.keys() - (_HUB_ARGUMENTS if name else _SIMPLE_ARGUMENTS)):
        raise UnsupportedModel(f"open_clip_config.json: the tokenizer's {unknown[0]} is not known here")
    if mode := config.get("tokenizer_mode"):
        raise UnsupportedModel(f"open_clip_config.json: tokenizer_mode {mode!r} is not known here")
    clean = arguments.pop("clean", "whitespace" if name else "lower")
    if clean not in _CLEANERS:
        raise UnsupportedModel(f"open_clip_config.json: cleaning texts by {clean!r} is not known here")
    cleaner: Clean = open_clip.tokenizer.get_clean_fn(clean)
    if not name:
        simple = open_clip.SimpleTokenizer(**arguments)

        def words(text: str) -> str:
            return " ".join(simple.pat.findall(cleaner(text)))

        return OpenClipTokenizer(
            _of_words(simple), words, max_tokens=max_tokens, vocabulary_size=vocabulary_size, pad_id=0
        )
    own = _read_hub_tokenizer(folder, str(name))
    made = OpenClipTokenizer(
        own.backend_tokenizer, cleaner, max_tokens=max_tokens, vocabulary_size=vocabulary_size, pad_id=own.pad_token_id
    )
    if arguments.get("strip_sep_token"):
        made.replaced_ids = (own.sep_token_id, 0)
    return made


def _of_words(simple: Any) -> Tokenizer:
    """open_clip's own BPE, of a text whose words stand between spaces."""
    tokenizer = Tokenizer(
        models.BPE(simple.encoder, list(simple.bpe_ranks), end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    specials = [simple.decoder[each] for each in simple.all_special_ids]
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in specials])
    start, end = simple.decoder[simple.sot_token_id], simple.decoder[simple.eot_token_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, simple.sot_token_id), (end, simple.eot_token_id)]
    )
    return tokenizer


def _read_hub_tokenizer(folder: Path, name: str) -> Any:
    """transformers' own, of the folder's files and of nothing else."""
    remedy = f"put the files of the tokenizer {name!r} beside open_clip_config.json, which asks for it"
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"the model's folder has no tokenizer.json: {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ModelError(f"the tokenizer in the model's folder cannot be read ({error}): {remedy}") from error
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise UnsupportedModel(f"the tokenizer in the model's folder fills no texts up on the right: {remedy}")
    return tokenizer
