"""Models from one file: what is said of each, what holds for all, and every wrong thing by file, line and key."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from mlx_embeddings_backends.base import Kind
from mlx_embeddings_server.model_entry import ModelEntry
from mlx_embeddings_server.registry import ModelSpec, model_specs
from mlx_embeddings_server.settings import Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("MLX_EMBEDDINGS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def specs(content: str, **flags: Any) -> dict[str | None, ModelSpec]:
    Path("models.yaml").write_text(content)
    return {spec.name: spec for spec in model_specs(load_settings({"config": "models.yaml", **flags}))}


def one(entry: str, around: str = "", **flags: Any) -> ModelSpec:
    return specs(f"models: {{m: {{name: a/b, {entry}}}}}\n{around}", **flags)["m"]


def refused(content: str) -> list[str]:
    Path("models.yaml").write_text(content)
    with pytest.raises(SettingsError) as caught:
        load_settings({"config": "models.yaml"})
    return str(caught.value).splitlines()


def test_every_key_of_a_model() -> None:
    content = """
models:
  BAAI/bge-m3:
    name: BAAI/bge-m3
    type: sparse-embeddings
    backend: torch
    device: cuda:1
    dtype: float16
    revision: v2
    pretrained: openai
    adapters: {one: x/one, two: x/two}
    aliases: [bge, bge:latest]
    prompts: {query: "query: ", document: ""}
    max_batch_tokens: 512
    max_image_tokens: 64
    truncate: end
    allow_unverified: true
    pinned: true
    keep_alive: 5m
