"""compose.yaml, as far as it can be held to account without Docker: against Dockerfile and the script for Qdrant."""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_embeddings_server.setting_problems import ENVIRONMENT_PREFIX
from mlx_embeddings_server.settings import Settings
from tests.test_containers import environment, last, stages

ROOT = Path(__file__).parents[1]


@cache
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text()))


def qdrant_check() -> str:
    kind, *command = compose()["services"]["qdrant"]["healthcheck"]["test"]
    assert kind == "CMD" and command[:2] == ["bash", "-c"]
    return str(command[2])


def test_the_services_can_be_built_and_keep_what_they_have() -> None:
    file = compose()
    server, qdrant = file["services"]["server"], file["services"]["qdrant"]
    assert server["build"]["target"] in stages() and (ROOT / server["build"]["context"] / "Dockerfile").exists()
    assert server["volumes"] == [f"models:{environment('cpu')['HF_HOME']}"]
    assert set(file["volumes"]) == {"models", "qdrant"}
    assert server["restart"] == qdrant["restart"] == "unless-stopped"
    # Killed, at that time, is what requests in flight must not be.
    assert int(server["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_timeout"].default
    names = {name for name in server["environment"] if name.startswith(ENVIRONMENT_PREFIX)}
    assert {name.removeprefix(ENVIRONMENT_PREFIX).lower() for name in names} <= set(Settings.model_fields)


def test_only_this_machine_reaches_the_services() -> None:
    for service in compose()["services"].values():
        for port in service["ports"]:
            assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-(\d+)\}:\1", port)
    assert f":{last('cpu', 'EXPOSE')}" in compose()["services"]["server"]["ports"][0]


def test_qdrant_is_the_one_of_the_script() -> None:
    script = (ROOT / "scripts" / "qdrant-docker.sh").read_text()
    qdrant = compose()["services"]["qdrant"]
    assert re.search(r"^readonly IMAGE=(\S+)", script, re.MULTILINE)[1] == qdrant["image"]  # type: ignore[index]
    [volume] = qdrant["volumes"]
    assert f'$NAME:{volume.partition(":")[2]}"' in script
    ports = {port.rpartition("}:")[2] for port in qdrant["ports"]}
    assert ports == set(re.findall(r"_PORT:-(\d+)\}", script))


def test_the_lines_for_a_gpu_fit_where_they_stand() -> None:
    text = (ROOT / "compose.yaml").read_text()
    uncommented = re.sub(r"^    # (deploy:|  .*)$", r"    \1", text, flags=re.MULTILINE)
    server = yaml.safe_load(uncommented.replace("target: cpu", "target: cuda"))["services"]["server"]
    [device] = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert server["build"]["target"] in stages() and server["restart"]


class Qdrant(ThreadingHTTPServer):
    ready_status = 200


class QdrantRequest(BaseHTTPRequestHandler):
    server: Qdrant

    def do_GET(self) -> None:
        self.send_response(self.server.ready_status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def qdrant() -> Iterator[Qdrant]:
    with Qdrant(("127.0.0.1", 0), QdrantRequest) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_qdrants_health_check_takes_bash_and_grep_alone(qdrant: Qdrant, tmp_path: Path) -> None:
    for program in ("bash", "grep"):
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    command = ["bash", "-c", qdrant_check().replace("6333", str(qdrant.server_port))]

    def check() -> int:
        return subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, timeout=20).returncode

    assert check() == 0
    qdrant.ready_status = 503
    assert check() != 0
    qdrant.shutdown()
    qdrant.server_close()
    assert check() != 0


def test_shellcheck_finds_nothing_in_qdrants_health_check() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "--shell=bash", "-"], input=qdrant_check(), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
