"""Who runs next on a device that several workers share: first come, first served, a batch each."""

import threading
from collections import deque


class Turns:
    """A fair lock, which `threading.Lock` is not: a worker with much to do would take it again and again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Event] = deque()

    def take(self) -> None:
        """Block until those who came before have had theirs."""
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()  # it is handed over taken, so that nobody gets in between

    def take_if_free(self) -> bool:
        with self._lock:
            is_free, self._is_taken = not self._is_taken, True
            return is_free

    def pass_on(self) -> None:
        """To who has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_taken = False


class DeviceTurns:
    """One `Turns` a device, for all workers of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_device: dict[str, Turns] = {}

    def of(self, device: str) -> Turns:
        with self._lock:
            return self._by_device.setdefault(device, Turns())
