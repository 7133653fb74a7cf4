"""Dockerfile and .dockerignore, as far as they can be held to account without Docker."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pytest

from mlx_embeddings_server.setting_problems import ENVIRONMENT_PREFIX
from mlx_embeddings_server.settings import Settings
from tests.scripted import scripted_server
from tests.server import Server

ROOT = Path(__file__).parents[1]
TARGETS = ("cpu", "cuda")
CUDA = re.compile(r"(nvidia|cuda)-.*|triton")


@dataclass(slots=True)
class Stage:
    """`FROM base AS name`, and the instructions that follow."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


@cache
def stages() -> dict[str, Stage]:
    """Of the Dockerfile, by name, in its order."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found[name] = Stage(base, name)
        else:
            stage.instructions.append((keyword, " ".join(rest.split())))
    return found


def instructions(target: str) -> list[tuple[str, str]]:
    """What makes the image, those of the stages that it stands on first."""
    stage = stages()[target]
    return (instructions(stage.base) if stage.base in stages() else []) + stage.instructions


def last(target: str, keyword: str) -> str:
    return [rest for each, rest in instructions(target) if each == keyword][-1]


def environment(target: str, **arguments: str) -> dict[str, str]:
    """The variables of the image, as Docker substitutes them: `$a`, `${a:-b}` and `${a:+b}`."""
    known: dict[str, str] = {}
    variables: dict[str, str] = {"PATH": "/usr/bin"}

    def value(match: re.Match[str]) -> str:
        name, operator, word = match[1] or match[2], match[3], match[4] or ""
        found = known.get(name, variables.get(name, ""))
        return (word if found else "") if operator == ":+" else found or word

    for keyword, rest in instructions(target):
        if keyword == "ARG":
            name, _, default = rest.partition("=")
            known[name] = arguments.get(name, default.strip('"'))
        if keyword == "ENV":
            words = (word.partition("=") for word in shlex.split(rest))
            variables |= {
                name: re.sub(r"\$(?:(\w+)|\{(\w+)(?:(:[-+])([^}]*))?\})", value, text) for name, _, text in words
            }
    return variables


def health_command(target: str = "cpu") -> list[str]:
    return list(json.loads(last(target, "HEALTHCHECK").partition(" CMD ")[2]))


# The Dockerfile


def test_the_default_target_is_the_small_one_and_there_is_one_for_cuda() -> None:
    assert list(stages())[-1] == "cpu" and set(TARGETS) <= set(stages())


def test_images_from_elsewhere_are_pinned_and_python_is_the_projects() -> None:
    images = {stage.base for stage in stages().values()} - set(stages())
    assert len(images) == 2
    for image in images:
        name, _, tag = image.partition(":")
        if name == "python":
            assert tag.startswith((ROOT / ".python-version").read_text().strip() + "-slim-")
        else:
            assert name == "ghcr.io/astral-sh/uv" and re.fullmatch(r"\d+\.\d+\.\d+", tag)


@pytest.mark.parametrize("target", TARGETS)
def test_the_server_is_no_root_and_gets_signals_itself(target: str) -> None:
    keywords = [keyword for keyword, _ in instructions(target)]
    assert "USER" not in keywords[:-1], "what comes after is done by a user who may not"
    user, _, group = last(target, "USER").partition(":")
    assert int(user) > 0 and int(group) > 0
    [made] = [rest for keyword, rest in instructions(target) if keyword == "RUN" and "useradd" in rest]
    assert f"--uid {user} " in made
    # A shell around it would keep SIGTERM to itself.
    assert json.loads(last(target, "ENTRYPOINT")) == ["mlx-embeddings-server"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "mlx-embeddings-server" in scripts
    assert last(target, "STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("target", TARGETS)
def test_the_variables_of_an_image_are_settings_of_the_server(target: str) -> None:
    ours = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment(target).items()
        if name.startswith(ENVIRONMENT_PREFIX)
    }
    assert set(ours) <= set(Settings.model_fields)
    assert ours["host"] == "0.0.0.0" and ours["port"] == last(target, "EXPOSE")


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_that_is_baked_in_needs_no_network_and_is_where_no_volume_hides_it(target: str) -> None:
    empty = environment(target)
    assert empty["HF_HOME"] == "/data" and empty["HF_HUB_OFFLINE"] == "" == empty["MLX_EMBEDDINGS_MODEL"]
    baked = environment(target, MODEL="ViT-B-32", PRETRAINED="laion2b", ADAPTERS="a=b/c,d=e/f", REVISION="v1")
    assert baked["HF_HOME"] == "/opt/models" and baked["HF_HUB_OFFLINE"] == "1"
    names = ("MODEL", "PRETRAINED", "ADAPTER", "REVISION")
    assert [baked[f"MLX_EMBEDDINGS_{name}"] for name in names] == ["ViT-B-32", "laion2b", "a=b/c,d=e/f", "v1"]
    # Offline only after the download, and the download before the user who may not write there.
    made = stages()[target].instructions
    [download] = [place for place, (keyword, rest) in enumerate(made) if keyword == "RUN"]
    assert "preload_model.py" in made[download][1]
    assert "HF_HUB_OFFLINE" in made[download + 1][1] and made[download + 2][0] == "USER"
    assert environment("runtime").keys().isdisjoint({"HF_HUB_OFFLINE"})


@cache
def ignore_rules() -> list[tuple[bool, re.Pattern[str]]]:
    """(whether it takes files in, pattern), of which the last that matches decides."""
    rules = []
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            rules.append((line.startswith("!"), re.compile(pattern)))
    return rules


def in_context(path: str) -> bool:
    """Whether .dockerignore lets Docker have a file: a pattern holds for what is below it, too."""
    kept = True
    above = [str(parent) for parent in PurePosixPath(path).parents if parent != PurePosixPath(".")]
    for takes_in, pattern in ignore_rules():
        if any(map(pattern.fullmatch, (path, *above))):
            kept = takes_in
    return kept


def files_in_context() -> list[str]:
    skipped = (".git", ".venv", "node_modules")
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(folder, name).relative_to(ROOT).as_posix() for name in names]
    return [path for path in found if in_context(path)]


def test_what_the_build_copies_is_there_and_nothing_else_reaches_it() -> None:
    sources = set()
    for stage in stages().values():
        for keyword, rest in stage.instructions:
            mounts = [
                dict(each.split("=", 1) for each in mount.split(",")) for mount in re.findall(r"--mount=(\S+)", rest)
            ]
            sources |= {mount["source"] for mount in mounts if mount["type"] == "bind"}
            if keyword == "COPY" and rest.startswith("--from="):
                assert rest.split()[0].removeprefix("--from=") in stages()
            elif keyword == "COPY":
                sources |= set(rest.split()[:-1])
    for source in sources:
        assert (ROOT / source).exists(), source
    files = files_in_context()
    for source in sources:
        assert any(path == source or path.startswith(f"{source}/") for path in files), source
    for path in files:
        assert any(path == source or path.startswith(f"{source}/") for source in sources), path
        assert not path.endswith(".pyc")
    for path in (".git/config", ".env", ".venv/bin/python", "tests/server.py", "scripts/bench.py", "a/__pycache__/b"):
        assert not in_context(path)


def test_the_wheel_of_the_context_alone_has_both_packages_whole(tmp_path: Path) -> None:
    uv = _uv()
    context = tmp_path / "context"
    for path in files_in_context():
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, context / path)
    command = [uv, "build", "--quiet", "--wheel", "--offline", "--out-dir", str(tmp_path), str(context)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("hatchling is not in uv's cache")
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, package in ((ROOT, "mlx_embeddings_server"), (ROOT / "backends", "mlx_embeddings_backends")):
        assert {path.relative_to(folder).as_posix() for path in (folder / package).rglob("*.py")} <= names


def test_linters_find_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    checked = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_shellcheck_finds_nothing_in_the_commands() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    commands = [rest for stage in stages().values() for keyword, rest in stage.instructions if keyword == "RUN"]
    assert len(commands) == 6
    for command in commands:
        script = re.sub(r"--mount=\S+ ", "", command)
        checked = subprocess.run(["shellcheck", "--shell=sh", "-"], input=script, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


# What goes into the environment


def _uv() -> str:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on the PATH")
    return uv


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the CPU image's own commands write, run where there is nothing but the project's two files."""
    folder = tmp_path_factory.mktemp("export")
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, folder)
    [command] = [rest for keyword, rest in stages()["dependencies-cpu"].instructions if keyword == "RUN"]
    exports = [part for part in re.sub(r"--mount=\S+ ", "", command).split(" && ") if part.startswith("uv export ")]
    assert len(exports) == 2
    everything = "uv export --quiet --locked --no-dev --no-emit-project --no-hashes --output-file /tmp/everything.txt"
    for export in (*exports, everything):
        words = [word.replace("/tmp/", f"{folder}/") for word in shlex.split(export)]
        done = subprocess.run([_uv(), *words[1:], "--offline"], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    return folder


def requirements(file: Path) -> set[str]:
    """`name==version ; marker` lines."""
    lines = (line.rstrip(" \\") for line in file.read_text().splitlines())
    return {line for line in lines if re.match(r"[a-z0-9]", line)}


def name_of(requirement: str) -> str:
    return requirement.partition("=")[0]


def test_the_cpu_image_has_all_that_is_locked_but_cudas_libraries(exported: Path) -> None:
    locked, torch, everything = (requirements(exported / f"{name}.txt") for name in ("locked", "torch", "everything"))
    assert not [each for each in locked | torch if CUDA.fullmatch(name_of(each))]
    assert locked | torch == {each for each in everything if not CUDA.fullmatch(name_of(each))}
    assert len(everything) > len(locked | torch)
    assert {name_of(each) for each in torch} == {"torch", "torchvision"}
    text = (exported / "locked.txt").read_text()
    for each in locked:
        assert f"{each} \\\n    --hash=sha256:" in text, each


def test_torch_is_the_locked_one(exported: Path) -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    versions = {package["name"]: package["version"] for package in packages if package["name"].startswith("torch")}
    assert requirements(exported / "torch.txt") == {f"{name}=={versions[name]}" for name in ("torch", "torchvision")}


# Health


def run_health_check(server_url: str, **variables: str) -> int:
    command = [sys.executable, *health_command()[1:]]
    port = {"MLX_EMBEDDINGS_PORT": str(urlsplit(server_url).port)}
    return subprocess.run(command, env={**port, **variables}, stderr=subprocess.DEVNULL, timeout=20).returncode


def test_both_images_check_their_health_with_the_python_that_they_have() -> None:
    assert health_command("cpu") == health_command("cuda")
    assert health_command()[0] == "python"


def test_the_health_check_follows_the_server(tmp_path: Path) -> None:
    with (
        ThreadPoolExecutor(1) as thread,
        scripted_server(tmp_path, api_key="key", max_batch_tokens=4) as server,
    ):
        # It asks this machine, whatever the proxy.
        assert run_health_check(server.url, http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9") == 0
        busy = thread.submit(
            server.client.post,
            "/v1/embeddings",
            json={"model": "toy", "input": "work 3 long"},
            headers={"X-API-Key": "key"},
        )
        wait_until_busy(server)
        server.process.terminate()
        server.wait_for_log("signal 15: finishing")
        assert run_health_check(server.url) == 1
        assert busy.result().status_code == 200
        assert server.process.wait(60) == 0
        assert run_health_check(server.url) == 1


def wait_until_busy(server: Server) -> None:
    deadline = time.monotonic() + 60
    while not server.client.get("/health").json()["requests_in_flight"]:
        assert time.monotonic() < deadline, "the request did not come in"
        time.sleep(0.01)
