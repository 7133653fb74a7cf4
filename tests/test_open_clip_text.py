"""Texts as open_clip's own tokenizer has them: their ids, their length, and what they cost."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mlx_embeddings_backends.base import Backend, Item
from mlx_embeddings_backends.errors import (
    InputTooLong,
    InvalidTokenId,
    MissingEndToken,
)
from tests.checkpoints import WORDS
from tests.clip_checkpoints import (
    IMAGES,
    Reference,
    open_clip_folder,
)
from tests.parity import distance, embed, load

TOLERANCE = 1e-5  # of any component of a unit vector, in float32
START, END = 49406, 49407


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference.of(folder)


@pytest.mark.parametrize(
    "text",
    [
        " ", "\n\t", "a", "A\u0301 e\u0301", "it's we'LL I'VE 'tis", "&lt;b&gt; &amp;amp; &#39;", "Ã©tÃ© â€œquotâ€\x9d",
        "1234 12.5 ½ Ⅷ ٣", "<end_of_text>", "a<end_of_text>b", "!<end_of_text>", "<START_OF_TEXT> a", "a_b-c/d\\e",
        "東京タワー 한국어 ไทย", "🙂👍🏽\u200d🚀", "İstanbul ſ ß ﬁ", "\x00a\x1cb\x85c\u3000d\u200be", "word " * 100,
        "x" * 3000,
    ],
)  # fmt: skip
def test_token_ids_are_open_clips_own(backend: Backend, reference: Reference, text: str) -> None:
    [prepared] = backend.prepare([Item(text)], "end")
    expected = reference.tokenizer([text])[0].tolist()
    ids = prepared.payload.tolist()
    assert ids + [0] * (77 - len(ids)) == expected
    assert prepared.truncated == (len(text) >= 500)


def test_too_long_a_text(backend: Backend, reference: Reference) -> None:
    long = " ".join(WORDS * 2)
    tokens = len(reference.tokenizer.encode(long)) + 2
    assert tokens > 100
    with pytest.raises(InputTooLong) as caught:
        backend.prepare([IMAGES[0], Item("the"), Item(long)])
    assert (caught.value.lengths, caught.value.max_tokens) == ([(2, tokens)], 77)
    [end] = backend.prepare([Item(long)], "end")
    assert end.truncated and end.payload.tolist() == reference.tokenizer([long])[0].tolist()
    [start] = backend.prepare([Item(long)], "start")
    assert start.payload.tolist() == [START, *reference.tokenizer.encode(long)[-75:], END]


def test_a_prompt_goes_before_the_text(backend: Backend, reference: Reference) -> None:
    rows = embed(backend, [Item("fox", prompt="a photo of a "), Item("graph", prompt="photo")])
    assert distance(rows, reference.texts(["a photo of a fox", "photograph"])) < TOLERANCE
    [cut] = backend.prepare([Item("fox " * 100, prompt="a photo of a ")], "start")
    assert cut.payload.tolist()[:6] == [START, *reference.tokenizer.encode("a photo of a fox")]
    with pytest.raises(InputTooLong) as full:
        backend.prepare([Item("fox", prompt="word " * 80)], "end")
    assert full.value.prompt_fills


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("a small fox " * 500_000, "a small fox " * 100),
        (" \n" * 3_000_000 + "fox", "fox"),
        ("\0" * 3_000_000 + "fox", "fox"),
        ("&#32;" * 20_000 + "fox", "fox"),
    ],
)
def test_texts_of_megabytes_take_no_time(backend: Backend, reference: Reference, text: str, short: str) -> None:
    started = time.process_time()
    [prepared] = backend.prepare([Item(text)], "end")
    assert time.process_time() - started < 5
    ids = prepared.payload.tolist()
    assert ids + [0] * (77 - len(ids)) == reference.tokenizer([short])[0].tolist()
    if len(short) > 3:
        with pytest.raises(InputTooLong):
            backend.prepare([Item(text)])


def test_texts_are_prepared_on_many_threads(backend: Backend) -> None:
    texts = [f"a photo of fox number {number} & its ünïcode" for number in range(200)]
    with ThreadPoolExecutor(8) as threads:
        prepared = list(threads.map(lambda text: backend.prepare([Item(text)])[0].payload.tolist(), texts))
    assert prepared == [each.payload.tolist() for each in backend.prepare([Item(text) for text in texts])]


def test_token_ids_are_taken_as_they_are(backend: Backend, reference: Reference) -> None:
    whole = reference.tokenizer(["a quick brown fox"])[0].tolist()
    expected = reference.texts(["a quick brown fox"])
    for ids in (whole, whole[: whole.index(END) + 1]):  # with padding, and without
        assert distance(embed(backend, [Item(tuple(ids))]), expected) < TOLERANCE
    without_start = torch.tensor([[*whole[1:], 0]])
    with torch.inference_mode():
        expected = np.asarray(reference.model.encode_text(without_start))
    assert distance(embed(backend, [Item(tuple(whole[1 : whole.index(END) + 1]))]), expected) < TOLERANCE
    with pytest.raises(InvalidTokenId) as wrong:
        backend.prepare([IMAGES[0], Item((START, 49408, END))])
    assert wrong.value.index == 1
    # The vector is that of the end: without one it would be that of any token.
    with pytest.raises(MissingEndToken) as endless:
        backend.prepare([IMAGES[0], Item("fox"), Item((START, 320, 3712))])
    assert (endless.value.index, endless.value.token_id) == (2, END)
    [cut] = backend.prepare([Item((START, *[320] * 100, END))], "end")
    assert cut.payload.tolist() == [START, *[320] * 75, END]
