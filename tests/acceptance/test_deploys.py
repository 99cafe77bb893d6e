"""Deploys: a worker told to leave in the middle of everything, and all processes replaced one by one under load."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from machine import OK, PATIENCE_S, Account, Machine, each_once, started_at
from sandbox_client import JsonObject
from servers import wait_until

from worker.timetable import POLLS

POLLS_IN_FLIGHT = 300
REQUEST_DEADLINE_S, MARGIN_S = 190, 60
#: What three hundred polls may take to begin, or to come back, on a machine that does other things too.
LONG_S = 4 * PATIENCE_S

#: "A few seconds", and what a busy machine may add: no account waits for longer than this between two polls.
GAP_S = 15.0


class OneKey(Machine):
    """All log-ons send one token: three hundred fingerprints would take longer than the rest of the test."""

    def secrets(self) -> dict[str, str]:
        return {"BALANCES_SECRET_DEFAULT_TOKEN": "token-canary.default.signature"}


def test_three_hundred_polls_in_flight_are_cut_off_named_and_come_back_after_their_leases(tmp_path: Path) -> None:
    busy = [f"busy-{number:03}" for number in range(POLLS_IN_FLIGHT)]
    late = "late"
    accounts = [*(Account(alias, [f"{OK}@120s", OK]) for alias in busy), Account(late)]
    limits = {"request_deadline": f"{REQUEST_DEADLINE_S}s", "lease_margin": f"{MARGIN_S}s"}
    env = {"BALANCES_GRACE": "2s", "BALANCES_CONCURRENCY": str(POLLS_IN_FLIGHT + 10)}
    with OneKey(tmp_path, accounts, limits=limits, bearer=[*busy, late], env=env) as machine:
        machine.beat()
        worker = machine.worker()
        machine.kick(*busy)
        wait_until(lambda: machine.sandbox.stats()["in_flight"] == POLLS_IN_FLIGHT, LONG_S, "all polls in flight")
        tasks = sorted(f"{alias}.{account['poll']}" for alias, account in machine.timetable.accounts(busy))

        assert worker.stop() == 0
        [said] = worker.said("cut off at the end of the grace period")
        assert said["tasks"] == tasks
        cut = machine.sandbox.requests(limit=1000)
        assert {request["state"] for request in cut} == {"aborted"}, "the grace period decided, not the polls' own end"
        assert not machine.entries()

        machine.move_clock(REQUEST_DEADLINE_S + MARGIN_S + 1)
        machine.worker("next")
        machine.kick(late)
        wait_until(lambda: len(machine.entries()) == POLLS_IN_FLIGHT + 1, LONG_S, "every poll on the stream")
        assert each_once(machine.entries())
        asked = requests_of(machine.sandbox.requests(limit=1000))
        assert len(asked.pop(machine.number(late))) == 1
        assert {tuple(request["state"] for request in requests) for requests in asked.values()} == {
            ("aborted", "answered")
        }
        published = {entry["operation_id"] for entry in machine.entries()}
        assert {requests[1]["operation_id"] for requests in asked.values()} < published
        assert {tuple(machine.outcomes(alias)) for alias in busy} == {("1 LOST", "2 ok")}


def test_a_worker_that_leaves_takes_no_new_polls_but_the_one_that_it_had_asked_for(tmp_path: Path) -> None:
    """It has threads to spare and a long grace period, and messages wait in the queue."""
    new = [f"new-{number}" for number in range(5)]
    accounts = [Account("hanging", ["hang", OK]), *(Account(alias) for alias in new)]
    with Machine(tmp_path, accounts, limits={"lease_margin": "60s"}) as machine:
        machine.beat()
        worker = machine.worker()
        machine.kick("hanging")
        machine.requests("hanging", 1, ended=False)
        worker.send(signal.SIGTERM)
        wait_until(lambda: not machine.store.zcard("workers"), PATIENCE_S, "a worker that leaves")
        machine.timetable.register_worker("another host", len(new), ttl_s=3600)
        machine.kick(*new)
        for alias in new:
            wait_until(lambda alias=alias: int(machine.account(alias)["poll"]), PATIENCE_S, f"{alias} sent out")
        assert machine.sandbox.answer_hanging(machine.number("hanging"), OK) == 1
        assert worker.ended() == 0
        assert len(machine.entries("hanging")) == 1, "it did not finish what it had"
        taken = len(machine.entries()) - 1
        assert taken <= 1, "its read of the queue was open once"
        assert machine.store.llen(POLLS) == len(new) - taken, "it took a message and did nothing with it"
        machine.worker("next")
        for alias in new:
            assert len(machine.until_entries(alias, 1)) == 1


def test_two_workers_and_two_beats_are_replaced_and_no_account_waits_for_it(tmp_path: Path) -> None:
    aliases = [f"steady-{number:02}" for number in range(10)]
    with Machine(tmp_path, [Account(alias, every="1s") for alias in aliases]) as machine:
        old = [machine.beat("beat-1"), machine.beat("beat-2"), machine.worker("worker-1"), machine.worker("worker-2")]
        for alias in aliases:
            machine.until_entries(alias, 2)
        for process in old:
            kind, _, number = process.name.partition("-")
            name = f"{kind}-{int(number) + 2}"
            new = machine.beat(name) if kind == "beat" else machine.worker(name)
            assert process.stop() == 0
            assert new.is_alive
        since = max(request["seq"] for request in machine.sandbox.requests())
        machine.sandbox.wait_for(2 * len(aliases), since=since)
        for alias in aliases:
            machine.settle_down(alias)

        requests = machine.sandbox.requests(limit=100_000)
        gaps = {number: longest_gap_s(found) for number, found in requests_of(requests).items()}
        print(f"longest gap: {max(gaps.values()):.1f} s of one account, {longest_gap_s(requests):.1f} s of all")
        assert max(gaps.values()) <= GAP_S
        assert {request["state"] for request in requests} == {"answered"}
        assert sorted(entry["operation_id"] for entry in machine.entries()) == sorted(
            request["operation_id"] for request in requests
        )


def requests_of(requests: Iterable[JsonObject]) -> dict[str, list[JsonObject]]:
    """By account number, in order."""
    found = defaultdict(list)
    for request in requests:
        found[request["number"]].append(request)
    return found


def longest_gap_s(requests: Iterable[JsonObject]) -> float:
    return max(started_at(second) - started_at(first) for first, second in pairwise(requests))
