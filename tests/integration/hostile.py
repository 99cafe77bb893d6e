"""A server of raw sockets that does with every connection exactly what a test says, and remembers what it was sent.

with Hostile(lambda peer: peer.answer(200, b"{}")) as server:
    requests.post(server.url)
assert len(server.requests) == 1
"""

from __future__ import annotations

import queue
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: Seconds after which the server gives up on a client, so that a failing test ends.
PATIENCE_S = 20.0
#: Seconds between the bytes of a drip: many times shorter than any deadline, so no time-out per read notices it.
DRIP_S = 0.05


@dataclass(frozen=True)
class Request:
    """One request as it came in; header names in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """The client's end of one connection, as the script of a test sees it."""

    def __init__(self, server: Hostile, connection: socket.socket) -> None:
        self.server = server
        self.connection = connection
        self._received = b""

    def request(self) -> Request:
        """The next whole request, remembered by the server. Raises EOFError when there is none."""
        head, _, self._received = self._until(lambda: b"\r\n\r\n" in self._received).partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", "0"))
        received = self._until(lambda: len(self._received) >= length)
        body, self._received = received[:length], received[length:]
        request = Request(line, headers, body)
        self.server.requests.append(request)
        return request

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def drip(self, data: bytes) -> None:
        """One byte at a time, until the client or the server has had enough."""
        for byte in data:
            self.send(bytes([byte]))
            if self.server.closing.wait(DRIP_S):
                return

    def flood(self, data: bytes) -> None:
        """The same again and again, until the client has had enough; counted in `server.sent`."""
        while not self.server.closing.is_set():
            self.send(data)
            self.server.sent += len(data)

    def answer(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, *, keep: bool = False
    ) -> None:
        """Read one request and answer it properly."""
        self.request()
        self.reply(status, body, headers)
        if not keep:
            self.gone()

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send(head(status, {"Content-Length": str(len(body)), **(headers or {})}) + body)

    def gone(self) -> None:
        """Wait until the client has closed; `server.closed` says that it did."""
        with suppress(ConnectionError, ssl.SSLError):
            while self.connection.recv(65536):
                pass
        self.server.closed.put(True)

    def _until(self, complete: Callable[[], bool]) -> bytes:
        while not complete():
            received = self.connection.recv(65536)
            if not received:
                raise EOFError
            self._received += received
        return self._received


class Hostile:
    """The server. `script` gets each connection in a thread of its own; what it raises on a broken one is expected."""

    def __init__(self, script: Callable[[Peer], None], tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.sent = 0
        self.elsewhere = ""  # where a script that redirects leads to
        self.closing = threading.Event()
        self.closed: queue.Queue[bool] = queue.Queue()
        self._script = script
        self._tls = tls
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    def __enter__(self) -> Hostile:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                connection.settimeout(PATIENCE_S)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, EOFError), self._secured(connection) as secured:
            self._script(Peer(self, secured))

    @contextmanager
    def _secured(self, connection: socket.socket) -> Iterator[socket.socket]:
        with connection:
            if self._tls is None:
                self._open.append(connection)
                yield connection
            else:
                with self._tls.wrap_socket(connection, server_side=True) as secured:
                    self._open.append(secured)
                    yield secured


def certificate(directory: Path, *, days: int = 2, names: str = "IP:127.0.0.1") -> Path:
    """A certificate, for 127.0.0.1 unless told, signed by itself, in one file with its key."""
    path = directory / "server.pem"
    options = f"-x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days {days} -subj /CN=localhost"
    options += f" -addext subjectAltName={names} -keyout {path}.key -out {path}"
    subprocess.run(["openssl", "req", *options.split()], check=True, capture_output=True)
    with path.open("ab") as file:
        file.write(Path(f"{path}.key").read_bytes())
    return path


def head(status: int, headers: Mapping[str, str] | None = None) -> bytes:
    """A response up to its body."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
