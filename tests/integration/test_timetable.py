"""The timetable's rules and races, one by one, on a real server: stories, where `docs/states.md` has single steps."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from servers import ValkeyServer
from world import BANK, LEASE_MS, MINUTE_MS, OUTCOMES, STREAM, Entry, World, read, read_entries

from worker import timetable as module
from worker.accounts import Accounts
from worker.celery import settling_template
from worker.errors import Kind, Outcome, Refused, StoreUnavailable
from worker.policy import Counters, Credential, DeadLetterQueue
from worker.scripts import script_text
from worker.store import LOOPBACK, free_port
from worker.timetable import (
    MISSING,
    Begun,
    CredentialRefused,
    OtherScheme,
    Postponed,
    Timetable,
    Token,
    connect,
)

LUA = Path(module.__file__).parent / "lua"
MARGIN_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS
DUE_MS = 15 * MINUTE_MS


@pytest.fixture
def world(store: redis.Redis) -> World:
    return World(store)


def two(world: World) -> World:
    """Login acme with the accounts a and b."""
    world.apply(read("a", "b"))
    return world


def place(world: World, login: str = "acme") -> int | None:
    score = world.client.zscore("timetable", login)
    return None if score is None else int(score)


def sent(world: World) -> list[str]:
    """Task ids in the queue, oldest first; the queue is empty afterwards."""
    ids = [message["headers"]["id"] for message in world.messages()]
    world.client.delete("balances.polls")
    return ids


def dispatched(world: World, alias: str) -> Token:
    world.due_now(alias)
    world.claim()
    assert world.state(alias) == "dispatched"
    return world.token(alias)


# ---------------------------------------------------------------------------------------------------------------- place


def test_only_place_writes_the_timetable() -> None:
    writes = re.compile(r"'(Z(?!RANGE|SCORE|CARD|COUNT)\w+)', *'timetable'")
    found = {path.stem: writes.findall(path.read_text()) for path in LUA.glob("*.lua")}
    assert {name: commands for name, commands in found.items() if commands} == {"shared": ["ZADD", "ZREM"]}
    body = (LUA / "shared.lua").read_text().split("local function place_as(login, l)")[1].split("\nend\n")[0]
    assert writes.findall(body) == ["ZADD", "ZREM"]
    assert re.findall(r"""\.z\w+\(f?["']timetable""", Path(module.__file__).read_text()) == []


def test_the_place_of_an_idle_login_is_its_first_due_account(world: World) -> None:
    two(world)
    assert place(world) == min(world.due("a"), world.due("b"))
    world.apply(read("b"))
    assert place(world) == world.due("b")
    world.apply(Accounts({}, *_rest()))
    assert place(world) is None


def _rest() -> tuple[object, ...]:
    accounts = read("a")
    return accounts.retry, accounts.limits, accounts.logins, "digest of an empty file"


def test_a_held_place_is_until_and_nothing_of_the_login_goes_out_before(world: World) -> None:
    two(world)
    dispatched(world, "a")
    world.due_now("b")
    assert place(world) == int(world.login()["until"])
    sent(world)
    for _ in range(3):
        world.pass_time(MARGIN_MS // 4)
        assert world.claim().dispatched == 0
    assert sent(world) == []


def test_a_blocked_login_has_no_place_even_while_a_poll_is_under_way(world: World) -> None:
    two(world)
    begun = world.start("a")
    world.block(world.token("b"))
    assert place(world) is None
    world.settle(begun)
    assert place(world) is None
    assert world.timetable.unblock("acme") is None
    assert place(world) == min(world.due("a"), world.due("b"))


CHANGES: dict[str, Callable[[World], object]] = {
    "redefined": lambda world: world.apply(read_entries(Entry("a", number="55"), Entry("b"))),
    "moved": lambda world: world.apply(read_entries(Entry("a", "beta"), Entry("b"))),
    "paused": lambda world: world.timetable.pause("a"),
    "removed": lambda world: world.apply(read_entries(Entry("b"))),
    "re-added": lambda world: (world.apply(read_entries(Entry("b"))), world.apply(pair())),
    "re-added elsewhere": lambda world: (
        world.apply(read_entries(Entry("b"))),
        world.apply(read_entries(Entry("a", "beta"), Entry("b"))),
    ),
}


def pair() -> Accounts:
    return read_entries(Entry("a"), Entry("b"))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_begun", [False, True], ids=["dispatched", "polling"])
def test_what_happens_to_an_account_in_flight_does_not_free_its_place(
    world: World, change: str, is_begun: bool
) -> None:
    world.apply(pair())
    token = dispatched(world, "a")
    if is_begun:
        world.begin(token)
    world.due_now("b")
    until = int(world.login()["until"])
    CHANGES[change](world)
    world.check()
    assert place(world) == until
    sent(world)
    assert "b" not in {task.split(".")[0] for task in _claimed(world)}
    world.pass_time(until - world.timetable.now_ms() + 1)
    claim = world.claim()
    for lapse in claim.lapsed:
        world.postpone(lapse.token)
    world.claim()
    assert "b" in {task.split(".")[0] for task in sent(world)}
    world.check()


def _claimed(world: World) -> list[str]:
    world.claim()
    return sent(world)


@pytest.mark.parametrize("change", CHANGES)
def test_a_second_copy_of_a_begun_message_does_not_free_the_place(world: World, change: str) -> None:
    """It waited longer than its lease, was sent again, and the account changed while the first copy's request ran."""
    world.apply(pair())
    token = dispatched(world, "a")
    world.begin(token, "first copy")
    CHANGES[change](world)
    world.due_now("b")
    assert world.begin(token, "second copy") is None
    world.check()
    assert world.login().get("holder") == f"a {token.poll} 1"
    sent(world)
    assert "b" not in {task.split(".")[0] for task in _claimed(world)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_message_that_nobody_will_begin_gives_its_place_back(world: World, change: str) -> None:
    world.apply(pair())
    token = dispatched(world, "a")
    CHANGES[change](world)
    assert world.begin(token) is None
    world.check()
    assert "holder" not in world.login()


# ---------------------------------------------------------------------------------------------------------------- until


def test_until_is_one_margin_after_the_claim_and_the_whole_lease_after_begin(world: World) -> None:
    two(world)
    token = dispatched(world, "a")
    assert int(world.login()["until"]) == int(world.client.hget("config", "claimed_at")) + MARGIN_MS
    world.pass_time(MARGIN_MS // 2)
    begun = world.begin(token)
    assert isinstance(begun, Begun)
    assert begun.lease_ms == LEASE_MS
    assert int(world.login()["until"]) == begun.now_ms + LEASE_MS
    world.pass_time(MINUTE_MS)
    again = world.begin(token)
    assert isinstance(again, Begun)
    assert LEASE_MS - MINUTE_MS - 1000 < again.lease_ms <= LEASE_MS - MINUTE_MS


def test_until_follows_the_limits_in_force(world: World) -> None:
    world.apply(read_entries(Entry("a"), head='[limits]\nrequest_deadline = "20s"\nlease_margin = "7s"\n'))
    token = dispatched(world, "a")
    assert int(world.login()["until"]) == int(world.client.hget("config", "claimed_at")) + 7_000
    assert isinstance(begun := world.begin(token), Begun)
    assert begun.lease_ms == 27_000


# --------------------------------------------------------------------------------------------------------------- lapsed


def test_a_lost_message_is_sent_again_under_its_token_and_is_no_loss(world: World) -> None:
    two(world)
    token = dispatched(world, "a")
    first = world.messages()[0]
    for _ in range(5):
        world.client.delete("balances.polls")
        world.pass_time(MARGIN_MS + 1)
        claim = world.claim()
        assert (claim.dispatched, claim.resent, claim.lapsed) == (0, 1, ())
        assert world.messages() == [first]
        world.check()
    begun = world.begin(token)
    assert isinstance(begun, Begun)
    assert begun.counters == Counters(attempt=1)
    assert world.token("a") == token


def test_of_two_copies_one_is_begun_and_the_other_changes_nothing(world: World) -> None:
    two(world)
    token = dispatched(world, "a")
    world.pass_time(MARGIN_MS + 1)
    world.claim()
    assert len(world.messages()) == 2
    assert isinstance(world.begin(token, "one"), Begun)
    before = world.snapshot()
    assert world.begin(token, "other") is None
    assert world.snapshot() == before
    assert isinstance(world.begin(token, "one"), Begun)


def test_a_lapsed_poll_is_returned_until_a_decision_is_applied(world: World) -> None:
    two(world)
    token = world.start("a").token
    world.due_now("b")
    world.pass_time(LEASE_MS + 1)
    for _ in range(3):
        claim = world.claim()
        assert [(lapse.token, lapse.state) for lapse in claim.lapsed] == [(token, "polling")]
        assert claim.dispatched == 0
        assert claim.wait_ms == 0
    world.postpone(token, 7200)
    claim = world.claim()
    assert (claim.lapsed, claim.dispatched) == ((), 1)
    assert world.state("b") == "dispatched"


def test_two_beats_that_judge_the_same_lapse_are_one(world: World) -> None:
    two(world)
    token = world.start("a").token
    world.pass_time(LEASE_MS + 1)
    [one], [other] = world.claim().lapsed, world.claim().lapsed
    assert one == other
    first = world.postpone(token, 7200)
    world.pass_time(1000)
    before = world.snapshot()
    assert world.postpone(token, 9999) == first
    assert world.snapshot() == before


def test_two_beats_that_bury_the_same_poll_write_one_letter(world: World) -> None:
    two(world)
    token = world.start("a").token
    world.pass_time(LEASE_MS + 1)
    for _ in range(2):
        assert world.timetable.suspend(token, DeadLetterQueue.RETRIES_EXHAUSTED, OUTCOMES["suspend"]) == "suspended"
    assert len(list(world.timetable.letters())) == 1
    assert [event["type"] for event in world.events()] == ["account.suspended.v1"]


def test_a_decision_on_a_lapse_comes_too_late_for_the_next_attempt(world: World) -> None:
    two(world)
    token = world.start("a").token
    world.pass_time(LEASE_MS + 1)
    world.postpone(token, 0)
    world.claim()
    assert world.token("a") == replace(token, attempt=2)
    before = world.snapshot()
    assert world.postpone(token, 9999) is None
    assert world.suspend(token) is None
    assert world.snapshot() == before


def test_an_answer_one_second_after_its_lease_is_published(world: World) -> None:
    two(world)
    begun = world.start("a")
    world.pass_time(LEASE_MS + 1000)
    world.claim()
    assert world.settle(begun).result == "published"
    assert world.state("a") == "scheduled"


def test_an_answer_after_the_decision_on_its_lapse_is_published_late_and_the_retry_goes_on(world: World) -> None:
    two(world)
    begun = world.start("a")
    world.pass_time(LEASE_MS + 1000)
    world.claim()
    world.postpone(begun.token, 0)
    world.claim()
    before = (world.state("a"), world.login().get("holder"), place(world))
    settled = world.settle(begun)
    assert (settled.result, settled.changed) == ("late", True)
    assert (world.state("a"), world.login().get("holder"), place(world)) == before
    assert [event["data"]["late"] for event in world.events()] == [True]
    assert world.latest("a")["late"] is True


def test_lapses_are_returned_and_the_next_account_served_in_the_same_claim_where_nobody_is_polling_any_more(
    world: World,
) -> None:
    two(world)
    world.start("a")
    world.apply(read("b"))
    world.due_now("b")
    world.pass_time(LEASE_MS + 1)
    claim = world.claim()
    assert (claim.lapsed, claim.dispatched) == ((), 1)


def test_the_next_account_of_a_lapsed_place_waits_for_its_time(world: World) -> None:
    two(world)
    dispatched(world, "a")
    world.timetable.pause("a")
    sent(world)
    world.pass_time(MARGIN_MS + 1)
    assert world.claim().dispatched == 0
    assert place(world) == world.due("b")


# ---------------------------------------------------------------------------------------------------------------- block


def test_a_log_on_error_blocks_whatever_its_token_says(world: World) -> None:
    two(world)
    old = world.start("a").token
    world.pass_time(LEASE_MS + 1)
    world.postpone(old, 0)
    world.claim()
    current = world.token("a")
    assert world.block(old) == "blocked"
    world.check()
    assert world.state("a") == "blocked waiting"
    assert world.begin(current) is None
    assert world.timetable.unblock("acme") is None
    assert world.begin(current) is None


@pytest.mark.parametrize("change", ["redefined", "moved", "removed", "re-added"])
def test_a_log_on_error_of_an_older_generation_blocks_the_login_it_was_sent_for(world: World, change: str) -> None:
    world.apply(pair())
    token = world.start("a").token
    CHANGES[change](world)
    assert world.block(token) == "blocked"
    world.check()
    assert world.state("b") == "blocked scheduled"
    assert world.login()["code"] == "E101"
    assert "holder" not in world.login()


def test_a_block_of_a_login_without_accounts_holds_for_those_that_come(world: World) -> None:
    two(world)
    token = world.start("a").token
    world.apply(read_entries(Entry("c", "beta")))
    assert world.block(token) == "blocked"
    [(_, letter)] = world.timetable.letters()
    assert letter["headers"]["reason"]["accounts"] == []
    world.apply(read("a", "b"))
    world.pass_time(DUE_MS)
    sent(world)
    assert world.claim().dispatched == 0


def test_other_decisions_on_a_stale_token_are_only_counted(world: World) -> None:
    two(world)
    old = world.start("a").token
    world.postpone(old, 0)
    world.claim()
    before = world.snapshot()
    assert (world.postpone(old), world.suspend(old), world.park(old)) == (None, None, None)
    assert world.snapshot() == before
    counts = world.client.hgetall("counts")
    assert {name: counts[name] for name in ("stale postpone", "stale suspended", "stale parked")} == {
        "stale postpone": "1",
        "stale suspended": "1",
        "stale parked": "1",
    }


def test_a_credential_replaced_since_blocks_nothing_and_is_remembered(world: World) -> None:
    two(world)
    old = world.start("a").token
    world.pass_time(LEASE_MS + 1)
    world.postpone(old, 0)
    world.claim()
    world.bank = "bank-2"
    assert isinstance(world.begin(world.token("a")), Begun)
    world.bank = "bank-1"
    assert world.block(old) is None
    assert world.state("a") == "polling"
    assert world.client.hgetall("failed") == {"bank-1": "bank"}


def test_a_blocked_login_has_one_letter_that_names_its_accounts_and_the_ledger_hears_of_each(world: World) -> None:
    two(world)
    world.block(world.start("a").token)
    [(queue, letter)] = world.timetable.letters()
    assert queue == DeadLetterQueue.DO_NOT_RETRY
    assert letter["headers"]["reason"]["accounts"] == ["a", "b"]
    assert [(event["type"], event["subject"], event["data"]["state"]) for event in world.events()] == [
        ("account.suspended.v1", "a", "blocked"),
        ("account.suspended.v1", "b", "blocked"),
    ]
    world.timetable.unblock("acme")
    assert list(world.timetable.letters()) == []
    assert sorted((e["type"], e["subject"]) for e in world.events()[2:]) == [
        ("account.resumed.v1", "a"),
        ("account.resumed.v1", "b"),
    ]


def test_what_is_redriven_under_a_block_resumes_for_the_ledger_with_the_unblock(world: World) -> None:
    two(world)
    world.suspend(world.start("a").token)
    world.block(world.token("b"))
    assert world.timetable.redrive("a") is None
    world.check()
    assert [e["type"] for e in world.events() if e["subject"] == "a"] == ["account.suspended.v1"]
    world.timetable.unblock("acme")
    assert [e["type"] for e in world.events() if e["subject"] == "a"] == ["account.suspended.v1", "account.resumed.v1"]


def test_the_reason_tells_when_this_poll_began_not_the_one_before(world: World) -> None:
    world.apply(read("a"))
    world.settle(world.start("a"))
    world.pass_time(timedelta(days=1))
    token = dispatched(world, "a")
    world.begin(token)
    world.suspend(token)
    [(_, letter)] = world.timetable.letters()
    reason = letter["headers"]["reason"]
    assert reason["last_at"][:16] == reason["first_at"][:16]
    assert datetime.fromisoformat(reason["first_at"]) > datetime.now(UTC) + timedelta(hours=23)
    world.timetable.redrive("a")
    world.pass_time(timedelta(days=1))
    world.block(dispatched(world, "a"), refused=True)
    first_at = world.messages(DeadLetterQueue.DO_NOT_RETRY)[0]["headers"]["reason"]["first_at"]
    assert datetime.fromisoformat(first_at) > datetime.now(UTC) + timedelta(hours=47)


# ------------------------------------------------------------------------------------------------------------- overlays


def test_pausing_voids_a_token_that_has_not_begun(world: World) -> None:
    two(world)
    token = dispatched(world, "a")
    world.timetable.pause("a")
    assert world.timetable.resume("a") is None
    assert world.begin(token) is None
    world.claim()
    assert world.token("a").poll > token.poll
    world.check()


def test_a_voided_retry_goes_on_as_the_retry_it_was(world: World) -> None:
    two(world)
    world.postpone(world.start("a").token, 20)
    world.pass_time(20_001)
    world.claim()
    token = world.token("a")
    world.timetable.pause("a")
    world.timetable.resume("a")
    assert world.state("a") == "waiting"
    assert world.begin(token) is None
    world.claim()
    assert world.token("a") == replace(token, attempt=3)
    assert isinstance(begun := world.begin(world.token("a")), Begun)
    assert begun.counters == Counters(1, 0, 0, 3, "E201")


def _resumed(world: World) -> None:
    world.timetable.pause("a")
    world.pass_time(MINUTE_MS)
    world.timetable.resume("a")


def _unblocked(world: World) -> None:
    world.block(world.token("b"))
    world.pass_time(MINUTE_MS)
    world.timetable.unblock("acme")


def _released(world: World) -> None:
    world.timetable.release()
    world.timetable.release(["a"])


OVERLAYS: dict[str, Callable[[World], object]] = {
    "resume": _resumed,
    "unblock": _unblocked,
    "release": _released,
    "poll": lambda world: world.timetable.poll("a"),
    "redrive": lambda world: world.timetable.redrive("a"),
    "another interval": lambda world: world.apply(read("a", "b", every="1m")),
    "the same file": lambda world: world.apply(read("a", "b")),
    "discard": lambda world: world.timetable.discard("a"),
}


@pytest.mark.parametrize("event", OVERLAYS)
def test_nothing_shortens_a_wait(world: World, event: str) -> None:
    two(world)
    postponed = world.postpone(world.start("a").token, 4 * 3600)
    OVERLAYS[event](world)
    world.check()
    assert world.due("a") == postponed.due_ms
    sent(world)
    world.pass_time(timedelta(hours=4) - timedelta(minutes=2))
    for _ in range(3):
        for task in _claimed(world):
            assert not task.startswith("a.")
            world.settle(world.begin(world.token("b")))
    world.pass_time(timedelta(minutes=2))
    world.claim()
    world.settle(world.known("b"))
    tasks = [task for task in sent(world) if task.startswith("a.")]
    if not tasks:
        if isinstance(begun := world.begin(world.token("b")), Begun):
            world.settle(begun)
        tasks = [task for task in _claimed(world) if task.startswith("a.")]
    assert len(tasks) == 1


def test_poll_makes_only_a_scheduled_account_due(world: World) -> None:
    two(world)
    assert world.timetable.poll("a") is None
    assert world.due("a") <= world.timetable.now_ms()
    assert world.timetable.poll("a") is None


# --------------------------------------------------------------------------------------------- late, latest and changed


@pytest.mark.parametrize(
    ("answers", "events", "latest"),
    [
        # (poll before the current one, attempt, amount) → (late, changed)
        ([(0, 1, "10")], [(False, True)], "10"),
        ([(1, 1, "10"), (0, 1, "10")], [(True, True), (False, False)], "10"),
        ([(1, 1, "10"), (0, 1, "11")], [(True, True), (False, True)], "11"),
        ([(0, 1, "11"), (1, 1, "10")], [(False, True), (True, False)], "11"),
        ([(0, 1, "11"), (1, 2, "10")], [(False, True), (True, False)], "11"),
        ([(0, 1, "11"), (0, 0, "10")], [(False, True), (True, False)], "11"),
        ([(2, 1, "10"), (1, 1, "11"), (0, 1, "10")], [(True, True), (True, True), (False, True)], "10"),
        ([(1, 3, "10"), (1, 2, "11"), (0, 1, "10")], [(True, True), (True, False), (False, False)], "10"),
        ([(0, 1, "11"), (0, 1, "12")], [(False, True), (True, False)], "11"),
    ],
)
def test_an_older_answer_is_published_and_moves_neither_latest_nor_changed(
    world: World, answers: list[tuple[int, int, str]], events: list[tuple[bool, bool]], latest: str
) -> None:
    two(world)
    begun = world.start("a")
    for back, attempt, amount in answers:
        token = replace(begun.token, poll=begun.token.poll - back, attempt=attempt)
        world.settle(replace(begun, token=token), amount=amount)
    assert [(e["data"]["late"], e["data"]["changed"]) for e in world.events()] == events
    assert [each["amount"] for each in world.latest("a")["balances"]] == [latest]


def test_poll_9_is_older_than_poll_10(world: World) -> None:
    two(world)
    begun = world.start("a")
    for poll, changed in ((9, True), (10, True), (9, False), (100, True), (11, False)):
        settled = world.settle(replace(begun, token=replace(begun.token, poll=poll)), amount=f"{poll}")
        assert settled.changed == changed


# ---------------------------------------------------------------------------------------------------------- generations


GENERATIONS = {
    "another number": (Entry("a", number="55"),),
    "another bank": (Entry("a", institution="bice.cl"),),
    "another login": (Entry("a", "beta"),),
    "removed": (),
}


@pytest.mark.parametrize("change", GENERATIONS)
def test_an_older_generations_answer_is_checked_against_its_own_pins_and_published_late(
    world: World, change: str
) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "other")))
    world.settle(world.start("a"), ids=("old",))
    old = world.start("a")
    world.apply(read_entries(*GENERATIONS[change], Entry("b", "other")))
    if change != "removed":
        other = world.account("a")["login"]
        world.pass_time(LEASE_MS + 1)
        world.claim()
        world.pass_time(DUE_MS)
        world.claim()
        begun = world.begin(world.token("a"))
        assert isinstance(begun, Begun)
        assert (begun.generation, other) == (2, world.token("a").login)
        assert world.settle(begun, ids=("new",), amount="77").result == "published"
    assert world.settle(old, ids=("new",)) is None
    assert world.settle(old, ids=("old",), operation="last").result == "late"
    world.check()
    last = world.events()[-1]
    assert (last["id"], last["data"]["late"], last["data"]["changed"]) == ("last", True, False)
    assert world.client.smembers("pins:a:1") == {"old"}
    latest = world.latest("a")
    assert latest is None if change == "removed" else latest["balances"][0]["amount"] == "77"


@pytest.mark.parametrize("change", ["redefined", "moved", "removed", "re-added elsewhere"])
def test_an_older_generations_answer_moves_nothing_even_where_it_is_the_first(world: World, change: str) -> None:
    world.apply(pair())
    begun = world.start("a")
    CHANGES[change](world)
    settled = world.settle(begun)
    assert (settled.result, settled.changed) == ("late", False)
    assert world.latest("a") is None


def test_an_answer_from_before_an_account_was_away_is_its_newest_all_the_same(world: World) -> None:
    world.apply(pair())
    begun = world.start("a")
    CHANGES["re-added"](world)
    settled = world.settle(begun)
    assert (settled.result, settled.changed) == ("late", True)
    assert world.latest("a")["late"] is True


@pytest.mark.parametrize("change", ["redefined", "moved", "removed", "re-added", "re-added elsewhere"])
@pytest.mark.parametrize("end", ["settle", "postpone", "suspend", "park"])
def test_the_end_of_an_older_generations_poll_frees_only_its_place(world: World, change: str, end: str) -> None:
    world.apply(pair())
    begun = world.start("a")
    CHANGES[change](world)
    before = world.account("a")
    ends = {
        "settle": lambda: world.settle(begun).result,
        "postpone": lambda: world.postpone(begun.token),
        "suspend": lambda: world.suspend(begun.token),
        "park": lambda: world.park(begun.token),
    }
    assert ends[end]() == ("late" if end == "settle" else None)
    world.check()
    assert "holder" not in world.login()
    after = world.account("a")
    for name in ("state", "due", "poll", "attempt", "login", "tries"):
        assert after.get(name) == before.get(name)


def test_a_re_added_account_keeps_generation_and_pins_and_goes_on_counting_polls(world: World) -> None:
    world.apply(pair())
    world.settle(world.start("a"), ids=("873458",))
    poll = world.token("a").poll
    world.apply(read_entries(Entry("b")))
    assert 0 < world.client.pttl("pins:a:1") <= 30 * DAY_MS
    world.apply(pair())
    assert world.client.pttl("pins:a:1") == -1
    world.pass_time(-DAY_MS)
    begun = world.start("a")
    assert begun.token.poll > poll
    assert begun.generation == 1
    assert world.settle(begun, ids=("another",)) is None


def test_an_identity_that_comes_back_is_a_new_generation_all_the_same(world: World) -> None:
    world.apply(pair())
    world.settle(world.start("a"), ids=("old",))
    CHANGES["redefined"](world)
    world.apply(pair())
    assert world.account("a")["generation"] == "3"
    assert world.settle(world.start("a"), ids=("fresh",)).result == "published"


def test_pins_that_a_removed_account_leaves_go_with_the_streams_memory(world: World) -> None:
    world.apply(pair())
    begun = world.start("a")
    world.apply(read_entries(Entry("b")))
    assert world.settle(begun).result == "late"
    assert 0 < world.client.pttl("pins:a:1") <= 31 * DAY_MS
    world.apply(pair())
    begun = world.start("a")
    CHANGES["redefined"](world)
    world.client.delete("pins:a:1")
    world.settle(begun)
    assert 0 < world.client.pttl("pins:a:1") <= 31 * DAY_MS


def test_an_answer_without_balances_pins_nothing(world: World) -> None:
    two(world)
    assert world.settle(world.start("a"), ids=()).result == "published"
    assert world.settle(world.start("a"), ids=("first",)).result == "published"
    assert world.settle(world.start("a"), ids=()).result == "published"
    assert world.settle(world.start("a"), ids=("first", "second")) is None


# -------------------------------------------------------------------------------------------------------- lost wake-up


SCOPES: list[tuple[dict[str, object], bool]] = [
    ({}, True),
    ({"institution": BANK}, True),
    ({"login": "acme"}, True),
    ({"institution": BANK, "login": "acme"}, True),
    ({"aliases": ["a"]}, True),
    ({"aliases": ["b", "a"]}, True),
    ({"aliases": ["a"], "institution": BANK, "login": "acme"}, True),
    ({"institution": "bice.cl"}, False),
    ({"login": "beta"}, False),
    ({"institution": BANK, "login": "beta"}, False),
    ({"institution": "bice.cl", "login": "acme"}, False),
    ({"aliases": ["b"]}, False),
    ({"aliases": ["a"], "login": "beta"}, False),
    ({"aliases": ["a"], "institution": "bice.cl"}, False),
]


@pytest.mark.parametrize(("scope", "is_woken"), SCOPES, ids=[json.dumps(scope) for scope, _ in SCOPES])
@pytest.mark.parametrize("jump_ms", [0, 1, -MINUTE_MS])
def test_a_release_while_the_poll_that_will_park_is_in_flight_becomes_a_short_wait(
    world: World, scope: dict, is_woken: bool, jump_ms: int
) -> None:
    two(world)
    token = world.start("a").token
    world.pass_time(jump_ms)
    assert world.timetable.release(**scope) == []
    result = world.park(token)
    world.check()
    assert isinstance(result, Postponed) == is_woken
    assert world.state("a") == ("waiting" if is_woken else "parked")
    if is_woken:
        assert world.park(token) == result
        assert result.due_ms - world.timetable.now_ms() <= 5000


def test_a_release_before_the_poll_began_does_not_keep_it_from_parking(world: World) -> None:
    two(world)
    world.timetable.release(["a"])
    world.timetable.release()
    assert world.park(world.start("a").token) == "parked"


def test_released_accounts_come_back_one_after_the_other(world: World) -> None:
    entries = [Entry(f"p{i}", f"login-{i}") for i in range(5)]
    world.apply(read_entries(*entries))
    for entry in entries:
        assert world.park(world.start(entry.alias).token) == "parked"
    released = world.timetable.release(spread_ms=3000)
    assert released == [entry.alias for entry in entries]
    dues = [world.due(alias) for alias in released]
    assert [due - dues[0] for due in dues] == [0, 3000, 6000, 9000, 12000]
    assert dues[0] <= world.timetable.now_ms()
    assert list(world.timetable.letters()) == []
    world.check()


def test_release_by_name_takes_ten_thousand_names(world: World) -> None:
    two(world)
    world.park(world.start("a").token)
    assert world.timetable.release(["a", *(f"nobody-{i}" for i in range(10_000))]) == ["a"]


# -------------------------------------------------------------------------------------------------------- fingerprints


def offer(world: World, token: Token, bank: str = "bank-1", key: str = "key-1", caller: str = "caller") -> object:
    return world.timetable.begin(token, caller=caller, scheme="api-key", bank=bank, key=key)


def test_a_failed_credential_is_refused_for_every_login_that_uses_it(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "beta"), Entry("c", "gamma")))
    world.block(world.start("a").token)
    token = dispatched(world, "b")
    assert offer(world, token) == CredentialRefused(Credential.BANK, 1)
    assert offer(world, token, key=MISSING, caller="other") == CredentialRefused(Credential.KEY, 2)
    assert world.state("b") == "dispatched"
    world.check()
    assert isinstance(offer(world, token, bank="bank-2", caller="third"), Begun)
    world.block(dispatched(world, "c"), credential=Credential.KEY)
    world.check()
    assert world.client.hgetall("failed") == {"bank-1": "bank", "key-1": "key"}


