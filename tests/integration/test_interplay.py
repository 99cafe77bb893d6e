"""Limits, rests, blocks and pauses lie over each other: none of them keeps for ever what another one waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import redis
from test_limits import DAY_MS, FAILED, INSTITUTION, limited, many, taken
from test_purge import mentions
from test_rest import fail, is_resting
from world import LEASE_MS, MINUTE_MS, OUTCOMES, Entry, World, read, read_entries

from worker.clock import Jump
from worker.policy import Cause, Counters, Credential
from worker.timetable import Begun, Token


@pytest.fixture
def world(store: redis.Redis) -> World:
    return World(store)


# --------------------------------------------------------------------------------------------------------- the breaker


def probe(world: World, mode: str) -> Begun:
    """The probe that goes out after five of nine logins have failed; three others are due."""
    entries = [replace(entry, mode=mode) for entry in many(9)]
    world.apply(read_entries(*entries))
    for entry in entries[:5]:
        token = world.start(entry.alias).token
        world.timetable.postpone(token, 2 * DAY_MS, Counters(), FAILED[Cause.UNAVAILABLE])
    taken(world)
    next_probe = int(world.client.hget(f"breaker:{INSTITUTION}", "next_probe"))
    world.pass_time(next_probe - world.timetable.now_ms())
    world.due_now(entries[8].alias)
    world.claim()
    [token] = taken(world)
    begun = world.begin(token)
    assert isinstance(begun, Begun)
    for entry in entries[5:8]:
        world.due_now(entry.alias)
    return begun


def _paused(world: World) -> int:
    begun = probe(world, "callback")
    deadline_ms = world.timetable.accept(begun, None)
    assert deadline_ms is not None
    world.timetable.pause(begun.token.account)
    return deadline_ms


def _blocked(world: World) -> int:
    token = probe(world, "sync").token
    world.timetable.block(Token(token.login, token.account, 1, 1), Credential.BANK, "bank-1", OUTCOMES["block"])
    assert world.state(token.account) == "blocked polling"
    return world.timetable.now_ms() + LEASE_MS


#: What keeps a probe from lapsing; each returns when it is over (ms).
HOLDS: dict[str, Callable[[World], int]] = {"paused": _paused, "blocked": _blocked}


@pytest.mark.parametrize("how", HOLDS)
def test_a_probe_that_cannot_lapse_is_over_all_the_same(world: World, how: str) -> None:
    end_ms = HOLDS[how](world)
    world.pass_time(end_ms - MINUTE_MS - world.timetable.now_ms())
    assert world.claim().dispatched == 0, "it is under way"
    world.pass_time(2 * MINUTE_MS)
    assert world.claim().dispatched == 1
    world.check()


# --------------------------------------------------------------------------------------------------------------- slots


def test_after_a_jump_of_the_clock_the_first_slot_is_now(world: World) -> None:
    entries = many(20)
    world.apply(limited(*entries, rate=1))
    for entry in entries:
        world.due_now(entry.alias)
    assert world.claim().dispatched == 1
    [token] = taken(world)
    begun = world.begin(token)
    assert isinstance(begun, Begun)
    world.settle(begun)
    seen = world.claim()
    world.pass_time(MINUTE_MS)
    assert world.timetable.hold(Jump(by_ms=MINUTE_MS, within_ms=0), seen) == LEASE_MS
    world.pass_time(LEASE_MS)
    assert world.claim().dispatched == 1, "not after the slots of those that lost theirs"
    [token] = taken(world)
    assert isinstance(world.begin(token), Begun)
    assert world.claim().dispatched == 0
    world.check()


# ----------------------------------------------------------------------------------------------------------- deadlines


def _behind_a_budget(world: World) -> None:
    entries = [Entry(alias, mode="callback", every="1d") for alias in "ae"]
    world.apply(limited(*entries, daily_requests=1))
    world.timetable.accept(world.start("a"), None)


def _behind_a_rest(world: World) -> None:
    world.apply(read_entries(*(Entry(alias, mode="callback", every="1d") for alias in "abcde")))
    world.timetable.accept(world.start("a"), None)
    world.pass_time(11 * MINUTE_MS)
    for alias in "bcd":
        fail(world, world.start(alias))
    assert is_resting(world)


#: What holds the login of a back, while that awaits its callback and e could go.
BEHIND: dict[str, Callable[[World], None]] = {"budget": _behind_a_budget, "rest": _behind_a_rest}


@pytest.mark.parametrize("why", BEHIND)
def test_what_holds_a_login_back_holds_no_deadline_of_it(world: World, why: str) -> None:
    BEHIND[why](world)
    world.due_now("e")
    deadline_ms = int(world.account("a")["due"])
    world.pass_time(deadline_ms - MINUTE_MS - world.timetable.now_ms())
    claim = world.claim()
    assert (claim.dispatched, claim.lapsed) == (0, ())
    world.check()
    world.pass_time(MINUTE_MS)
    claim = world.claim()
    assert [lapse.token.account for lapse in claim.lapsed] == ["a"]
    assert claim.dispatched == 0
    world.check()


# ---------------------------------------------------------------------------------------------- what moved, or is gone


def test_what_another_login_has_under_way_is_not_purged(world: World) -> None:
    world.apply(read("a"))
    begun = world.start("a")
    taken(world)
    world.apply(read("a", login="other", number="55"))
    world.apply(read("z"))
    assert world.timetable.purge("a") == "polling"
    world.settle(begun)
    assert world.timetable.purge("a") is None
    assert mentions(world.client, begun.token.task_id) == []


def test_nobody_is_told_of_a_removed_logins_token(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b"), Entry("c", "other")))
    for login in ("acme", "other"):
        world.timetable.note_token_end(login, 1_900_000_000)
    world.apply(read_entries(Entry("a"), Entry("c", "other")))
    assert world.client.zrange("token_expires", 0, -1) == ["acme", "other"], "both have an account"
    world.apply(read_entries(Entry("a")))
    assert world.client.zrange("token_expires", 0, -1) == ["acme"]
    assert "token_expires" not in world.login("other")


def test_no_worker_needs_a_removed_logins_secret(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("c", "other")))
    assert world.timetable.schemes().keys() == {"acme", "other"}
    world.apply(read_entries(Entry("a")))
    assert world.timetable.schemes().keys() == {"acme"}


# ------------------------------------------------------------------------------------------------------------ migrating


def test_migrating_counts_what_an_older_program_did_not(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b"), Entry("c", "other"), Entry("d", "callback", mode="callback")))
    world.settle(world.start("a"))
    world.suspend(world.start("b").token)
    world.timetable.accept(world.start("d"), None)
    world.block(world.start("c").token)
    before = world.snapshot()
    world.client.delete(
        "blocked", "institutions", *world.client.scan_iter("state:*"), *world.client.scan_iter("as_of:*")
    )
    for alias in "abcd":
        world.client.hdel(f"account:{alias}", "counted")
    world.client.hdel("config", "version")
    world.timetable.migrate()
    assert world.snapshot() == before
    world.check()
