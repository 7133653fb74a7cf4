"""uvicorn's HTTP/1.1 over httptools, with a bound for what comes before a body: it has none, and keeps all of it."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of a request line and headers together. nginx takes 32 KB, and tokens of some issuers are long.
MAX_HEAD_BYTES = 64 * 1024
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 and closes, once a head is larger."""

    _head_bytes = 0
    _arrived = 0  # bytes, with the rest of the request before where they came together
    _is_in_head = True

    def data_received(self, data: bytes) -> None:
        self._arrived = len(data)
        self._head_bytes += self._arrived
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._head_bytes, self._is_in_head = self._arrived, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()