def test_a_refused_poll_is_sent_again_after_a_margin_and_its_third_refusal_blocks(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "beta")))
    world.block(world.start("a").token)
    token = dispatched(world, "b")
    for times in (1, 2, 3):
        assert sent(world)[-1:] == [token.task_id]
        assert offer(world, token, caller=f"host {times}") == CredentialRefused(Credential.BANK, times)
        assert int(world.login("beta")["until"]) > world.timetable.now_ms() + MARGIN_MS - 1000
        if times < 3:
            world.pass_time(MARGIN_MS + 1)
            assert world.claim().resent == 1
    assert world.block(token, refused=True) == "blocked"
    world.check()
    assert world.state("b") == "blocked scheduled"
    assert "manual" not in world.login("beta")


def test_a_repeated_call_counts_one_refusal(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "beta")))
    world.block(world.start("a").token)
    token = dispatched(world, "b")
    for caller, times in (("one", 1), ("one", 1), ("two", 2), ("two", 2)):
        assert offer(world, token, caller=caller) == CredentialRefused(Credential.BANK, times)


def test_refusals_count_in_a_row(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "beta")))
    world.block(world.start("a").token)
    token = dispatched(world, "b")
    offer(world, token)
    world.settle(offer(world, token, bank="bank-2", caller="other"))
    assert offer(world, dispatched(world, "b")) == CredentialRefused(Credential.BANK, 1)


