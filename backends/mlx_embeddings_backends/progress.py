"""How far a download from the Hugging Face Hub is: for a terminal, and for whoever asks."""

import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Progress:
    """In bytes. The thread that downloads writes it, others may read it."""

    done: int = 0
    total: int | None = None  # None: not known yet, or there is nothing to fetch

    def expect(self, sizes: Iterable[int | None]) -> None:
        """Files to come. A mirror of the Hub may leave sizes out: then there is no total, and never a wrong one."""
        sizes = list(sizes)
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes):
            self.total = (self.total or 0) + sum(known)


def progress_bar(progress: Progress | None) -> type[Any]:
    """huggingface_hub's bar, which also counts in `progress`; silent where nobody watches.

    The library's own switch would silence it for the whole process.
    """
    from huggingface_hub.utils.tqdm import tqdm

    is_silent = not (sys.stderr and sys.stderr.isatty())
    counting = threading.Lock()  # files come in several threads

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # One bar counts files, one what goes over the network, and this one the files' bytes.
            self._is_of_bytes = kwargs.get("name") == "huggingface_hub.snapshot_download"
            if is_silent:
                kwargs["disable"] = True
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            if progress is not None and self._is_of_bytes:
                with counting:
                    progress.done += int(n or 0)
            return super().update(n)

    return Bar
