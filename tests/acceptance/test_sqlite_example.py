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
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from schemas import validate_stream
from servers import ROOT, ValkeyServer, wait_until
from world import STREAM, World, read

from worker.errors import StoreUnavailable
from worker.store import tethered
from worker.timetable import Begun, connect

EXAMPLE = ROOT / "docs" / "examples" / "sqlite_ledger.py"
SEED = 20261122
OPERATIONS = 700
#: Rows from one blow to the next, at most.
STRIDE = 60


class Ledger:
    """The example as a process, and its file."""

    def __init__(self, directory: Path, url: str) -> None:
        self.file, self.log = directory / "ledger.db", directory / "ledger.log"
        self._url = url
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = tethered([sys.executable, str(EXAMPLE), self._url, str(self.file)])
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

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


def publish(url: str, begun: Begun, operations: list[str]) -> None:
    """Settles every operation, the first ones again and again, as if their workers had been killed in between."""
    world = World(connect(url))
    for number, operation in enumerate(operations):
        done = False
        while not done:
            with suppress(StoreUnavailable):
                world.settle(begun, operation=operation, amount=str(number))
                world.settle(begun, operation=operations[number // 2], amount="0")
                done = True
    world.client.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path, appendonly="yes", appendfsync="always") as server:
        yield server


def test_every_operation_is_in_the_ledger_once_whatever_is_killed(server: ValkeyServer, tmp_path: Path) -> None:
    operations = [f"operation-{number:04}" for number in range(OPERATIONS)]
    with server.client() as client:
        world = World(client)
        world.apply(read("a"))
        begun = world.start("a")
    publisher = threading.Thread(target=publish, args=(server.url, begun, operations), daemon=True)
    ledger = Ledger(tmp_path, server.url)
    ledger.start()
    publisher.start()
    try:
        blows = torture(server, ledger, random.Random(SEED))
        publisher.join(30)
        wait_until(lambda: ledger.count() == OPERATIONS, 30, "every operation")
        with server.client() as client:
            wait_until(lambda: is_done(client), what="every acknowledgement")
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
    assert {name: blows.count(name) for name in sorted(set(blows))}.keys() == {"both", "group", "ledger", "server"}
    amounts = [(operation, str(number)) for number, operation in enumerate(operations)]
    assert ledger.rows("SELECT operation_id, amount FROM balance ORDER BY operation_id, amount") == amounts
    assert [row for (row,) in ledger.rows("SELECT operation_id FROM answer ORDER BY 1")] == operations


def torture(server: ValkeyServer, ledger: Ledger, chance: random.Random) -> list[str]:
    """Strikes again as soon as the ledger has grown a little, until it is nearly full; what was struck."""

    def both() -> None:
        server.kill()
        ledger.kill()

    def destroy_group() -> None:
        with server.client() as client:
            client.xgroup_destroy(STREAM, "sqlite")

    strikes: dict[str, tuple[Callable[[], None], Callable[[], object]]] = {
        "ledger": (ledger.kill, ledger.start),
        "server": (server.kill, server.start),
        "both": (both, lambda: (ledger.start(), server.start())),
        "group": (destroy_group, lambda: None),
    }
    blows: list[str] = []
    while (rows := ledger.count()) < OPERATIONS - 2 * STRIDE:
        growth = chance.randint(1, STRIDE)
        wait_until(lambda: ledger.count() >= rows + growth, 30, f"{growth} rows more than {rows}")  # noqa: B023
        blows += chance.choices(list(strikes), [4, 3, 2, 1])
        strike, repair = strikes[blows[-1]]
        strike()
        repair()
    return blows


def is_done(client) -> bool:
    [group] = client.xinfo_groups(STREAM)
    return (group["pending"], group["lag"]) == (0, 0)


def test_the_example_is_as_short_as_it_says() -> None:
    code = [line for line in EXAMPLE.read_text().partition('"""\n\nimport')[2].splitlines() if line.strip()]
    assert len(code) <= 40