def test_an_operators_unblock_forgives_what_failed(world: World) -> None:
    two(world)
    world.block(world.start("a").token)
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-1") == "it failed"
    assert world.timetable.unblock("acme") is None
    assert world.client.hgetall("failed") == {}
    world.claim()
    assert isinstance(offer(world, world.token("a")), Begun)


def test_what_was_forgiven_for_another_login_does_not_unblock_by_itself(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "beta")))
    begun = world.start("b")
    world.block(world.start("a").token)
    world.block(begun.token)
    assert world.timetable.unblock("acme") is None
    assert world.timetable.unblock_with("beta", Credential.BANK, "bank-1") == "it failed"
    assert world.timetable.unblock_with("beta", Credential.BANK, "") == "it failed"
    assert world.timetable.unblock_with("beta", Credential.BANK, "bank-2") is None


def test_forgiving_a_key_does_not_forgive_a_log_on_that_failed_long_before(world: World) -> None:
    two(world)
    world.block(world.start("a").token)
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-2") is None
    world.bank = "bank-2"
    world.claim()
    assert isinstance(world.begin(world.token("a")), Begun)
    world.block(world.token("a"), credential=Credential.KEY)
    assert world.timetable.unblock("acme") is None
    assert world.client.hgetall("failed") == {"bank-1": "bank"}


