"""What happens around the polls: the server goes and comes back, workers are told to leave, a start is refused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from celery import Celery
from machine import OK, PATIENCE_S, Account, Machine, Process, started_at
from servers import ValkeyServer, wait_until

#: The promise is five seconds (docs/reliability.md has what was measured); here a busy machine may need a few more.
RESUMES_WITHIN_S = 15.0
#: How long the server is away: a minute, where there is time.
OUTAGE_S = 60.0 if os.environ.get("BALANCES_TEST_LONG") else 0.0

SLOW = [f"slow-{number}" for number in range(1, 7)]
QUICK = [f"quick-{number}" for number in range(1, 4)]


# ---------------------------------------------------------------------------------------------- the server is away


def test_a_server_killed_twice_takes_no_process_and_no_poll_with_it(tmp_path: Path) -> None:
    accounts = [
        *(Account(alias, [f"{OK}@3s"]) for alias in SLOW),
        *(Account(alias, every="1s") for alias in QUICK),
    ]
    limits = {"request_deadline": "20s", "lease_margin": "10s"}
    with Machine(tmp_path, accounts, limits=limits) as machine:
        beat = machine.beat(traps=True)
        worker = machine.worker(traps=True)
        machine.until_entries(QUICK[0], 1)

        in_flight = until_in_flight(machine)
        machine.server.kill()
        machine.server.start()
        until_polled(machine)
        until_settled(machine, in_flight)

        in_flight = until_in_flight(machine)
        waited_before = len(worker.said("waiting for the server"))
        machine.server.kill()
        until_waited_for(worker, waited_before)
        machine.server.start()
        until_polled(machine)
        until_settled(machine, in_flight)

        for alias in (*SLOW, *QUICK):
            machine.settle_down(alias)
        published = [entry["operation_id"] for entry in machine.entries()]
        assert sorted(published) == sorted(request["operation_id"] for request in machine.sandbox.requests())
        assert worker.is_alive, worker.text()
        assert beat.is_alive, beat.text()
        assert kept_tags(machine) == {"delivered": 0, "dirty": 0}
        assert {part for command in machine.written() for part in command} & {b"unacked", b"unacked_index"} == set()


@dataclass(frozen=True)
class Outage:
    """One way in which a server does not work, how it ends, what our processes call it, and how it writes its file."""

    begin: Callable[[ValkeyServer], object]
    end: Callable[[ValkeyServer], object]
    reason: str
    appendfsync: str = "always"


OUTAGES = {
    "away": Outage(ValkeyServer.kill, ValkeyServer.start, "Redis: ConnectionError"),
    "disk": Outage(ValkeyServer.fill_disk, ValkeyServer.free_disk, "Redis: MISCONF", "everysec"),  # else it exits
    "memory": Outage(ValkeyServer.fill_memory, ValkeyServer.free_memory, "Redis: OutOfMemoryError"),
}


@pytest.mark.parametrize("kind", OUTAGES)
def test_an_outage_is_said_once_ends_no_process_and_loses_no_answer(tmp_path: Path, kind: str) -> None:
    accounts = [
        *(Account(alias, ["hang", OK]) for alias in SLOW),
        *(Account(alias, every="1s") for alias in QUICK),
    ]
    outage, limits = OUTAGES[kind], {"request_deadline": "90s", "lease_margin": "30s"}
    with Machine(tmp_path, accounts, limits=limits, server={"appendfsync": outage.appendfsync}) as machine:
        processes = [machine.beat(), worker := machine.worker()]
        machine.until_entries(QUICK[0], 1)
        in_flight = until_in_flight(machine)

        ends_s = time.monotonic() + OUTAGE_S
        outage.begin(machine.server)
        for process in processes:
            wait_until(lambda process=process: process.said("the server is away"), PATIENCE_S, process.name)
        for alias in SLOW:
            assert machine.sandbox.answer_hanging(machine.number(alias), OK) == 1
        until_waited_for(worker, 0)
        wait_until(lambda: time.monotonic() >= ends_s, OUTAGE_S + 1, "the end of the outage")
        outage.end(machine.server)
        until_polled(machine)
        until_settled(machine, in_flight)

        for alias in (*SLOW, *QUICK):
            machine.settle_down(alias)
        published = sorted(entry["operation_id"] for entry in machine.entries())
        assert published == sorted(request["operation_id"] for request in machine.sandbox.requests())
        for process in processes:
            wait_until(lambda process=process: process.said("the server is back"), PATIENCE_S, process.name)
            assert process.is_alive, process.text()
            assert [said["reason"] for said in process.said("the server is away")] == [outage.reason]
        assert len(worker.said("waiting for the server")) == len(
            {said["task"] for said in worker.said("waiting for the server")}
        )
        assert not worker.said("poll crashed")
        assert machine.store.waitaof(1, 0, 10_000) == [1, 0], "in memory, not on disk"


def test_a_poll_that_cannot_begin_waits_for_the_server(tmp_path: Path) -> None:
    with Machine(tmp_path, [Account("acme")]) as machine:
        machine.beat()
        worker = machine.worker(traps=True)
        machine.arm("claimed", "acme", number=signal.SIGSTOP)
        machine.kick("acme")
        machine.until_sprung()
        machine.server.fill_memory()
        worker.thaw()
        wait_until(lambda: worker.said("waiting for the server", account="acme"), PATIENCE_S, "a poll that waits")
        machine.server.free_memory()
        machine.until_entries("acme", 1)
        assert machine.outcomes("acme") == ["1 ok"]
        assert not worker.said("poll crashed")


def test_an_answer_waits_for_the_server_as_long_as_its_lease_and_the_poll_comes_back(tmp_path: Path) -> None:
    limits = {"request_deadline": "2s", "lease_margin": "1s"}
    with Machine(tmp_path, [Account("acme", [f"{OK}@1s"])], limits=limits) as machine:
        machine.beat()
        worker = machine.worker()
        machine.kick("acme")
        machine.requests("acme", 1, ended=False)
        machine.server.kill()
        wait_until(lambda: worker.said("the server was away for too long", account="acme"), PATIENCE_S, "its end")
        machine.server.start()
        [entry] = machine.until_entries("acme", 1)
        first, second = machine.requests("acme", 2)
        assert entry["operation_id"] == second["operation_id"] != first["operation_id"]
        assert machine.outcomes("acme") == ["1 LOST", "2 ok"]


def until_in_flight(machine: Machine) -> dict[int, str]:
    """The slow requests, as soon as all of them are in flight: number in the sandbox's records → operation."""
    machine.kick(*SLOW)
    numbers = {machine.number(alias) for alias in SLOW}

    def found() -> dict[int, str]:
        return {
            request["seq"]: request["operation_id"]
            for request in machine.sandbox.requests()
            if request["number"] in numbers and request["state"] == "in-flight"
        }

    wait_until(lambda: len(found()) == len(SLOW), PATIENCE_S, "all slow requests in flight at once")
    return found()


