"""BGE-M3's three outputs against FlagEmbedding's, which scripts/bge_m3_reference.py has made of a tiny checkpoint."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, Item, Output, Row, Rows, SparseVector, Vector
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.hub import needed
from tests import parity
from tests.conftest import DATA
from tests.mlx_checkpoints import changed_json
from tests.parity import distance, embed, load, unit

M3 = DATA / "bge_m3"
CHECKPOINT = M3 / "checkpoint"
EXPECTED = load_file(M3 / "expected.safetensors")
TEXTS: list[str] = json.loads((M3 / "texts.json").read_text())
ALL: tuple[Output, ...] = ("dense", "sparse", "multi_vector")
HEADS = ("colbert_linear.pt", "sparse_linear.pt")
TOLERANCE = 1e-5  # of any component, in float32

Outputs = Mapping[Output, Vector]


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load(CHECKPOINT)


def run(backend: Backend, items: Sequence[Item]) -> Rows:
    """All items in one batch, cut as the reference's were."""
    return backend.run(backend.collate(backend.prepare(items, "end")))


def outputs_of(row: Row) -> Outputs:
    assert isinstance(row, Mapping)
    return row


def all_outputs(backend: Backend, texts: Sequence[str] = TEXTS) -> list[Outputs]:
    return [outputs_of(row) for row in run(backend, [Item(text, outputs=ALL) for text in texts])]


def array(vector: Vector) -> NDArray[np.float32]:
    assert isinstance(vector, np.ndarray) and vector.dtype == np.float32
    return vector


def sparse(vector: Vector) -> SparseVector:
    assert isinstance(vector, SparseVector)
    assert vector.indices.dtype == np.int32 and vector.values.dtype == np.float32
    return vector


def assert_equal(row: Outputs, place: int) -> None:
    """To the reference's, once dense and multi-vector rows are normalised."""
    for name in row:
        if name == "sparse":
            found = sparse(row[name])
            assert found.indices.tolist() == EXPECTED[f"{place}.indices"].tolist()
            np.testing.assert_allclose(found.values, EXPECTED[f"{place}.values"], rtol=0, atol=TOLERANCE)
        else:
            rows = unit(np.atleast_2d(array(row[name])))
            np.testing.assert_allclose(rows, np.atleast_2d(EXPECTED[f"{place}.{name}"]), rtol=0, atol=TOLERANCE)


def copy(folder: Path, **config: Any) -> Path:
    shutil.copytree(CHECKPOINT, folder)
    changed_json(folder / "config.json", **config)
    return folder


@contextmanager
def calls_of(kind: type[nn.Module]) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what torch's modules of a kind give meanwhile, one a call."""
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, kind):
            shapes.append(tuple(output.shape))

    handle = register_module_forward_hook(note)
    try:
        yield shapes
    finally:
        handle.remove()


def test_every_output_is_that_of_flagembedding_in_a_batch_and_alone(backend: Backend) -> None:
    """Of texts with unknown, repeated and special tokens, of no token, and of more than the model reads."""
    for place, row in enumerate(all_outputs(backend)):
        assert list(row) == list(ALL)
        assert_equal(row, place)
        assert_equal(all_outputs(backend, [TEXTS[place]])[0], place)