@pytest.mark.parametrize(
    ("failed", "fingerprint", "offered", "new", "answer"),
    [
        (Credential.BANK, "bank-1", Credential.BANK, "bank-2", None),
        (Credential.BANK, "bank-1", Credential.BANK, "bank-1", "it failed"),
        (Credential.BANK, "bank-1", Credential.KEY, "key-2", "the other credential failed"),
        (Credential.BANK, "", Credential.BANK, "bank-2", "only an operator may unblock"),
        (Credential.KEY, "key-1", Credential.KEY, "key-2", None),
        (Credential.KEY, "key-1", Credential.KEY, "key-1", "it failed"),
        (Credential.KEY, "key-1", Credential.BANK, "bank-2", "the other credential failed"),
        (Credential.KEY, "", Credential.KEY, "key-2", None),
    ],
)
def test_only_a_different_credential_of_the_kind_that_failed_unblocks(
    world: World, failed: Credential, fingerprint: str, offered: Credential, new: str, answer: str | None
) -> None:
    two(world)
    token = world.start("a").token
    assert world.timetable.block(token, failed, fingerprint, OUTCOMES["block"]) == "blocked"
    assert world.timetable.unblock_with("acme", offered, new) == answer
    assert ("blocked" in world.login()) == (answer is not None)
    world.check()


def fail_with(world: World, fingerprint: str) -> None:
    """The next poll goes out with this bank credential, and E101 is the answer."""
    world.client.delete("balances.polls")
    world.pass_time(1)
    world.claim()
    login = world.login()
    alias = login["holder"].split()[0]
    assert isinstance(begun := offer(world, world.token(alias), bank=fingerprint), Begun)
    assert world.timetable.block(begun.token, Credential.BANK, fingerprint, OUTCOMES["block"]) == "blocked"


