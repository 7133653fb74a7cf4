"""Downloads what serving needs, without loading a model: for container images, and for machines without a network.

    uv run python scripts/preload_model.py --model allenai/specter2 --adapter adhoc_query=allenai/specter2_adhoc_query

Takes the server's settings: the same flags, variables and YAML file. What is downloaded goes to the Hugging Face cache
(HF_HOME). Then a second process, with HF_HUB_OFFLINE set, goes through all that the server does up to loading, and
lists what it found; with HF_HUB_OFFLINE set from the start, that is all that happens. Exits with 2 where something is
wrong or missing. Where no model is named there is nothing to do.
"""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

import tiktoken

from mlx_embeddings_backends.checkpoints import Checkpoint
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_server.logs import configure_logging
from mlx_embeddings_server.main import argument_parser
from mlx_embeddings_server.registry import model_specs
from mlx_embeddings_server.settings import Settings, SettingsError, load_settings

_NAME = "preload_model.py"


def main(arguments: Sequence[str]) -> None:
    """Download, then check and list. Exits with 2 and a message where the server would not start offline."""
    flags = vars(argument_parser(_NAME, "Download what the server needs with these settings.").parse_args(arguments))
    try:
        settings = load_settings({name: value for name, value in flags.items() if value is not None})
        if not settings.model and not settings.models:
            print("no model was named (--model, MLX_EMBEDDINGS_MODEL, or the file's models): nothing to download")
            return
        is_offline = _preload(settings)
    except (SettingsError, ModelError) as error:
        _exit(str(error))
    if not is_offline:
        # Another process: huggingface_hub reads its variables once, when it is imported.
        again = subprocess.run([sys.executable, __file__, *arguments], env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if again.returncode:
            _exit("all of it is here now, and still it could not be served: the reason is above")


def _exit(message: str) -> NoReturn:
    sys.stderr.write(f"{_NAME}: {message}\n")
    sys.exit(2)


def _preload(settings: Settings) -> bool:
    """Download; offline, check and list. Returns whether it is offline. Raises `ModelError` or `SettingsError`."""
    from huggingface_hub import constants, is_offline_mode

    from mlx_embeddings_server.found import Found
    from mlx_embeddings_server.metrics import Metrics
    from mlx_embeddings_server.models import Models

    configure_logging(settings.log_format)
    with nullcontext() if sys.stderr.isatty() else progress(Path(constants.HF_HUB_CACHE)):
        if settings.token_encoding != "native":
            _fetch_vocabulary(settings.token_encoding)
        found = [Found.of(spec).checkpoint for spec in model_specs(settings)]
    if not is_offline_mode():
        return False
    Models(settings, Metrics())  # what the server looks at before it loads
    for checkpoint in found:
        _list(checkpoint)
    return True


def _fetch_vocabulary(encoding_name: str) -> None:
    try:
        tiktoken.get_encoding(encoding_name)
    except ValueError as error:  # no such encoding, or not the file that it should be
        raise SettingsError(f"--token-encoding {encoding_name}: {str(error).splitlines()[0]}") from error
    except OSError as error:  # requests' errors are OSErrors
        raise SettingsError(
            f"--token-encoding {encoding_name}: its vocabulary cannot be downloaded ({type(error).__name__}): check "
            "the network and the proxy, and that TIKTOKEN_CACHE_DIR is a folder that can be written"
        ) from error


@contextmanager
def progress(folder: Path, seconds: float = 10) -> Iterator[None]:
    """A line on stderr now and then of what has come into `folder`: for logs, where huggingface_hub shows no bar."""
    done = threading.Event()

    def report() -> None:
        before = last = _size(folder, follow_links=False)
        while not done.wait(seconds):
            now = _size(folder, follow_links=False)
            if now != last:
                print(f"{_megabytes(now - before)} so far", file=sys.stderr, flush=True)
            last = now

    reporter = threading.Thread(target=report)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def _list(checkpoint: Checkpoint) -> None:
    snapshot = checkpoint.snapshot
    told = {"local": "a local folder", "packaged": "in an installed package"}
    source = told.get(snapshot.source, f"revision {snapshot.revision}")
    print(f"{snapshot.name} ({source}) can be served without a network:")
    for folder, part in _parts(checkpoint).items():
        print(f"  {part}: {_megabytes(_size(folder))} in {folder}")


def _parts(checkpoint: Checkpoint) -> dict[Path, str]:
    """What each of its folders holds."""
    parts = {folder: f"adapter {name}" for name, folder in checkpoint.adapters.items()}
    parts.setdefault(checkpoint.snapshot.path, "model" if checkpoint.base is None else "adapter")
    parts.setdefault(checkpoint.base or checkpoint.folder, "base model")
    return parts


def _size(folder: Path, *, follow_links: bool = True) -> int:
    """Bytes of all files. The cache's snapshots are links to its blobs; a download's files come and go."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.stat(follow_symlinks=follow_links)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            total += status.st_size
    return total


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    main(sys.argv[1:])
