"""scripts/preload_model.py: what it has downloaded is served by a server that reaches nothing but this machine.

The Hub is the local server of tests/hub.py, which is ended before the models are served.
"""

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from tests.conftest import DATA
from tests.hub import COMMIT, Hub, files_of
from tests.server import MINILM, Server
from tests.test_containers import stages
from tests.test_hub import NOWHERE

SCRIPT = Path(__file__).parents[1] / "scripts" / "preload_model.py"
SPECTER2 = DATA / "specter2"
BASE = "allenai/specter2_base"  # as the adapters' configs name it
EXPECTED = json.loads((SPECTER2 / "expected.json").read_text())
# The base as a sentence-transformers folder whose vectors are those of [CLS].
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
POOLING = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
SMALL = {
    **files_of(SPECTER2 / "base"),
    "modules.json": json.dumps(MODULES).encode(),
    "1_Pooling/config.json": json.dumps(POOLING).encode(),
}

# Python runs a module of this name first. Names, too, are only looked up for what is to be connected to.
GUARD = """
import os, sys

def guard(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", None):
        with open(os.environ["GUARD_LOG"], "a") as log:
            log.write(f"{host}\\n")
        raise OSError(f"{host} is outside")

sys.addaudithook(guard)
open(os.environ["GUARD_LOG"], "a").close()
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A folder with an empty Hugging Face cache."""

    folder: Path

    def preload(self, *flags: str, hub: Hub | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run([sys.executable, str(SCRIPT), *flags], hub, **variables)

    def run(self, command: list[str], hub: Hub | None, **variables: str) -> subprocess.CompletedProcess[str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_EMBEDDINGS_", "HF_"))}
        endpoint = hub.url if hub else NOWHERE
        environment = {**ours, "HF_HOME": str(self.folder / "hf"), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
        return subprocess.run(
            command, env=environment | variables, cwd=self.folder, capture_output=True, text=True, timeout=120
        )

    def server(self, **variables: str) -> Server:
        """One that reads the variables alone, as in a container, and for which there is no world outside."""
        (self.folder / "guard").mkdir()
        (self.folder / "guard" / "sitecustomize.py").write_text(GUARD)
        guarded = {"PYTHONPATH": str(self.folder / "guard"), "GUARD_LOG": str(self.folder / "attempts")}
        offline = {"HF_HOME": str(self.folder / "hf"), "HF_ENDPOINT": NOWHERE, "HF_HUB_OFFLINE": "1"}
        return Server(environment=guarded | offline | {"MLX_EMBEDDINGS_DTYPE": "float32"} | variables)

    @property
    def attempts(self) -> list[str]:
        """The hosts that the server tried to reach. Raises `FileNotFoundError` where nobody was on guard."""
        return (self.folder / "attempts").read_text().split()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


def rows(server: Server, model: str, **fields: object) -> NDArray[np.float32]:
    reply = server.embed(EXPECTED["texts"], model, **fields)
    assert reply.status_code == 200, reply.text
    return np.array([each["embedding"] for each in reply.json()["data"]], dtype=np.float32)


def test_a_preloaded_model_is_served_without_a_network(machine: Machine, hub: Hub) -> None:
    hub.files["acme/small"] = SMALL
    done = machine.preload("--model", "acme/small", hub=hub, HF_HUB_OFFLINE="")
    hub.shutdown()
    hub.server_close()
    assert done.returncode == 0, done.stderr
    assert f"acme/small (revision {COMMIT}) can be served without a network" in done.stdout
    whole = sum(map(len, SMALL.values()))
    assert f"  model: {whole / 1e6:.1f} MB in {machine.folder}" in done.stdout

    # Empty variables are a container image's way to set nothing.
    unset = dict.fromkeys(("MLX_EMBEDDINGS_PRETRAINED", "MLX_EMBEDDINGS_ADAPTER", "MLX_EMBEDDINGS_REVISION"), "")
    with machine.server(MLX_EMBEDDINGS_MODEL="acme/small", **unset) as server:
        assert_allclose(rows(server, "acme/small"), EXPECTED["base"], atol=1e-5, rtol=0)
        assert f"revision {COMMIT} from the cache" in server.log
    assert machine.attempts == []


def test_an_adapter_brings_its_base_and_further_adapters(machine: Machine, hub: Hub) -> None:
    hub.files[BASE] = files_of(SPECTER2 / "base")
    hub.files["acme/proximity"] = files_of(SPECTER2 / "specter2_proximity")
    hub.files["acme/query"] = files_of(SPECTER2 / "specter2_adhoc_query")
    names = {"MLX_EMBEDDINGS_MODEL": "acme/proximity", "MLX_EMBEDDINGS_ADAPTER": "adhoc_query=acme/query"}
    done = machine.preload(hub=hub, **names)
    hub.shutdown()
    hub.server_close()
    assert done.returncode == 0, done.stderr
    for part, name in (
        ("base model", BASE), ("adapter specter2_proximity", "acme/proximity"), ("adapter adhoc_query", "acme/query")
    ):  # fmt: skip
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"  {part}: ")]
        assert f"models--{name.replace('/', '--')}" in line

    with machine.server(**names) as server:
        for adapter, key in ((None, "specter2_proximity"), ("adhoc_query", "specter2_adhoc_query")):
            assert_allclose(rows(server, "acme/proximity", adapter=adapter), EXPECTED[key], atol=1e-5, rtol=0)
    assert machine.attempts == []


def test_a_download_that_breaks_off_is_an_error_and_the_next_one_goes_on(machine: Machine, hub: Hub) -> None:
    hub.files["acme/small"] = SMALL
    hub.cut["model.safetensors"] = 100
    hub.failing.add("model.safetensors")
    broken = machine.preload("--model", "acme/small", hub=hub)
    assert broken.returncode == 2
    assert "preload_model.py: the Hugging Face Hub answered 500 for 'acme/small': try again" in broken.stderr
    assert "can be served" not in broken.stdout

    hub.failing.clear()
    assert machine.preload("--model", "acme/small", hub=hub).returncode == 0
    hub.requests.clear()
    again = machine.preload("--model", "acme/small", hub=hub)
    assert again.returncode == 0 and "can be served" in again.stdout and hub.requests == []


def test_what_could_not_be_served_is_an_error_of_the_preload(machine: Machine, hub: Hub) -> None:
    classifier = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    hub.files["acme/classifier"] = {
        **{name: SMALL[name] for name in ("model.safetensors", "tokenizer.json")},
        "config.json": json.dumps(classifier).encode(),
    }
    cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        (("--model", "acme/nothing"), {"hub": hub}, "has no model 'acme/nothing', or it is private"),
        (
            ("--model", "acme/classifier"),
            {"hub": hub},
            "BertForSequenceClassification has 2 labels, it is a classifier",
        ),
        (("--model", "acme/elsewhere"), {}, "the Hugging Face Hub cannot be reached"),
        (("--model", MINILM, "--adapter", "nonsense"), {}, "must be NAME=ID_OR_PATH"),
        (
            ("--model", MINILM, "--token-encoding", "nonsense"),
            {},
            "--token-encoding nonsense: Unknown encoding nonsense",
        ),
        (
            ("--model", MINILM, "--token-encoding", "cl100k_base"),
            {"HTTPS_PROXY": NOWHERE, "NO_PROXY": "", "TIKTOKEN_CACHE_DIR": str(machine.folder)},
            "its vocabulary cannot be downloaded (ProxyError)",
        ),
    ]
    for flags, around, said in cases:
        done = machine.preload(*flags, **around)
        assert done.returncode == 2 and done.stdout == "", (flags, done)
        assert done.stderr.splitlines()[-1].startswith("preload_model.py: ") and said in done.stderr