def test_after_two_failed_log_ons_in_a_day_only_an_operator_unblocks(world: World) -> None:
    two(world)
    world.due_now("a")
    fail_with(world, "bank-1")
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-2") is None
    world.pass_time(timedelta(hours=23))
    fail_with(world, "bank-2")
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-3") == "only an operator may unblock"
    world.pass_time(timedelta(days=3))
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-3") == "only an operator may unblock"
    assert world.timetable.unblock("acme") is None


def test_two_failed_log_ons_more_than_a_day_apart_are_two_accidents(world: World) -> None:
    two(world)
    world.due_now("a")
    fail_with(world, "bank-1")
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-2") is None
    world.pass_time(timedelta(hours=25))
    fail_with(world, "bank-2")
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-3") is None


def test_a_second_failed_log_on_that_arrives_late_counts_too(world: World) -> None:
    """Two hosts: the older secret's answer comes after the newer one has already blocked the login."""
    two(world)
    old = world.start("a").token
    world.pass_time(LEASE_MS + 1)
    world.postpone(old, 0)
    world.pass_time(1)
    fail_with(world, "bank-2")
    assert world.block(old) is None
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-3") == "only an operator may unblock"


def test_a_refusal_is_not_a_failed_log_on(world: World) -> None:
    two(world)
    world.due_now("a")
    fail_with(world, "bank-1")
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-2") is None
    world.pass_time(timedelta(hours=25))
    world.claim()
    world.bank = "bank-1"
    assert world.block(world.token(world.login()["holder"].split()[0]), refused=True) == "blocked"
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-2") is None
    world.pass_time(MARGIN_MS)
    fail_with(world, "bank-2")
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-3") is None


def test_a_block_for_the_key_becomes_one_for_the_log_on_and_a_new_key_does_not_lift_it(world: World) -> None:
    two(world)
    begun = world.start("a")
    world.block(world.token("b"), credential=Credential.KEY)
    assert world.block(begun.token) == "blocked"
    world.check()
    assert world.login()["blocked"] == "bank"
    assert world.timetable.unblock_with("acme", Credential.KEY, "key-2") == "the other credential failed"
    assert world.timetable.unblock_with("acme", Credential.BANK, "bank-2") is None
    world.claim()
    token = world.token(world.login()["holder"].split()[0])
    assert offer(world, token, bank="bank-2") == CredentialRefused(Credential.KEY, 1)


def test_the_letter_of_a_block_that_becomes_one_for_the_log_on_says_so(world: World) -> None:
    two(world)
    begun = world.start("a")
    world.timetable.block(world.token("b"), Credential.KEY, "key-1", replace(OUTCOMES["block"], code="A000"))
    world.block(begun.token)
    world.check()
    assert [letter["headers"]["reason"]["code"] for _, letter in world.timetable.letters()] == ["E101"]
    assert world.login()["code"] == "E101"


def test_a_failed_key_does_not_soften_a_block_for_the_log_on(world: World) -> None:
    two(world)
    begun = world.start("a")
    world.block(world.token("b"))
    assert world.block(begun.token, credential=Credential.KEY) == "blocked"
    world.check()
    assert world.login()["blocked"] == "bank"
    assert world.timetable.unblock_with("acme", Credential.KEY, "key-2") == "the other credential failed"


def test_a_caller_that_asks_again_after_a_block_gets_nothing(world: World) -> None:
    two(world)
    token = dispatched(world, "a")
    world.begin(token)
    world.block(world.token("b"))
    assert world.begin(token) is None
    world.check()


def test_begin_names_the_logins_scheme_and_begins_nothing(world: World) -> None:
    two(world)
    token = dispatched(world, "a")
    before = world.snapshot()
    assert world.timetable.begin(token, caller="c", scheme="bearer", bank="", key="k") == OtherScheme("api-key")
    assert world.snapshot() == before


# ------------------------------------------------------------------------------------------------------------- probing


def probing_world(world: World) -> World:
    """Login acme unblocked a moment ago, with the accounts a, b and c due, in this order."""
    world.apply(read_entries(Entry("a"), Entry("b"), Entry("c")))
    world.block(world.token("a"))
    for alias in ("a", "b", "c"):
        world.client.zadd("due:acme", {alias: world.timetable.now_ms() - 3000 + ord(alias)})
        world.client.hset(f"account:{alias}", "due", f"{world.client.zscore('due:acme', alias):.0f}")
    assert world.timetable.unblock("acme") is None
    return world


def in_flight(world: World) -> str | None:
    holder = world.login().get("holder")
    return None if holder is None else holder.split()[0]


def test_one_account_probes_and_the_others_wait_for_its_retry(world: World) -> None:
    probing_world(world)
    world.claim()
    assert in_flight(world) == "a"
    postponed = world.postpone(world.begin(world.token("a")).token, 3600)
    world.check()
    assert place(world) == postponed.due_ms
    sent(world)
    world.pass_time(timedelta(minutes=59))
    assert _claimed(world) == []
    world.pass_time(timedelta(minutes=1))
    assert _claimed(world) == [world.token("a").task_id]


PROBE_ENDS: dict[str, Callable[[World, Begun], object]] = {
    "park": lambda world, begun: world.park(begun.token),
    "suspend": lambda world, begun: world.suspend(begun.token),
    "pause": lambda world, begun: (world.postpone(begun.token, 9), world.timetable.pause("a")),
    "remove": lambda world, begun: (world.postpone(begun.token, 9), world.apply(read_entries(Entry("b"), Entry("c")))),
    "move": lambda world, begun: (
        world.postpone(begun.token, 9),
        world.apply(read_entries(Entry("a", "beta"), Entry("b"), Entry("c"))),
    ),
}


@pytest.mark.parametrize("end", PROBE_ENDS)
def test_when_the_probe_is_gone_the_next_one_probes(world: World, end: str) -> None:
    probing_world(world)
    world.claim()
    PROBE_ENDS[end](world, world.begin(world.token("a")))
    world.check()
    world.claim()
    assert in_flight(world) == "b"
    assert world.login()["probing"] == "1"
    world.postpone(world.begin(world.token("b")).token, 3600)
    sent(world)
    assert _claimed(world) == []


def test_a_success_ends_the_probing(world: World) -> None:
    probing_world(world)
    world.claim()
    world.settle(world.begin(world.token("a")))
    assert "probing" not in world.login()
    for alias in ("b", "c"):
        world.claim()
        assert in_flight(world) == alias
        world.postpone(world.begin(world.token(alias)).token, 3600)
    world.check()


def test_a_late_answer_does_not_end_the_probing(world: World) -> None:
    probing_world(world)
    world.claim()
    begun = world.begin(world.token("a"))
    world.postpone(begun.token, 3600)
    world.settle(begun)
    assert "probing" in world.login()


def test_until_one_was_tried_an_operators_choice_may_probe(world: World) -> None:
    """Cron accounts at night: the first slot is hours away, and `balances poll` must not wait for it."""
    two(world)
    world.block(world.token("a"))
    world.timetable.unblock("acme")
    last = max(("a", "b"), key=world.due)
    world.due_now(last)
    world.check()
    world.claim()
    assert in_flight(world) == last


def test_a_block_ends_the_probing_and_an_unblock_begins_it_anew(world: World) -> None:
    probing_world(world)
    world.claim()
    world.block(world.begin(world.token("a")).token)
    assert world.login().keys().isdisjoint({"probing", "probe"})
    world.timetable.unblock("acme")
    assert world.login()["probing"] == "1"
    world.check()


def test_an_account_that_comes_to_a_probing_login_without_accounts_probes(world: World) -> None:
    two(world)
    world.block(world.token("a"))
    world.apply(read_entries(Entry("x", "beta")))
    world.timetable.unblock("acme")
    world.check()
    assert place(world) is None
    world.apply(read_entries(Entry("c"), Entry("x", "beta")))
    assert place(world) == world.due("c")


# ---------------------------------------------------------------------------------------------------- room and fairness


def many(count: int, per_login: int = 1) -> Accounts:
    entries = [Entry(f"m{i}", f"login-{i // per_login}") for i in range(count)]
    return read_entries(*entries)


def test_never_more_messages_than_threads_of_live_workers(world: World) -> None:
    world.apply(many(30))
    world.pass_time(DUE_MS)
    world.workers(7)
    assert world.claim().dispatched == 7
    assert world.claim().dispatched == 0
    world.client.rpop("balances.polls", 3)
    assert world.claim().dispatched == 3
    world.timetable.register_worker("another", 5, ttl_s=60)
    assert world.claim().dispatched == 5
    assert len(world.messages()) == 12
    world.check()


def test_without_a_live_worker_nothing_is_dispatched_and_nothing_is_lost(world: World) -> None:
    world.apply(many(3))
    world.pass_time(DUE_MS)
    world.client.zadd("workers", {"test 100": 1})
    claim = world.claim()
    assert (claim.dispatched, claim.wait_ms, world.messages()) == (0, 0, [])
    world.timetable.forget_worker("test", 100)
    assert world.claim().dispatched == 0
    world.workers(100)
    assert world.claim().dispatched == 3


