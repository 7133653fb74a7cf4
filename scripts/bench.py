"""Measure an embeddings server over HTTP, and the bare model beside it in the same run.

The two take turns (bare, server, bare, server, ...), so that a machine's moods fall on both alike: their ratio is what
counts. A run sends requests until its time is up and then waits for those in flight, so slow requests count in full.
wrk (bench_client.lua) drives the load where it is installed, else bench_client.py: that one takes more of the CPU.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
from bench_loads import FRESH, LOADS, WORDS, bare_kind, fresh_words, loads_of, request_inputs

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
STARTUP_S = 900  # a first start downloads the model
TIMEOUT_S = 60  # of one request
STALL_S = 90  # past its time, a run is given this long for what is in flight


class BenchError(Exception):
    """The measurement cannot go on; the message says why."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The processes, as the one that asks sees them.


class Child:
    """A process started here. What it writes to stderr is kept, to be shown if it dies."""

    def __init__(self, title: str, command: list[str], log: Path, piped: bool) -> None:
        self.title, self.log, pipe = title, log, subprocess.PIPE if piped else None
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe or out, stderr=out, text=True)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def check(self) -> None:
        if self.process.poll() is not None:
            self.fail()

    def fail(self) -> NoReturn:
        status = self.process.wait(10)
        last = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
        raise BenchError(f"{self.title} ended with status {status}; its last lines:\n{last}")


