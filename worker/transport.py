"""Send one HTTP request and read its reply: once, on a connection that the thread keeps, under one total deadline.

    request ─▶ a connection, kept or new ─▶ head and body in one write ─▶ status, headers, body ─▶ Reply
                          └──── at the deadline it is cut, whoever waits for what on it ────┘

requests prepares what is sent, httptools (llhttp, in C) reads what comes. Neither a session nor a pool stands between
them: those know no total deadline, keep cookies, follow redirects and may ask again, and what had to be switched off
there cost more than all that is done here.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httptools
import requests

import worker
from worker.errors import KhipuFailure, Kind, Outcome

#: What every request says of itself.
USER_AGENT = f"balance-poller/{worker.__version__}"
#: Bytes of one body, compressed or not: an answer is about 300 per balance.
BODY_LIMIT = 1024 * 1024
#: Bytes of status and headers, provisional answers (100) before them included.
HEAD_LIMIT = 64 * 1024
#: Bytes of a whole reply: what frames its chunks and what follows them may be more than the body, within reason.
REPLY_LIMIT = HEAD_LIMIT + 8 * BODY_LIMIT
READ_SIZE = 64 * 1024
#: Seconds for one address to accept a connection; what takes longer has dropped the packets, and the next may not.
CONNECT_LIMIT_S = 10.0
#: Seconds for which a connection nobody used is believed to be open: gateways between us and the bank forget one after
#: minutes, and tell nobody until a request is lost on it.
IDLE_LIMIT_S = 30.0

Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
Resolver = Callable[[str, int], Sequence[Address]]


class NotConnected(OSError):
    """No address of the host accepted a connection."""


#: Everything that is raised here, or by what lies below, for a request that went wrong.
TROUBLE = (OSError, ValueError, httptools.HttpParserError, httptools.HttpParserUpgrade)
#: What a broken connection is called, by the first of these among the causes.
BROKEN = (
    (ssl.SSLCertVerificationError, "certificate"),
    (ssl.SSLError, "TLS"),
    (socket.gaierror, "name resolution"),
    (NotConnected, "connect"),
)


def resolve(host: str, port: int) -> Sequence[Address]:
    """The system's resolver, which knows no deadline."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; names of `headers` in lower case.

    `body` is without its compression; None where an error's body could not be read, which does not matter then.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes | None


class Transport:
    """Exchanges requests for replies. One object serves all threads; each keeps one connection, to its last host.

    `verify`: True for the CAs that requests brings along, or the path of others.
    """

    def __init__(self, *, verify: bool | str, resolver: Resolver) -> None:
        self._tls = _tls_context(verify)
        self._resolver = resolver
        self._thread = threading.local()

    def exchange(self, request: requests.PreparedRequest, *, deadline_s: float) -> Reply:
        """Send the request and read all of the reply; over within `deadline_s` seconds, whatever the other side does.

        Raises KhipuFailure where there is no reply: CONNECTION, TIMEOUT or UNREADABLE; its `sent` tells whether some of
        the request may have gone out.
        """
        attempt = _Attempt(deadline_s, self._resolver)
        keep = False
        try:
            _watchdog.watch(attempt)
            target = _target(request.url or "")
            connection = self._connection(target, attempt)
            connection.send(_head(request, target) + _body(request), attempt)
            reply, keep = connection.receive(attempt)
        except KhipuFailure as failure:
            outcome = failure.outcome
        except TROUBLE as error:
            outcome = _broken(error, attempt)
        else:
            return reply
        finally:
            _watchdog.forget(attempt)
            attempt.release()
            if not keep:
                self.close()
        # Raised out here because the exceptions above hold the request, and would be this one's context.
        raise KhipuFailure(outcome, sent=attempt.sent)

    def reach(self, url: str, *, deadline_s: float) -> datetime | None:
        """Connect to the host of `url` as a request would, and send nothing.

        Returns when its certificate ends, None for plain http. Raises KhipuFailure: CONNECTION or TIMEOUT.
        """
        attempt = _Attempt(deadline_s, self._resolver)
        try:
            _watchdog.watch(attempt)
            return self._connection(_target(url), attempt).certificate_end()
        except TROUBLE as error:
            raise KhipuFailure(_broken(error, attempt)) from error
        finally:
            _watchdog.forget(attempt)
            attempt.release()
            self.close()

    def close(self) -> None:
        """Close this thread's connection: the next request opens another one."""
        connection: _Connection | None = vars(self._thread).pop("connection", None)
        if connection is not None:
            connection.close()

    def _connection(self, target: _Target, attempt: _Attempt) -> _Connection:
        """This thread's, or a new one where that leads elsewhere, was closed, or holds what nobody asked for."""
        kept: _Connection | None = vars(self._thread).get("connection")
        if kept is not None and kept.site == target.site and kept.is_idle():
            attempt.guard(kept.socket)
            return kept
        self.close()
        connection = self._thread.connection = _Connection(target.site, self._tls)
        connection.open(attempt)
        return connection