def test_a_worker_is_counted_until_its_registration_ends_or_it_leaves(world: World) -> None:
    world.apply(many(9))
    world.pass_time(DUE_MS)
    world.client.delete("workers")
    world.timetable.register_worker("host:1", 2, ttl_s=60)
    world.timetable.register_worker("host:2", 3, ttl_s=-1)
    assert world.claim().dispatched == 2
    world.timetable.forget_worker("host:1", 2)
    world.client.delete("balances.polls")
    assert world.claim().dispatched == 0


def test_what_is_sent_again_takes_room_too(world: World) -> None:
    world.apply(many(3))
    world.pass_time(DUE_MS)
    world.workers(2)
    world.claim()
    world.client.delete("balances.polls")
    world.pass_time(MARGIN_MS + 1)
    claim = world.claim()
    assert claim.dispatched + claim.resent == 2
    assert world.claim().resent == 0
    assert len(world.messages()) == 2


def test_lapses_are_returned_without_room(world: World) -> None:
    world.apply(many(3))
    token = world.start("m0").token
    world.pass_time(LEASE_MS + DUE_MS)
    world.workers(0)
    claim = world.claim()
    assert [lapse.token for lapse in claim.lapsed] == [token]
    assert claim.dispatched == 0


def test_accounts_of_a_login_go_in_the_order_of_their_due_times(world: World) -> None:
    world.apply(many(20, per_login=20))
    world.pass_time(DUE_MS)
    order = sorted((f"m{i}" for i in range(20)), key=world.due)
    served = []
    for _ in range(20):
        world.claim()
        alias = world.login("login-0")["holder"].split()[0]
        served.append(alias)
        world.postpone(world.begin(world.token(alias)).token, 1)
    assert served == order


def test_logins_go_in_the_order_of_their_due_times_however_many_accounts_they_have(world: World) -> None:
    big = [Entry(f"big-{i}", "big") for i in range(30)]
    small = [Entry(f"small-{i}", f"small-{i}") for i in range(5)]
    world.apply(read_entries(*big, *small))
    world.pass_time(DUE_MS)
    world.workers(6)
    assert world.claim().dispatched == 6
    assert {task.rpartition(".")[0] for task in sent(world)} >= {entry.alias for entry in small}


def test_a_claim_looks_at_most_at_so_many_logins_the_oldest_first(world: World) -> None:
    world.apply(many(10))
    world.pass_time(DUE_MS)
    order = sorted((f"m{i}" for i in range(10)), key=world.due)
    assert world.timetable.claim(4).dispatched == 4
    assert [task.split(".")[0] for task in sent(world)] == order[:4]


def test_two_beats_at_once_never_send_an_account_twice(world: World, valkey_server: ValkeyServer) -> None:
    count = 120
    world.apply(many(count, per_login=3))
    world.pass_time(DUE_MS)
    barrier = threading.Barrier(4)

    def beat() -> int:
        with valkey_server.client() as client:
            timetable = Timetable(client, stream=STREAM, message=world.template[0], letter=world.template[1])
            barrier.wait()
            return sum(timetable.claim(7).dispatched for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(lambda _: beat(), range(4)))
    tasks = sent(world)
    assert total == len(tasks) == len(set(tasks)) == count // 3
    world.check()


# -------------------------------------------------------------------------------------------------- polls and counters


def test_poll_numbers_increase_whatever_the_clock_does(world: World) -> None:
    two(world)
    polls = []
    for jump in (0, -DAY_MS, 0, DAY_MS, -3 * DAY_MS, MINUTE_MS):
        world.pass_time(jump)
        begun = world.start("a")
        polls.append(begun.token.poll)
        world.settle(begun)
    assert polls == sorted(set(polls))


def test_a_retry_keeps_its_poll_and_raises_the_attempt(world: World) -> None:
    two(world)
    begun = world.start("a")
    for attempt in (2, 3, 4):
        world.postpone(begun.token, 0)
        world.claim()
        assert world.token("a") == replace(begun.token, attempt=attempt)
        message = world.messages()[-1]
        assert (message["headers"]["id"], message["headers"]["retries"]) == (begun.token.task_id, attempt - 1)
        begun = world.begin(world.token("a"))
    world.settle(begun)
    assert world.start("a").token.attempt == 1


def test_counters_go_with_the_account_until_a_balance_comes(world: World) -> None:
    two(world)
    token = world.start("a").token
    world.timetable.postpone(token, 0, Counters(0, 2, 1, 1), Outcome(Kind.SERVER_ERROR, "HTTP_504"))
    world.claim()
    begun = world.begin(world.token("a"))
    assert begun.counters == Counters(0, 2, 1, 2, "HTTP_504")
    world.pass_time(LEASE_MS + 1)
    [lapse] = world.claim().lapsed
    assert lapse.counters == Counters(0, 2, 1, 2)
    world.settle(begun)
    assert world.start("a").counters == Counters(0, 0, 0, 1, "ok")


@pytest.mark.parametrize("way", ["redrive", "release", "unblock", "redefine", "re-add", "discard"])
def test_what_comes_back_comes_back_without_its_counters(world: World, way: str) -> None:
    world.apply(pair())
    token = world.start("a").token
    world.timetable.postpone(token, 0, Counters(1, 2, 2, 1), Outcome(Kind.SERVER_ERROR, "HTTP_504"))
    world.claim()
    token = world.begin(world.token("a")).token
    ways: dict[str, Callable[[], object]] = {
        "redrive": lambda: (world.suspend(token), world.timetable.redrive("a")),
        "release": lambda: (world.park(token), world.timetable.release()),
        "unblock": lambda: (world.block(token), world.timetable.unblock("acme")),
        "redefine": lambda: (world.postpone(token), CHANGES["redefined"](world)),
        "re-add": lambda: (world.postpone(token), CHANGES["re-added"](world)),
        "discard": lambda: (world.suspend(token), world.timetable.discard("a"), world.timetable.resume("a")),
    }
    ways[way]()
    world.check()
    begun = world.start("a")
    assert begun.counters == Counters(last=begun.counters.last)
    assert begun.token.poll > token.poll


# ------------------------------------------------------------------------------------------------------- repeated calls


def _polling(world: World) -> Token:
    return world.start("a").token


REPEATED: dict[str, tuple[Callable[[World], Token], Callable[[World, Token], object], object]] = {
    "begin": (lambda w: dispatched(w, "a"), lambda w, t: type(w.begin(t)).__name__, "Begun"),
    "settle": (_polling, lambda w, _: w.settle(w.known("a"), operation="op").result, "repeated"),
    "postpone": (_polling, lambda w, t: type(w.postpone(t, 20)).__name__, "Postponed"),
    "suspend": (_polling, lambda w, t: w.suspend(t), "suspended"),
    "park": (_polling, lambda w, t: w.park(t), "parked"),
    "block": (_polling, lambda w, t: w.block(t), "blocked"),
    "pause": (_polling, lambda w, _: w.timetable.pause("a"), None),
    "resume": (lambda w: (_polling(w), w.timetable.pause("a"))[0], lambda w, _: w.timetable.resume("a"), "polling"),
    "redrive": (lambda w: (t := _polling(w), w.suspend(t))[0], lambda w, _: w.timetable.redrive("a"), "scheduled"),
    "discard": (lambda w: (t := _polling(w), w.suspend(t))[0], lambda w, _: w.timetable.discard("a"), "scheduled"),
    "release": (lambda w: (t := _polling(w), w.park(t))[0], lambda w, _: w.timetable.release(["a"]), []),
    "unblock": (lambda w: (t := _polling(w), w.block(t))[0], lambda w, _: w.timetable.unblock("acme"), "not blocked"),
    "unblock with": (
        lambda w: (t := _polling(w), w.block(t))[0],
        lambda w, _: w.timetable.unblock_with("acme", Credential.BANK, "bank-2"),
        "not blocked",
    ),
    "claim": (lambda w: (w.due_now("a"), w.token("a"))[1], lambda w, _: w.claim().dispatched, 0),
    "apply": (lambda w: w.token("a"), lambda w, _: w.apply(read("a", "b", "c")), 0),
    "retire": (lambda w: w.token("a"), lambda w, _: w.apply(read("a")), 0),
}


def without_times(snapshot: dict) -> dict:
    """What a repeated call may touch: when a scope or a content was last named."""
    return {
        key: value
        for key, value in snapshot.items()
        if key not in {"contents", "config", "failures:acme"} and not key.startswith("released:")
    }