"""
    assert specs(content)["BAAI/bge-m3"] == ModelSpec(
        "BAAI/bge-m3", "BAAI/bge-m3", "sparse-embeddings", "torch", "cuda:1", "float16", "v2", "openai",
        ("one=x/one", "two=x/two"), ("bge", "bge:latest"), {"query": "query: ", "document": ""}, 512, 64, "end", True,
        True, 300.0,
    )  # fmt: skip
    of_fallbacks = {"fallback", "fallback_other_dimensions", "fallback_when_full", "dimensions"}
    others = {"provider", "max_tokens"} | of_fallbacks  # tests/test_provider_settings.py has them
    assert set(yaml.safe_load(content)["models"]["BAAI/bge-m3"]) == set(ModelEntry.model_fields) - others


def test_what_a_model_leaves_out_is_what_holds_for_all() -> None:
    common: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "backend": "torch", "truncate": "start", "max_batch_tokens": 7,
        "max_image_tokens": 8, "keep_alive": 60, "allow_unverified": True,
    }  # fmt: skip
    of_model = {"revision": "r", "pretrained": "p", "adapter": "a=b"}
    spec = specs(yaml.safe_dump({**common, **of_model, "models": {"m": {"name": "a/b", "device": None}}}))["m"]
    assert {name: getattr(spec, name) for name in common} == common
    assert (spec.revision, spec.pretrained, spec.adapters, spec.pinned) == (None, None, (), False)
    assert one("allow_unverified: false, keep_alive: never", "allow_unverified: true\nkeep_alive: 1m") == one("")


def test_flags_hold_for_the_files_models_and_not_over_them() -> None:
    assert one("", "dtype: float16", dtype="float32").dtype == "float32"
    assert one("dtype: float16", dtype="float32").dtype == "float16"


def test_models_of_flags_come_first_and_are_pinned() -> None:
    content = "models: {m: {name: a/b}, n: {name: c/d, pinned: true}}"
    found = specs(content, model=["x/y", "z"], served_model_name=["one", "two"], revision="r", keep_alive="1m")
    assert [(spec.name, spec.source, spec.pinned, spec.revision) for spec in found.values()] == [
        ("one", "x/y", True, "r"), ("two", "z", True, "r"), ("m", "a/b", False, None), ("n", "c/d", True, None),
    ]  # fmt: skip
    assert [spec.keep_alive for spec in found.values()] == [60.0] * 4
    [alone] = model_specs(load_settings({"model": "x", "pretrained": "p", "adapter": ["a=b"]}))
    assert (alone.name, alone.pretrained, alone.adapters) == (None, "p", ("a=b",))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model": ["x", "y"], "served_model_name": ["one"]}, "was given 1 times and --model 2 times"),
        ({"model": ["x"], "served_model_name": ["one", "two"]}, "was given 2 times and --model 1 times"),
        ({"model": ["x", "y"], "adapter": ["a=b"]}, "belong to one model"),
        ({"model": ["x", "y"], "pretrained": "p"}, "belong to one model"),
        ({"model": ["x", "y"], "served_model_name": ["one", "one"]}, "two models would be served as 'one'"),
        ({"model": ["x"], "served_model_name": ["m"]}, "two models would be served as 'm'"),
        ({"model": ["x"], "served_model_name": ["short"]}, "two models would be served as 'short'"),
    ],
)
def test_flags_that_do_not_fit_together(flags: Mapping[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        specs("models: {m: {name: a/b, aliases: short}}", **flags)


def test_paths_are_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "models.yaml").write_text(
        "models:\n  a: {name: ./m, adapters: {x: ../x, y: o/y}}\n  b: {name: o/m}\n  c: {name: ~/m}\n  d: {name: ..}\n"
    )
    found = model_specs(load_settings({"config": "conf/models.yaml"}))
    folder = tmp_path / "conf"
    assert [spec.source for spec in found] == [str(folder / "m"), "o/m", "~/m", str(folder / "..")]
    assert found[0].adapters == (f"x={folder / '../x'}", "y=o/y")


@pytest.mark.parametrize("aliases", ["short", "[short]"])
def test_one_alias_needs_no_list(aliases: str) -> None:
    assert one(f"aliases: {aliases}").aliases == ("short",)


def test_adapters_may_be_a_list_as_well() -> None:
    assert one("adapters: [x=o/x, y=o/y]").adapters == ("x=o/x", "y=o/y")


def test_anchors_share_settings_and_may_stand_at_keys_of_their_own() -> None:
    found = specs(
        "x-small: &small {max_batch_tokens: 512, keep_alive: 1h}\n"
        "models:\n  a: {<<: *small, name: o/a}\n  b: {<<: *small, name: o/b, keep_alive: 1m}\n"
    )
    assert [(spec.max_batch_tokens, spec.keep_alive) for spec in found.values()] == [(512, 3600.0), (512, 60.0)]


def test_kinds_are_the_backends() -> None:
    for kind in get_args(Kind):
        assert one(f"type: {kind}").kind == kind


# Durations and sizes


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("90", 90), ("1.5", 1.5), ("30s", 30), ("5m", 300), ("1h", 3600), ('"0.5 h"', 1800), ("0", 0), ("never", None),
     ("-1", None), ('"-1"', None)],
)  # fmt: skip
def test_durations(written: str, seconds: float | None) -> None:
    assert one(f"keep_alive: {written}", "keep_alive: 7").keep_alive == seconds
    assert one("", f"keep_alive: {written}").keep_alive == seconds
    assert one("", keep_alive=written.strip('"')).keep_alive == seconds


@pytest.mark.parametrize("written", ["-2", "soon", "5 days", "true", ".inf", ".nan", "1e99", "[1]", '""', "9999999h"])
def test_what_is_no_duration(written: str) -> None:
    [top] = refused(f"keep_alive: {written}\n")
    [inner] = refused(f"models:\n  m:\n    name: a/b\n    keep_alive: {written}\n")
    assert top.startswith("models.yaml, line 1: --keep-alive (variable MLX_EMBEDDINGS_KEEP_ALIVE, YAML key keep_alive)")
    assert inner.startswith("models.yaml, line 4: models.m.keep_alive: must be ")


@pytest.mark.parametrize(
    ("written", "size"),
    [("16GB", 16_000_000_000), ("800MB", 800_000_000), ("12GiB", 12 * 2**30), ('"1.5 gb"', 1_500_000_000), ("123", 123),
     ('"123"', 123), ("2T", 2 * 10**12)],
)  # fmt: skip
def test_sizes(written: str, size: int) -> None:
    Path("models.yaml").write_text(f"max_memory: {written}\n")
    assert load_settings({"config": "models.yaml"}).max_memory == size
    assert load_settings({"max_memory": written.strip('"')}).max_memory == size


@pytest.mark.parametrize("written", ["0", "-1", "0GB", "big", "16 GB of it", "16Gbit", "'true'", "1.5", "[1]", ".inf"])
def test_what_is_no_size(written: str) -> None:
    [said] = refused(f"max_memory: {written}\n")
    assert "YAML key max_memory): must be a size such as 16GB" in said


def test_without_them_models_stay() -> None:
    settings = load_settings()
    assert (settings.keep_alive, settings.max_memory, dict(settings.models)) == (None, None, {})
    assert one("").keep_alive is None


# Refusals: file, line and key


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("keep_alive: soon", "4: models.m.keep_alive: must be seconds, or such as 30s"),
        ("type: reranker", "4: models.m.type: must be 'embeddings', 'sparse-embeddings' or 'rerank'"),
        ("backend: jax", "4: models.m.backend: must be 'auto', 'mlx' or 'torch'"),
        ("device: gpu", "4: models.m.device: must be auto, cpu, cuda, cuda:N or mps"),
        ("dtype: 8", "4: models.m.dtype: must be 'auto'"),
        ("truncate: middle", "4: models.m.truncate: must be 'none'"),
        ("revision: 123", "4: models.m.revision: must be text: put it in quotes"),
        ("revision: ''", "4: models.m.revision: must not be empty"),
        ("pretrained: [a]", "4: models.m.pretrained: must be text"),
        ("adapters: {a: 1}", "4: models.m.adapters: must be NAME=ID_OR_PATH"),
        ("adapters: {a: }", "4: models.m.adapters: must be NAME=ID_OR_PATH"),
        ("adapters: [a]", "4: models.m.adapters: must be NAME=ID_OR_PATH"),
        ("adapters: [a=b, a=c]", "4: models.m.adapters: gives two adapters the same name"),
        ("adapters: [1]", "4: models.m.adapters[0]: must be text"),
        ("adapters: 3", "4: models.m.adapters: must be a list"),
        ("aliases: {a: b}", "4: models.m.aliases: must be a list"),
        ("aliases: [a, 3]", "4: models.m.aliases[1]: must be text"),
        ("aliases: [a b]", "4: models.m.aliases[0]: an alias must be a name of letters"),
        ("aliases: ''", "4: models.m.aliases: an alias must be a name of letters"),
        ("prompts: 'query: '", "4: models.m.prompts: must be a mapping"),
        ("prompts: [a]", "4: models.m.prompts: must be a mapping"),
        ("prompts: {query: 3}", "4: models.m.prompts.query: must be text"),
        ("prompts: {'': x}", "4: models.m.prompts: a prompt has an empty name"),
        ("max_batch_tokens: true", "4: models.m.max_batch_tokens: must be a valid integer"),
        ("max_batch_tokens: 0", "4: models.m.max_batch_tokens: must be greater than or equal to 1"),
        ("max_image_tokens: 3", "4: models.m.max_image_tokens: must be greater than or equal to 4"),
        ("allow_unverified: 1", "4: models.m.allow_unverified: must be a valid boolean"),
        ("pinned: perhaps", "4: models.m.pinned: must be a valid boolean"),
        ("keepalive: 3", "4: models.m.keepalive: there is no such setting; did you mean keep_alive?; known: name, "),
        ("max-batch-tokens: 3", "4: models.m.max-batch-tokens: there is no such setting; did you mean max_batch_tok"),
        ("port: 3", "4: models.m.port: there is no such setting; known: name, "),
    ],
)
def test_a_wrong_setting_of_a_model_is_named_with_its_line(entry: str, said: str) -> None:
    [message] = refused(f"models:\n  m:\n    name: a/b\n    {entry}\n")
    assert message.startswith(f"models.yaml, line {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("models:\n", "1: models: names no model"),
        ("models: {}\n", "1: models: names no model"),
        ("port: 1\nmodels: []\n", "2: models: names no model"),
        ("models: [a]\n", "1: models: must be a mapping"),
        ("models: a\n", "1: models: must be a mapping"),
        ("models:\n  m:\n", "2: models.m: must hold the model's settings"),
        ("models:\n  m: a/b\n", "2: models.m: must hold the model's settings"),
        ("models:\n\n  m: {type: rerank}\n", "3: models.m.name: is missing"),
        ("models:\n  m: {name: }\n", "2: models.m.name: must be text"),
        ("models:\n  m: {name: ' '}\n", "2: models.m.name: must not be empty"),
        ("port: yes\n", "1: --port (variable MLX_EMBEDDINGS_PORT, YAML key port): must not be true or false"),
        ("model: a\nmodle: b\n", "2: modle: there is no such setting; did you mean model?; known: "),
        ("models:\n  m: {name: a/b}\n  m: {name: a/c}\n", "3: models.m: stands here a second time, first in line 2"),
        ("models:\n  1: {name: a/b}\n  m: {name: a/b}\n", "2: models: the key 1 is no text: put it in quotes"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(content: str, said: str) -> None:
    [message] = refused(content)
    assert message.startswith(f"models.yaml, line {said}")


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a/b/c", "/a", "a/", "..", "a/..", ".", "a?b", "a#b", "a%2f", "a\\\\b", "é", "a,b", "a\\r\\nX: 1",
     "a\\u2028", "-", "a\\n", "x" * 201],
)  # fmt: skip
def test_names_that_would_break_an_address_or_a_header(name: str) -> None:
    [message] = refused(f'models:\n  "{name}": {{name: a/b}}\n')
    assert message.startswith("models.yaml, line 2: models.") and "must be a name of letters, digits" in message
    assert message.isprintable() and len(message) < 500


@pytest.mark.parametrize("name", ["a", "BAAI/bge-m3", "text-embedding-3-small", "bge-m3:567m", "x_1.5", "x" * 200])
def test_names_that_are_fine(name: str) -> None:
    assert name in specs(f'models:\n  "{name}": {{name: a/b, aliases: "y{name[1:]}"}}\n')


def test_aliases_that_lead_nowhere() -> None:
    said = refused(
        "models:\n"
        "  a: {name: x/a, aliases: [b]}\n"
        "  b: {name: x/b, aliases: [c]}\n"
        "  c:\n    name: x/c\n    aliases:\n    - a\n    - c\n    - d\n    - d\n"
        "  e: {name: x/e, aliases: d}\n"
    )
    expected = [
        "line 2: models.a.aliases[0]: 'b' is the name of another model",
        "line 3: models.b.aliases[0]: 'c' is the name of another model",
        "line 7: models.c.aliases[0]: 'a' is the name of another model",
        "line 8: models.c.aliases[1]: 'c' is the model's own name",
        "line 10: models.c.aliases[3]: 'd' is an alias of 'c' already",
        "line 11: models.e.aliases: 'd' is an alias of 'c' already",
    ]
    assert len(said) == len(expected)
    assert all(line.startswith(f"models.yaml, {start}") for line, start in zip(said, expected, strict=True))


def test_all_that_is_wrong_is_told_at_once_in_the_files_order() -> None:
    said = refused("port: http\nmodels:\n  a: {nam: x}\n  b: {name: x/b, aliases: a}\n  b: {name: x/b, aliases: a}\n")
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == [
        "--port (variable MLX_EMBEDDINGS_PORT, YAML key port)",
        "models.a.name",
        "models.a.nam",
        "models.b",
        "models.b.aliases",
    ]


@pytest.mark.parametrize("content", ["models:\n" + "  m%d: x\n" * 9000, "k%d: x\n" * 9000])
def test_of_very_many_the_first_are_told_in_seconds(content: str) -> None:
    before = time.process_time()
    many = refused(content % tuple(range(9000)))
    assert len(many) == 101 and many[-1] == "and more"
    assert time.process_time() - before < 10


def test_a_value_that_does_not_come_from_the_file_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("models.yaml").write_text("port: 1\n")
    monkeypatch.setenv("MLX_EMBEDDINGS_PORT", "http")
    with pytest.raises(SettingsError) as caught:
        load_settings({"config": "models.yaml"})
    assert str(caught.value).startswith("--port (variable")


def test_models_have_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_EMBEDDINGS_MODELS", "a/b")
    with pytest.raises(SettingsError, match="MLX_EMBEDDINGS_MODELS: .* MLX_EMBEDDINGS_MODEL"):
        load_settings()


def test_settings_stay_as_they_are() -> None:
    settings: Settings = load_settings({"keep_alive": math.pi})
    with pytest.raises(ValueError, match="frozen"):
        settings.keep_alive = 1.0