# --- the request


@dataclass(frozen=True, slots=True)
class _Site:
    """Whom a connection leads to."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class _Target:
    """Whom a URL leads to, and how the request names it there."""

    site: _Site
    host: str
    path: str


@lru_cache
def _target(url: str) -> _Target:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(_Site(parts.scheme, parts.hostname or "", port), parts.netloc.rpartition("@")[2], path)


def _head(request: requests.PreparedRequest, target: _Target) -> bytes:
    lines = [f"{request.method} {target.path} HTTP/1.1", f"Host: {target.host}", f"User-Agent: {USER_AGENT}"]
    lines += (f"{name}: {value}" for name, value in request.headers.items())
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _body(request: requests.PreparedRequest) -> bytes:
    body = request.body or b""
    return body.encode() if isinstance(body, str) else body


# --- the connection


class _Connection:
    """One connection to one host. Whoever closes it has let go of it first: an attempt must not cut another's."""

    socket: socket.socket

    def __init__(self, site: _Site, tls: ssl.SSLContext) -> None:
        self.site = site
        self._tls = tls
        self._incoming = select.poll()
        self._used_s = 0.0

    def open(self, attempt: _Attempt) -> None:
        """Raises OSError and ValueError."""
        self.socket = attempt.connect(self.site.host, self.site.port)
        if self.site.scheme == "https":
            # The handshake comes after the attempt knows the new socket: it may be waited for until the deadline.
            self.socket = self._tls.wrap_socket(
                self.socket, server_hostname=self.site.host.rstrip("."), do_handshake_on_connect=False
            )
            attempt.guard(self.socket)
            self.socket.do_handshake()
        self._incoming.register(self.socket, select.POLLIN)

    def send(self, message: bytes, attempt: _Attempt) -> None:
        """Raises OSError."""
        self.socket.settimeout(attempt.patience())
        attempt.sent = True
        self.socket.sendall(message)

    def receive(self, attempt: _Attempt) -> tuple[Reply, bool]:
        """The reply, and whether the connection may serve another request. Raises `TROUBLE` and KhipuFailure."""
        incoming = _Incoming()
        try:
            while not incoming.is_complete:
                incoming.feed(self.socket.recv(READ_SIZE), attempt)
            content = _inflated(bytes(incoming.body), incoming.headers.get("content-encoding", ""))
        except (KhipuFailure, *TROUBLE):
            # A status that says enough: a refused key is no time-out and no broken connection, whatever comes after it.
            if incoming.status < HTTPStatus.OK or incoming.status in {HTTPStatus.OK, HTTPStatus.ACCEPTED}:
                raise
            return Reply(incoming.status, incoming.headers, None), False
        finally:
            incoming.end()
            self._used_s = time.monotonic()
        return Reply(incoming.status, incoming.headers, content), incoming.may_another_follow

    def is_idle(self) -> bool:
        """Whether the last reply was lately, and nothing came since: no end, and no bytes that belong to no request."""
        if time.monotonic() - self._used_s > IDLE_LIMIT_S:
            return False
        leftover = self.socket.pending() if isinstance(self.socket, ssl.SSLSocket) else 0
        return not leftover and not self._incoming.poll(0)

    def certificate_end(self) -> datetime | None:
        certificate = self.socket.getpeercert() if isinstance(self.socket, ssl.SSLSocket) else None
        if not certificate:
            return None
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)

    def close(self) -> None:
        if hasattr(self, "socket"):
            self.socket.close()

    def __del__(self) -> None:
        """A thread that ends takes its connection along."""
        self.close()


