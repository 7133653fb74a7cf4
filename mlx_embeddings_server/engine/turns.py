"""Who runs next on a device that several workers share: whoever ran longest ago, for one batch.

So a model that is rarely asked waits for the batch that runs and no other, however many models are busy; and those that
are busy all the time go round.
"""

import itertools
import threading


class Device:
    """What the workers of a device share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_taken = False
        self.waiting: list[Turns] = []
        self.turns_had = itertools.count(1)


class Turns:
    """One worker's part in a fair lock. `threading.Lock` is none: who has much to do takes it again and again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._last = 0  # the number of the turn that it had last
        self._given = threading.Event()

    def take(self) -> None:
        """Block until nobody else that waits has run longer ago."""
        device = self._device
        with device.lock:
            if not device.is_taken:
                device.is_taken = True
                return
            self._given.clear()
            device.waiting.append(self)
        self._given.wait()  # it is handed over taken, so that nobody gets in between

    def take_if_free(self) -> bool:
        with self._device.lock:
            is_free, self._device.is_taken = not self._device.is_taken, True
            return is_free

    def pass_on(self) -> None:
        """To who ran longest ago; of those who never did, to who came first."""
        device = self._device
        with device.lock:
            self._last = next(device.turns_had)
            if device.waiting:
                following = min(device.waiting, key=lambda each: each._last)
                device.waiting.remove(following)
                following._given.set()
            else:
                device.is_taken = False


class DeviceTurns:
    """The devices of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: dict[str, Device] = {}

    def of(self, device: str) -> Turns:
        """A worker's, of its own."""
        with self._lock:
            return Turns(self._devices.setdefault(device, Device()))
