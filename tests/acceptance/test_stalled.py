"""A worker that is alive and takes nothing, which Celery's ping does not see; and one that has no thread free."""

from __future__ import annotations

from pathlib import Path

from checked import CheckedMachine
from machine import PATIENCE_S, Account, Machine, Process
from servers import wait_until

from worker.lifecycle import PRESENT_EVERY_S, STALLED_LOOKS
from worker.timetable import POLLS

STALLED_WITHIN_S = STALLED_LOOKS * PRESENT_EVERY_S + PATIENCE_S


def test_a_worker_that_takes_nothing_while_messages_wait_is_red_until_it_takes_them(tmp_path: Path) -> None:
    with CheckedMachine(tmp_path, [Account("acme")]) as machine:
        machine.beat()
        worker = machine.worker()
        assert machine.celery("control", "cancel_consumer", POLLS).returncode == 0
        assert machine.is_ready("worker"), "nothing waits yet"

        machine.kick("acme")
        wait_until(lambda: machine.store.llen(POLLS), PATIENCE_S, "a message in the queue")
        wait_until(lambda: not machine.is_ready("worker"), STALLED_WITHIN_S, "a red worker")
        assert not machine.is_alive("worker")
        assert worker.is_alive
        assert machine.celery("inspect", "ping").returncode == 0, "it still answers to Celery"
        assert len(worker.said("messages wait and none is taken: this worker counts as gone")) == 1

        assert machine.celery("control", "add_consumer", POLLS).returncode == 0
        machine.until_entries("acme", 1)
        wait_until(lambda: machine.is_ready("worker"), PATIENCE_S, "a green worker")


def test_a_worker_whose_threads_are_all_busy_is_green(tmp_path: Path) -> None:
    accounts = [Account("busy", ("hang",)), Account("waits")]
    with CheckedMachine(tmp_path, accounts, limits={"request_deadline": "60s"}) as machine:
        worker = machine.worker(BALANCES_CONCURRENCY="1")
        machine.beat()
        machine.kick("busy")
        machine.requests("busy", 1, ended=False)
        machine.kick("waits")
        wait_until(lambda: machine.store.llen(POLLS), PATIENCE_S, "a message in the queue")
        long_enough = believed_until(machine, worker) + (STALLED_LOOKS + 2) * PRESENT_EVERY_S
        wait_until(lambda: believed_until(machine, worker) > long_enough, STALLED_WITHIN_S, "a worker still present")
        assert machine.store.llen(POLLS) == 1
        assert machine.is_ready("worker")


def believed_until(machine: Machine, worker: Process) -> float:
    """Until when the worker is believed, in seconds: grows with every look that finds it at work."""
    (until_ms,) = (
        at for name, at in machine.store.zrange("workers", 0, -1, withscores=True) if f":{worker.pid} " in name
    )
    return float(until_ms) / 1000
