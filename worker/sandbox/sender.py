"""POST once over plain HTTP to an address of this machine, and to no other: nothing that is sent may leave it.

No TLS, no redirects, no proxies, no names but `localhost` are looked at; every request has a connection of its own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

#: Bytes of an answer's body that are looked at.
BODY_KEPT = 1024
PIECE = 64 * 1024
#: Scheme and host, path, the rest.
URL = re.compile(r"((?:[^/?#]*//)?[^/?#]*)([^?#]*)(.*)", re.DOTALL)
STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})(?: |\r)")


class NotHere(ValueError):
    """The URL leads somewhere else than to plain HTTP on this machine."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads. `authority` is for the Host header."""

    host: str
    port: int
    authority: str
    path: str


@dataclass(frozen=True, slots=True)
class Post:
    """What to send. With `interval_s` the body leaves byte by byte."""

    body: bytes
    content_type: str
    headers: Mapping[str, str]
    interval_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: `status` None, and the trouble, where nothing did. `body`: its beginning as it came."""

    status: int | None
    body: bytes = b""
    trouble: str | None = None


def target_of(url: str) -> Target:
    """Raises NotHere."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise NotHere(f"the URL cannot be read: {error}") from None
    if parts.scheme != "http":
        raise NotHere("the sandbox sends over plain http only")
    if host != "localhost" and not _is_loopback(host):
        raise NotHere("the sandbox sends to addresses of this machine only")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    authority = parts.netloc.rpartition("@")[2]
    return Target("127.0.0.1" if host == "localhost" else host, 80 if port is None else port, authority, path)


def _is_loopback(host: str) -> bool:
    """127.0.0.0/8 or ::1, written as an address: a name could mean anything."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def last_part(url: str) -> str:
    """The last part of its path: the secret of a callback URL."""
    return _parts(url)[1]


def with_wrong_token(url: str) -> str:
    """The URL with the last part of its path changed, of the same length unless it is empty."""
    before, token, after = _parts(url)
    return f"{before}{'B' if token.startswith('A') else 'A'}{token[1:]}{after}"


def _parts(url: str) -> tuple[str, str, str]:
    """All up to the last slash of the path, what is behind it, query and fragment; any URL can be taken apart so."""
    authority, path, after = URL.fullmatch(url).groups()  # type: ignore[union-attr]  # it matches any text
    before, slash, token = path.rpartition("/")
    return f"{authority}{before}{slash or '/'}", token, after


async def post(target: Target, message: Post, timeout_s: float) -> Reply:
    """Send, and read what comes back, within `timeout_s` seconds; raises nothing for whatever the other side does."""
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            return await _exchange(reader, writer, target, message)
    except TimeoutError:
        return Reply(None, trouble="no answer in time")
    except ConnectionRefusedError:
        return Reply(None, trouble="the connection was refused")
    except (OSError, EOFError, asyncio.LimitOverrunError):
        return Reply(None, trouble="the connection broke")
    finally:
        if writer is not None:
            writer.transport.abort()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target, message: Post) -> Reply:
    """Read while writing: who refuses a large body answers before it has all of it."""
    writer.write(_head(target, message))
    if len(message.body) <= PIECE and not message.interval_s:
        writer.write(message.body)
        return await _reply(reader)
    writing = asyncio.ensure_future(_write(writer, message))
    try:
        return await _reply(reader)
    finally:
        writing.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await writing


async def _write(writer: asyncio.StreamWriter, message: Post) -> None:
    for piece in _pieces(message):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(message.interval_s)


def _pieces(message: Post) -> Iterator[bytes]:
    size = 1 if message.interval_s else PIECE
    return (message.body[start : start + size] for start in range(0, len(message.body), size))


def _head(target: Target, message: Post) -> bytes:
    headers = {
        "Host": target.authority,
        "User-Agent": "khipu-sandbox",
        "Content-Type": message.content_type,
        "Content-Length": str(len(message.body)),
        "Connection": "close",
        **message.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {target.path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1", "replace")


async def _reply(reader: asyncio.StreamReader) -> Reply:
    head = await reader.readuntil(b"\r\n\r\n")
    while head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
        head = await reader.readuntil(b"\r\n\r\n")
    if not (found := STATUS_LINE.match(head)):
        return Reply(None, trouble="what came is not HTTP")
    length = re.search(rb"\r\ncontent-length: *(\d{1,9})\r\n", head, re.IGNORECASE)
    body = b""
    with suppress(OSError, EOFError):
        body = await _read(reader, min(int(length[1]), BODY_KEPT) if length else BODY_KEPT)
    return Reply(int(found[1]), body)


async def _read(reader: asyncio.StreamReader, size: int) -> bytes:
    """`size` bytes, or what there is before the end."""
    try:
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as short:
        return short.partial
