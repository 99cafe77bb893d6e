"""SIGKILL between every two steps of a poll: of the worker, of beat, of the server; and what a frozen one must not do.

    claimed │ begun │ sent │ answered │ settled

Whoever comes to the armed point is killed *after* that step (`dying_worker.py`: the real app with trap doors). Then it
is started again, and what counts is that the account is polled again after its lease, by nobody's help, and that each
answer is on the stream once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import PATIENCE_S, Account, Machine, Process, each_once, started_at
from servers import alive, wait_until

from worker.timetable import POLLS

DEADLINE_S, MARGIN_S = 2.0, 1.5
#: From begin to the end of a running poll's lease, less what passes from begin to the request.
LEASE_S = DEADLINE_S + MARGIN_S - 0.5

#: After which step the worker dies → how the poll's attempts end, requests at the bank, answers that nobody got.
WORKER = {
    "claimed": (["1 ok"], 1, 0),  # never begun: the same attempt is sent again
    "begun": (["1 LOST", "2 ok"], 1, 0),
    "sent": (["1 LOST", "2 ok"], 2, 0),
    "answered": (["1 LOST", "2 ok"], 2, 1),
}
#: After which step the server dies. The worker lives on: it repeats its call, or the message is sent again.
SERVER = ("claimed", "begun", "sent", "answered", "settled")

ACCOUNTS = [
    *(Account(f"worker-{step}") for step in WORKER),
    Account("worker-settled"),
    *(Account(f"server-{step}") for step in SERVER),
    Account("beat-pushed"),
    Account("beat-lapsed"),
    Account("doubled"),
    Account("frozen"),
]


class Site(Machine):
    """One worker and one beat, both with traps; whoever dies in a test is started again by it, or before the next."""

    def stand_up(self) -> None:
        self.trap_path.unlink(missing_ok=True)
        if not self.is_up("beat"):
            self.beat(traps=True)
        if not self.is_up("worker"):
            self.worker(traps=True)

    def is_up(self, name: str) -> bool:
        return any(process.is_alive for process in self.processes if process.name == name)

    def running(self, name: str) -> Process:
        return next(process for process in self.processes if process.name == name and process.is_alive)

    def check_stream(self, alias: str, lost_answers: int = 0) -> None:
        """Each answer is on the stream once, but for those given to somebody who was dead before settling them."""
        published = [entry["operation_id"] for entry in self.entries(alias)]
        answered = [request["operation_id"] for request in self.requests(alias) if request["state"] == "answered"]
        assert len(published) == len(set(published))
        assert set(published) <= set(answered)
        assert len(answered) - len(published) == lost_answers

    def check_goes_on(self, alias: str) -> None:
        """Nothing was lost, so nothing is repeated; the next poll is like any other."""
        self.until_state(alias, "scheduled")
        assert self.outcomes(alias) == ["1 ok"]
        self.check_stream(alias)
        self.kick(alias)
        self.until_entries(alias, 2)
        assert self.outcomes(alias) == ["1 ok", "1 ok"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    limits = {"request_deadline": f"{DEADLINE_S * 1000:.0f}ms", "lease_margin": f"{MARGIN_S * 1000:.0f}ms"}
    with Site(tmp_path_factory.mktemp("site"), ACCOUNTS, limits=limits, latency="300ms") as site:
        yield site


@pytest.fixture
def site(built: Site) -> Iterator[Site]:
    built.stand_up()
    yield built
    built.show_logs()


# ------------------------------------------------------------------------------------------------------ the worker


@pytest.mark.parametrize("step", WORKER)
def test_a_worker_killed_after_this_step_loses_no_poll_and_doubles_no_answer(site: Site, step: str) -> None:
    alias = f"worker-{step}"
    outcomes, requests, lost_answers = WORKER[step]
    victim = site.running("worker")
    site.arm(step, alias)
    site.kick(alias)
    assert victim.ended() == -signal.SIGKILL
    site.begin_worker(traps=True)
    site.until_entries(alias, 1)
    site.until_state(alias, "scheduled")
    assert site.outcomes(alias) == outcomes
    asked = site.requests(alias)
    assert len(asked) == requests
    assert [request["state"] for request in asked[:-1]] == ["answered" if lost_answers else "aborted"] * (requests - 1)
    if requests == 2:
        assert started_at(asked[1]) - started_at(asked[0]) >= LEASE_S, "it was asked again before the lease was over"
    site.check_stream(alias, lost_answers)


def test_a_worker_killed_after_settling_has_settled(site: Site) -> None:
    alias = "worker-settled"
    victim = site.running("worker")
    site.arm("settled", alias)
    site.kick(alias)
    assert victim.ended() == -signal.SIGKILL
    assert (site.state(alias), len(site.entries(alias))) == ("scheduled", 1)
    site.begin_worker(traps=True)
    site.check_goes_on(alias)


# ------------------------------------------------------------------------------------------------------------ beat


def test_a_beat_killed_after_pushing_has_dispatched_and_another_one_dispatches_nothing_twice(site: Site) -> None:
    victim = site.running("beat")
    site.arm("pushed", "")
    site.kick("beat-pushed")
    assert victim.ended() == -signal.SIGKILL
    site.beat(traps=True)
    site.until_entries("beat-pushed", 1)
    site.check_goes_on("beat-pushed")


def test_a_beat_killed_between_finding_a_loss_and_deciding_loses_and_counts_it_once(site: Site) -> None:
    alias = "beat-lapsed"
    worker, beat = site.running("worker"), site.running("beat")
    site.arm("begun", alias)
    site.kick(alias)
    assert worker.ended() == -signal.SIGKILL
    site.arm("lapsed", alias)
    site.begin_worker(traps=True)
    assert beat.ended() == -signal.SIGKILL
    assert site.account(alias)["state"] == "polling", "nothing was decided"
    site.beat(traps=True)
    site.until_entries(alias, 1)
    assert site.outcomes(alias) == ["1 LOST", "2 ok"]
    site.check_stream(alias)


# ------------------------------------------------------------------------------------------------------ the server


@pytest.mark.parametrize("step", SERVER)
def test_a_server_killed_after_this_step_keeps_the_poll_and_its_answer(site: Site, step: str) -> None:
    alias = f"server-{step}"
    worker, beat = site.running("worker"), site.running("beat")
    pid = site.server.pid
    site.arm(step, alias, pid=pid)
    site.kick(alias)
    wait_until(lambda: not alive(pid), PATIENCE_S, "the server's end")
    site.server.kill()
    site.server.start()
    site.until_entries(alias, 1)
    site.check_goes_on(alias)
    assert worker.is_alive
    assert beat.is_alive


# ----------------------------------------------------------------------------------------------- doubled and frozen


def test_a_message_sent_three_times_and_once_more_later_is_one_request(site: Site) -> None:
    site.running("worker").stop()
    site.timetable.register_worker("nobody", 4, ttl_s=60)
    site.kick("doubled")
    wait_until(lambda: site.store.llen(POLLS) == 1, PATIENCE_S, "a message that nobody takes")
    message = site.store.lindex(POLLS, 0)
    site.store.lpush(POLLS, message, message)
    site.timetable.forget_worker("nobody", 4)
    worker = site.worker(traps=True)
    site.until_entries("doubled", 1)
    stale = {"account": "doubled", "attempt": 1}
    wait_until(lambda: len(worker.said("stale message ignored", **stale)) >= 2, PATIENCE_S, "two stale messages")
    count = len(worker.said("stale message ignored", **stale))
    site.store.lpush(POLLS, message)
    wait_until(lambda: len(worker.said("stale message ignored", **stale)) > count, PATIENCE_S, "one more")
    assert len(site.requests("doubled", ended=False)) == 1
    assert each_once(site.entries("doubled"))


def test_credentials_that_take_long_to_fingerprint_cost_no_lease(tmp_path: Path) -> None:
    """A new worker computes each fingerprint once, one after the other, 50 ms each: more than the margin for all."""
    accounts = [Account(f"login-{number}") for number in range(48)]
    aliases = [account.alias for account in accounts]
    with Machine(tmp_path, accounts, limits={"request_deadline": "5s", "lease_margin": "1s"}) as machine:
        machine.beat()
        machine.worker(BALANCES_CONCURRENCY="48")
        machine.kick(*aliases)
        for alias in aliases:
            machine.until_entries(alias, 1)
        assert {outcome for alias in aliases for outcome in machine.outcomes(alias)} == {"1 ok"}


def test_a_worker_frozen_beyond_its_lease_sends_nothing_when_it_wakes(site: Site) -> None:
    frozen = site.running("worker")
    site.arm("begun", "frozen", number=signal.SIGSTOP)
    site.kick("frozen")
    site.until_sprung()
    other = site.worker("other")
    [entry] = site.until_entries("frozen", 1)
    assert site.outcomes("frozen") == ["1 LOST", "2 ok"]
    frozen.thaw()
    wait_until(lambda: frozen.said("not sent: the lease is too short", account="frozen"), PATIENCE_S, "its awakening")
    asked = site.requests("frozen", ended=False)
    assert [request["operation_id"] for request in asked] == [entry["operation_id"]]
    other.stop()
    site.kick("frozen")
    site.until_entries("frozen", 2)
    assert frozen.is_alive, "it goes on working"
