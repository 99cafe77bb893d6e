"""Ask Khipu once: one request under one total deadline, and name how it ended.

    definition + credentials ──▶ request ──▶ status, headers, body ──▶ Answer | Accepted, or a KhipuFailure

It never asks twice, follows no redirect and does not decide what a failure leads to (`policy` does). Every request is
billed and may log in at a bank, so nothing below this module may repeat one either.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

import requests
from pydantic import JsonValue
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError

import worker
from worker.accounts import Definition
from worker.balances import Accepted, Answer, read_accepted, read_answer, read_error
from worker.credentials import Credentials
from worker.errors import KhipuFailure, Kind, Outcome
from worker.policy import LOG_ON_ERROR

#: Bytes of one body, compressed or not: an answer is about 300 per balance.
BODY_LIMIT = 1024 * 1024
READ_SIZE = 64 * 1024
#: Seconds for one address to accept a connection; what takes longer has dropped the packets, and the next may not.
CONNECT_LIMIT_S = 10.0
#: Shorter texts are not searched for in descriptions: they would blot out ordinary words and hide nothing.
SHORTEST_SECRET = 3
#: What every balance call says of itself.
HEADERS = {
    "User-Agent": f"balance-poller/{worker.__version__}",
    "Accept": "application/json",
    "Accept-Encoding": "gzip",
    "Content-Type": "application/json",
}
#: What may stand in a header without starting another one.
HEADER_VALUE = re.compile(r"[\x21-\x7e]+")

#: Everything that requests, urllib3 and what lies below them raise for a request that went wrong.
TROUBLE = (requests.RequestException, HTTPError, HTTPException, OSError, ValueError)
#: What a broken connection is called, by the first of these among the causes.
BROKEN = (
    (ssl.SSLCertVerificationError, "certificate"),
    (ssl.SSLError, "TLS"),
    (socket.gaierror, "name resolution"),
    (NewConnectionError, "connect"),
)

Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
Resolver = Callable[[str, int], Sequence[Address]]


def resolve(host: str, port: int) -> Sequence[Address]:
    """The system's resolver, which knows no deadline."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class KhipuClient:
    """Khipu's balance call. One object serves all threads; each thread keeps its own connection alive.

    `trust_env` admits proxies and CA bundles from the environment. `verify`: True, or the path of a CA bundle.
    """

    def __init__(
        self,
        base_url: str,
        *,
        trust_env: bool = False,
        verify: bool | str = True,
        resolver: Resolver = resolve,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._resolver = resolver
        self._send_options = _send_options(self._base_url, trust_env, verify)
        self._tls = _tls_context(self._send_options["verify"])
        self._urls: dict[tuple[str, str, str], str] = {}
        self._thread = threading.local()

    def fetch(
        self,
        definition: Definition,
        credentials: Credentials,
        *,
        deadline_s: float,
        callback_url: str | None = None,
    ) -> Answer | Accepted:
        """Ask for the balances of one account; over within `deadline_s` seconds, whatever the other side does.

        With `callback_url` Khipu may accept and answer there later. Raises KhipuFailure, and nothing else for
        whatever can happen on the way; its `sent` tells whether Khipu may have got the request.
        """
        attempt = _Attempt(deadline_s, self._resolver)
        try:
            request = self._request(definition, credentials, callback_url)
            reply = self._exchange(request, attempt)
            return _read(reply, never_shown(definition, credentials, callback_url), callback_url is not None)
        except KhipuFailure as failure:
            failure.sent = attempt.sent
            if failure.outcome.kind is not Kind.ANSWERED:
                self._adapter().close()  # what is left on this connection could be read as the next one's answer
            raise

    def exchange(self, request: requests.PreparedRequest, *, deadline_s: float) -> Reply:
        """Send a request that is no balance call, by the same rules: once, within a total deadline, no redirect, 1 MiB.

        Raises KhipuFailure where there is no reply: CONNECTION, TIMEOUT or UNREADABLE.
        """
        try:
            return self._exchange(request, _Attempt(deadline_s, self._resolver))
        finally:
            self._adapter().close()  # the next request of this thread goes to another host

    def reach(self, url: str, *, deadline_s: float) -> datetime | None:
        """Connect to the host of `url` as a request would, and send nothing.

        Returns when its certificate ends, None for plain http. Raises KhipuFailure: CONNECTION or TIMEOUT.
        """
        attempt = _Attempt(deadline_s, self._resolver)
        _current.attempt = attempt
        _watchdog.watch(attempt)
        try:
            with closing(self._connection(url)) as connection:
                connection.connect()
                return _certificate_end(connection.sock)
        except TROUBLE as error:
            raise KhipuFailure(_broken(error, attempt)) from error
        finally:
            _watchdog.forget(attempt)
            attempt.release()

    def _connection(self, url: str) -> _Connection:
        parts = urlsplit(url)
        if parts.scheme == "https":
            return _TlsConnection(parts.hostname or "", parts.port or 443, ssl_context=self._tls)
        return _Connection(parts.hostname or "", parts.port or 80)

    def _request(
        self, definition: Definition, credentials: Credentials, callback_url: str | None
    ) -> requests.PreparedRequest:
        """As `requests.Request(…).prepare()` makes it, but for its URL, which is prepared once an institution."""
        request = requests.PreparedRequest()
        request.method, request.url = "POST", self._url(definition)
        request.body = _body(definition, credentials, callback_url)
        length = str(len(request.body))
        request.headers = CaseInsensitiveDict({**HEADERS, **_authentication(credentials), "Content-Length": length})
        return request

    def _url(self, definition: Definition) -> str:
        parts = definition.country, definition.segment, definition.institution
        if parts not in self._urls:
            path = "/v1/{}/banking/{}/{}/current/balances".format(*map(_path_part, parts))
            self._urls[parts] = requests.Request("POST", self._base_url + path).prepare().url or ""
        return self._urls[parts]

    def _exchange(self, request: requests.PreparedRequest, attempt: _Attempt) -> Reply:
        """Send and read all of the reply, or fail with CONNECTION, TIMEOUT or UNREADABLE."""
        _current.attempt = attempt
        _watchdog.watch(attempt)
        try:
            with self._adapter().send(request, timeout=attempt.remaining(), **self._send_options) as response:
                return Reply(response.status_code, response.headers, _content(response, attempt))
        except TROUBLE as error:
            outcome = _broken(error, attempt)
        finally:
            _watchdog.forget(attempt)
            attempt.release()
        # Raised out here because the exceptions above hold the request, and would be this one's context.
        raise KhipuFailure(outcome)

    def _adapter(self) -> _Adapter:
        """This thread's adapter, and so its connection."""
        if not hasattr(self._thread, "adapter"):
            self._thread.adapter = _Adapter(self._tls)
        adapter: _Adapter = self._thread.adapter
        return adapter


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `body` is None where an error's body could not be read, which does not matter then."""

    status: int
    headers: Mapping[str, str]
    body: bytes | None


# --- the request


def _path_part(text: str) -> str:
    """One part of the path, which stays one part."""
    if text in {"", ".", ".."}:
        _fail(Kind.BAD_REQUEST, "country, segment or institution cannot stand in a path")
    return quote(text, safe="")


def _authentication(credentials: Credentials) -> dict[str, str]:
    """One scheme per request, never both."""
    key = credentials.key.get_secret_value()
    if not HEADER_VALUE.fullmatch(key):  # http.client would put it into its exception's text
        _fail(Kind.UNAUTHORIZED, "the key or token cannot stand in a header")
    return {"x-api-key": key} if credentials.scheme == "api-key" else {"Authorization": f"Bearer {key}"}


def _body(definition: Definition, credentials: Credentials, callback_url: str | None) -> bytes:
    data: dict[str, JsonValue] = {"AccountNumber": definition.number}
    if definition.send_currency and definition.currency is not None:
        data["Currency"] = definition.currency
    if credentials.scheme == "api-key" and credentials.account_credential is not None:
        data["AccountCredential"] = credentials.account_credential
    envelope: dict[str, JsonValue] = {"RequestData": data}
    if callback_url is not None:
        envelope["CallbackUrl"] = callback_url
    return json.dumps(envelope, separators=(",", ":")).encode()


def never_shown(
    definition: Definition, credentials: Credentials | None, callback_url: str | None = None
) -> tuple[str, ...]:
    """Every text of a request that must not come back out in a description."""
    texts = [definition.number]
    if credentials is not None:
        texts += [credentials.key.get_secret_value(), *_texts(credentials.account_credential)]
        texts += [] if credentials.client_id is None else [credentials.client_id.get_secret_value()]
    if callback_url is not None:
        texts += [callback_url, callback_url.rpartition("/")[2]]
    return tuple(text for text in texts if len(text) >= SHORTEST_SECRET)


def _texts(value: JsonValue) -> Iterator[str]:
    """All strings and numbers in a JSON value, however deep."""
    match value:
        case None | bool():
            return
        case dict():
            for inner in value.values():
                yield from _texts(inner)
        case list():
            for inner in value:
                yield from _texts(inner)
        case _:
            yield str(value)


# --- the reply


def _content(response: requests.Response, attempt: _Attempt) -> bytes | None:
    """The body; None where it cannot be read and the status says enough: a refused key is no time-out."""
    try:
        content = _raw_content(response.raw, attempt)
        return _inflated(content, response.headers.get("Content-Encoding", ""))
    except (KhipuFailure, *TROUBLE):
        if response.status_code in {HTTPStatus.OK, HTTPStatus.ACCEPTED}:
            raise
        return None


def _raw_content(raw: HTTPResponse, attempt: _Attempt) -> bytes:
    content = bytearray()
    while chunk := raw.read(READ_SIZE, decode_content=False):
        content += chunk
        if len(content) > BODY_LIMIT:
            _fail(Kind.UNREADABLE, "body: larger than 1 MiB")
    framed = raw.chunked or raw.length_remaining is not None
    if not framed and (attempt.over or not content):
        raise ConnectionError  # such a body ends where the connection does: this one was cut, or never began
    return bytes(content)


def _inflated(content: bytes, encoding: str) -> bytes:
    """The body without its compression, in bounded memory: not every urllib3 that we run on bounds it."""
    if encoding.strip().lower() in {"", "identity"}:
        return content
    if encoding.strip().lower() not in {"gzip", "x-gzip"}:
        _fail(Kind.UNREADABLE, "body: a compression that was not asked for")
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    complete = False
    with suppress(zlib.error):
        content = inflater.decompress(content, BODY_LIMIT + 1)
        complete = inflater.eof and not inflater.unused_data
    if len(content) > BODY_LIMIT:
        _fail(Kind.UNREADABLE, "body: larger than 1 MiB")
    if not complete:
        _fail(Kind.UNREADABLE, "body: not gzip, or not all of it")
    return content


def _read(reply: Reply, hide: Sequence[str], callback_wanted: bool) -> Answer | Accepted:
    """Branch on the status, then on the body: failures arrive as 200 too."""
    content_type = reply.headers.get("Content-Type")
    if reply.status == HTTPStatus.OK:
        return read_answer(reply.body or b"", content_type, hide=hide)
    if reply.status != HTTPStatus.ACCEPTED:
        raise KhipuFailure(_refusal(reply, hide))
    if not callback_wanted:
        _fail(Kind.UNREADABLE, "HTTP 202 to a request without a callback")
    try:
        return read_accepted(reply.body or b"", content_type, hide=hide)
    except KhipuFailure as failure:
        if failure.outcome.kind is not Kind.UNREADABLE:
            raise
        # Whatever its body says: a 202 means that Khipu is at work, and must not be asked again meanwhile.
        return Accepted(operation_id="", drift=("body",))


def _refusal(reply: Reply, hide: Sequence[str]) -> Outcome:
    """An HTTP error; an envelope in its body knows better, but only a bank's refusal outweighs that of the key."""
    kind = kind_of(reply.status)
    wait = retry_after(reply.headers.get("Retry-After", ""), datetime.now(UTC))
    said = read_error(reply.body or b"", reply.headers.get("Content-Type"), hide=hide)
    if said is None:
        return Outcome(kind, f"HTTP_{reply.status}", description=_phrase(reply.status), retry_after=wait)
    if kind is Kind.UNAUTHORIZED and not LOG_ON_ERROR.fullmatch(said.code):
        return replace(said, kind=kind, retry_after=wait)
    return replace(said, retry_after=wait)


def kind_of(status: int) -> Kind:
    """What an HTTP error means, whatever its body says."""
    match status:
        case 401 | 403:
            return Kind.UNAUTHORIZED
        case 404:
            return Kind.NOT_FOUND
        case 408 | 425 | 429:
            return Kind.THROTTLED
        case _ if 300 <= status < 500:
            return Kind.BAD_REQUEST
        case _ if 500 <= status < 600:
            return Kind.SERVER_ERROR
        case _:
            return Kind.UNREADABLE


def _phrase(status: int) -> str:
    """The status in words: ours, not the server's."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "a status that HTTP does not know"


def retry_after(value: str, now: datetime) -> timedelta | None:
    """Seconds or an HTTP date; None for what is neither, or over."""
    if re.fullmatch(r"[0-9]{1,9}", value):
        return timedelta(seconds=int(value))
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(moment.replace(tzinfo=moment.tzinfo or UTC) - now, timedelta()) or None


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


def _certificate_end(connection: socket.socket) -> datetime | None:
    certificate = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
    if not certificate:
        return None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)


def _fail(kind: Kind, description: str) -> NoReturn:
    raise KhipuFailure(Outcome(kind, kind.value, description=description))


# --- the deadline


class _Attempt:
    """One request's total deadline, which cuts its connection when the time is up, whoever waits for what on it."""

    def __init__(self, seconds: float, resolver: Resolver) -> None:
        self.at = time.monotonic() + seconds
        self.over = False
        self.sent = False
        self._resolver = resolver
        self._lock = threading.Lock()
        self._duplicate: int | None = None

    def remaining(self) -> float:
        """Seconds; a time-out that has passed is negative, and no library may get it."""
        return self.at - time.monotonic()

    def connect(self, host: str, port: int, options: Sequence[tuple[int, int, int | bytes]]) -> socket.socket:
        """A connection to the first address that accepts one. Raises OSError."""
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in self._resolve(host, port):
            connection = socket.socket(family, kind, protocol)
            try:
                for option in options:
                    connection.setsockopt(*option)
                connection.settimeout(self._patience(CONNECT_LIMIT_S))
                connection.connect(address)
                connection.settimeout(self._patience())
                self.guard(connection)
            except OSError as error:
                connection.close()
                failure = error
            else:
                return connection
        raise failure

    def guard(self, connection: socket.socket) -> None:
        """Cut `connection` at the deadline. Holds a duplicate: by then its own number may be another file's."""
        with self._lock:
            if self._duplicate is None:
                self._duplicate = os.dup(connection.fileno())
            if self.over:
                self._shut()

    def cut(self) -> None:
        """The time is up."""
        with self._lock:
            self.over = True
            self._shut()

    def release(self) -> None:
        """The request is over: its connection may serve another one."""
        with self._lock:
            if self._duplicate is not None:
                os.close(self._duplicate)
                self._duplicate = None

    def _shut(self) -> None:
        if self._duplicate is not None:
            with suppress(OSError):
                connection = socket.socket(fileno=self._duplicate)
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                finally:
                    connection.detach()  # `release` closes it

    def _patience(self, limit: float = float("inf")) -> float:
        """Seconds for a library that would take nothing left as for ever, or as not to wait at all."""
        remaining = self.remaining()
        if remaining <= 0:
            raise TimeoutError
        return min(remaining, limit)

    def _resolve(self, host: str, port: int) -> Sequence[Address]:
        """Addresses within the deadline: the system's resolver cannot be interrupted, so it may outlive us."""
        found: Future[Sequence[Address]] = Future()

        def look_up() -> None:
            try:
                found.set_result(self._resolver(host, port))
            except (OSError, ValueError) as error:
                found.set_exception(error)

        threading.Thread(target=look_up, name="khipu-resolver", daemon=True).start()
        return found.result(self._patience())


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


class _Current(threading.local):
    """The attempt that this thread is making: what urllib3 builds cannot be handed anything."""

    attempt: _Attempt


_watchdog = _Watchdog()
_current = _Current()


# --- requests and urllib3, held to one request, one deadline and one host


class _Connection(HTTPConnection):
    """A connection that the current attempt resolves, opens and cuts."""

    #: What `request` has not sent yet.
    _parts: list[bytes] | None = None

    def _new_conn(self) -> socket.socket:
        try:
            return _current.attempt.connect(self._dns_host.strip("[]"), self.port, self.socket_options or ())
        except (OSError, ValueError) as error:
            raise NewConnectionError(self, "no connection") from error

    @property
    def is_connected(self) -> bool:
        """Also False with bytes left over from the last answer, which TLS may have taken off the socket already."""
        leftover = self.sock.pending() if isinstance(self.sock, ssl.SSLSocket) else 0
        return super().is_connected and not leftover

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Head and body in one write: two cost another call to the system, and a TLS record more."""
        if self.sock is None:
            self.connect()
        _current.attempt.guard(self.sock)  # a connection kept alive comes from an earlier attempt
        _current.attempt.sent = True
        self._parts = []
        try:
            super().request(*args, **kwargs)
        finally:
            parts, self._parts = self._parts, None
        self.send(b"".join(parts))

    def send(self, data: Any) -> None:
        if self._parts is None:
            super().send(data)
        else:
            self._parts.append(data)


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    """An adapter that makes our connections, never retries, and verifies with a context made once.

    It is called without a session, which would look for cookies and redirects; none is ever wanted here.
    """

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._pools: dict[str, Any] = {}
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        if proxy.lower().startswith("socks"):
            raise requests.exceptions.InvalidSchema("its connections would know no deadline")
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = self.poolmanager.pool_classes_by_scheme
        return manager

    def get_connection_with_tls_context(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
        """The pool of this URL, found once: looking it up is a seventh of what a request costs."""
        url = request.url or ""
        if url not in self._pools:
            self._pools[url] = super().get_connection_with_tls_context(request, *args, **kwargs)
        return self._pools[url]

    def build_connection_pool_key_attributes(self, *args: Any, **kwargs: Any) -> Any:
        host, _ = super().build_connection_pool_key_attributes(*args, **kwargs)
        return host, {"ssl_context": self._tls} if host["scheme"] == "https" else {}

    def cert_verify(self, *args: Any, **kwargs: Any) -> None:
        """The context verifies; requests would load the whole CA bundle for every connection."""

    def build_response(self, request: requests.PreparedRequest, raw: BaseHTTPResponse) -> requests.Response:
        """What is read of a response, and no cookies."""
        response = requests.Response()
        response.status_code, response.headers, response.raw = raw.status, CaseInsensitiveDict(raw.headers), raw
        response.request = request
        return response

    def close(self) -> None:
        self._pools.clear()
        super().close()


def _send_options(base_url: str, trust_env: bool, verify: bool | str) -> dict[str, Any]:
    """What every request is sent with, proxies and CA bundle of the environment included where they are trusted."""
    with requests.Session() as session:
        session.trust_env = trust_env
        return dict(session.merge_environment_settings(base_url, {}, True, verify, None))


def _tls_context(verify: bool | str) -> ssl.SSLContext:
    """TLS 1.2 or later that verifies against `verify`, or against the CAs that requests brings along."""
    where = verify if isinstance(verify, str) else requests.utils.DEFAULT_CA_BUNDLE_PATH
    cafile, capath = (None, where) if os.path.isdir(where) else (where, None)
    context = ssl.create_default_context(cafile=cafile, capath=capath)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