def until_waited_for(worker: Process, before: int) -> None:
    """The bank has answered all of them, and every answer has found no server to go to."""

    def waiting() -> set[str]:
        return {entry["account"] for entry in worker.said("waiting for the server")[before:]}

    wait_until(lambda: waiting() >= set(SLOW), PATIENCE_S, "answers that wait for the server")


def until_settled(machine: Machine, in_flight: dict[int, str]) -> None:
    def settled() -> bool:
        return set(in_flight.values()) <= {entry["operation_id"] for entry in machine.entries()}

    wait_until(settled, PATIENCE_S, "what was in flight, on the stream")


def until_polled(machine: Machine) -> None:
    """Until the next request at the bank, which must not be long."""
    start_s = time.monotonic()
    last = max(request["seq"] for request in machine.sandbox.requests())
    machine.sandbox.wait_for(1, since=last, ended=False)
    took_s = time.monotonic() - start_s
    print(f"polling again {took_s:.1f} s after the server was back")
    assert took_s <= RESUMES_WITHIN_S


def kept_tags(machine: Machine) -> dict[str, int]:
    """What kombu still knows of delivered messages, as the worker tells by remote control.

    A broadcast reaches whoever has subscribed by then, and a worker subscribes again only after it has connected again.
    """
    with machine.server.client() as client:
        wait_until(lambda: client.pubsub_numpat() > 0, PATIENCE_S, "a worker that listens to remote control again")
    with Celery("test", broker=machine.server.url, set_as_current=False) as app:
        [[tags]] = [answer.values() for answer in app.control.broadcast("tags", reply=True, limit=1, timeout=10)]
    return dict(tags)


