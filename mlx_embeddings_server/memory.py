"""Python's and the C library's memory, around models that come and go."""

import ctypes
import gc
import sys


def settle() -> None:
    """After a load: what the libraries made stays, and the collector need not look through it again and again.

    Each look would stop the server for a third of a second.
    """
    gc.collect()
    gc.freeze()


def release() -> None:
    """After an unload: free what only refers to itself, and give free pages back to the system."""
    gc.unfreeze()
    settle()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
