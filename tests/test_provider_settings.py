"""What the file says of providers and fallbacks, by line and key; and where keys come from."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from mlx_embeddings_server.providers.endpoint import EndpointSettings
from mlx_embeddings_server.registry import ModelSpec, ProviderSpec, model_specs, provider_specs
from mlx_embeddings_server.settings import Settings, SettingsError, load_settings

KEY = "sk-settings-0123456789"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("EMBEDDINGS_DIMENSION_POLICY", raising=False)
    monkeypatch.setenv("UP_KEY", KEY)
    monkeypatch.chdir(tmp_path)


def load(content: str, **flags: Any) -> Settings:
    Path("models.yaml").write_text(content)
    return load_settings({"config": "models.yaml", **flags})


def refused(content: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(content)
    assert KEY not in str(caught.value)
    return [line.removeprefix("models.yaml, line ") for line in str(caught.value).splitlines()]


def provider(entry: str) -> ProviderSpec:
    return provider_specs(
        load(f"providers: {{up: {{url: http://up.example/v1, {entry}}}}}\nmodels: {{m: {{name: a/b}}}}")
    )["up"]


def test_every_key_of_a_provider_and_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = load("""
providers:
  openai: {}
  local_api:
    url: http://127.0.0.1:8080/v1/embeddings
    api_key_env: UP_KEY
    timeout: 1m
    connect_timeout: 2
    batch_size: 64
    max_in_flight: 3
    retries: 0
    failure_threshold: 7
    recovery: 2m
    models: [a, b/c]
models:
  small:
    provider: openai
    name: text-embedding-3-small
    dimensions: 1536
    max_tokens: 8192
    aliases: [s]
    prompts: {query: "q: "}
    fallback: [minilm, "local_api:a"]
    fallback_other_dimensions: true
    fallback_when_full: true
  minilm: {name: ./m, provider: local, dimensions: 384, fallback: "openai:text-embedding-3-large"}
