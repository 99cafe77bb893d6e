"""A copy of the server's files, taken while everything runs, is enough to go on with: docs/backup.md, done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import OK, PATIENCE_S, Account, Machine, each_once
from servers import wait_until

ACCOUNTS = [
    *(Account(f"polled-{number}") for number in range(4)),
    Account("suspended", ("error:E401:DO_NOT_RETRY",)),
    Account("waits", ("error:E202:WAIT_4_HOURS_BEFORE_RETRY",)),
    Account("blocked", ("error:E101:DO_NOT_RETRY",)),
    Account("in-flight", ("hang", OK)),
]
POLLED = [account.alias for account in ACCOUNTS if account.alias.startswith("polled")]
RETRY = {"wait": "4h"}


def copy_append_only(machine: Machine, to: Path) -> None:
    """As docs/backup.md says: no rewrite meanwhile, then every file of the directory."""
    machine.store.config_set("auto-aof-rewrite-percentage", 0)
    machine.store.execute_command("WAITAOF", 1, 0, 5000)
    shutil.copytree(machine.directory / "appendonlydir", to / "appendonlydir")


def copy_snapshot(machine: Machine, to: Path) -> None:
    """BGSAVE, and the file that it made."""
    before = machine.store.lastsave()
    machine.store.bgsave()
    wait_until(lambda: machine.store.lastsave() != before, PATIENCE_S, "a snapshot")
    shutil.copy(machine.directory / "dump.rdb", to / "dump.rdb")


def restore(machine: Machine, directory: Path, *, appendonly: str) -> None:
    """A fresh server on the copy, at the same address."""
    machine.server.kill()
    machine.server.directory = directory
    machine.server.options["appendonly"] = appendonly
    machine.server.start()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with Machine(tmp_path / "first", ACCOUNTS, retry=RETRY) as machine:
        yield machine


@pytest.mark.parametrize("way", ["append-only file", "snapshot"])
def test_what_was_restored_goes_on_where_the_copy_was_taken(machine: Machine, tmp_path: Path, way: str) -> None:
    beat, worker = machine.beat(), machine.worker()
    machine.kick(*machine.accounts)
    for alias in POLLED:
        machine.until_entries(alias, 1)
    machine.until_state("suspended", "suspended")
    machine.until_state("waits", "waiting")
    machine.until_state("blocked", "blocked scheduled")
    machine.requests("in-flight", 1, ended=False)

    second = tmp_path / "second"
    if way == "snapshot":  # lastsave counts seconds
        wait_until(lambda: machine.store.time()[0] > int(machine.store.lastsave().timestamp()), PATIENCE_S)
    (copy_snapshot if way == "snapshot" else copy_append_only)(machine, second)
    copied = {alias: machine.account(alias) for alias in machine.accounts}
    entries = machine.store.xrange("balances")
    machine.kick("polled-0")  # what happens after the copy is not in it
    machine.until_entries("polled-0", 2)
    lost = int(machine.account("polled-0")["poll"])
    for process in (beat, worker):
        process.kill()

    # A server with an append-only file reads no snapshot: it starts without one, and is switched over afterwards.
    restore(machine, second, appendonly="no" if way == "snapshot" else "yes")
    machine.store.config_set("appendonly", "yes")
    assert machine.store.xrange("balances") == entries
    assert {alias: machine.account(alias) for alias in machine.accounts} == copied
    asked = machine.sandbox.requests()[-1]["seq"]
    machine.beat()
    machine.worker()
    # The request that was in flight is a loss: its lease ends, and it is asked once more. Nobody else is.
    machine.move_clock(60)
    [entry] = machine.until_entries("in-flight", 1)
    assert entry["poll"] == int(copied["in-flight"]["poll"])
    assert machine.state("suspended") == "suspended"
    assert machine.state("waits") == "waiting"
    assert machine.state("blocked") == "blocked scheduled"
    assert {request["number"] for request in machine.sandbox.requests(asked)} == {machine.number("in-flight")}
    # The copy does not know of the last poll before the end; its number is not used again.
    machine.kick("polled-0")
    [_, again] = machine.until_entries("polled-0", 2)
    assert again["poll"] > lost
    assert each_once(machine.entries())