class Server(Child):
    def __init__(self, model: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url, self.peak_mib = f"http://127.0.0.1:{port}", 0.0
        command = [sys.executable, "-m", "mlx_embeddings_server.main", "--model", model, "--port", str(port)]
        super().__init__("the server", [*command, "--log-format", "text"], folder / "server.log", piped=False)

    def wait(self) -> dict[str, Any]:
        """Wait for /health to say 200; return the served model's entry of /v1/models."""
        deadline = time.monotonic() + STARTUP_S
        with httpx.Client(base_url=self.url, trust_env=False, timeout=TIMEOUT_S) as http:
            while time.monotonic() < deadline:
                self.check()
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/health").status_code == 200:
                        return dict(http.get("/v1/models").raise_for_status().json()["data"][0])
                time.sleep(0.1)
        raise BenchError(f"the server was not ready after {STARTUP_S} s: /health never said 200")

    def rss_mib(self) -> float:
        """Resident memory of the process and its children, now; `peak_mib` remembers the most."""
        total, main = 0, psutil.Process(self.process.pid)
        for process in [main, *main.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        peak = total
        with contextlib.suppress(OSError, IndexError):  # Linux knows the main process's peak, between our looks too
            peak = int(Path(f"/proc/{main.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        self.peak_mib = max(self.peak_mib, peak / 2**20, total / 2**20)
        return total / 2**20


class Bare(Child):
    def __init__(self, model: str, facts: dict[str, Any], folder: Path) -> None:
        """`facts` is what the server says of its model; empty for a peer."""
        device = str(facts.get("device", "auto"))
        device = device if device.startswith(("cpu", "cuda", "mps")) else "auto"
        arguments = [
            model,
            device,
            *(facts.get(k, v) for k, v in {"dtype": "auto", "backend": "torch"}.items()),
            bare_kind(facts),
        ]
        command = [sys.executable, str(Path(__file__).with_name("bench_bare.py")), *arguments]
        super().__init__("the bare model", command, folder / "bare.log", piped=True)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return dict(json.loads(line)) if line else self.fail()

    def ask(self, load: str, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # answer() says what happened
            self.process.stdin.write(json.dumps({"load": load, "seconds": seconds}) + "\n")
            self.process.stdin.flush()
        return self.answer()


class Client:
    """Sends loads to one embeddings route, from a process of its own."""

    def __init__(self, url: str, model: str, folder: Path, server: Server | None) -> None:
        self.url, self.model, self.folder, self.server = url, model, folder, server
        self.sent: Counter[str] = Counter()  # requests of each load so far: what comes next is new
        self.wrk = shutil.which("wrk")

    def prepare(self, name: str) -> None:
        """Write the load's bodies, and see that the server answers one of them as it should."""
        fields = {"model": self.model, "encoding_format": "base64"}
        bodies = [json.dumps({**fields, "input": inputs}) for inputs in request_inputs(name)]
        (self.folder / name).write_text("\n".join([" ".join(WORDS), *bodies]) + "\n")
        content, headers = bodies[-1].replace(FRESH, fresh_words(-1)), {"Content-Type": "application/json"}
        try:
            reply = httpx.post(self.url, content=content, headers=headers, timeout=STALL_S, trust_env=False)
        except httpx.HTTPError as error:
            raise BenchError(f"no reply from {self.url}: {error!r}") from error
        if reply.status_code != 200 or len(reply.json()["data"]) != LOADS[name].inputs:
            raise BenchError(
                f"{self.url} answered {LOADS[name].inputs} inputs with {reply.status_code}: {reply.text[:300]}"
            )
        if not isinstance(reply.json()["data"][0]["embedding"], str):
            say("the server does not heed `encoding_format: base64`")

    def run(self, name: str, seconds: float, limit: int = 10**9) -> dict[str, Any]:
        """Send requests for so long, or so many: requests (answered with 200), seconds, p50_ms, p99_ms, errors."""
        connections = min(LOADS[name].connections, limit)
        arguments = [str(self.folder / name), *map(str, (connections, seconds, limit, self.sent[name]))]
        script = str(Path(__file__).with_name("bench_client"))
        command = [sys.executable, f"{script}.py", self.url, *arguments]
        if self.wrk:
            command = [self.wrk, "-t1", f"-c{connections}", f"-d{int(seconds + STALL_S)}", f"--timeout={TIMEOUT_S}"]
            command += ["--script", f"{script}.lua", self.url, "--", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            output = None
            try:
                while output is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        output, _ = process.communicate(timeout=0.2)
                    if self.server:
                        self.server.check()
                        self.server.rss_mib()
            finally:
                process.kill()
        found = [line for line in output.splitlines() if line.startswith("{")]
        if process.returncode or not found:
            raise BenchError(f"the client ended with status {process.returncode}:\n{output[-2000:]}")
        served = dict(json.loads(found[-1]))
        self.sent[name] += served["requests"] + served["errors"] + connections
        return served


# What is measured, in turns, and how it is shown.


def measure(name: str, seconds: float, rounds: int, bare: Bare, client: Client) -> dict[str, Any]:
    """A load's rounds, and their medians."""
    client.prepare(name)
    for prober in (bare.ask, client.run):  # warm-up
        prober(name, min(1.0, seconds))
    rows = []
    for _ in range(rounds):
        row = bare.ask(name, seconds) | client.run(name, seconds)
        row["requests_per_s"] = row["requests"] / row["seconds"] if row["requests"] else 0.0
        row["inputs_per_s"] = row["requests_per_s"] * LOADS[name].inputs
        row["ratio"] = row["inputs_per_s"] / row["bare_inputs_per_s"]
        if LOADS[name].connections == 1 == LOADS[name].bare_batch:
            row["p50_ratio"] = row["p50_ms"] / row["bare_p50_ms"]
        if client.server:
            row["rss_mib"] = client.server.rss_mib()
        say(f"{name}: {row['inputs_per_s']:.3g} inputs/s, bare {row['bare_inputs_per_s']:.3g}, errors {row['errors']}")
        rows.append(row)
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {"load": asdict(LOADS[name]), **medians, "errors": sum(row["errors"] for row in rows), "rounds": rows}


def soak(count: int, client: Client, server: Server) -> dict[str, Any]:
    """Memory after the first twentieth of `count` short requests, and after all of them."""
    client.prepare("short-32")
    result: dict[str, Any] = {"requests": 0, "errors": 0}
    for moment, share in {"early": count // 20, "end": count - count // 20}.items():
        say(f"soak: {share} requests")
        served = client.run("short-32", max(STALL_S, share / 10), share)
        result["requests"] += served["requests"]
        result["errors"] += served["errors"]
        result |= {f"{moment}_requests": result["requests"], f"{moment}_mib": server.rss_mib()}
    return result | {"ratio": result["end_mib"] / result["early_mib"]}


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].lstrip("\t: ")
    if sys.platform == "darwin":
        cpu = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    facts = {"platform": platform.platform(), "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "sentence-transformers")}
    date, busy = datetime.now(UTC).isoformat(timespec="seconds"), round(os.getloadavg()[0], 2)
    return {"date": date, **facts, **versions, "load_average": busy}


def table(report: dict[str, Any]) -> str:
    columns = ["requests_per_s", "inputs_per_s", "p50_ms", "p99_ms", "errors"]
    columns += ["bare_inputs_per_s", "bare_p50_ms", "ratio", "p50_ratio", "rss_mib"]
    titles = [column.replace("_per_s", "/s").replace("_", " ") for column in columns]

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    lines = [" | ".join(["| load", *titles, ""]), "|---" * (len(columns) + 1) + "|"]
    for name, result in report["loads"].items():
        lines.append(" | ".join([f"| {name}", *(cell(result.get(column)) for column in columns), ""]))
    lines.append("")
    for part in ("settings", "machine", "server", "bare", "memory", "soak"):
        facts = ", ".join(f"{k} {round(v, 2) if isinstance(v, float) else v}" for k, v in report.get(part, {}).items())
        lines += [f"- {part}: {facts}"] if facts else []
    return "\n".join(line.rstrip() for line in lines)


def bench(options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    server, facts, url, model = None, {}, options.peer, options.peer_model or options.model
    if not url:
        say("starting the server")
        server = Server(options.model, folder)
        stack.callback(server.stop)
        facts = server.wait()
        url, model = server.url, facts["id"]
        started_mib = server.rss_mib()
    url = url.rstrip("/") if url.endswith("/embeddings") else url.rstrip("/").removesuffix("/v1") + "/v1/embeddings"
    say("loading the bare model")
    loads = options.loads or loads_of(facts)
    bare = Bare(options.model, facts, folder)
    stack.callback(bare.stop)
    client = Client(url, model, folder, server)
    report: dict[str, Any] = {
        "settings": {"model": model, "seconds": options.seconds, "rounds": options.rounds, "wrk": bool(client.wrk)},
        "machine": machine(),
        "server": facts or {"url": url},
        "bare": bare.answer(),
        "loads": {name: measure(name, options.seconds, options.rounds, bare, client) for name in loads},
    }
    if server:
        report["memory"] = {"started_mib": started_mib, "loaded_mib": server.rss_mib()}
        if options.soak:
            report["soak"] = soak(options.soak, client, server)
        report["memory"]["peak_mib"] = server.peak_mib
    return report


def parse() -> argparse.Namespace:
    summary = "Measure the server over HTTP and the bare model beside it. Flags of the server's own can be set in the"
    parser = argparse.ArgumentParser(description=f"{summary} environment, as MLX_EMBEDDINGS_... variables.")
    add = parser.add_argument
    add("--model", default=MODEL, help="id or path, for the server and for the bare model (%(default)s)")
    add("--peer", metavar="URL", help="measure the OpenAI-compatible server at this URL instead of starting ours")
    add("--peer-model", metavar="NAME", help="the model's name in requests to the peer (default: --model)")
    add("--seconds", type=float, default=10.0, help="of each run (%(default)s)")
    add("--rounds", type=int, default=3, help="runs of each load, bare model and server in turn (%(default)s)")
    add(
        "--loads",
        default="",
        help=f"of {', '.join(LOADS)}, by comma (default: those that the model is made for)",
    )
    add("--soak", type=int, default=0, metavar="N", help="at the end send N short requests and compare memory")
    add("--quick", action="store_true", help="a smoke run: --seconds 1 --rounds 1")
    add("--json", type=Path, metavar="PATH", help="write every round, and what machine it was, to this file")
    options = parser.parse_args()
    options.loads = options.loads.split(",") if options.loads else []
    if unknown := set(options.loads) - set(LOADS):
        parser.error(f"--loads: there is no {', '.join(unknown)}; there are {', '.join(LOADS)}")
    if options.soak and (options.peer or options.soak < 20):
        parser.error("--soak takes 20 requests or more, and a server that is started here, not --peer")
    if options.quick:
        options.seconds, options.rounds = 1.0, 1
    return options


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: terminated"))
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            report = bench(options, Path(folder), stack)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if any(result["errors"] for result in [*report["loads"].values(), report.get("soak", {"errors": 0})]):
        sys.exit("bench: some requests failed")


if __name__ == "__main__":
    main()
