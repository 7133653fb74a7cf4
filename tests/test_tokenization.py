"""Texts of any size, against the tokenizers library's own truncation."""

import pytest
from tokenizers import Tokenizer

from mlx_embeddings_backends.base import Item, Truncate
from mlx_embeddings_backends.errors import InputTooLong, InvalidTokenId
from mlx_embeddings_backends.hub import resolve
from mlx_embeddings_backends.tokenization import TextTokenizer
from tests.peak_memory import run_alone
from tests.server import MINILM

MAX_TOKENS = 256
WORDS = "the river runs, unbelievably slowly, past 3 old stone houses (and a naïve 東京 café) "


def minilm_file() -> str:
    return str(resolve(MINILM).path / "tokenizer.json")


@pytest.fixture(scope="module")
def ours() -> TextTokenizer:
    return TextTokenizer(Tokenizer.from_file(minilm_file()), max_tokens=MAX_TOKENS, vocabulary_size=30522)


@pytest.mark.parametrize(("truncate", "direction"), [("end", "right"), ("start", "left")])
@pytest.mark.parametrize("size", [500, 16_380, 16_390, 100_000, 600_000])
def test_a_long_text_is_cut_as_the_library_cuts_it(
    ours: TextTokenizer, truncate: Truncate, direction: str, size: int
) -> None:
    library = Tokenizer.from_file(minilm_file())
    library.no_padding()
    library.enable_truncation(MAX_TOKENS, direction=direction)
    text = (WORDS * (size // len(WORDS) + 1))[:size]
    [short, tokens] = ours.encode([Item("short"), Item(text)], truncate)
    assert short.ids.tolist() == library.encode("short").ids and not short.truncated
    assert tokens.ids.tolist() == library.encode(text).ids
    assert tokens.truncated == (size > 500)


def test_a_long_text_of_few_tokens_is_not_too_long(ours: TextTokenizer) -> None:
    spaces = " " * 100_000
    [plain, padded] = ours.encode([Item("a word"), Item(f"{spaces}a{spaces}word{spaces}")], "none")
    assert padded.ids.tolist() == plain.ids.tolist()


def test_indexes_hold_across_many_texts(ours: TextTokenizer) -> None:
    items = [Item(f"{WORDS * 100} {number}") for number in range(60)]  # more than are tokenised at once
    with pytest.raises(InputTooLong) as caught:
        ours.encode([Item("short"), *items], "none")
    assert [index for index, _ in caught.value.lengths] == list(range(1, 61))
    with pytest.raises(InvalidTokenId) as wrong:
        ours.encode([*items, Item((1, 30522))], "end")
    assert wrong.value.index == 60


MEMORY = """
from tokenizers import Tokenizer
from mlx_embeddings_backends.base import Item
from mlx_embeddings_backends.tokenization import TextTokenizer
from tests.peak_memory import peak_megabytes

tokenizer = TextTokenizer(Tokenizer.from_file({file!r}), max_tokens=256, vocabulary_size=30522)
for items in ([Item("a," * 500_000)], [Item("a," * 8_000 + str(place)) for place in range(60)]):
    before = peak_megabytes()
    tokenizer.encode(items, "end")
    grown = peak_megabytes() - before
    assert grown < 120, grown  # a token takes 400 bytes until it is an id
"""


def test_a_million_tokens_take_no_hundreds_of_megabytes() -> None:
    run_alone(MEMORY.format(file=minilm_file()))
