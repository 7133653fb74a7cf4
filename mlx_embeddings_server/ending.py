"""The end of a process that has served models."""

import atexit
import os
import sys
from typing import NoReturn


def end_process(*, is_idle: bool) -> NoReturn:
    """With status 0. `is_idle`: no thread runs a batch.

    Python's own way takes apart what the libraries made, half a million objects, for a third of the time that a start
    takes; and it aborts while a thread is in native code.
    """
    if is_idle:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)
