"""A circuit breaker: a provider that keeps failing is left alone for a while, and then tried by one request."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, cast

from mlx_embeddings_server.providers.base import CircuitOpen, InputRefused, ProviderFailed

log = logging.getLogger(__name__)

State = Literal["closed", "open", "half_open"]


class Circuit:
    """Closed while calls succeed; open after `threshold` failures in a row; half-open `recovery_seconds` later.

    The library counts and keeps the time. It would let every caller through when half-open, and take a call that was
    cancelled for one that succeeded: here one call at a time tries, and a cancelled one says nothing.
    """

    def __init__(self, provider: str, threshold: int, recovery_seconds: float) -> None:
        from circuitbreaker import CircuitBreaker  # most servers have no provider

        self.provider = provider
        self.opened_at: datetime | None = None  # None: it is closed
        self._breaker = CircuitBreaker(threshold, recovery_seconds, ProviderFailed, name=provider)
        self._is_tried = False

    @property
    def state(self) -> State:
        return cast("State", self._breaker.state)

    @property
    def failure_count(self) -> int:
        """In a row."""
        return int(self._breaker.failure_count)

    @property
    def retry_after(self) -> int | None:
        """Seconds until the provider is tried again. None: it may be asked now."""
        return max(1, int(self._breaker.open_remaining)) if self.state == "open" or self._is_tried else None

    def reset(self) -> None:
        """Close it, whatever was."""
        self._close()

    def check(self) -> None:
        """Raises `CircuitOpen` where there is to be no call now."""
        if (seconds := self.retry_after) is not None:
            raise CircuitOpen(
                f"the provider {self.provider!r} failed {self.failure_count} times in a row and is left alone for "
                f"another {seconds} s",
                is_temporary=True,
                retry_after=seconds,
            )

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call: its end counts. Raises `CircuitOpen` where there is to be none."""
        self.check()
        is_trial = self._is_tried = self.state == "half_open"
        try:
            yield
        except ProviderFailed as error:
            if error.counts:
                self._count(error)
            else:
                self._close()  # it answered
            raise
        except InputRefused:
            self._close()
            raise
        else:
            self._close()
        finally:
            if is_trial:
                self._is_tried = False

    def _count(self, error: ProviderFailed) -> None:
        if self._breaker.opened:
            return  # a call of before: it must not make the pause longer
        # The library counts what leaves this block.
        self._breaker.__exit__(type(error), error, None)
        if self._breaker.opened:
            self.opened_at = datetime.now(UTC)
            log.warning(
                "the circuit of %s is open after %d failures: not asked for %d s",
                self.provider,
                self.failure_count,
                self._breaker.open_remaining,
            )

    def _close(self) -> None:
        if self.opened_at is not None:
            self.opened_at = None
            log.info("the circuit of %s is closed", self.provider)
        self._is_tried = False
        self._breaker.reset()