# ------------------------------------------------------------------------------------------------ told to leave


def test_a_worker_told_to_stop_finishes_what_it_can_and_names_what_it_cuts_off(tmp_path: Path) -> None:
    """Three polls in flight: one ends within the grace period, two do not and come back after their lease."""
    hanging = ["hanging-1", "hanging-2"]
    accounts = [*(Account(alias, ["hang", OK]) for alias in hanging), Account("short", [f"{OK}@1s"])]
    limits = {"request_deadline": "3s", "lease_margin": "2s"}
    with Machine(tmp_path, accounts, limits=limits, env={"BALANCES_GRACE": "2s"}) as machine:
        machine.beat()
        worker = machine.worker()
        machine.kick(*hanging, "short")
        for alias in (*hanging, "short"):
            machine.requests(alias, 1, ended=False)
        start_s = time.monotonic()
        assert worker.stop() == 0
        took_s = time.monotonic() - start_s
        assert 1.5 < took_s < 10.0, "the polls that hang decided, not the grace period"
        assert len(machine.entries("short")) == 1
        [said] = worker.said("cut off at the end of the grace period")
        assert said["tasks"] == sorted(f"{alias}.{machine.account(alias)['poll']}" for alias in hanging)
        machine.worker("next")
        for alias in hanging:
            machine.until_entries(alias, 1)
            first, second = machine.requests(alias)
            assert first["state"] == "aborted"
            assert started_at(second) - started_at(first) >= 4.5, "it was asked again before the lease was over"
            assert machine.outcomes(alias) == ["1 LOST", "2 ok"]


# ---------------------------------------------------------------------------------------------- a start is refused


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A server that knows two logins, and nobody running."""
    accounts = [Account("acme-operating", login="acme"), Account("beta-trading", login="beta-trading")]
    with Machine(tmp_path_factory.mktemp("known"), accounts, bearer=["beta-trading"]) as machine:
        machine.beat().stop()
        yield machine


@pytest.mark.parametrize("missing", ["BALANCES_SECRET_ACME_ACCOUNT_CREDENTIAL", "BALANCES_SECRET_BETA_TRADING_TOKEN"])
def test_a_worker_without_a_secret_does_not_start_and_names_it(known: Machine, missing: str) -> None:
    ended = known.celery("worker", without=[missing])
    assert ended.returncode == 2
    assert missing in ended.stderr
    assert known.store.zcard("workers") == 0


@pytest.mark.parametrize("process", ["beat", "worker"])
@pytest.mark.parametrize(("variable", "value"), [("BALANCES_GRACE", "soon"), ("BALANCES_GRASE", "30s")])
def test_a_wrong_variable_stops_the_start_and_is_named(known: Machine, process: str, variable: str, value: str) -> None:
    ended = known.celery(process, **{variable: value})
    assert ended.returncode == 2
    assert variable in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_beat_with_a_wrong_accounts_file_does_not_start_and_names_each_key(known: Machine, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(known.accounts_path.read_text().replace("every = ", "evry = ").replace('"6s"', '"soon"'))
    ended = known.celery("beat", BALANCES_ACCOUNTS=str(wrong))
    assert ended.returncode == 2
    assert f"{wrong}:3: retry.wait" in ended.stderr or "retry.wait" in ended.stderr
    assert "accounts[0] (acme-operating).evry" in ended.stderr
    assert "accounts[1] (beta-trading).evry" in ended.stderr
    assert "did you mean every?" in ended.stderr


def test_a_worker_starts_with_all_secrets_there(known: Machine) -> None:
    """What the refusals above are measured against."""
    worker: Process = known.worker()
    assert worker.stop() == 0
