"""What every measurement stands on: one Valkey, the cheap bank, and processes that end with it.

Peers run from environments of their own (`make bench` makes them under .bench/; BENCH_ENVIRONMENTS names another
folder, and without any they are left out), ours from the project's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.request import urlopen

import redis
from servers import ROOT, ValkeyServer, wait_until
from usage import cpu_s, memory_mb, tree

from worker.store import LOOPBACK, free_port, tethered

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("BENCH_ENVIRONMENTS", ROOT / ".bench"))


def shipped() -> dict[str, str | int]:
    """The options of config/valkey.conf that say how data is kept in memory."""
    lines = (ROOT / "config" / "valkey.conf").read_text().splitlines()
    return {name: value for name, _, value in (line.partition(" ") for line in lines) if name.startswith("hash-")}


@dataclass(frozen=True, slots=True)
class Running:
    """A process of a measurement."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def cpu_s(self) -> float:
        return cpu_s(self.popen.pid)

    @property
    def memory_mb(self) -> float:
        return memory_mb(self.popen.pid)

    def must_live(self) -> None:
        assert self.popen.poll() is None, f"{self.name} ended: {self.log.read_text(errors='replace')[-3000:]}"

    def stop(self) -> None:
        """At once, with all that it started: nothing that they could still say is wanted."""
        for pid in tree(self.popen.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()


class Rig:
    """A Valkey and its client; `with` ends everything that was started here.

    The server keeps its data as config/valkey.conf has it, and its file only where `appendonly` says so.
    """

    def __init__(self, **server_options: str | int) -> None:
        self._server_options = {**shipped(), **server_options}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(tempfile.mkdtemp(prefix="bench-"))
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.server = stack.enter_context(ValkeyServer(self.directory, **self._server_options))
            self.store: redis.Redis = stack.enter_context(self.server.client())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def server_cpu_s(self) -> float:
        return cpu_s(self.server.pid)

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Running:
        """A process with a log of its own, and nothing of this process's environment that means something to us."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("BALANCES_", "BENCH_"))}
        log = self.directory / f"{name}.log"
        with log.open("ab") as out:
            popen = subprocess.Popen(
                tethered(list(command)),
                cwd=cwd or self.directory,
                env={**inherited, **(env or {})},
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        running = Running(name, popen, log)
        self._stack.callback(running.stop)
        return running

    def bank(self, latency_s: float = 0.0, callback_after_s: float = 2.0) -> Bank:
        """A bank of its own, listening."""
        port = free_port()
        command = [sys.executable, str(HERE / "bank.py"), str(port), str(latency_s), str(callback_after_s)]
        bank = Bank(f"http://{LOOPBACK}:{port}", self.start(f"bank-{port}", command))
        wait_until(bank.listens, 10, "the bank")
        return bank


@dataclass(frozen=True, slots=True)
class Bank:
    """The bank's address, and what came there."""

    url: str
    process: Running

    def stats(self) -> dict[str, Any]:
        with urlopen(self.url) as answer:  # noqa: S310 - our own address
            stats: dict[str, Any] = json.load(answer)
        return stats

    def listens(self) -> bool:
        self.process.must_live()
        try:
            return bool(self.stats())
        except OSError:
            return False


def until(predicate: Any, timeout_s: float, what: str, pause_s: float = 0.02) -> None:
    """As `wait_until`, with fewer looks: looking costs CPU that others are measured by."""
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(pause_s)