# --- the reply


class _Incoming:
    """What has come of a reply. Its `on_…` are called by the parser, while it is fed."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.is_head_complete = False
        self.is_complete = False
        #: Whether the connection may serve another request: it is kept open, and nothing came after the reply.
        self.may_another_follow = False
        self._size = 0
        self._parser = httptools.HttpResponseParser(self)
        # What http.client, aiohttp and browsers put up with too: a paid answer is not lost over a line's end.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True,
            lenient_chunked_length=True,
            lenient_optional_cr_before_lf=True,
            lenient_spaces_after_chunk_size=True,
        )

    def feed(self, data: bytes, attempt: _Attempt) -> None:
        """Take what was read; nothing is the connection's end. Raises HttpParserError, OSError and KhipuFailure."""
        if not data:
            self._end_of_connection(attempt)
            return
        self._size += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self.is_complete:
                raise
            self.may_another_follow = False  # it came after the reply
        if len(self.body) > BODY_LIMIT:
            fail(Kind.UNREADABLE, "body: larger than 1 MiB")
        if self._size > (REPLY_LIMIT if self.is_head_complete else HEAD_LIMIT):
            raise ConnectionError

    def end(self) -> None:
        """Lets go of the parser, which holds on to this: a body is not to wait until garbage is collected."""
        del self._parser

    def _end_of_connection(self, attempt: _Attempt) -> None:
        is_framed = "content-length" in self.headers or "chunked" in self.headers.get("transfer-encoding", "").lower()
        if not self.is_head_complete or is_framed or attempt.over or not self.body:
            raise ConnectionError  # a body without a length ends here: this one was cut, or never began
        self.is_complete = True

    def on_message_begin(self) -> None:
        if self.is_complete:
            self.may_another_follow = False

    def on_status(self, _: bytes) -> None:
        """The code is whole now, and counts even where a header after it cannot be read."""
        if not self.is_head_complete:
            self.status = self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.is_head_complete:  # what follows the body, or is another reply's, counts for nothing
            self.status = self._parser.get_status_code()
            key, text = name.decode("latin-1").lower(), value.decode("latin-1").rstrip()
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        if not self.is_head_complete:
            self.status = self._parser.get_status_code()
            self.is_head_complete = True

    def on_body(self, body: bytes) -> None:
        if not self.is_complete:
            self.body += body

    def on_message_complete(self) -> None:
        if self.is_complete:
            return
        if HTTPStatus.CONTINUE <= self.status < HTTPStatus.OK:  # provisional: what counts is still to come
            self.is_head_complete = False
            self.status = 0
            self.headers.clear()
        else:
            self.is_complete = True
            self.may_another_follow = self._parser.should_keep_alive()


def _inflated(content: bytes, encoding: str) -> bytes:
    """The body without its compression, in bounded memory."""
    if encoding.strip().lower() in {"", "identity"}:
        return content
    if encoding.strip().lower() not in {"gzip", "x-gzip"}:
        fail(Kind.UNREADABLE, "body: a compression that was not asked for")
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    complete = False
    with suppress(zlib.error):
        content = inflater.decompress(content, BODY_LIMIT + 1)
        complete = inflater.eof and not inflater.unused_data
    if len(content) > BODY_LIMIT:
        fail(Kind.UNREADABLE, "body: larger than 1 MiB")
    if not complete:
        fail(Kind.UNREADABLE, "body: not gzip, or not all of it")
    return content


def fail(kind: Kind, description: str) -> NoReturn:
    """Raise a KhipuFailure in our own words."""
    raise KhipuFailure(Outcome(kind, kind.value, description=description))


