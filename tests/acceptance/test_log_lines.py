"""Every line that the Procfile's beat and worker write is an event; one per attempt; none with a secret in it.

With faults planted in the worker that quote what must not be told, a server that dies, and a broken accounts file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from machine import OK, PATIENCE_S, Account, Machine, Process, canaries_in
from servers import ROOT, wait_until

from worker.processes import read_procfile

#: A worker in which asking for some accounts ends in an exception that quotes the account's number and the key.
PLANTED = """
import logging, sys, threading, warnings
import redis, requests
from celery.__main__ import main
from worker import tasks

def crash(account, said):
    if account == "crashes-in-redis":
        raise redis.ResponseError(f"ERR Error running script: {said}")
    if account == "crashes-in-requests":
        requests.get(f"http://127.0.0.1:1/{said}", headers={"x-api-key": said})
    if account == "crashes-in-a-thread":
        thread = threading.Thread(target=lambda: int(said))
        thread.start()
        thread.join()
    if account == "crashes-in-a-library":
        warnings.warn(said)
        logging.getLogger("library").warning("trying again: %s", ValueError(said))
    raise KeyError(said)

def ask(attempt):
    if attempt.token.account.startswith("crashes"):
        crash(attempt.token.account, attempt.begun.definition.number + attempt.credentials.key.get_secret_value())
    return asked(attempt)

asked, tasks.ask = tasks.ask, ask
sys.argv[0] = "celery"
main()
"""
LATER = "error:E201:RETRY_IMMEDIATELY:NUMBER-CANARY-0002 is unknown"
CRASHES = ["crashes", "crashes-in-redis", "crashes-in-requests", "crashes-in-a-thread", "crashes-in-a-library"]
EVERY = "365d"
ACCOUNTS = [
    Account("fine", every=EVERY),
    Account("retried", (LATER, OK), every=EVERY),
    Account("dead", ("error:E401:DO_NOT_RETRY",), every=EVERY),
    Account("blocked", ("error:E101:DO_NOT_RETRY",), every=EVERY),
    *(Account(alias, every=EVERY) for alias in CRASHES),
]
BROKEN = """
[logins.one]
[[accounts]]
alias = "one"
institution = "bancosecurity.cl"
number = "NUMBER-CANARY-7777"
login = "one"
[[accounts]]
alias = "two"
institution = "bancosecurity.cl"
number = "NUMBER-CANARY-7777"
login = "one"
[[accounts]]
alias = "three"
institution = "bancosecurity.cl"
number = ["NUMBER-CANARY-8888"]
login = "no-such"
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A deployment after its day: polls, crashes, an outage, a broken file, and an orderly end."""
    with Machine(tmp_path_factory.mktemp("logs"), ACCOUNTS) as machine:
        beat, worker = start(machine, "beat", "-m", "celery"), start(machine, "worker", "-c", PLANTED)
        wait_until(lambda: machine.store.zcard("workers") and machine.timetable.current_content(), PATIENCE_S)
        machine.kick(*machine.accounts)
        wait_until(lambda: len(worker.said("poll crashed")) == len(CRASHES), PATIENCE_S, "all crashes")
        machine.until_entries("fine", 1)
        machine.until_entries("retried", 1)
        machine.until_state("dead", "suspended")
        wait_until(lambda: worker.said("failed", account="blocked"), PATIENCE_S, "the block")
        machine.accounts_path.write_text(BROKEN)
        wait_until(lambda: beat.said("accounts file not applied"), PATIENCE_S, "the broken file")
        machine.server.kill()
        wait_until(lambda: beat.said("the server is away") and worker.said("the server is away"), PATIENCE_S, "outage")
        machine.server.start()
        wait_until(lambda: beat.said("the server is back"), PATIENCE_S, "the end of the outage")
        wait_until(lambda: machine.store.zcard("workers"), PATIENCE_S, "the worker again")
        assert [beat.stop(), worker.stop()] == [0, 0]
        yield machine


def start(machine: Machine, name: str, *python: str) -> Process:
    """The Procfile's process."""
    [command] = [command for command in read_procfile(ROOT / "Procfile", {}) if command.name == name]
    assert command.argv[0] == "celery"
    return machine.start(name, *python, *command.argv[1:])


def entries(machine: Machine, name: str) -> list[dict[str, Any]]:
    [process] = [process for process in machine.processes if process.name == name]
    return [json.loads(line) for line in process.text().splitlines()]


