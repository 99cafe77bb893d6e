"""`balances check` on real processes: green before the first start and at work, red for each that died or is frozen."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from machine import PATIENCE_S, Account, Machine, Process, frozen
from servers import wait_until

from worker.health import CLAIM_WITHIN_S
from worker.lifecycle import PRESENT_TTL_S
from worker.store import LOOPBACK, free_port

PORT = free_port()
CALLBACKS = {"BALANCES_CALLBACK_URL": f"http://{LOOPBACK}:{PORT}", "BALANCES_WEBHOOK_PORT": str(PORT)}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """At work, as the Procfile has it, and seen green before."""
    with Machine(tmp_path_factory.mktemp("machine"), [Account("acme")], env=CALLBACKS) as machine:
        assert red(machine) == set(), "nothing was started yet"
        machine.beat()
        machine.worker("worker", "-Q", "balances.polls")
        machine.worker("settler", "-Q", "balances.answers", "-c", "2")
        machine.start("webhook", "-m", "worker.webhook")
        wait_until(lambda: red(machine) == set(), PATIENCE_S, "a deployment where all is well")
        yield machine


def red(machine: Machine) -> set[str]:
    """What is wrong, as JSON and by the exit status."""
    run = machine.balances("check", "--json")
    assert run.stderr == ""
    wrong = {finding["name"] for finding in json.loads(run.stdout) if not finding["is_right"]}
    assert run.returncode == (1 if wrong else 0)
    return wrong


def running(machine: Machine, name: str) -> Process:
    return next(process for process in machine.processes if process.name == name and process.is_alive)


def test_a_frozen_worker_and_a_frozen_settler_are_red_until_each_is_back(machine: Machine) -> None:
    with frozen(running(machine, "settler")):
        with frozen(running(machine, "worker")):
            wait_until(lambda: red(machine) == {"workers", "settlers"}, PRESENT_TTL_S + PATIENCE_S, "both red")
        wait_until(lambda: red(machine) == {"settlers"}, PATIENCE_S, "a worker that is back")
    wait_until(lambda: red(machine) == set(), PATIENCE_S, "a settler that is back")


def test_a_killed_beat_is_red_until_another_one_claims(machine: Machine) -> None:
    running(machine, "beat").kill()
    machine.move_clock(CLAIM_WITHIN_S + 1)
    assert red(machine) == {"beat", "clock"}, "the clock because the test moves it"
    machine.store.delete("clock:offset")
    machine.beat()
    wait_until(lambda: red(machine) == set(), PATIENCE_S, "a beat that claims")


def test_a_killed_webhook_is_red_until_it_is_back(machine: Machine) -> None:
    running(machine, "webhook").kill()
    assert red(machine) == {"webhook"}
    machine.start("webhook", "-m", "worker.webhook")
    wait_until(lambda: red(machine) == set(), PATIENCE_S, "a webhook")


def test_the_table_says_right_and_wrong_in_words(machine: Machine) -> None:
    machine.store.set("clock:offset", 1)
    run = machine.balances("check")
    machine.store.delete("clock:offset")
    assert (run.returncode, run.stderr) == (1, "")
    assert all(len(line) <= 80 for line in run.stdout.splitlines())
    rows = {tuple(line.split()[:2]) for line in run.stdout.splitlines()}
    assert {("wrong", "clock"), ("ok", "beat"), ("ok", "workers"), ("ok", "settlers"), ("ok", "webhook")} <= rows
