"""SPECTER2's adapters on both backends: the vectors of AdapterHub's own library, whatever else is in a batch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertModel

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, DType, Item, LoadOptions
from mlx_embeddings_backends.detect import MLX_TEXT_ENCODERS
from mlx_embeddings_backends.tokenization import Group
from tests import parity
from tests.checkpoints import bare_encoder
from tests.conftest import DATA
from tests.mlx_checkpoints import changed_json, quantised
from tests.parity import Rows, cosines, embed

SPECTER2 = DATA / "specter2"
BASE = SPECTER2 / "base"
ADAPTERS = {"proximity": SPECTER2 / "specter2_proximity", "adhoc_query": SPECTER2 / "specter2_adhoc_query"}
EXPECTED = json.loads((SPECTER2 / "expected.json").read_bytes())
TEXTS: list[str] = EXPECTED["texts"]
TOLERANCE = 1e-5  # of any component of the raw vectors, whose lengths are about 8, in float32

Name = Literal["torch", "mlx"]


@pytest.fixture(params=["torch", "mlx"])
def name(request: pytest.FixtureRequest) -> Name:
    backend: Name = request.param
    return backend


def load(
    name: Name, base: Path = BASE, *, adapters: Mapping[str, Path], dtype: DType | Literal["auto"] = "float32"
) -> Backend:
    choice = detect.choose(base, name, has_adapters=bool(adapters))
    return detect.load(choice, base, LoadOptions(device="cpu", dtype=dtype, adapters=adapters))


def expected(key: str) -> Rows:
    return np.array(EXPECTED[key], dtype=np.float32)


def items(adapter: str | None) -> list[Item]:
    return [Item(text, adapter=adapter) for text in TEXTS]


def with_modules(folder: Path, pooling: Any, *after: nn.Module) -> Path:
    """The base in sentence-transformers' format."""
    modules = [Transformer(str(BASE)), Pooling(64, pooling), *after]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module", params=["torch", "mlx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """With the adapters as the library saved them, which are pickles."""
    return load(request.param, adapters=ADAPTERS)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same as safetensors, which MLX reads without the help of another process."""
    made = {}
    for adapter, folder in ADAPTERS.items():
        made[adapter] = tmp_path_factory.mktemp(adapter)
        shutil.copy(folder / "adapter_config.json", made[adapter])
        weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        save_file(weights, made[adapter] / "adapter.safetensors")
    return made


def test_vectors_are_the_librarys_alone_and_in_a_batch(backend: Backend) -> None:
    for adapter in ADAPTERS:
        reference = expected(f"specter2_{adapter}")
        np.testing.assert_allclose(embed(backend, items(adapter)), reference, atol=TOLERANCE, rtol=0)
        singly = parity.embed_singly(backend, items(adapter))
        np.testing.assert_allclose(singly, reference, atol=TOLERANCE, rtol=0)


def test_adapters_make_a_difference() -> None:
    """Or nothing above would say anything."""
    rows = [expected(key) for key in ("base", "specter2_proximity", "specter2_adhoc_query")]
    assert all(np.abs(a - b).max(axis=1).min() > 0.5 for a, b in ((rows[0], rows[1]), (rows[1], rows[2])))


def test_the_first_adapter_is_the_default(name: Name, adapters: dict[str, Path]) -> None:
    for order in (list(adapters), list(reversed(adapters))):
        backend = load(name, adapters={each: adapters[each] for each in order})
        assert backend.info.adapters == tuple(order)
        reference = expected(f"specter2_{order[0]}")
        np.testing.assert_allclose(embed(backend, items(None)), reference, atol=TOLERANCE, rtol=0)


def test_items_of_two_adapters_never_share_a_batch(backend: Backend) -> None:
    order = ["adhoc_query", "proximity", None, "adhoc_query"]
    prepared = backend.prepare([Item(text, adapter=each) for text, each in zip(TEXTS, order, strict=False)])
    wanted = ["adhoc_query", "proximity", "proximity", "adhoc_query"]
    assert [each.group for each in prepared] == [Group(each) for each in wanted]
    for adapter in ADAPTERS:
        places = [place for place, each in enumerate(wanted) if each == adapter]
        rows = np.asarray(backend.run(backend.collate([prepared[place] for place in places])))
        np.testing.assert_allclose(rows, expected(f"specter2_{adapter}")[places], atol=TOLERANCE, rtol=0)


def test_an_adapter_that_is_not_there_is_never_another(backend: Backend) -> None:
    with pytest.raises(ValueError, match="no adapter 'classification'"):
        backend.prepare([Item("a text"), Item("a text", adapter="classification")])


def test_the_vector_is_that_of_cls_without_a_warning(
    name: Name, adapters: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    info = load(name, adapters=adapters).info
    assert "pooling is used" not in caplog.text
    assert (info.dimensions, info.max_tokens, info.normalize, info.separator) == (64, 512, False, "[SEP]")
    bare = load(name, adapters={})
    assert "mean pooling is used" in caplog.text
    with pytest.raises(ValueError, match="no adapter 'proximity'"):
        bare.prepare(items("proximity"))


def test_the_base_alone(name: Name, tmp_path: Path) -> None:
    backend = load(name, with_modules(tmp_path / "base", "cls"), adapters={})
    assert backend.info.adapters == ()
    np.testing.assert_allclose(embed(backend, TEXTS), expected("base"), atol=TOLERANCE, rtol=0)


def test_modules_behind_the_transformer_stay(name: Name, adapters: dict[str, Path], tmp_path: Path) -> None:
    backend = load(name, with_modules(tmp_path / "base", "mean", Normalize()), adapters=adapters)
    assert backend.info.normalize
    for adapter, folder in adapters.items():
        means = [hidden.mean(dim=0).numpy() for hidden in bert_with(folder, functional.relu)]
        np.testing.assert_allclose(embed(backend, items(adapter)), np.stack(means), atol=TOLERANCE, rtol=0)


class Adapted(nn.Module):
    """transformers' output block of a layer, with the adapter in it."""

    def __init__(self, block: nn.Module, weights: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block: Any = block
        self.weights = {name.partition("adapter_")[2]: each for name, each in weights.items()}
        self.activation = activation

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        own = self.weights
        dense = self.block.dense(hidden)
        down = functional.linear(self.block.LayerNorm(dense + residual), own["down.0.weight"], own["down.0.bias"])
        up = functional.linear(self.activation(down), own["up.weight"], own["up.bias"])
        changed: Tensor = self.block.LayerNorm(dense + up + residual)
        return changed


def bert_with(folder: Path, activation: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The last hidden state of each text, [tokens, dim]."""
    weights = load_file(folder / "adapter.safetensors")
    model: Any = BertModel.from_pretrained(BASE, dtype=torch.float32)
    model.eval()
    for number, layer in enumerate(model.encoder.layer):
        own = {key: each for key, each in weights.items() if f".layer.{number}." in key}
        layer.output = Adapted(layer.output, own, activation)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]


@pytest.mark.parametrize(
    ("non_linearity", "activation"),
    [
        ("relu", functional.relu),
        ("gelu", functional.gelu),
        ("gelu_new", lambda x: functional.gelu(x, approximate="tanh")),
        ("silu", functional.silu),
        ("Swish", functional.silu),
    ],
)
def test_every_non_linearity(
    non_linearity: str, activation: Callable[[Tensor], Tensor], name: Name, tmp_path: Path
) -> None:
    """With a reduction factor for each layer."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    own = json.loads((ADAPTERS["proximity"] / "adapter_config.json").read_bytes())
    own["config"] |= {"non_linearity": non_linearity, "reduction_factor": {"1": 2, "default": 6}}
    (folder / "adapter_config.json").write_text(json.dumps(own))
    random, weights = torch.Generator().manual_seed(0), {}
    for layer, size in enumerate((10, 32, 10)):
        shapes = {"down.0.weight": (size, 64), "down.0.bias": (size,), "up.weight": (64, size), "up.bias": (64,)}
        for part, shape in shapes.items():
            key = f"bert.encoder.layer.{layer}.output.adapters.specter2_proximity.adapter_{part}"
            weights[key] = 0.3 * torch.randn(shape, generator=random)
    save_file(weights, folder / "adapter.safetensors")
    reference = np.stack([hidden[0].numpy() for hidden in bert_with(folder, activation)])
    rows = embed(load(name, adapters={"mine": folder}), TEXTS)
    np.testing.assert_allclose(rows, reference, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype: DType, name: Name, adapters: dict[str, Path]) -> None:
    backend = load(name, adapters=adapters, dtype=dtype)
    assert backend.info.dtype == dtype
    for adapter in ADAPTERS:
        reference = expected(f"specter2_{adapter}")
        rows = embed(backend, items(adapter))
        assert np.abs(rows - reference).max() > 1e-4  # or nothing was in half precision
        assert cosines(rows, reference).min() > 0.999


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_keeps_its_adapters_as_they_are(bits: int, adapters: dict[str, Path], tmp_path: Path) -> None:
    packed, plain = quantised(BASE, tmp_path, bits=bits)
    ours, reference = load("mlx", packed, adapters=adapters, dtype="auto"), load("torch", plain, adapters=adapters)
    for adapter in adapters:
        rows = embed(ours, items(adapter))
        np.testing.assert_allclose(rows, embed(reference, items(adapter)), atol=TOLERANCE, rtol=0)
        assert np.abs(rows - expected(f"specter2_{adapter}")).max() > 1e-3  # or nothing was quantised


def as_published(folder: Path) -> Path:
    """The base as the hub may have it: a pickle of BERT within another model, and a vocabulary."""
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer.json"))
    weights = {f"bert.{key}": each for key, each in load_file(BASE / "model.safetensors").items()}
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_a_base_of_a_pickle_and_a_vocabulary(name: Name, adapters: dict[str, Path], tmp_path: Path) -> None:
    rows = embed(load(name, as_published(tmp_path / "base"), adapters=adapters), items("adhoc_query"))
    np.testing.assert_allclose(rows, expected("specter2_adhoc_query"), atol=TOLERANCE, rtol=0)


ALONE = """
import sys
from pathlib import Path
from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Item, LoadOptions

base, adapter = Path({base!r}), Path({adapter!r})
options = LoadOptions(device="cpu", adapters={{"proximity": adapter}})
backend = detect.load(detect.choose(base, "mlx", has_adapters=True), base, options)
backend.run(backend.collate(backend.prepare([Item("a text")])))
assert not {{"torch", "transformers", "sentence_transformers", "safetensors.torch"}} & sys.modules.keys()
"""


def test_pickles_bring_no_torch_into_a_process_of_mlx(tmp_path: Path) -> None:
    script = ALONE.format(base=str(as_published(tmp_path / "base")), adapter=str(ADAPTERS["proximity"]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model_type", MLX_TEXT_ENCODERS)
def test_the_separator_is_the_tokenizers(model_type: str, tmp_path: Path) -> None:
    folder = bare_encoder(tmp_path, model_type)
    library = AutoTokenizer.from_pretrained(folder).sep_token
    assert library == {"xlm-roberta": "</s>", "qwen3": None}.get(model_type, "[SEP]")
    for backend in ("torch", "mlx"):
        assert parity.load(folder, backend=backend).info.separator == library


@pytest.mark.parametrize(
    ("config", "special_tokens"),
    [
        ({"sep_token": None, "added_tokens_decoder": None}, {"sep_token": {"content": "[MASK]", "lstrip": False}}),
        ({"sep_token": None, "added_tokens_decoder": None}, {}),
        ({"sep_token": "[MASK]", "added_tokens_decoder": None}, {"sep_token": "[SEP]"}),
        ({"sep_token": "[MASK]"}, {"sep_token": "[SEP]"}),
    ],
)
def test_wherever_the_separator_is_named(
    config: dict[str, object], special_tokens: dict[str, object], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(BASE, tmp_path / "base"))
    changed_json(folder / "tokenizer_config.json", **config)
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    assert load("mlx", folder, adapters={}).info.separator == load("torch", folder, adapters={}).info.separator
