"""A server that must not be used is refused by the processes themselves, whoever starts them; the rest is warned of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import PATIENCE_S, Account, Machine, Process
from servers import wait_until

from worker.server import NOT_KEPT
from worker.store import free_port

EVICTION = "BALANCES_REDIS_URL: eviction: maxmemory-policy is allkeys-lru; it must be noeviction"
COMMANDS = {
    "beat": ("-m", "celery", "-A", "worker", "-q", "beat"),
    "worker": ("-m", "celery", "-A", "worker", "-q", "worker"),
    "settler": ("-m", "celery", "-A", "worker", "-q", "worker", "-Q", "balances.answers"),
    "webhook": ("-m", "worker.webhook"),
}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with Machine(tmp_path, [Account("acme-operating")]) as machine:
        yield machine


def begin_all(machine: Machine) -> list[Process]:
    port = str(free_port())
    return [machine.start(name, *command, BALANCES_WEBHOOK_PORT=port) for name, command in COMMANDS.items()]


def test_every_process_refuses_a_server_that_evicts(machine: Machine) -> None:
    machine.store.config_set("maxmemory-policy", "allkeys-lru")
    for process in begin_all(machine):
        assert process.ended() == 2, process.text()
        assert EVICTION in process.text()
        assert "Traceback" not in process.text()


def test_every_process_that_waited_for_the_server_refuses_it_when_it_comes_and_evicts(machine: Machine) -> None:
    machine.server.kill()
    processes = begin_all(machine)
    for process in processes:
        wait_until(lambda process=process: process.said("the server is away"), PATIENCE_S, process.name)
    machine.server.options["maxmemory-policy"] = "allkeys-lru"
    machine.server.start()
    for process in processes:
        assert process.ended() == 2, process.text()
        assert EVICTION in process.text()


@pytest.mark.parametrize(
    ("breaking", "what", "reason"),
    [
        (("CONFIG", "SET", "appendonly", "no"), "persistence", NOT_KEPT),
        (
            ("ACL", "SETUSER", "default", "-info"),
            "permissions",
            "this user may not use INFO: version, eviction and file not checked",
        ),
    ],
)
def test_every_process_warns_of_a_server_that_may_lose_or_hide_something_and_starts(
    machine: Machine, breaking: tuple[str, ...], what: str, reason: str
) -> None:
    machine.store.execute_command(*breaking)
    processes = begin_all(machine)
    for process in processes:
        wait_until(
            lambda process=process: process.said("the server is not as it should be", what=what, reason=reason),
            PATIENCE_S,
            process.name,
        )
    wait_until(lambda: machine.store.exists("account:acme-operating"), PATIENCE_S, "a beat that works")
    machine.kick("acme-operating")
    machine.until_entries("acme-operating", 1)
    assert all(process.is_alive for process in processes)


def test_a_worker_that_was_refused_for_a_while_is_present_again(machine: Machine) -> None:
    """A list of rights that lacked one, and was mended."""
    worker = machine.worker()
    machine.store.execute_command("ACL", "SETUSER", "default", "-zadd")
    wait_until(lambda: worker.said("presence failed"), PATIENCE_S, "a worker that says so")
    machine.store.delete("workers")
    machine.store.execute_command("ACL", "SETUSER", "default", "+zadd")
    machine.until_present(worker)
    assert len(worker.said("presence failed")) == 1
