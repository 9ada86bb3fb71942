"""A connection of `upright serve`: uvicorn's, with limits on everything before the body of a request."""

import asyncio
import json
from asyncio import TimerHandle
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from upright.runtime.serving.metrics import Metrics

MAX_HEAD_BYTES = 64 * 1024
"""Limit for the request line and the headers together, and for the trailers after a chunked body."""
MAX_HEADERS = 100
HEAD_SECONDS = 10.0
"""Limit from the first byte of a request, or from the start of a connection, to the end of the headers."""
INVALID = HTTPStatus.BAD_REQUEST, "The request is not valid HTTP."
TOO_LARGE = (
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"Request line and headers may have up to {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers; send fewer.",
)


class Connection(HttpToolsProtocol):
    """A connection that answers 431 to large heads and 408 to slow ones, and then closes."""

    _in_head = False
    _head_bytes = _headers = 0
    _unparsed_bytes = 0
    """Bytes since the last complete header or part of a body. The parser copies them again for every piece that
    arrives, so they must stay few."""
    _deadline: TimerHandle | None = None
    _refusal = INVALID

    # The interface of asyncio.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unparsed_bytes > MAX_HEAD_BYTES:
            self._refuse(*TOO_LARGE)
        elif (self._in_head or self._unparsed_bytes) and not self._deadline:
            self._start_deadline()

    # The parser calls the following methods. After an exception it stops, and uvicorn calls `send_400_response`.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._headers = True, 0, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._unparsed_bytes = 0
        self._headers += 1
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._in_head, self._unparsed_bytes = False, 0
        self._stop_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes = 0
        self._stop_deadline()
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or self._headers > MAX_HEADERS:
            self._refusal = TOO_LARGE
            raise ValueError(TOO_LARGE[1])

    # Refusals.

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._expire)

    def _stop_deadline(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self.cycle and not self.cycle.response_complete:
            self._start_deadline()  # the client still waits for an answer to its last request
        elif self._in_head or self._unparsed_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"The headers did not arrive within {HEAD_SECONDS:g} s.")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request. Uvicorn calls this method when its parser stops."""
        self._refuse(*self._refusal)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        """Send an error as JSON, and close the connection."""
        self._stop_deadline()
        metrics: Metrics = self.app_state["metrics"]
        metrics.requests.labels("none", status.value).inc()
        body = json.dumps({"error": text}).encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        self.transport.close()