""")
    assert provider_specs(settings) == {
        "openai": ProviderSpec(EndpointSettings("openai", "https://api.openai.com/v1", SecretStr(KEY))),
        "local_api": ProviderSpec(
            EndpointSettings("local_api", "http://127.0.0.1:8080/v1", SecretStr(KEY), 60.0, 2.0, 64, 3, 0, 7, 120.0),
            ("a", "b/c"),
        ),
    }
    small, minilm = model_specs(settings)
    assert small == ModelSpec(
        "small", "text-embedding-3-small", aliases=("s",), prompts={"query": "q: "}, provider="openai",
        dimensions=1536, max_tokens=8192, fallback=("minilm", "local_api:a"), fallback_other_dimensions=True,
        fallback_when_full=True,
    )  # fmt: skip
    assert small.is_remote and not minilm.is_remote
    assert (minilm.dimensions, minilm.fallback) == (384, ("openai:text-embedding-3-large",))


def test_openai_needs_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load("models: {m: {provider: openai, name: x}, n: {name: a/b, fallback: 'openai:y'}}")
    with pytest.raises(SettingsError, match="variable OPENAI_API_KEY has the key of the provider 'openai', and is not"):
        provider_specs(settings)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert provider_specs(settings)["openai"].endpoint.key == SecretStr(KEY)
    assert KEY not in repr(provider_specs(settings)) and KEY not in repr(settings)


def test_the_known_variable_belongs_to_the_known_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = load("providers: {openai: {url: http://elsewhere.example/v1}}\nmodels: {m: {name: a/b}}")
    assert provider_specs(settings)["openai"].endpoint.key is None


def test_a_key_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert provider("api_key_file: ./key").endpoint.key == SecretStr(KEY)
    assert provider("any_model: true").endpoint.key is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("api_key_env: NOT_SET", "variable NOT_SET has the key of the provider 'up', and is not set"),
        ("api_key_env: TWO_WORDS", "variable TWO_WORDS holds no key: it must be one word of ASCII"),
        ("api_key_file: none", "none cannot be read: No such file"),
        ("api_key_file: .", "cannot be read: Is a directory"),
        ("api_key_file: empty", "empty holds no key"),
        ("api_key_file: binary", "binary holds no key"),
    ],
)
def test_keys_that_are_none(entry: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWO_WORDS", f"{KEY} more\r\nX-Other: 1")
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError) as caught:
        provider(entry)
    assert str(caught.value).startswith("providers.up: ") and said in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (f"api_key: {KEY}", "api_key: a key does not belong in this file: name the variable"),
        (f"token: {KEY}", "token: a key does not belong in this file"),
        ("retry: 3", "retry: there is no such setting; did you mean retries?"),
        ("url: ftp://x/v1", "url: must be an http or https URL"),
        ("url: up.example/v1", "url: must be an http or https URL"),
        ("url: 'http://x y/v1'", "url: must be an http or https URL"),
        ("url: http://xn--/v1", "url: must be a URL of a host and a port that can be"),
        ("url: http://up.example:99999/v1", "url: must be a URL of a host and a port that can be"),
        ("url: http://up.example:0/v1", "url: must be a URL of a host and a port that can be"),
        ("url: http://up..example/v1", "url: must be a URL of a host and a port that can be"),
        (f"url: 'https://me:{KEY}@up.example/v1'", "url: must hold no user and no password"),
        (f"url: 'https://up.example/v1?key={KEY}'", "url: must end with its path"),
        ("timeout: never", "timeout: must be seconds above 0"),
        ("timeout: 0", "timeout: must be seconds above 0"),
        ("recovery: soon", "recovery: must be seconds"),
        ("batch_size: 0", "batch_size: "),
        ("batch_size: '3'", "batch_size: "),
        ("retries: 11", "retries: "),
        ("any_model: true, models: [x]", "any_model: allows all models, and `models` some"),
        ("api_key_env: X, api_key_file: y", "api_key_file: and api_key_env exclude each other"),
        ("models: {a: b}", "models: must be a list"),
    ],
)
def test_what_a_provider_may_not_say(entry: str, said: str) -> None:
    url = "" if "url:" in entry else "url: http://up.example/v1, "
    [line] = refused(f"models: {{m: {{name: a/b}}}}\nproviders:\n  up: {{{url}{entry}}}\n")
    assert line.startswith(f"3: providers.up.{said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("providers: [up]", "1: providers: must be a mapping"),
        ("providers:\n  up:", "2: providers.up: must hold the provider's settings"),
        ("providers:\n  up: {}", "2: providers.up: needs `url`"),
        ("providers:\n  local: {url: http://x/v1}", "2: providers.local: a provider's name must be of letters"),
        ("providers:\n  'a:b': {url: http://x/v1}", "2: providers.a:b: a provider's name must be of letters"),
        ("models:\n  m: {name: x, provider: up}", "2: models.m.provider: there is no provider 'up'; known: local, "),
        ("models:\n  m: {name: x, provider: openai, device: cpu}", "2: models.m.device: is of models that run here"),
        ("models:\n  m: {name: x, provider: openai, pinned: true}", "2: models.m.pinned: is of models that run here"),
        ("models:\n  m: {name: x, provider: openai, truncate: end}", "2: models.m.truncate: is of models that run"),
        ("models:\n  m: {name: x, max_tokens: 5}", "2: models.m.max_tokens: is of models of other providers"),
        ("models:\n  m: {name: x, dimensions: 0}", "2: models.m.dimensions: "),
        ("models:\n  m: {name: x, fallback: n}", "2: models.m.fallback: there is no model 'n'; known: m"),
        ("models:\n  m: {name: x, fallback: ['up:n']}", "2: models.m.fallback[0]: there is no model 'up:n'"),
        ("models:\n  m: {name: x, fallback: ['local:n']}", "2: models.m.fallback[0]: there is no model 'n'"),
        ("models:\n  m: {name: x, fallback: 'openai:'}", "2: models.m.fallback: there is no model 'openai:'"),
        ("models:\n  m: {name: x, fallback: m}", "2: models.m.fallback: is the model itself"),
        ("models:\n  m: {name: x, aliases: n, fallback: [n]}", "2: models.m.fallback[0]: is the model itself"),
        ("models:\n  m: {name: x, provider: openai, fallback: 'openai:x'}", "2: models.m.fallback: is the model"),
        ("models:\n  m: {name: x, fallback: [3]}", "2: models.m.fallback[0]: must be text"),
        (
            "models:\n  a: {name: x, fallback: b}\n  b: {name: x, fallback: [c]}\n  c: {name: x, fallback: [bee, a]}",
            "4: models.c.fallback[1]: goes round in a circle: a -> b -> c -> a",
        ),
        (
            "models:\n  a: {name: x, dimensions: 4, fallback: b}\n  b: {name: y, dimensions: 8}",
            "2: models.a.fallback: has 8 dimensions, and a 4: mixed in one index they are silent damage",
        ),
        (
            "models:\n  a: {name: x, dimensions: 4, fallback: 'openai:y'}\n"
            "  b: {name: y, provider: openai, dimensions: 8}",
            "2: models.a.fallback: has 8 dimensions, and a 4",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(content: str, said: str) -> None:
    models = "" if content.startswith("models") else "\nmodels: {m: {name: a/b}}"
    assert any(line.startswith(said) for line in refused(content + models)), refused(content + models)


def test_a_circle_is_told_once_and_models_by_provider_make_none() -> None:
    circle = "models:\n  a: {name: x, fallback: b}\n  b: {name: x, fallback: c}\n  c: {name: x, fallback: b}\n"
    assert refused(circle) == [
        "4: models.c.fallback: goes round in a circle: b -> c -> b; PROVIDER:MODEL comes without its own list"
    ]
    load(
        "models:\n  a: {name: x, provider: openai, fallback: b}\n"
        "  b: {name: y, fallback: 'openai:x'}\n  c: {name: z, fallback: [a, b]}\n"
    )


def test_thousands_of_models_in_a_row() -> None:
    names = [f"m{number}" for number in range(3000)]
    entries = [
        f"{name}: {{name: x, fallback: {after}}}" for name, after in zip(names, names[1:] + names[:1], strict=True)
    ]
    [line] = refused("models:\n  " + "\n  ".join(entries))
    assert line.startswith("3001: models.m2999.fallback: goes round in a circle: m0 -> m1")


def test_a_fallback_that_only_a_flag_names(tmp_path: Path) -> None:
    content = "models:\n  m: {name: x, fallback: later}\n"
    assert load(content, model=["./x"], served_model_name=["later"]).models["m"].fallback == ("later",)
    assert refused(content) == [
        "2: models.m.fallback: there is no model 'later'; known: m; or a provider's, as PROVIDER:MODEL"
    ]


def test_only_the_file_has_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_EMBEDDINGS_PROVIDERS", "{}")
    with pytest.raises(SettingsError, match="MLX_EMBEDDINGS_PROVIDERS: only the file of --config has `providers`"):
        load_settings({})


def test_the_policy_for_dimensions_has_a_second_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_DIMENSION_POLICY", "pad")
    assert load_settings({}).dimensions_policy == "pad"
    monkeypatch.setenv("MLX_EMBEDDINGS_DIMENSIONS_POLICY", "ignore")
    assert load_settings({}).dimensions_policy == "ignore"


def test_the_check_tells_of_providers_and_of_keys_that_are_not_here(tmp_path: Path) -> None:
    Path("models.yaml").write_text(
        "providers:\n"
        "  up: {url: http://up.example/v1, api_key_env: UP_KEY, models: [a, b]}\n"
        "  any: {url: http://any.example/v1, api_key_env: NOT_SET, any_model: true}\n"
        "models:\n"
        "  small: {provider: up, name: m, dimensions: 8, aliases: s}\n"
        "  other: {provider: any, name: n}\n"
    )
    command = [str(Path(sys.executable).with_name("mlx-embeddings-server")), "check", "models.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "up: provider at http://up.example/v1, which also serves up:a, up:b, with a key",
        "any: provider at http://any.example/v1, which also serves any model of it, without its key here: the "
        "environment variable NOT_SET has the key of the provider 'any', and is not set",
        "small: m at the provider up, vectors of 8 dimensions; aliases: s",
        "other: n at the provider any, vectors of the size that it gives",
    ]