@pytest.mark.parametrize("call", REPEATED)
def test_a_repeated_call_changes_nothing(world: World, call: str) -> None:
    arrange, run, expected = REPEATED[call]
    two(world)
    token = arrange(world)
    run(world, token)
    world.check()
    before = without_times(world.snapshot())
    assert run(world, token) == expected
    world.check()
    assert without_times(world.snapshot()) == before


# --------------------------------------------------------------------------------------------------------------- apply


def test_first_due_times_are_spread_over_the_interval_and_stay_where_they_are(world: World) -> None:
    world.apply(many(300))
    now_ms = world.timetable.now_ms()
    offsets = sorted((world.due(f"m{i}") - now_ms) / DUE_MS for i in range(300))
    assert offsets[0] >= 0
    assert offsets[-1] <= 1
    tenths = [sum(tenth <= offset * 10 < tenth + 1 for offset in offsets) for tenth in range(10)]
    assert min(tenths) > 10
    before = world.snapshot()
    world.client.hdel("revisions", *(f"m{i}" for i in range(300)))
    world.apply(many(300))
    assert {k: v for k, v in world.snapshot().items() if k.startswith("due:")} == {
        k: v for k, v in before.items() if k.startswith("due:")
    }


def test_apply_goes_in_batches_and_counts_what_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "APPLY_BATCH", 7)
    assert world.apply(many(30)) == 30
    assert world.apply(many(20)) == 10
    assert world.apply(many(25)) == 5
    assert world.apply(many(25)) == 0
    assert len(world.timetable.revisions()) == 25
    world.check()


