"""Speak just enough HTTP/1.1 to hold thousands of slow answers open, and to misbehave on purpose.

No task and no thread per request: a waiting answer is one timer, a hanging one is nothing at all. An ASGI server would
be in the way, since it can neither drop a connection nor send half an answer. Not supported: chunked request bodies,
`Expect`, TLS.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, unquote, urlsplit

#: Bytes of a request's head; what asyncio and most servers allow.
HEAD_LIMIT = 65_536
#: Bytes of a request's body: room for setting 100,000 accounts at once.
BODY_LIMIT = 64 * 1024 * 1024


class BadRequest(Exception):
    """What came is not a request that this server reads; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: header names in lower case, `path` decoded, `query` with the last value of each name."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class Response:
    """One response. `sized=False` leaves the length out and ends with the connection, so that nobody can look ahead."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    sized: bool = True


def json_response(value: object, status: int = 200) -> Response:
    """`value` as a JSON body."""
    return Response(status, json.dumps(value, ensure_ascii=False).encode())


def parse(buffer: bytearray) -> Request | None:
    """Take the first whole request out of `buffer`; None while it is not whole. Raises BadRequest."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        if len(buffer) > HEAD_LIMIT:
            raise BadRequest("the head of the request is too long")
        return None
    lines = buffer[:end].decode("latin-1").split("\r\n")
    headers = _headers(lines[1:])
    start, length = end + 4, _length(headers)
    if len(buffer) < start + length:
        return None
    body = bytes(buffer[start : start + length])
    del buffer[: start + length]
    return _request(lines[0], headers, body)


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadRequest("a header has no colon")
        headers[name.strip().lower()] = value.strip()
    return headers


def _length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise BadRequest("chunked bodies are not supported: send Content-Length")
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdecimal()):
        raise BadRequest("Content-Length is not a number")
    if (length := int(text)) > BODY_LIMIT:
        raise BadRequest("the body is too large")
    return length


def _request(line: str, headers: Mapping[str, str], body: bytes) -> Request:
    try:
        method, target, version = line.split(" ")
        url = urlsplit(target)
    except ValueError:
        raise BadRequest("the first line is not METHOD TARGET HTTP/1.1") from None
    keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return Request(method, unquote(url.path), dict(parse_qsl(url.query)), headers, body, keep_alive)


def head(response: Response, keep_alive: bool) -> bytes:
    """Status line and headers, up to and with the empty line."""
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "Unknown"
    headers = {"Server": "khipu-sandbox", "Content-Type": response.content_type}
    if response.sized:
        headers["Content-Length"] = str(len(response.body))
    if not keep_alive or not response.sized:
        headers["Connection"] = "close"
    lines = [f"{name}: {value}\r\n" for name, value in {**headers, **response.headers}.items()]
    return f"HTTP/1.1 {response.status} {phrase}\r\n{''.join(lines)}\r\n".encode("latin-1")


class Exchange:
    """One request and the one answer to it, which may come at any later time, or never.

    `gone` is called once if the client leaves before the answer is complete. Whatever is asked of an exchange after
    its end does nothing.
    """

    def __init__(self, connection: Connection, request: Request) -> None:
        self.request = request
        self.gone: Callable[[], None] = _nothing
        self._connection = connection
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call `call` in `delay_s` seconds, unless the client is gone by then."""
        if delay_s <= 0:
            call()
        else:
            self._timer = asyncio.get_running_loop().call_later(delay_s, call)

    def answer(self, response: Response) -> None:
        """Send the whole response."""
        if not self._ended:
            keep_alive = self.request.keep_alive and response.sized
            self._connection.write(head(response, keep_alive) + response.body)
            self._end(keep_alive)

    def drop(self) -> None:
        """Close the connection without a word (the client sees a reset or an early end)."""
        if not self._ended:
            self._end(keep_alive=False)

    def drip(self, response: Response, interval_s: float, done: Callable[[], None]) -> None:
        """Send the head at once and the body byte by byte; `done` after the last one."""
        if not self._ended:
            self._connection.write(head(response, keep_alive=False))
            self._drip(response.body, 0, interval_s, done)

    def _drip(self, body: bytes, at: int, interval_s: float, done: Callable[[], None]) -> None:
        self._connection.write(body[at : at + 1])
        if at + 1 < len(body):
            self.later(interval_s, lambda: self._drip(body, at + 1, interval_s, done))
        else:
            self._end(keep_alive=False)
            done()

    def _end(self, keep_alive: bool) -> None:
        self._ended = True
        self._connection.ended(keep_alive)

    def lose(self) -> None:
        """The client is gone: called by the connection."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._ended:
            self._ended = True
            self.gone()


def _nothing() -> None:
    """An exchange that nobody watches."""


class Connection(asyncio.Protocol):
    """One client's connection: requests one after another, each handed to `app` as an exchange."""

    def __init__(self, app: Callable[[Exchange], None]) -> None:
        self._app = app
        self._buffer = bytearray()
        self._exchange: Exchange | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's: a client came."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for mypy; create_server makes no other kind
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Asyncio's: the client left, or this side closed."""
        self._transport = None
        if self._exchange is not None:
            self._exchange.lose()
            self._exchange = None

    def data_received(self, data: bytes) -> None:
        """Asyncio's: bytes came."""
        self._buffer += data
        if len(self._buffer) > HEAD_LIMIT + BODY_LIMIT and self._transport is not None:
            self._transport.abort()
        else:
            self._next()

    def write(self, data: bytes) -> None:
        """Send `data`, as far as anybody is there."""
        if self._transport is not None:
            self._transport.write(data)

    def ended(self, keep_alive: bool) -> None:
        """The exchange is over: close, or wait for the next request."""
        self._exchange = None
        if not keep_alive:
            if self._transport is not None:
                self._transport.close()
        elif self._buffer:
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._exchange is not None or self._transport is None:
            return
        try:
            request = parse(self._buffer)
        except BadRequest as error:
            self.write(head(Response(400, str(error).encode(), "text/plain"), False) + str(error).encode())
            self._transport.close()
            return
        if request is not None:
            self._exchange = Exchange(self, request)
            self._app(self._exchange)
