"""What vectors are kept under: another key for everything that decides them, the same for all that does not."""

import asyncio
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_embeddings_backends.base import EncodedImage, Item, Pair
from mlx_embeddings_backends.checkpoints import Checkpoint
from mlx_embeddings_backends.hub import Snapshot
from mlx_embeddings_server.cache.identity import files_of, identity_of
from mlx_embeddings_server.cache.keys import Keys, canonical, keys_of
from tests.scripted import ScriptedBackend

TEXT = st.text(st.characters(), max_size=4) | st.sampled_from(["", "0:", "4:text", "n0:", "a" * 70_000])
CONTENT = st.one_of(
    TEXT,
    st.lists(st.integers(-5, 70_000) | st.integers(2**62, 2**66), min_size=1, max_size=3).map(tuple),
    st.builds(
        EncodedImage,
        st.binary(max_size=4) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.none() | TEXT,
    ),
    st.builds(Pair, TEXT, TEXT),
)
ITEMS = st.builds(
    Item,
    CONTENT,
    TEXT,
    st.sampled_from([None, "query", "document"]),
    st.none() | TEXT,
    st.sampled_from([(), ("dense",), ("dense", "sparse"), ("sparse", "dense")]),
    st.none() | st.integers(1, 20),
)


def key(item: Item, identity: bytes = b"model", truncate: Any = "none") -> bytes:
    return Keys(identity, truncate).of(item)


@given(ITEMS, ITEMS)
def test_items_have_the_same_key_when_they_are_equal_and_only_then(first: Item, second: Item) -> None:
    assert (key(first) == key(second)) == (first == second)


@given(
    *[st.recursive(st.none() | TEXT | st.binary(max_size=3) | st.integers(), lambda each: st.lists(each).map(tuple))]
    * 2
)
def test_encodings_are_equal_when_values_are(first: Any, second: Any) -> None:
    assert (canonical(first) == canonical(second)) == (first == second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Item("c", prompt="ab"), Item("bc", prompt="a")),
        (Item(Pair("ab", "c")), Item(Pair("a", "bc"))),
        (Item(Pair("a", "")), Item("a")),
        (Item("a", role="query"), Item("a", prompt="query")),
        (Item("a", adapter="x"), Item("a", prompt="x")),
        (Item("1,2"), Item((1, 2))),
        (Item((1, 2)), Item((1, 2, 0))),
        (Item((12,)), Item((1, 2))),
        (Item((2**64,)), Item((0,))),
        (Item("png"), Item(EncodedImage(b"png"))),
        (Item(EncodedImage(b"png")), Item(EncodedImage(b"png", ""))),
        (Item(EncodedImage(b"pn", "g")), Item(EncodedImage(b"png", ""))),
        (Item("a", outputs=("dense", "sparse")), Item("a", outputs=("sparse", "dense"))),
    ],
)
def test_what_reads_the_same_when_it_is_joined_has_keys_of_its_own(first: Item, second: Item) -> None:
    assert key(first) != key(second)


def test_every_field_of_an_item_is_part_of_its_key() -> None:
    others = {
        "content": "b",
        "prompt": "p",
        "role": "query",
        "adapter": "x",
        "outputs": ("dense",),
        "max_active_dims": 3,
    }
    assert others.keys() == {field.name for field in fields(Item)}
    keys = {key(Item("a")), *(key(replace(Item("a"), **{name: other})) for name, other in others.items())}  # type: ignore[arg-type]
    assert len(keys) == 1 + len(others)


def test_the_model_and_the_truncation_are_part_of_the_key() -> None:
    assert len({key(Item("a")), key(Item("a"), b"other"), key(Item("a"), truncate="end")}) == 3


def test_texts_that_are_hashed_in_parts_or_in_a_thread_have_the_keys_that_they_have_alone() -> None:
    items = [Item(text) for text in ("short", "wörd " * 100_000, "a" * 65_536, "a" * 65_537, "\ud800" * 70_000)]
    assert asyncio.run(keys_of(b"model", items, "none")) == [key(item) for item in items]


INFO = ScriptedBackend.info


def checkpoint(folder: Path, **more: Any) -> Checkpoint:
    return Checkpoint(Snapshot(folder, "toy", None, "local"), folder, **more)


def model_folder(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_copy_of_a_folder_is_the_same_model_wherever_and_whenever(tmp_path: Path) -> None:
    first = model_folder(tmp_path / "first")
    second = tmp_path / "elsewhere" / "second"
    shutil.copytree(first, second)
    os.utime(second / "model.safetensors", (1, 1))
    (second / "README.md").write_text("not served")
    assert files_of(checkpoint(first)) == files_of(checkpoint(second))


def test_other_weights_of_the_same_size_and_time_are_another_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "toy", b"one")
    before, times = files_of(checkpoint(folder)), (folder / "model.safetensors").stat()
    (folder / "model.safetensors").write_bytes(b"two")
    os.utime(folder / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files_of(checkpoint(folder)) != before


def test_base_and_adapters_and_their_order_are_part_of_the_model(tmp_path: Path) -> None:
    folder, one, two = (model_folder(tmp_path / name, name.encode()) for name in ("toy", "one", "two"))
    several = [
        checkpoint(folder),
        checkpoint(folder, base=one),
        checkpoint(folder, base=two),
        checkpoint(folder, adapters={"one": one}),
        checkpoint(folder, adapters={"one": one, "two": two}),
        checkpoint(folder, adapters={"two": two, "one": one}),
        checkpoint(folder, adapters={"one": two, "two": one}),
    ]
    assert len({files_of(each) for each in several}) == len(several)


def test_of_the_hubs_cache_the_commit_and_the_files_that_are_here_say_what_the_model_is(tmp_path: Path) -> None:
    first = model_folder(tmp_path / "a" / "models--o--toy" / "snapshots" / ("1" * 40))
    same = model_folder(tmp_path / "b" / "models--o--toy" / "snapshots" / ("1" * 40))
    other_commit = model_folder(tmp_path / "a" / "models--o--toy" / "snapshots" / ("2" * 40))
    other_model = model_folder(tmp_path / "a" / "models--o--other" / "snapshots" / ("1" * 40))
    identity = files_of(checkpoint(first))
    assert files_of(checkpoint(same)) == identity
    assert identity not in {files_of(checkpoint(other_commit)), files_of(checkpoint(other_model))}
    (same / "modules.json").write_text("[]")  # the same commit, of which more is here
    assert files_of(checkpoint(same)) != identity


def test_what_rounds_otherwise_has_an_identity_of_its_own() -> None:
    several = [
        identity_of(b"files", INFO, "torch.bert:Bert", None, None),
        identity_of(b"other", INFO, "torch.bert:Bert", None, None),
        identity_of(b"files", replace(INFO, dtype="bfloat16"), "torch.bert:Bert", None, None),
        identity_of(b"files", replace(INFO, device="cuda:0"), "torch.bert:Bert", None, None),
        identity_of(b"files", replace(INFO, backend="mlx"), "torch.bert:Bert", None, None),
        identity_of(b"files", INFO, "mlx.bert:Bert", None, None),
        identity_of(b"files", INFO, "torch.bert:Bert", "rerank", None),
        identity_of(b"files", INFO, "torch.bert:Bert", None, 768),
    ]
    assert len(set(several)) == len(several)


def test_the_number_of_a_gpu_is_no_part_of_the_identity() -> None:
    first, second = (identity_of(b"", replace(INFO, device=device), "", None, None) for device in ("cuda:0", "cuda:1"))
    assert first == second