def test_the_limits_are_there_before_the_first_account(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat that dies within its first apply must leave nothing that the next one stumbles over."""
    monkeypatch.setattr(module, "APPLY_BATCH", 1)
    accounts = read("a", "b")
    batches = world.timetable._changes(accounts)
    for _ in range(2):
        event, batch = next(batches)
        world.timetable._run("apply", "0", event, *batch, "beat")
    assert list(world.timetable.revisions()) == ["a"]
    assert not world.timetable.knows_content(accounts.digest)
    world.due_now("a")
    assert world.claim().dispatched == 1
    world.check()


def test_other_limits_come_into_force_when_the_whole_file_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "APPLY_BATCH", 1)
    world.apply(read("a", "b"))
    accounts = read_entries(Entry("a"), Entry("b"), head="[retry]\nmax_waits = 9\n")
    *batches, finish = world.timetable._changes(accounts)
    for event, batch in batches:
        world.timetable._run("apply", "1", event, *batch, "beat")
    assert world.timetable.retry().max_waits == 6
    world.timetable._run("apply", "1", finish[0], *finish[1], "beat")
    assert world.timetable.retry().max_waits == 9


def test_an_apply_that_was_overtaken_compares_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "APPLY_BATCH", 1)
    two(world)
    mine, theirs = read("a", "b", "c"), read("a", "b", "d", every="5m")
    run, is_overtaken = world.timetable._run, []

    def interrupted(script: str, *args: str | int) -> object:
        if script == "apply" and args[1] == "set" and not is_overtaken:
            is_overtaken.append(True)
            Timetable(world.client, stream=STREAM).apply(theirs, force=True)
        return run(script, *args)

    monkeypatch.setattr(world.timetable, "_run", interrupted)
    world.apply(mine)
    assert set(world.timetable.revisions()) == {"a", "b", "c"}
    assert world.timetable.current_content() == mine.digest
    assert world.timetable.knows_content(theirs.digest)
    world.check()


def test_two_applies_at_once_end_as_one_of_them_would_alone(
    world: World, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "APPLY_BATCH", 3)
    files = [many(40), many(35, per_login=5), many(38, per_login=2)]
    barrier = threading.Barrier(len(files))

    def sync(accounts: Accounts) -> None:
        with valkey_server.client() as client:
            barrier.wait()
            Timetable(client, stream=STREAM).apply(accounts, force=True)

    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(sync, files))
    [last] = [accounts for accounts in files if accounts.digest == world.timetable.current_content()]
    assert world.timetable.revisions() == {d.alias: d.revision for d in last.definitions.values()}
    world.check()


@pytest.mark.parametrize(
    ("known", "left", "is_refused"),
    [(3, 1, False), (3, 0, True), (4, 1, True), (10, 8, False), (10, 7, True), (20, 16, False), (20, 15, True)],
)
def test_a_file_that_lacks_more_than_a_fifth_of_the_accounts_needs_force(
    world: World, known: int, left: int, is_refused: bool
) -> None:
    world.apply(many(known))
    file = read_entries(*(Entry(f"m{i}", f"login-{i}") for i in range(left)), Entry("new", "new"))
    if is_refused:
        before = world.snapshot()
        with pytest.raises(Refused, match=f"remove {known - left} of {known} accounts"):
            world.apply(file, force=False)
        assert world.snapshot() == before
    else:
        world.apply(file, force=False)
    world.apply(file, force=True)
    assert len(world.timetable.revisions()) == left + 1
    world.check()


def test_another_interval_moves_only_scheduled_accounts(world: World) -> None:
    aliases = ("idle", "queued", "running", "waits", "dead", "held")
    world.apply(read_entries(*(Entry(alias, f"l-{alias}") for alias in aliases)))
    dispatched(world, "queued")
    world.start("running")
    world.postpone(world.start("waits").token, 4 * 3600)
    world.suspend(world.start("dead").token)
    world.timetable.pause("held")
    before = {alias: (world.state(alias), world.due(alias)) for alias in aliases}
    idle = world.due("idle")
    world.apply(read_entries(*(Entry(alias, f"l-{alias}", every="2h") for alias in aliases)))
    world.check()
    assert world.due("idle") != idle
    assert {a: (world.state(a), world.due(a)) for a in aliases[1:]} == {a: before[a] for a in aliases[1:]}
    world.timetable.resume("held")
    assert world.due("held") == int(world.account("held")["slot"])


def test_a_poll_of_the_older_schedule_goes_on_by_the_newer(world: World) -> None:
    world.apply(read("a"))
    begun = world.start("a")
    world.apply(read("a", every="2h"))
    assert world.settle(begun).result == "published"
    assert world.due("a") == int(world.account("a")["slot"])


def test_retiring_takes_the_letter_and_what_would_be_polled(world: World) -> None:
    world.apply(pair())
    world.park(world.start("a").token)
    world.apply(read_entries(Entry("b")))
    world.check()
    assert list(world.timetable.letters()) == []
    assert world.timetable.release() == []
    assert world.client.smembers("aliases:acme") == {"b"}
    assert "definition" not in world.account("a")


def test_a_new_definition_takes_the_letter_of_the_old(world: World) -> None:
    world.apply(pair())
    world.suspend(world.start("a").token)
    CHANGES["redefined"](world)
    world.check()
    assert list(world.timetable.letters()) == []
    assert world.state("a") == "scheduled"


def test_a_discarded_letter_pauses_the_account(world: World) -> None:
    two(world)
    world.suspend(world.start("a").token)
    assert world.timetable.discard("a") is None
    assert list(world.timetable.letters()) == []
    assert world.state("a") == "paused scheduled"
    assert world.timetable.resume("a") is None
    world.check()
    assert world.start("a")


def test_a_logins_letter_is_not_discarded_nor_redriven(world: World) -> None:
    two(world)
    world.block(world.start("a").token)
    assert (world.timetable.discard("acme"), world.timetable.discard("a")) == ("unknown", "scheduled")
    assert (world.timetable.redrive("acme"), world.timetable.redrive("a")) == ("unknown", "scheduled")
    assert len(list(world.timetable.letters())) == 1


# --------------------------------------------------------------------------------------------------------- publishing


def test_an_operation_is_published_once_and_another_poll_that_brings_it_again_goes_on(world: World) -> None:
    two(world)
    world.settle(world.start("a"), operation="op")
    begun = world.start("a")
    assert world.settle(begun, operation="op").result == "repeated"
    assert world.state("a") == "scheduled"
    assert [event["id"] for event in world.events()] == ["op"]
    world.check()


def test_another_accounts_operation_is_a_bad_answer(world: World) -> None:
    two(world)
    world.settle(world.start("a"), operation="op")
    begun = world.start("b")
    before = world.snapshot()
    assert world.settle(begun, operation="op") is None
    assert world.snapshot() == before


def test_an_operation_is_remembered_a_day_longer_than_the_stream_remembers_it(world: World) -> None:
    world.apply(read_entries(Entry("a"), head='[limits]\nretention = "5d"\n'))
    world.settle(world.start("a"), operation="op")
    assert 6 * DAY_MS - MINUTE_MS < world.client.pttl("operation:op") <= 6 * DAY_MS


def test_the_stream_is_trimmed_by_age_and_never_by_count(world: World) -> None:
    world.apply(read_entries(Entry("a"), head='[limits]\nretention = "2d"\n'))
    seconds, _ = world.client.time()
    pipeline = world.client.pipeline()
    for i in range(1000):
        pipeline.xadd(STREAM, {"data": "{}"}, id=f"{(seconds - 3 * 86400) * 1000 + i}-0")
    for i in range(5000):
        pipeline.xadd(STREAM, {"data": "{}"}, id=f"{(seconds - 86400) * 1000 + i}-0")
    pipeline.execute()
    world.settle(world.start("a"))
    kept = world.client.xlen(STREAM)
    assert 5001 <= kept < 5001 + 200
    world.pass_time(timedelta(days=365))
    world.settle(world.start("a"))
    assert world.client.xlen(STREAM) == kept + 1


def test_an_entry_is_a_whole_cloud_event(world: World) -> None:
    two(world)
    world.settle(world.start("a"), operation="op")
    [event] = world.events()
    assert event.pop("data").keys() >= {"account", "poll", "late", "changed"}
    assert datetime.fromisoformat(event.pop("time")).tzinfo == UTC
    assert event == {
        "specversion": "1.0",
        "id": "op",
        "source": "/khipu/cl/business/bancosecurity.cl",
        "type": "balance.observed.v1",
        "subject": "a",
        "datacontenttype": "application/json",
        "dataschema": "urn:balance-poller:balance.observed.v1",
    }


def test_account_events_name_the_poll(world: World) -> None:
    two(world)
    token = world.start("a").token
    world.suspend(token)
    world.timetable.redrive("a")
    suspended, resumed = world.events()
    assert (suspended["id"], resumed["id"]) == (
        f"a.{token.poll}.account.suspended.v1",
        f"a.{token.poll}.account.resumed.v1",
    )
    assert suspended["data"]["poll"] == token.poll
    assert suspended["data"]["code"] == "E401"


def test_dates_are_written_as_python_writes_them(store: redis.Redis) -> None:
    moments = [datetime(year, 12, 31, 23, 59, 59, 999000, UTC) for year in range(1970, 2110)]
    moments += [datetime(year, month, 1, tzinfo=UTC) for year in range(1999, 2033) for month in range(1, 13)]
    moments += [datetime(year, 2, 28, 23, 59, 59, tzinfo=UTC) for year in range(1970, 2110)]
    moments += [datetime(year, 2, 29, 12, 30, 15, 7000, UTC) for year in range(1972, 2110, 4) if year != 2100]
    moments += [datetime(year, 3, 1, tzinfo=UTC) for year in range(1970, 2110)]
    text = (
        LUA / "shared.lua"
    ).read_text() + "\nlocal r = {}\nfor i, ms in ipairs(ARGV) do r[i] = iso(tonumber(ms)) end\nreturn r"
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    written = store.eval(text, 0, *((moment - epoch) // timedelta(milliseconds=1) for moment in moments))
    assert written == [m.isoformat(timespec="milliseconds").replace("+00:00", "Z") for m in moments]


# ----------------------------------------------------------------------------------------------- answers by callback


def called_back(world: World, alias: str) -> Begun:
    """The account's poll in callback mode, with its answer stored and the word of it in the queue."""
    world.timetable._settling = settling_template()
    begun = world.start(alias)
    callback = (world.callback(begun.token), b"{}", "application/json")
    assert world.timetable.receive([callback], is_durable=False)[0].result == "stored"
    return begun


def callback_world(world: World) -> World:
    world.apply(read_entries(Entry("a", mode="callback"), Entry("b", "beta", mode="callback")))
    return world


def test_a_night_without_workers_does_not_fill_the_queue_of_answers(world: World) -> None:
    callback_world(world)
    called_back(world, "a")
    called_back(world, "b")
    for _ in range(60):
        world.pass_time(10 * MINUTE_MS)
        world.claim()
    assert len(world.messages("balances.answers")) == 2
    world.client.rpop("balances.answers")
    world.pass_time(10 * MINUTE_MS)
    world.claim()
    assert len(world.messages("balances.answers")) == 2


def test_what_an_answer_has_overtaken_is_no_end_of_the_poll(world: World) -> None:
    """Neither a letter nor a line in its history, nor a short wait where a release came, too."""
    token = called_back(callback_world(world), "a").token
    world.timetable.release()
    before = world.snapshot()
    assert (world.suspend(token), world.park(token), world.postpone(token)) == (None, None, None)
    changed = {key for key, value in world.snapshot().items() if value != before.get(key)}
    assert changed <= {"login:acme", "timetable"}
    assert world.timetable.history("a") == []
    assert world.settle(world.known("a")).result == "published"


def test_a_log_on_error_blocks_even_where_an_answer_is_there(world: World) -> None:
    begun = called_back(callback_world(world), "a")
    assert world.block(begun.token) == "blocked"
    world.check()
    assert world.settle(begun).result == "late"


def test_a_caller_that_asks_again_after_its_poll_was_accepted_gets_nothing(world: World) -> None:
    callback_world(world)
    begun = world.start("a")
    assert world.timetable.accept(begun, None)
    assert world.begin(begun.token) is None
    world.pass_time(11 * MINUTE_MS)
    world.claim()
    assert world.begin(begun.token) is None
    assert world.state("a") == "awaiting"
    world.check()


def test_a_202_read_after_the_place_was_freed_does_not_touch_the_next_ones_lease(world: World) -> None:
    """The answer came first, nobody settled it until the lease was over, and the worker that was frozen wakes up."""
    world.apply(read_entries(Entry("a", mode="callback"), Entry("b", mode="callback")))
    begun = called_back(world, "a")
    world.pass_time(LEASE_MS + 1)
    world.claim()
    world.check()
    world.due_now("b")
    world.claim()
    assert in_flight(world) == "b"
    until = world.login()["until"]
    assert world.timetable.accept(begun, None)
    assert world.login()["until"] == until
    world.check()


def test_an_account_that_awaits_probes_only_where_there_is_no_other(world: World) -> None:
    world.apply(read_entries(Entry("a", mode="callback"), Entry("b", mode="callback")))
    begun = world.start("a")
    world.timetable.accept(begun, None)
    world.pass_time(11 * MINUTE_MS)
    world.workers(0)
    world.claim()
    world.workers(100)
    world.block(world.token("b"))
    world.timetable.unblock("acme")
    world.pass_time(15 * MINUTE_MS)
    world.claim()
    world.check()
    assert in_flight(world) == "b"


# ---------------------------------------------------------------------------------------------------- a server in need


def claim_and_settle(world: World) -> dict[str, Callable[[], object]]:
    begun = world.known("a")
    return {
        "claim": world.claim,
        "settle": lambda: world.settle(begun),
        "postpone": lambda: world.postpone(begun.token),
        "suspend": lambda: world.suspend(begun.token),
        "block": lambda: world.block(begun.token),
        "pause": lambda: world.timetable.pause("a"),
        "release": lambda: world.timetable.release(),
        "apply": lambda: world.apply(read("a", "b", "c")),
    }


@pytest.fixture
def own_server(tmp_path: Path):
    with ValkeyServer(tmp_path) as server:
        yield server


@pytest.mark.parametrize("trouble", ["OOM", "READONLY"])
def test_a_server_that_refuses_writes_is_unavailable_and_nothing_is_half_done(
    own_server: ValkeyServer, trouble: str
) -> None:
    with own_server.client() as client:
        world = two(World(client))
        world.start("a")
        world.due_now("b")
        calls = claim_and_settle(world)
        world.pass_time(LEASE_MS + 1)
        for name in ("shared", *(path.stem for path in LUA.glob("*.lua"))):
            client.script_load(script_text(name))
        if trouble == "OOM":
            client.config_set("maxmemory", 1)
        else:
            client.replicaof(LOOPBACK, free_port())
        before = world.snapshot()
        for call in calls.values():
            with pytest.raises(StoreUnavailable):
                call()
        assert world.snapshot() == before
        client.config_set("maxmemory", 0)
        client.replicaof("NO", "ONE")
        world.check()
        assert world.settle(world.known("a")).result == "published"


def test_a_server_that_is_away_is_unavailable() -> None:
    timetable = Timetable(connect(f"redis://{LOOPBACK}:{free_port()}/0"), stream=STREAM)
    calls: list[Callable[[], object]] = [
        timetable.claim,
        timetable.revisions,
        timetable.now_ms,
        timetable.logins,
        timetable.salt,
        lambda: timetable.poll("a"),
        lambda: list(timetable.accounts(["a"])),
        lambda: list(timetable.letters()),
        lambda: timetable.register_worker("w", 1, 1),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            call()


def test_a_fault_of_ours_is_not_taken_for_a_server_in_need(world: World) -> None:
    with pytest.raises(redis.ResponseError):
        world.timetable._run("claim", "not a number")
