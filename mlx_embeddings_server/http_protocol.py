"""uvicorn's HTTP/1.1 over httptools, with two bounds that it lacks: how large what comes before a body may be, all of
which it keeps, and how long a client is waited for in the middle of a request.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of a request line and headers together. nginx takes 32 KB, and tokens of some issuers are long.
MAX_HEAD_BYTES = 64 * 1024
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 and closes, once a head is larger; 408, when a head takes longer than uvicorn's `timeout_keep_alive`,
    or nothing more of a body comes for as long.
    """

    _head_bytes = 0
    _arrived = 0  # bytes, with the rest of the request before where they came together
    _is_in_head = True
    _waits_since = 0.0  # loop.time()
    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # narrower, as uvicorn has it
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self._watch = self.loop.call_later(self.timeout_keep_alive, self._close_if_late)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._arrived = len(data)
        self._head_bytes += self._arrived
        super().data_received(data)
        if not self._is_in_head:
            self._waits_since = self.loop.time()
        elif self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._head_bytes, self._is_in_head, self._waits_since = self._arrived, True, self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def _close_if_late(self) -> None:
        """One timer a connection, which looks again when it would be time: none is set and ended for each request."""
        left = self._waits_since + self.timeout_keep_alive - self.loop.time()
        if left > 0 or not self._waits_for_client():
            self._watch = self.loop.call_later(left if left > 0 else self.timeout_keep_alive, self._close_if_late)
        elif not self.transport.is_closing():
            if self._head_bytes:
                self.transport.write(_TOO_SLOW)
            self.transport.close()

    def _waits_for_client(self) -> bool:
        """For its first request, or for the rest of one. Between two uvicorn itself watches."""
        if self.cycle is None or self._is_in_head:
            return True
        return self.cycle.more_body and not self.cycle.response_started and not self.flow.read_paused
