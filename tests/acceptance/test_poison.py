"""Poison: a poll that kills its worker each time ends in a dead letter; what merely waits for a worker never does."""

from __future__ import annotations

import signal
from pathlib import Path

from machine import PATIENCE_S, Account, Machine, Process, each_once
from servers import wait_until

from worker.policy import DeadLetterQueue
from worker.timetable import POLLS

#: A lease of three seconds and a half, as in test_kills.py, and the ladder of transient failures in front of the third.
LIMITS = {"request_deadline": "2s", "lease_margin": "1500ms"}
MAX_LOSSES = 3


def test_a_poll_that_kills_its_worker_each_time_is_a_dead_letter_and_the_others_go_on(tmp_path: Path) -> None:
    """Whichever of the two workers begins the poisonous poll dies of it, before anything is sent, and is replaced."""
    accounts = [Account("poison"), Account("healthy", every="1s")]
    with Machine(tmp_path, accounts, limits=LIMITS, retry={"max_losses": MAX_LOSSES}) as machine:
        machine.beat()
        workers = [machine.worker(name, traps=True) for name in ("left", "right")]
        machine.arm("begun", "poison")
        machine.kick("poison")
        for loss in range(1, MAX_LOSSES + 1):
            machine.until_sprung()
            if loss < MAX_LOSSES:
                machine.arm("begun", "poison")
            victim = _died(workers)
            assert victim.ended() == -signal.SIGKILL
            workers.remove(victim)
            workers.append(machine.begin_worker(victim.name, traps=True))
            machine.until_entries("healthy", len(machine.entries("healthy")) + 2)
        machine.until_state("poison", "suspended")
        queue, reason = machine.letter("poison")
        assert queue is DeadLetterQueue.RETRIES_EXHAUSTED
        assert (reason["code"], reason["attempts"]) == ("LOST", MAX_LOSSES)
        assert machine.outcomes("poison") == [f"{number} LOST" for number in range(1, MAX_LOSSES + 1)]
        assert machine.requests("poison", ended=False) == []
        assert [letter["headers"]["id"] for _, letter in machine.timetable.letters()] == [_poll(machine, "poison")]
        assert each_once(machine.entries("healthy"))
        assert machine.timetable.redrive("poison") is None
        machine.until_entries("poison", 1)


def _died(workers: list[Process]) -> Process:
    wait_until(lambda: any(not worker.is_alive for worker in workers), PATIENCE_S, "the victim's end")
    return next(worker for worker in workers if not worker.is_alive)


def _poll(machine: Machine, alias: str) -> str:
    return f"{alias}.{machine.account(alias)['poll']}"


def test_messages_that_wait_for_longer_than_their_lease_are_no_losses(tmp_path: Path) -> None:
    """Nobody takes them: a worker's threads are promised, and it never comes; then one does."""
    aliases = [f"account-{number}" for number in range(4)]
    retry = {"max_losses": 1}
    with Machine(tmp_path, [Account(alias) for alias in aliases], limits=LIMITS, retry=retry) as machine:
        beat = machine.beat()
        machine.timetable.register_worker("nobody", len(aliases), ttl_s=600)
        machine.kick(*aliases)
        wait_until(lambda: machine.store.llen(POLLS) == len(aliases), PATIENCE_S, "messages that nobody takes")
        for _ in range(3):
            machine.store.delete(POLLS)  # room, to send them again
            machine.move_clock(3600)
            wait_until(lambda: machine.store.llen(POLLS) == len(aliases), PATIENCE_S, "all of them sent again")
        assert {machine.state(alias) for alias in aliases} == {"dispatched"}
        machine.timetable.forget_worker("nobody", len(aliases))
        machine.worker()
        for alias in aliases:
            machine.until_entries(alias, 1)
            assert machine.outcomes(alias) == ["1 ok"]
        assert not list(machine.timetable.letters())
        assert not beat.said("lapsed")
