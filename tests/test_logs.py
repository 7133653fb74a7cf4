"""What the log says of requests, and what it must never say. Also run as a script: a server that takes images."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_embeddings_backends.base import Backend
from mlx_embeddings_server.logs import TOLD_IN_FULL, JsonFormatter, TextFormatter, without_words
from mlx_embeddings_server.serve import serve
from mlx_embeddings_server.settings import load_settings
from tests.image_bytes import encoded, scene
from tests.scripted import ScriptedBackend, scripted_server
from tests.server import Server
from tests.test_access_tokens import SECRET as TOKEN_SECRET
from tests.test_access_tokens import claims, signed

KEY = "sk-key-of-the-server-0123456789"
# One for each place of a request, so that a failing test says which it is.
PLANTED = [f"planted-{place}-4711" for place in range(20)]
IMAGE = encoded(scene(), "PNG")


def lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.splitlines()]


def of_request(server: Server, id: str) -> list[dict[str, Any]]:
    """Its lines, when that of its end is there."""
    server.wait_for_log(f'"request_id":"{id}".*"duration_ms"|"duration_ms".*"request_id":"{id}"')
    return [line for line in lines(server) if id in (line.get("request_id"), *line.get("request_ids", ()))]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("machine")
    with scripted_server(folder, log_format="json", access_log=True, jwt_secret=TOKEN_SECRET) as server:
        server.client.headers["Authorization"] = f"Bearer {signed(claims(sub='carol'))}"
        yield server


def test_a_request_is_one_object(machine: Server) -> None:
    reply = machine.client.post(
        "/v1/embeddings?key=value", json={"model": "toy", "input": ["a b", "c"]}, headers={"X-Request-Id": "abc:1.2"}
    )
    [line] = of_request(machine, "abc:1.2")

    assert reply.status_code == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line.pop("message").startswith("POST /v1/embeddings 200 ")
    assert 0 < line.pop("duration_ms") < 60_000
    assert line == {
        "level": "info", "logger": "mlx_embeddings_server.access", "request_id": "abc:1.2", "method": "POST",
        "route": "/v1/embeddings", "status": 200, "caller": "carol", "model": "toy", "inputs": 2, "tokens": 3,
    }  # fmt: skip


def test_a_route_is_told_and_not_a_path(machine: Server) -> None:
    for path, route, status in (("/v1/models/toy", "/v1/models/{name:path}", 200), ("/none/such", "none", 404)):
        reply = machine.client.get(path)
        [line] = of_request(machine, reply.headers["x-request-id"])
        assert (line["route"], line["status"], reply.status_code) == (route, status, status)
        assert "model" not in line and "tokens" not in line


def test_lines_of_the_engine_name_the_request(machine: Server) -> None:
    def failing(text: str, status: int) -> dict[str, Any]:
        reply = machine.client.post("/v1/embeddings", json={"model": "toy", "input": text})
        assert reply.status_code == status, reply.text
        [line] = [each for each in of_request(machine, reply.headers["x-request-id"]) if "duration_ms" not in each]
        return line

    failed = failing("fail there", 500)
    assert failed["message"] == "the model failed on one input of 2 tokens"
    assert failed["exception"].startswith("Traceback") and failed["exception"].endswith("\nValueError")
    machine.client.post("/v1/embeddings", json={"model": "toy", "input": "die there"})
    machine.wait_for_log('"request_ids":')
    died = next(line for line in lines(machine) if "request_ids" in line)
    assert died["message"].startswith("the worker died") and died["exception"].endswith("\nSystemExit")


def test_for_people_it_is_a_line_to_read(tmp_path: Path) -> None:
    with scripted_server(tmp_path, access_log=True) as server:
        server.embed(["a b", "c"], "toy")
        id = server.client.get("/livez").headers["x-request-id"]
        server.wait_for_log(id)
        time = r"^\d\d:\d\d:\d\d INFO "
        line = rf"{time}POST /v1/embeddings 200 [\d.]+ ms toy inputs=2 tokens=3 [0-9a-f]{{32}}$"
        assert re.search(line, server.log, re.MULTILINE)
        assert re.search(rf"{time}GET /livez 200 [\d.]+ ms {id}$", server.log, re.MULTILINE)


def send_everywhere(server: Server, *keys: str) -> None:
    """Requests with secrets in all places that a request has, good ones and those that fail in every way."""
    p = iter(PLANTED)
    server.client.headers["Authorization"] = f"Bearer {keys[0]}" if keys else "none"
    known = {"model": "toy", "input": "a text"}
    bodies: list[Any] = [
        known | {"input": [next(p), f"fail {next(p)}", f"nan {next(p)}"]},
        known | {"user": next(p), next(p): next(p)},
        known | {"model": next(p)},
        known | {"encoding_format": next(p), "dimensions": next(p)},
        known | {"input": {"image": f"http://{next(p)}:{next(p)}@127.0.0.1:9/{next(p)}.png?{next(p)}"}},
        known | {"input": {"image": f"http://{PLANTED[0]}:{PLANTED[1]}@no-such-host.invalid/a.png"}},
        known | {"input": {"image": f"data:image/png;base64,{PLANTED[2]}"}},
        known | {"prompt_name": PLANTED[3], "input_type": PLANTED[4]},
        known
        | {
            "input": [
                f"lost {PLANTED[5]}",
                f"die {PLANTED[6]}",
                f"\ud800{PLANTED[7]}".encode(errors="replace").decode(),
            ]
        },
    ]
    for body in bodies:
        server.client.post(f"/v1/embeddings?key={next(p, PLANTED[8])}", json=body)
    server.client.post("/v1/embeddings", content=f'{{"input": {PLANTED[9]}'.encode())
    server.client.post("/v1/embeddings", content=f'{{"input": "\\ud800 {PLANTED[9]}"}}'.encode())
    rerank = {"model": "toy", "query": f"fail {PLANTED[10]}", "documents": [PLANTED[11], {"text": PLANTED[12]}]}
    server.client.post("/v1/rerank", json=rerank)
    headers = {
        "X-API-Key": PLANTED[13], "Cookie": PLANTED[14], "X-Other": PLANTED[15], "X-Request-Id": f"{PLANTED[16]} {{}}",
        "X-Provider": PLANTED[17], "X-Embeddings-Dimensions-Policy": PLANTED[18], "Content-Type": PLANTED[19],
        "User-Agent": PLANTED[13], "Referer": PLANTED[14], "traceparent": PLANTED[15], "Accept": PLANTED[16],
    }  # fmt: skip
    server.client.post("/v1/embeddings", json=known, headers=headers)
    server.client.post("/v1/embeddings", json=known, headers={"X-Provider": PLANTED[17]})
    server.client.get("/v1/models", headers={"Authorization": f"Bearer {PLANTED[0]}"})
    server.client.get("/v1/models", headers={"Authorization": f"Basic {PLANTED[1]}"})
    for path in (f"/{PLANTED[2]}", f"/v1/models/{PLANTED[3]}", f"/v1/models/toy?{PLANTED[4]}"):
        server.client.get(path)
        server.client.request(PLANTED[5].upper().replace("-", ""), path)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_that_a_caller_sends_is_in_it(tmp_path: Path, log_format: str) -> None:
    loud = {"PYTHONWARNINGS": "always", "PYTHONASYNCIODEBUG": "1"}
    server = scripted_server(tmp_path, log_format=log_format, access_log=True, api_key=KEY)
    server.command[1:2] = [__file__]
    server.environment |= loud
    with server:
        send_everywhere(server, KEY)
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        last = server.client.get("/livez").headers["x-request-id"]
        server.wait_for_log(last)
        log = server.log

        assert all(said in log for said in ("the model failed on one input", "the worker died", "Traceback"))
        assert len(re.findall(r"POST /v1/embeddings \d{3} ", log)) >= 13
        for secret in (*PLANTED, KEY):
            assert secret not in log and secret.upper() not in log
            assert secret.replace("-", "").upper() not in log
        if log_format == "json":
            assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines(server))


def test_nor_where_someone_else_writes_the_log(tmp_path: Path) -> None:
    """Under uvicorn's own command, whose formatters would tell what exceptions say."""
    (tmp_path / "app.py").write_text(
        "from mlx_embeddings_server.app import create_app\n"
        "from mlx_embeddings_server.settings import load_settings\n"
        "from tests.scripted import ScriptedLoad\n"
        "app = create_app(load_settings(), load=ScriptedLoad(''))\n"
    )
    server = scripted_server(tmp_path)
    server.command = [sys.executable, "-m", "uvicorn", "--app-dir", str(tmp_path), "app:app", "--no-access-log"]
    server.command += ["--port", "0"]
    with server:
        send_everywhere(server)
        server.stop()
        assert "the model failed on one input" in server.log and "ValueError" in server.log
        assert not [secret for secret in PLANTED if secret in server.log]