def test_offline_it_only_checks_and_says_what_is_missing(machine: Machine, hub: Hub) -> None:
    missing = machine.preload("--model", "acme/tiny", hub=hub, HF_HUB_OFFLINE="1")
    assert missing.returncode == 2 and "HF_HUB_OFFLINE is set, and the cache has no complete copy" in missing.stderr
    packaged = machine.preload("--model", MINILM, HF_HUB_OFFLINE="1")
    assert packaged.returncode == 0 and f"{MINILM} (in an installed package)" in packaged.stdout
    assert hub.requests == []


def test_the_models_of_a_file_are_preloaded(machine: Machine, hub: Hub) -> None:
    hub.files["acme/small"] = SMALL
    file = machine.folder / "models.yaml"
    file.write_text(f"models: {{small: {{name: acme/small}}, mini: {{name: {MINILM}}}}}")
    done = machine.preload("--config", str(file), hub=hub, HF_HUB_OFFLINE="")
    assert done.returncode == 0, done.stderr
    assert "acme/small (revision" in done.stdout and f"{MINILM} (in an installed package)" in done.stdout


def test_without_a_model_nothing_happens(machine: Machine) -> None:
    done = machine.preload(MLX_EMBEDDINGS_MODEL="", MLX_EMBEDDINGS_ADAPTER="")
    assert done.returncode == 0 and "no model was named" in done.stdout
    assert not (machine.folder / "hf").exists()


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh")
def test_what_the_image_is_built_with_opens_gated_models_and_leaves_files_for_everyone(
    machine: Machine, hub: Hub
) -> None:
    hub.files["acme/gated"] = SMALL
    token = machine.folder / "token"
    token.write_text("hf_letmein\n")
    [command] = [rest for keyword, rest in stages()["cpu"].instructions if keyword == "RUN"]
    for there, here in (
        (r"--mount=\S+ ", ""),
        ("/run/secrets/HF_TOKEN", str(token)),
        ("python /tmp/preload_model.py", f"{sys.executable} {SCRIPT}"),
    ):
        command, count = re.subn(there, here, command)
        assert count
    assert "is gated: accept its terms" in machine.preload("--model", "acme/gated", hub=hub).stderr
    done = machine.run(["sh", "-c", command], hub, MLX_EMBEDDINGS_MODEL="acme/gated")
    assert done.returncode == 0, done.stderr
    assert "hf_letmein" not in done.stdout + done.stderr
    cache = machine.folder / "hf"
    assert not [path for path, content in files_of(cache).items() if b"hf_letmein" in content]
    for path in cache.rglob("*"):  # the user who serves it is another than the one who downloads it
        needed = stat.S_IROTH | stat.S_IXOTH if path.is_dir() else stat.S_IROTH
        assert path.stat().st_mode & needed == needed, path


def test_a_log_sees_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("preload_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "old").write_bytes(bytes(5_000_000))
    said = ""
    deadline = time.monotonic() + 20
    with script.progress(tmp_path, seconds=0.01):
        time.sleep(0.1)
        assert capsys.readouterr().err == ""  # nothing new: nothing to say
        (tmp_path / "blob").write_bytes(bytes(1_200_000))
        (tmp_path / "link").symlink_to("blob")
        while "1.2 MB so far" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert "1.2 MB so far" in said