def of(machine: Machine, alias: str) -> list[dict[str, Any]]:
    """The lines of an account's attempts; a busy machine may bring others, such as of a message that came twice."""
    ends = {"settled", "failed", "poll crashed"}
    return [entry for entry in entries(machine, "worker") if entry.get("account") == alias and entry["event"] in ends]


@pytest.mark.parametrize("name", ["beat", "worker"])
def test_each_line_is_an_event_with_its_time_and_level(machine: Machine, name: str) -> None:
    for entry in entries(machine, name):
        assert list(entry)[:3] == ["timestamp", "level", "event"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry["timestamp"])
        assert entry["level"] in {"debug", "info", "warning", "error", "critical"}
        assert entry["event"]


@pytest.mark.parametrize("name", ["beat", "worker"])
def test_no_line_has_a_secret_a_number_or_an_amount(machine: Machine, name: str) -> None:
    text = "\n".join(json.dumps(entry) for entry in entries(machine, name))
    assert "the server is away" in text
    assert canaries_in(text) == []
    assert "Traceback" not in text


def test_an_attempt_is_one_line_and_a_poll_is_joined_by_its_task(machine: Machine) -> None:
    [settled] = of(machine, "fine")
    [entry] = machine.entries("fine")
    told = {"event": "settled", "level": "info", "attempt": 1, "login": "fine", "result": "published"}
    assert told.items() <= settled.items()
    assert (settled["task"], settled["operation"]) == (f"fine.{entry['poll']}", entry["operation_id"])
    failed, settled = of(machine, "retried")
    assert (failed["event"], failed["level"], failed["attempt"]) == ("failed", "info", 1)
    assert (failed["code"], failed["type"], failed["decision"]) == ("E201", "RETRY_IMMEDIATELY", "Retry")
    assert 0 < failed["countdown_s"] < 2
    assert (settled["event"], settled["attempt"], settled["task"]) == ("settled", 2, failed["task"])


def test_a_decision_that_needs_an_operator_is_louder(machine: Machine) -> None:
    [dead], [blocked] = of(machine, "dead"), of(machine, "blocked")
    assert (dead["level"], dead["queue"], dead["applied"]) == ("warning", "balances.dead.do-not-retry", "suspended")
    assert (blocked["level"], blocked["credential"], blocked["applied"]) == ("error", "bank", "blocked")


@pytest.mark.parametrize(
    ("alias", "error"),
    [
        ("crashes", "KeyError"),
        ("crashes-in-redis", "ResponseError"),
        ("crashes-in-requests", r"ConnectionError < .*ConnectionRefusedError \(Connection refused\)"),
        ("crashes-in-a-thread", "KeyError"),
        ("crashes-in-a-library", "KeyError"),
    ],
)
def test_a_crash_tells_types_and_frames_once(machine: Machine, alias: str, error: str) -> None:
    [crash] = [entry for entry in of(machine, alias) if entry["event"] == "poll crashed"]
    assert re.fullmatch(error, crash["error"])
    assert any(re.fullmatch(r"worker/tasks\.py:\d+ run", frame) for frame in crash["at"])
    assert (crash["task"], crash["attempt"]) == (f"{alias}.{machine.account(alias)['poll']}", 1)


def test_what_others_say_is_in_the_same_form(machine: Machine) -> None:
    told = entries(machine, "worker")
    [in_thread] = [entry for entry in told if entry["event"] == "uncaught error"]
    assert in_thread["error"] == "ValueError"
    [library] = [entry for entry in told if entry.get("logger") == "library"]
    assert (library["event"], library["account"]) == ("trying again: ValueError", "crashes-in-a-library")
    said = {entry["event"] for entry in told}
    assert any(event.endswith(" ready.") for event in said)
    assert "worker: Warm shutdown (MainProcess)" in said
    of_celery = {entry["event"] for entry in told if entry.get("logger", "").startswith("celery")}
    assert not [event for event in of_celery if "balances.poll" in event], "our own line says it"


def test_celerys_warning_of_a_superuser_is_one_line(machine: Machine) -> None:
    warnings = [entry for entry in entries(machine, "worker") if entry["event"] == "warning"]
    planted = [entry for entry in warnings if entry["category"] == "UserWarning"]
    assert [entry["text"] for entry in planted] == [""], "it may quote anything"
    assert {entry["category"] for entry in warnings} <= {"UserWarning", "SecurityWarning"}
    superuser = [entry for entry in warnings if entry["category"] == "SecurityWarning"]
    assert len(superuser) == (os.geteuid() == 0)
    assert all(entry["text"].startswith("You're running the worker with superuser") for entry in superuser)