def _broken(error: BaseException, attempt: _Attempt) -> Outcome:
    """Why there is no reply: in our words, because theirs hold the request."""
    if attempt.remaining() <= 0:
        return Outcome(Kind.TIMEOUT, Kind.TIMEOUT.value, description="the request's total deadline passed")
    causes = tuple(_causes(error))
    names = (name for kind, name in BROKEN if any(isinstance(cause, kind) for cause in causes))
    return Outcome(Kind.CONNECTION, Kind.CONNECTION.value, description=next(names, "the connection broke"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# --- the deadline


class _Attempt:
    """One request's total deadline, which cuts its connection when the time is up, whoever waits for what on it."""

    def __init__(self, seconds: float, resolver: Resolver) -> None:
        self.at = time.monotonic() + seconds
        self.over = False
        self.sent = False
        self._resolver = resolver
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def remaining(self) -> float:
        """Seconds; a time-out that has passed is negative, and no library may get it."""
        return self.at - time.monotonic()

    def patience(self, limit: float = float("inf")) -> float:
        """Seconds for a library that would take nothing left as for ever, or as not to wait at all."""
        remaining = self.remaining()
        if remaining <= 0:
            raise TimeoutError
        return min(remaining, limit)

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection to the first address that accepts one. Raises OSError."""
        try:
            addresses = self._resolve(host, port)
        except (OSError, ValueError) as error:
            raise NotConnected from error
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in addresses:
            try:
                connection = self._connect(socket.socket(family, kind, protocol), address)
            except OSError as error:
                failure = error
            else:
                self.guard(connection)
                return connection
        raise NotConnected from failure

    def _connect(self, connection: socket.socket, address: Any) -> socket.socket:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(self.patience(CONNECT_LIMIT_S))
            connection.connect(address)
            connection.settimeout(self.patience())
        except OSError:
            connection.close()
            raise
        return connection

    def guard(self, connection: socket.socket) -> None:
        """Cut `connection` at the deadline, unless `release` is called before."""
        with self._lock:
            self._socket = connection
            if self.over:
                self._shut()

    def cut(self) -> None:
        """The time is up."""
        with self._lock:
            self.over = True
            self._shut()

    def release(self) -> None:
        """The request is over: its connection may serve another one, or be closed and its number be another file's."""
        with self._lock:
            self._socket = None

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS would take leave of its object as well

    def _resolve(self, host: str, port: int) -> Sequence[Address]:
        """Addresses within the deadline: the system's resolver cannot be interrupted, so it may outlive us."""
        found: Future[Sequence[Address]] = Future()

        def look_up() -> None:
            try:
                found.set_result(self._resolver(host, port))
            except (OSError, ValueError) as error:
                found.set_exception(error)

        threading.Thread(target=look_up, name="khipu-resolver", daemon=True).start()
        return found.result(self.patience())


class _Watchdog:
    """One thread that cuts the attempts whose time is up. A set, not a heap: most are over long before, and leave."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._attempts: set[_Attempt] = set()
        self._wakes_at = float("inf")
        self._thread: threading.Thread | None = None

    def watch(self, attempt: _Attempt) -> None:
        with self._changed:
            self._attempts.add(attempt)
            if self._thread is None or not self._thread.is_alive():  # not alive after a fork either
                self._thread = threading.Thread(target=self._run, name="khipu-deadlines", daemon=True)
                self._thread.start()
            if attempt.at < self._wakes_at:
                self._changed.notify()

    def forget(self, attempt: _Attempt) -> None:
        with self._changed:
            self._attempts.discard(attempt)

    def _run(self) -> None:
        while True:
            with self._changed:
                for attempt in [attempt for attempt in self._attempts if attempt.remaining() <= 0]:
                    self._attempts.discard(attempt)
                    attempt.cut()
                self._wakes_at = min((attempt.at for attempt in self._attempts), default=float("inf"))
                self._changed.wait(min(self._wakes_at - time.monotonic(), threading.TIMEOUT_MAX))


_watchdog = _Watchdog()


def _tls_context(verify: bool | str) -> ssl.SSLContext:
    """TLS 1.2 or later that verifies against `verify`, or against the CAs that requests brings along."""
    where = verify if isinstance(verify, str) else requests.utils.DEFAULT_CA_BUNDLE_PATH
    cafile, capath = (None, where) if os.path.isdir(where) else (where, None)
    context = ssl.create_default_context(cafile=cafile, capath=capath)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    context.set_alpn_protocols(["http/1.1"])
    return context
