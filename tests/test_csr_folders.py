"""What a CSR folder may hold, and what is refused; and CSR over HTTP."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_server.engine.engine import Engine
from tests.checkpoints import HIDDEN, sentence_transformer
from tests.parity import load
from tests.sparse_checkpoints import auto_encoder, csr, dense_modules, masked_language_model, save, splade
from tests.sparse_parity import TEXTS, TOLERANCE, check, expected, reference, rows
from tests.threaded import ThreadedServer


def start(folder: Path) -> None:
    """As the server does."""
    Engine("tiny", lambda: load(folder), queue_tokens=10_000).load()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return csr(tmp_path_factory.mktemp("csr"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(made, tmp_path / "model")


def parts_of(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The auto-encoder's file, and its weights."""
    file = folder / "2_SparseAutoEncoder" / "model.safetensors"
    return file, load_file(file)


def configure(folder: Path, **changes: Any) -> None:
    """None takes a key away."""
    file = folder / "2_SparseAutoEncoder" / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["encoder.weight", "decoder.linear.weight"])
def test_the_one_matrix_goes_by_two_names(name: str, suffix: str, folder: Path) -> None:
    wanted = expected(reference(folder), TEXTS)
    file, weights = parts_of(folder)
    weights[name] = weights.pop("decoder.linear.weight")
    file.unlink()
    if suffix == "bin":  # which has it under both
        torch.save(
            {**weights, "encoder.weight": weights[name], "decoder.linear.weight": weights[name]},
            file.with_name("pytorch_model.bin"),
        )
    else:
        save_file(weights, file)
    np.testing.assert_allclose(rows(load(folder), TEXTS), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(expected(reference(folder), TEXTS), wanted, atol=TOLERANCE)


def test_weights_of_half_precision_are_computed_with_in_float32(folder: Path) -> None:
    file, weights = parts_of(folder)
    save_file({name: each.half() if each.is_floating_point() else each for name, each in weights.items()}, file)
    check(load(folder), reference(folder))


def test_what_config_json_leaves_out_is_as_the_library_has_it(tmp_path: Path) -> None:
    folder = csr(tmp_path, encoder=auto_encoder(hidden_dim=512, k=8))
    configure(folder, hidden_dim=None, k=None, k_aux=None, normalize=None, dead_threshold=None)
    check(load(folder), reference(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 97}, "k in its config.json is 97, more than its hidden_dim, 96"),
        ({"k": 0}, "k in its config.json is 0: it must be a number from 1"),
        ({"k": "12"}, "k in its config.json is '12'"),
        ({"k": 1.5}, "k in its config.json is 1.5"),
        ({"k": True}, "k in its config.json is True"),
        ({"input_dim": None}, "input_dim in its config.json is None"),
        ({"hidden_dim": 10**15}, "hidden_dim in its config.json is 1000000000000000"),
        ({"hidden_dim": 128}, r"encoder.weight is \[96, 32\], where config.json asks for \[128, 32\]"),
        ({"normalize": "no"}, "normalize in its config.json is 'no'"),
        ({"activation": "gelu"}, "'activation' in its config.json is not known"),
    ],
)
def test_a_config_that_makes_no_sense(changes: dict[str, Any], words: str, folder: Path) -> None:
    configure(folder, **changes)
    with pytest.raises(ModelError, match=f"the SparseAutoEncoder in '2_SparseAutoEncoder' cannot be loaded: {words}"):
        start(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre_bias": torch.ones(31)}, r"pre_bias is \[31\], where config.json asks for \[32\]"),
        ({"latent_bias": torch.ones(96, 1)}, r"latent_bias is \[96, 1\]"),
        ({"latent_bias": torch.ones(96, dtype=torch.int32)}, "no floating point numbers"),
        ({"more": torch.ones(1)}, "the files have 1 weights that the model has not, such as more"),
        ({"encoder.weight": torch.ones(96, 32)}, "encoder.weight and decoder.linear.weight differ"),
        ({"pre_bias": None}, "the files lack 1 of the model's weights, such as pre_bias"),
        ({"decoder.linear.weight": None}, "the files lack 1 of the model's weights, such as encoder.weight"),
    ],
)
def test_weights_of_another_shape(changes: dict[str, torch.Tensor | None], words: str, folder: Path) -> None:
    file, weights = parts_of(folder)
    changed = {name: each for name, each in {**weights, **changes}.items() if each is not None}
    save_file(changed, file)
    with pytest.raises(ModelError, match=words):
        start(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_missing(name: str, folder: Path) -> None:
    (folder / "2_SparseAutoEncoder" / name).unlink()
    with pytest.raises(ModelError, match=r"SparseAutoEncoder in '2_SparseAutoEncoder'.* has no (weights|config\.json)"):
        start(folder)


@pytest.mark.parametrize("keep", [0, 100, 500])
def test_weights_that_were_cut_short(keep: int, folder: Path) -> None:
    os.truncate(parts_of(folder)[0], keep)
    with pytest.raises(ModelError, match="not a safetensors file, or is cut short"):
        start(folder)


class RunsCode:
    """Its pickle calls `os.mkdir(path)` when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_run_no_code(folder: Path, tmp_path: Path) -> None:
    (file, weights), proof = parts_of(folder), tmp_path / "unpickled"
    file.unlink()
    torch.save({**weights, "evil": RunsCode(proof)}, file.with_name("pytorch_model.bin"))
    with pytest.raises(UnsupportedModel, match="which could run any code"):
        start(folder)
    file.with_name("pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(proof), protocol=2))
    with pytest.raises(ModelError, match="pickle"):
        start(folder)
    assert not proof.exists()


def test_an_auto_encoder_of_another_width(tmp_path: Path) -> None:
    folder = csr(tmp_path, encoder=auto_encoder(24))
    with pytest.raises(ModelError, match="give vectors of 32 dimensions, and it takes 24"):
        start(folder)


def _with_fill_mask(folder: Path) -> Path:
    bare = masked_language_model(folder / "bare")
    transformer: Transformer = Transformer(str(bare), transformer_task="fill-mask")
    return save(folder / "model", [transformer, Pooling(HIDDEN), auto_encoder()])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: csr(folder, after=[auto_encoder()]), "Pooling, SparseAutoEncoder, SparseAutoEncoder: known"),
        (lambda folder: splade(folder, after=[auto_encoder(293)]), "SpladePooling, SparseAutoEncoder: known"),
        (lambda folder: save(folder / "model", dense_modules(folder)), "made of Transformer, Pooling: known"),
        (
            lambda folder: save(folder / "model", [dense_modules(folder)[0], auto_encoder()]),
            "made of Transformer, SparseAutoEncoder: known",
        ),
        (
            lambda folder: save(folder / "model", [*dense_modules(folder), auto_encoder(), Normalize()]),
            "SparseAutoEncoder, Normalize: known",
        ),
        (_with_fill_mask, "is for 'fill-mask': before what follows it, only 'feature-extraction' is known"),
    ],
    ids=["two", "splade", "none", "no-pooling", "normalised", "fill-mask"],
)
def test_modules_in_an_order_that_is_not_known(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        start(make(tmp_path))


def test_a_dense_model_is_not_made_into_a_sparse_encoder(tmp_path: Path) -> None:
    """The library would: with an auto-encoder of random numbers."""
    folder = sentence_transformer(tmp_path)
    assert detect.choose(folder).target == detect.SENTENCE_TRANSFORMER
    with pytest.raises(UnsupportedModel, match="gives no sparse embeddings"):
        detect.choose(folder, kind="sparse-embeddings")


def test_a_sparse_encoder_does_not_pass_for_a_dense_model(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="its `type` is sparse-embeddings, not embeddings"):
        detect.choose(folder, kind="embeddings")
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "SentenceTransformer"}))
    with pytest.raises(UnsupportedModel, match="SparseAutoEncoder'; known modules: Transformer, Pooling"):
        detect.choose(folder)


@pytest.fixture(scope="module")
def server(made: Path) -> Iterator[ThreadedServer]:
    settings: dict[str, Any] = {"served_model_name": ["csr"], "backend": "torch", "device": "cpu", "dtype": "float32"}
    with ThreadedServer(model=[str(made)], **settings) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/embed_sparse", "/api/v1/embed_sparse"])
@pytest.mark.parametrize("most", [None, 3, 30])
def test_sparse_vectors_over_http_are_the_librarys(
    path: str, most: int | None, server: ThreadedServer, made: Path
) -> None:
    body = {"model": "csr", "input": TEXTS, "input_type": "query", "max_active_dims": most}
    reply = server.client.post(path, json={name: value for name, value in body.items() if value is not None})
    assert reply.status_code == 200, reply.text
    found = np.zeros((len(TEXTS), 96), dtype=np.float32)
    for row, each in zip(found, reply.json()["data"], strict=True):
        vector = each["embedding"]
        assert set(vector) == {"indices", "values"} and vector["indices"] == sorted(vector["indices"])
        assert len(vector["indices"]) <= (most or 12) and min(vector["values"]) > 0
        row[vector["indices"]] = vector["values"]
    wanted = expected(reference(made), TEXTS, "query", max_active_dims=most)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.array_equal(found != 0, wanted != 0)


def test_tokens_are_refused_where_dimensions_stand_for_none(server: ThreadedServer) -> None:
    reply = server.client.post("/v1/embed_sparse", json={"model": "csr", "input": "river", "tokens": True})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "tokens" and "stand for no tokens of its vocabulary: leave tokens out" in error["message"]
    plain = server.client.post("/v1/embed_sparse", json={"model": "csr", "input": "river", "tokens": False})
    assert plain.status_code == 200


def test_other_routes_say_where_to_ask(server: ThreadedServer) -> None:
    reply = server.embed("river", model="csr")
    assert reply.status_code == 400 and "ask /v1/embed_sparse" in reply.text
