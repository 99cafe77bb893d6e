"""docs/examples/sqlite_ledger.py under torture: whatever is killed, every operation is in its file once.

    publisher ──▶ settle.lua ──▶ stream ──▶ sqlite_ledger.py ──▶ ledger.db
                        └── killed ──┴──────────┘

The publisher repeats every answer until the server has taken it, as workers do. The server keeps its file with
`appendfsync always`: what a SIGKILL of the process takes is then what was not confirmed, and nothing else. (With
`everysec`, which production has, a crash of the *host* may take the last second of the stream, and what a consumer had
already read of it; it stays in the ledger.)
"""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
import redis
from schemas import validate_stream
from servers import ROOT, ValkeyServer, wait_until
from world import STREAM, World, read

from worker.errors import StoreUnavailable
from worker.store import tethered
from worker.timetable import Begun, connect

EXAMPLE = ROOT / "docs" / "examples" / "sqlite_ledger.py"
SEED = 20261122
OPERATIONS = 300
#: What is struck, in an order by chance; "group" forgets who has read what.
BLOWS = ["ledger"] * 6 + ["server"] * 4 + ["both"] * 2 + ["group"] * 2
#: Rows from one blow to the next at most, and entries that the publisher is ahead of the ledger at most.
STRIDE, AHEAD = 24, 30


class Ledger:
    """The example as a process, and its file."""

    def __init__(self, directory: Path, url: str) -> None:
        self.file, self.log = directory / "ledger.db", directory / "ledger.log"
        self._url = url
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._started_s = time.monotonic()
        command = tethered([sys.executable, str(EXAMPLE), self._url, str(self.file)])
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def is_reading(self, client: redis.Redis) -> bool:
        """Whether the present process has read: only then does it know what to do at SIGTERM."""
        age_ms = (time.monotonic() - self._started_s) * 1000
        return any(consumer["idle"] < age_ms for consumer in client.xinfo_consumers(STREAM, "sqlite"))

    def stop(self) -> int:
        """SIGTERM, and how it ended."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(10)

    def rows(self, query: str) -> list[tuple]:
        """What the file answers; nothing as long as there is none."""
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(self.file)) as file:
            return file.execute(query).fetchall()
        return []

    def count(self) -> int:
        return sum(count for (count,) in self.rows("SELECT count(*) FROM answer"))


def publish(url: str, begun: Begun, operations: list[str], ledger: Ledger) -> None:
    """Settles every operation, and older ones again, as if their workers had been killed before they knew."""
    world = World(connect(url))
    for number, operation in enumerate(operations):
        wait_until(partial(is_near, ledger, number), 30, "a ledger that keeps up")
        done = False
        while not done:
            with suppress(StoreUnavailable):
                world.settle(begun, operation=operation, amount=str(number))
                world.settle(begun, operation=operations[number // 2], amount="0")
                done = True
    world.client.close()


def is_near(ledger: Ledger, number: int) -> bool:
    return ledger.count() >= number - AHEAD


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path, appendonly="yes", appendfsync="always") as server:
        yield server


def test_every_operation_is_in_the_ledger_once_whatever_is_killed(server: ValkeyServer, tmp_path: Path) -> None:
    operations = [f"operation-{number:04}" for number in range(OPERATIONS)]
    ledger = Ledger(tmp_path, server.url)
    with server.client() as client:
        world = World(client)
        world.apply(read("a"))
        begun = world.start("a")
    publisher = threading.Thread(target=publish, args=(server.url, begun, operations, ledger), daemon=True)
    ledger.start()
    publisher.start()
    try:
        torture(server, ledger, random.Random(SEED))  # noqa: S311 - no secret
        publisher.join(30)
        wait_until(lambda: ledger.count() == OPERATIONS, 30, "every operation")
        with server.client() as client:
            wait_until(lambda: is_done(client), what="every acknowledgement")
            wait_until(lambda: ledger.is_reading(client), what="a ledger that reads")
            assert ledger.stop() == 0
            assert client.xlen(f"{STREAM}.dead") == 0
            assert validate_stream(client) == OPERATIONS
            assert client.xinfo_consumers(STREAM, "sqlite") == []
            [[position]] = ledger.rows("SELECT entry FROM position")
            assert position == client.xinfo_stream(STREAM)["last-generated-id"]
    except BaseException:
        print(ledger.log.read_text())
        ledger.kill()
        raise
    amounts = [(operation, str(number)) for number, operation in enumerate(operations)]
    assert ledger.rows("SELECT operation_id, amount FROM balance ORDER BY operation_id, amount") == amounts
    assert [row for (row,) in ledger.rows("SELECT operation_id FROM answer ORDER BY 1")] == operations


def torture(server: ValkeyServer, ledger: Ledger, chance: random.Random) -> None:
    """Strikes again as soon as the ledger has grown a little."""
    for name in chance.sample(BLOWS, len(BLOWS)):
        target = min(ledger.count() + chance.randint(1, STRIDE), OPERATIONS - 1)
        wait_until(partial(has, ledger, target), 30, f"{target} rows")
        if name in {"ledger", "both"}:
            ledger.kill()
        if name in {"server", "both"}:
            server.kill()
        if name in {"ledger", "both"}:
            ledger.start()
        if name in {"server", "both"}:
            server.start()
        if name == "group":
            with server.client() as client:
                client.xgroup_destroy(STREAM, "sqlite")


def has(ledger: Ledger, rows: int) -> bool:
    return ledger.count() >= rows


def is_done(client: redis.Redis) -> bool:
    return [(group["pending"], group["lag"]) for group in client.xinfo_groups(STREAM)] == [(0, 0)]


def test_the_example_is_as_short_as_it_says() -> None:
    code = [line for line in EXAMPLE.read_text().partition('"""\n\nimport')[2].splitlines() if line.strip()]
    assert len(code) <= 40