def formatted(formatter: logging.Formatter, error: BaseException, **extra: Any) -> str:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, (type(error), error, error.__traceback__))
    record.__dict__ |= extra
    return formatter.format(record)


def raised() -> BaseException:
    """An exception with a cause, whose cause has a context, all of which say too much."""
    try:
        try:
            try:
                raise KeyError(PLANTED[0])
            except KeyError:
                raise UnicodeDecodeError("utf-8", PLANTED[1].encode(), 0, 1, PLANTED[2])  # noqa: B904
        except ValueError as error:
            error.add_note(PLANTED[3])
            raise ExceptionGroup(PLANTED[4], [OSError(1, PLANTED[5], PLANTED[6])]) from error
    except ExceptionGroup as error:
        return error


def test_an_exception_is_told_by_kinds_and_lines() -> None:
    for text in (formatted(TextFormatter(), raised()), json.loads(formatted(JsonFormatter(), raised()))["exception"]):
        assert re.findall(r"^\w+Error|^\w+Group", text, re.MULTILINE) == [
            "KeyError", "UnicodeDecodeError", "ExceptionGroup",
        ]  # fmt: skip
        assert text.count("Traceback") == 3 and text.count("in raised") == 3
        assert not [secret for secret in PLANTED if secret in text]
    assert all(PLANTED[at] in formatted(TextFormatter(), raised(), **TOLD_IN_FULL) for at in (0, 2, 3, 4, 5, 6))


