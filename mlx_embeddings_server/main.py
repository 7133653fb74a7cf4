"""The launcher: flags -> Settings -> uvicorn."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import ByteSize

from mlx_embeddings_server import __version__, check
from mlx_embeddings_server.setting_problems import ENVIRONMENT_PREFIX, FILE_ONLY
from mlx_embeddings_server.settings import Settings, SettingsError, load_settings

_CHECK = "check"
_WORKER = "worker"
_DESCRIPTION = (
    "An embeddings server for MLX and torch that speaks OpenAI's API. In the place of options, `check FILE` says what "
    "a file for --config would serve, without loading anything; before options, `worker` does jobs instead of serving."
)
_WORKER_DESCRIPTION = (
    "Do the jobs of a server that has its collections in a store by URL: embed collections anew. Takes the server's "
    "options; those of serving mean nothing here. A model is loaded when a job needs it."
)

_NO_MODEL = """\
mlx-embeddings-server: no model was named. Two commands that work:

  mlx-embeddings-server --model sentence-transformers/all-MiniLM-L6-v2
  mlx-embeddings-server --model ./path/to/a/model/folder

Several, each with its own settings, and models of other servers are listed in a file (--config) as
models.example.yaml has them.
--help lists all options.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal. Exits with 0 after one, with 2 when the command or the model was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [_CHECK]:
        check.main(arguments[1:])
        return
    is_worker = arguments[:1] == [_WORKER]
    parser = argument_parser("mlx-embeddings-server worker", _WORKER_DESCRIPTION) if is_worker else argument_parser()
    flags = vars(parser.parse_args(arguments[is_worker:]))
    try:
        settings = load_settings({name: value for name, value in flags.items() if value is not None})
    except SettingsError as error:
        _exit(str(error))
    if not settings.names_a_model:
        sys.stderr.write(_NO_MODEL)
        sys.exit(2)
    # Only now: what follows imports the web framework, and then the model's backend.
    from mlx_embeddings_backends.errors import ModelError

    if is_worker:
        from mlx_embeddings_server.work import work as run
    else:
        from mlx_embeddings_server.serve import serve as run

    # The first process of a container ignores what it does not handle. Once it serves, the server drains instead.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    try:
        run(settings)
    except (SettingsError, ModelError) as error:
        _exit(str(error))
    except KeyboardInterrupt:  # while the model was loading: later it is a signal that the server handles
        sys.exit(130)


def _exit(message: str) -> NoReturn:
    sys.stderr.write(f"mlx-embeddings-server: {message}\n")
    sys.exit(2)


def argument_parser(prog: str = "mlx-embeddings-server", description: str = _DESCRIPTION) -> argparse.ArgumentParser:
    """One flag for each field of Settings that can have one."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"Each flag is also an environment variable, such as {ENVIRONMENT_PREFIX}MAX_BATCH_TOKENS, and a key of "
        "the YAML file; flags win over variables, variables over the file.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for name, field in Settings.model_fields.items():
        if name in FILE_ONLY:
            continue
        flag = f"--{name.replace('_', '-')}"
        text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=f"{text} (default: no)")
            continue
        several = isinstance(field.default, tuple)
        shown = "" if field.default is None or several else f" (default: {field.default})"
        action, metavar = "append" if several else "store", _metavar(field.annotation)
        parser.add_argument(flag, dest=name, action=action, metavar=metavar, help=text + shown)
    return parser


def _metavar(annotation: Any) -> str:
    choices = getattr(annotation, "__args__", ())
    if ByteSize in choices:
        return "SIZE"
    if choices and all(isinstance(choice, str) for choice in choices):
        return "{" + ",".join(choices) + "}"
    names = {int: "N", float: "SECONDS"}
    return next((names[kind] for kind in (annotation, *choices) if kind in names), "VALUE")


if __name__ == "__main__":
    main()
