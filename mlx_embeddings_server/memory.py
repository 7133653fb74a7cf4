"""Python's and the C library's memory, around models that come and go."""

import ctypes
import gc
import sys


def settle() -> None:
    """After a load: free what it made and needs no more."""
    gc.collect()


def release() -> None:
    """After an unload: free what only refers to itself, and give free pages back to the system."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