def test_exceptions_that_lead_to_each_other_in_a_circle_are_told_once() -> None:
    first, second = ValueError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    assert formatted(TextFormatter(), without_words(first)).count("Error\n") == 1


def test_an_exception_that_nobody_looked_at_is_told_by_its_first_line() -> None:
    script = (
        "import asyncio\n"
        "from mlx_embeddings_server.logs import configure_logging\n"
        "configure_logging('json')\n"
        "async def fail(): raise ValueError('planted-secret')\n"
        "async def run(): task = asyncio.ensure_future(fail()); await asyncio.sleep(0); await asyncio.sleep(0)\n"
        "asyncio.run(run())\n"
        "import threading\n"
        "def die(): raise KeyError('planted-secret')\n"
        "thread = threading.Thread(target=die, name='mine'); thread.start(); thread.join()\n"
        "import warnings; warnings.warn('about a thing')\n"
        "import logging\n"
        "library = logging.getLogger('library'); library.propagate = False\n"
        "library.addHandler(logging.StreamHandler()); library.warning('a line')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    first, *others = map(json.loads, done.stderr.splitlines())
    assert first["message"] == "Task exception was never retrieved" and first["exception"].endswith("\nValueError")
    assert [line["message"] for line in others] == [
        "the thread mine died", "UserWarning: about a thing (<string>:10)", "a line",
    ]  # fmt: skip
    assert "planted" not in done.stderr


@given(st.text(), st.characters(categories=["Cs"]))
def test_any_text_is_one_object_on_one_line(text: str, half: str) -> None:
    for message in (text, text + half):
        written = JsonFormatter().format(logging.LogRecord("x", 20, "", 0, "%s", (message,), None))
        assert "\n" not in written and json.loads(written)["message"] == message


class _TakesImages(ScriptedBackend):
    info = replace(ScriptedBackend.info, modalities=("text", "image"))


def _load(*asked: object) -> Backend:
    return _TakesImages()


if __name__ == "__main__":
    warnings.simplefilter("always")
    os.environ.pop("SCRIPTED_RELOAD")
    serve(load_settings(), load=_load)