def test_the_reference_has_what_tells_right_from_wrong() -> None:
    """Tokens that come again with another weight, tokens without weight, and texts that are cut."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    assert max(map(len, ids)) > 96 >= len(EXPECTED[f"{len(TEXTS) - 1}.multi_vector"]) + 1
    weighted = [set(EXPECTED[f"{place}.indices"].tolist()) for place in range(len(TEXTS))]
    assert any(len(own) < len(set(text) - {0, 1, 2, 3}) for own, text in zip(weighted, ids, strict=True) if own)
    assert all({0, 1, 2, 3} <= {*ids[4]} - own for own in weighted)
    assert any(text.count(token) > 1 for own, text in zip(weighted, ids, strict=True) for token in own)


def test_items_that_want_different_outputs_share_a_batch(backend: Backend) -> None:
    wanted: list[tuple[Output, ...]] = [
        (),
        ("sparse",),
        ("multi_vector", "dense"),
        ALL,
        ("dense",),
        (),
        ALL,
        ("sparse",),
    ]
    items = [Item(text, outputs=outputs) for text, outputs in zip(TEXTS, wanted, strict=True)]
    assert len({prepared.group for prepared in backend.prepare(items, "end")}) == 1
    for place, (row, outputs) in enumerate(zip(run(backend, items), wanted, strict=True)):
        named: Outputs = row if isinstance(row, Mapping) else {"dense": row}
        assert isinstance(row, Mapping) == bool(outputs)
        assert tuple(named) == (outputs or ("dense",))
        assert_equal(named, place)


def test_no_outputs_by_name_are_dense_rows_as_ever(backend: Backend) -> None:
    rows = run(backend, [Item(text) for text in TEXTS])
    assert isinstance(rows, np.ndarray) and rows.shape == (len(TEXTS), 32)
    assert distance(rows, parity.reference(CHECKPOINT).encode(TEXTS)) < TOLERANCE
    assert backend.info.normalize and (np.abs(np.linalg.norm(rows, axis=1) - 1) > 0.1).all()


def test_one_pass_gives_all_and_heads_run_on_the_tokens_of_those_who_ask(backend: Backend) -> None:
    lengths = [len(prepared.payload.ids) for prepared in backend.prepare([Item(text) for text in TEXTS], "end")]
    with calls_of(nn.LayerNorm) as passes, calls_of(nn.Linear) as heads:
        run(backend, [Item(text, outputs=("dense",)) for text in TEXTS])
        of_dense = len(passes)
        assert heads == []
        run(backend, [Item(text, outputs=ALL[: 3 * (place == 1)]) for place, text in enumerate(TEXTS)])
        assert len(passes) == 2 * of_dense
        assert sorted(heads) == [(lengths[1] - 2, 1), (lengths[1] - 1, 32)]


@pytest.mark.parametrize("ids", [(0,), (2,), (0, 2)])
def test_token_ids_of_nothing_but_special_tokens(backend: Backend, ids: tuple[int, ...]) -> None:
    row = outputs_of(run(backend, [Item(ids, outputs=ALL), Item("the river")])[0])
    assert sparse(row["sparse"]).indices.shape == (0,)
    assert array(row["multi_vector"]).shape == (len(ids) - 1, 32)
    assert array(row["dense"]).shape == (32,)


def test_token_ids_and_prompts_are_read_like_any_text(backend: Backend) -> None:
    ids = tuple(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(TEXTS[1]).ids)
    for item in (Item(ids, outputs=ALL), Item(TEXTS[1][9:], prompt=TEXTS[1][:9], outputs=ALL)):
        assert_equal(outputs_of(run(backend, [item])[0]), 1)


def test_a_sparse_vector_names_its_tokens(backend: Backend) -> None:
    found = sparse(all_outputs(backend, ["deep learning of the river, q"])[0]["sparse"])
    assert (np.diff(found.indices) > 0).all() and (found.values > 0).all()
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert backend.token_strings(found.indices.tolist()) == [tokenizer.id_to_token(each) for each in found.indices]
    assert "▁river" in (backend.token_strings(found.indices.tolist()) or [])
    assert backend.token_strings([10**6]) == [""]


def test_an_output_that_the_model_has_not(backend: Backend) -> None:
    with pytest.raises(ValueError, match="no output 'rerank'"):
        backend.prepare([Item("a"), Item("b", outputs=("dense", "rerank"))])


def test_warm_up_runs_every_head(backend: Backend) -> None:
    with calls_of(nn.Linear) as heads:
        backend.warm_up()
    assert {shape[1] for shape in heads} == {1, 32}


def test_the_model_says_what_it_gives(backend: Backend) -> None:
    info = backend.info
    assert (info.outputs, info.output, info.dimensions, info.max_tokens) == (ALL, "dense", 32, 96)
    assert info.vocabulary_size > max(int(EXPECTED[f"{place}.indices"].max(initial=0)) for place in range(len(TEXTS)))


def test_what_flagembedding_saves_has_no_modules_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy(tmp_path / "model")
    (folder / "modules.json").unlink()
    backend = load(folder)
    assert backend.info.normalize and "pooling is used" not in caplog.text
    for place, row in enumerate(all_outputs(backend)):
        assert_equal(row, place)


def test_an_encoder_that_is_left_to_transformers_gives_the_same(tmp_path: Path) -> None:
    backend = load(copy(tmp_path / "model", output_hidden_states=True))
    for place, row in enumerate(all_outputs(backend)):
        assert_equal(row, place)


def test_bfloat16_is_close(backend: Backend) -> None:
    exact, rounded = all_outputs(backend), all_outputs(load(CHECKPOINT, "bfloat16"))
    for place, (row, other) in enumerate(zip(exact, rounded, strict=True)):
        for name in ("dense", "multi_vector"):
            pair = (unit(np.atleast_2d(array(each[name]))) for each in (row, other))
            assert float(np.prod(list(pair), axis=0).sum(axis=1).min()) > 0.9999
        spread = [np.zeros(backend.info.vocabulary_size) for _ in range(2)]
        for target, each in zip(spread, (row, other), strict=True):
            target[sparse(each["sparse"]).indices] = sparse(each["sparse"]).values
        assert float(np.abs(spread[0] - spread[1]).max()) < 0.03, place


def test_weights_that_are_no_numbers_show(tmp_path: Path) -> None:
    """And do not pass for a text whose tokens have no weight: the engine refuses such rows."""
    folder = copy(tmp_path / "model")
    torch.save({"weight": torch.full((1, 32), torch.nan), "bias": torch.zeros(1)}, folder / "sparse_linear.pt")
    assert np.isnan(sparse(all_outputs(load(folder))[0]["sparse"]).values).any()


def written(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return write


def saved(content: object) -> Callable[[Path], None]:
    return lambda file: torch.save(content, file)


WEIGHT, BIAS = torch.zeros(1, 32), torch.zeros(1)
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "the folder lacks sparse_linear.pt"),
    "empty": (written(lambda _: b""), "sparse_linear.pt cannot be read"),
    "cut": (written(lambda content: content[:900]), "sparse_linear.pt cannot be read"),
    "code": (saved({"weight": WEIGHT, "bias": Path("evil")}), "sparse_linear.pt is a pickle with more than tensors"),
    "list": (saved([WEIGHT, BIAS]), "sparse_linear.pt holds a list"),
    "no bias": (saved({"weight": WEIGHT}), "lack 1 of the model's weights, such as sparse_linear.bias"),
    "more": (
        saved({"weight": WEIGHT, "bias": BIAS, "x": BIAS}),
        "1 weights that the model has not, such as sparse_linear.x",
    ),
    "narrow": (saved({"weight": WEIGHT[:, :9], "bias": BIAS}), r"sparse_linear.weight is \[1, 9\], where"),
    "integers": (saved({"weight": WEIGHT.int(), "bias": BIAS}), "sparse_linear.pt holds weights that are no floating"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_head_that_is_missing_or_broken_is_named(kind: str, tmp_path: Path) -> None:
    folder = copy(tmp_path / "model")
    spoil, words = BROKEN[kind]
    spoil(folder / "sparse_linear.pt")
    with pytest.raises(ModelError, match=words):
        load(folder)


def test_a_projection_to_another_size_is_refused(tmp_path: Path) -> None:
    folder = copy(tmp_path / "model")
    torch.save({"weight": torch.zeros(16, 32), "bias": torch.zeros(16)}, folder / "colbert_linear.pt")
    with pytest.raises(ModelError, match=r"colbert_linear.weight is \[16, 32\]"):
        load(folder)


def test_without_either_head_it_is_a_plain_encoder(tmp_path: Path) -> None:
    folder = copy(tmp_path / "model")
    for name in HEADS:
        (folder / name).unlink()
    assert detect.choose(folder).target == detect.SENTENCE_TRANSFORMER
    backend = load(folder)
    assert backend.info.outputs == ("dense",)
    assert distance(embed(backend, TEXTS, "end"), np.stack([EXPECTED[f"{n}.dense"] for n in range(8)])) < TOLERANCE


def test_torch_is_chosen_for_all_outputs_and_mlx_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    choice = detect.choose(CHECKPOINT)
    assert (choice.backend, choice.target) == ("torch", "mlx_embeddings_backends.torch.bge_m3:BgeM3Backend")
    assert choice.reason == "of BGE-M3 the MLX backend has dense vectors only"
    asked = detect.choose(CHECKPOINT, "mlx")
    assert (asked.target, asked.reason) == (detect.MLX_TEXT_ENCODER, "asked for, with its dense vectors only")


def test_mlx_gives_its_dense_vectors() -> None:
    backend = load(CHECKPOINT, backend="mlx")
    assert backend.info.outputs == ("dense",)
    assert distance(embed(backend, TEXTS, "end"), np.stack([EXPECTED[f"{n}.dense"] for n in range(8)])) < TOLERANCE


def test_heads_of_other_architectures_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "colbert_linear.pt").touch()
    assert detect.choose(tmp_path).target == detect.SENTENCE_TRANSFORMER
    with pytest.raises(UnsupportedModel, match="--adapter is for models of the architecture bert"):
        detect.choose(CHECKPOINT, has_adapters=True)


def test_the_hub_brings_the_heads_and_no_other_pickle_of_their_kind() -> None:
    # The files of BAAI/bge-m3, and of a copy with safetensors.
    files = ["config.json", "modules.json", "pytorch_model.bin", "1_Pooling/config.json", "sentencepiece.bpe.model"]
    files += ["tokenizer.json", *HEADS]
    others = ["onnx/model.onnx", "imgs/bm25.jpg", "long.jpg", "README.md", "optimizer.pt", "rng_state.pt"]
    others += ["scheduler.pt", "model.pt", "old/colbert_linear.pt", "1_Pooling/sparse_linear.pt", "linear.pt"]
    assert needed([*files, *others]) == sorted(files)
    converted = [*(file for file in files if file != "pytorch_model.bin"), "model.safetensors"]
    assert needed([*converted, "pytorch_model.bin", *others]) == sorted(converted)
