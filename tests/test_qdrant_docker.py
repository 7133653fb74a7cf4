"""scripts/qdrant-docker.sh, with stand-ins for two programs that are not here: a `docker` that writes down how it is
called and remembers whether its container runs, and a web server where Qdrant's would be."""

import importlib.metadata
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from qdrant_client.common.version_check import is_compatible

SCRIPT = Path(__file__).parent.parent / "scripts" / "qdrant-docker.sh"
DOCKER = """#!/usr/bin/env bash
cd "$(dirname "$0")/.."
echo "$*" >>calls
case $1 in
  version) [[ ! -e daemon-down ]] || { echo "Cannot connect to the Docker daemon" >&2; exit 1; } ;;
  container) [[ -e state ]] && cat state || exit 1 ;;
  run | start) [[ ! -e broken ]] || { echo "no such image" >&2; exit 125; }; echo running >state ;;
  stop) echo exited >state ;;
  port) echo "127.0.0.1:$(cat port)" ;;
  logs) echo "the last line of the log" ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("curl") is None, reason="no bash or curl")


class Qdrant(ThreadingHTTPServer):
    """Answers /readyz with 503 `refusals` times, then with 200."""

    refusals = 0


class Handler(BaseHTTPRequestHandler):
    server: Qdrant

    def do_GET(self) -> None:
        self.server.refusals -= 1
        self.send_response(200 if self.server.refusals < 0 and self.path == "/readyz" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Machine:
    """A folder that is the fake docker's memory, and a PATH on which there is that docker and little else."""

    def __init__(self, folder: Path, qdrant: Qdrant) -> None:
        self.folder, self.qdrant, self.bin = folder, qdrant, folder / "bin"
        self.bin.mkdir()
        for program in ("bash", "curl", "head", "sleep", "cat", "dirname", "env"):
            (self.bin / program).symlink_to(shutil.which(program) or program)
        (self.bin / "docker").write_text(DOCKER)
        (self.bin / "docker").chmod(0o755)
        (folder / "port").write_text(f"{qdrant.server_port}")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.free = free.getsockname()[1]

    def run(self, *arguments: str, port: int | None = None) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": str(self.bin),
            "QDRANT_HTTP_PORT": str(port or self.free),
            "QDRANT_GRPC_PORT": str(self.free),
            "QDRANT_READY_SECONDS": "2",
        }
        command = [str(SCRIPT), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)

    def set(self, state: str) -> None:
        (self.folder / "state").write_text(f"{state}\n")

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with Qdrant(("127.0.0.1", 0), Handler) as qdrant:
        thread = threading.Thread(target=qdrant.serve_forever, args=(0.05,))
        thread.start()
        yield Machine(tmp_path, qdrant)
        qdrant.shutdown()
        thread.join()


def test_a_first_start_runs_a_pinned_image_for_this_machine_alone_and_waits(machine: Machine) -> None:
    machine.qdrant.refusals = 2
    ended = machine.run()
    assert ended.returncode == 0, ended.stderr
    assert f"Qdrant is ready: http://127.0.0.1:{machine.qdrant.server_port}" in ended.stdout
    assert machine.qdrant.refusals < 0
    (run,) = [call for call in machine.calls if call.startswith("run ")]
    assert "--volume mlx-embeddings-qdrant:/qdrant/storage" in run
    published = [word for word in run.split() if word.endswith((":6333", ":6334"))]
    assert published == [f"127.0.0.1:{machine.free}:6333", f"127.0.0.1:{machine.free}:6334"]
    image, _, version = run.split()[-1].partition(":v")
    assert image == "qdrant/qdrant" and is_compatible(importlib.metadata.version("qdrant-client"), version)


def test_a_second_start_says_that_it_runs_already(machine: Machine) -> None:
    machine.run()
    ended = machine.run()
    assert ended.returncode == 0 and "running already" in ended.stdout
    assert len([call for call in machine.calls if call.startswith(("run ", "start "))]) == 1


def test_stop_ends_it_and_start_brings_the_same_container_back(machine: Machine) -> None:
    machine.run("start")
    assert "has ended" in machine.run("stop").stdout
    assert "not running" in machine.run("stop").stdout
    assert machine.run("start").returncode == 0
    assert machine.calls.count("stop mlx-embeddings-qdrant") == 1
    assert machine.calls.count("start mlx-embeddings-qdrant") == 1


def test_a_port_that_is_taken_is_told_before_docker_is_asked_to_run(machine: Machine) -> None:
    ended = machine.run(port=machine.qdrant.server_port)
    assert ended.returncode == 1
    assert f"port {machine.qdrant.server_port} is taken" in ended.stderr and "QDRANT_HTTP_PORT=" in ended.stderr
    assert not [call for call in machine.calls if call.startswith("run ")]


def test_a_qdrant_that_never_gets_ready_is_an_error_with_its_log(machine: Machine) -> None:
    machine.qdrant.refusals = 10**6
    ended = machine.run()
    assert ended.returncode == 1
    assert "not ready after 2 s" in ended.stderr and "the last line of the log" in ended.stderr


def test_a_docker_that_is_missing_or_asleep_or_fails_is_told(machine: Machine) -> None:
    (machine.folder / "broken").touch()
    assert "no such image" in machine.run().stderr
    machine.set("paused")
    assert "is paused" in machine.run().stderr
    (machine.folder / "daemon-down").touch()
    asleep = machine.run()
    assert asleep.returncode == 1 and "Cannot connect to the Docker daemon" in asleep.stderr
    (machine.bin / "docker").unlink()
    missing = machine.run()
    assert missing.returncode == 1 and "docker is not installed" in missing.stderr and "--embedded" in missing.stderr


def test_help_needs_no_docker_and_unknown_words_are_refused(machine: Machine) -> None:
    assert machine.run("--help").returncode == 0 and not machine.calls
    assert machine.run("restart").returncode == 2


def test_the_script_is_executable_and_shellcheck_finds_nothing() -> None:
    assert os.access(SCRIPT, os.X_OK)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
