"""Overdue: the ledger hears once of each spell in which an account is due for longer than its own interval."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import pytest
import redis
from world import EVERY_S, LEASE_MS, MINUTE_MS, Entry, World, accounts_file, read, read_entries

from worker import ops
from worker.accounts import parse_accounts
from worker.errors import Kind, Outcome
from worker.policy import Counters
from worker.timetable import Begun

EVERY_MS = EVERY_S * 1000


def prepared(store: redis.Redis) -> World:
    """The account a, and on its login b, which is not due for long."""
    world = World(store)
    world.apply(read_entries(Entry("a"), Entry("b", every="300d")))
    return world


@pytest.fixture
def world(store: redis.Redis) -> World:
    return prepared(store)


def start(world: World) -> Begun:
    """Claim and begin the poll of a, which is due."""
    world.claim()
    begun = world.begin(world.token("a"))
    assert isinstance(begun, Begun), begun
    return begun


def told(world: World) -> list[str]:
    """What the ledger heard of the account a, but for its balances."""
    heard = [event for event in world.events() if event["subject"] == "a" and event["type"] != "balance.observed.v1"]
    return [" ".join((event["type"].split(".")[1], event["data"].get("by", ""))).strip() for event in heard]


def look(world: World) -> list[str]:
    """Look for who is overdue, and whether everything still fits."""
    aliases = list(world.timetable.tell_overdue().told)
    world.check()
    return aliases


def is_counted(world: World) -> bool:
    """Whether the account a is overdue for who asks; commands and the server's set must agree."""
    [row] = ops.accounts(world.timetable, ["a"])
    assert row.overdue == bool(world.client.sismember("overdue", "a"))
    return row.overdue


def make_overdue(world: World) -> None:
    world.due_now("a")
    world.pass_time(EVERY_MS + 1000)
    assert "a" in look(world)


def test_an_account_is_overdue_an_interval_after_its_due_time_and_not_before(world: World) -> None:
    world.due_now("a")
    world.pass_time(EVERY_MS - 1000)
    assert look(world) == []
    assert not is_counted(world)
    world.pass_time(2000)
    assert look(world) == ["a"]
    assert is_counted(world)
    [event] = world.events()
    assert event["id"] == "a.0.account.overdue.v1"
    assert event["data"]["interval"] == EVERY_S
    since_ms = datetime.fromisoformat(event["data"]["since"]).timestamp() * 1000
    assert since_ms == int(world.account("a")["due"])


def test_the_ledger_hears_once_of_a_spell_and_once_of_its_end(world: World) -> None:
    make_overdue(world)
    for _ in range(3):
        world.pass_time(EVERY_MS)
        assert "a" not in look(world)
    begun = start(world)
    assert not is_counted(world)
    world.settle(begun)
    assert told(world) == ["overdue", "resumed answer"]
    assert world.events()[-1]["data"]["poll"] == begun.token.poll
    make_overdue(world)
    assert told(world) == ["overdue", "resumed answer", "overdue"]


def test_a_failed_poll_does_not_end_the_spell_nor_begin_another(world: World) -> None:
    make_overdue(world)
    token = start(world).token
    world.postpone(token, seconds=20)
    assert not is_counted(world), "it was polled"
    world.pass_time(EVERY_MS + 20_000)
    look(world)
    assert is_counted(world), "its retry is overdue as well"
    assert told(world) == ["overdue"]
    world.settle(start(world))
    assert told(world) == ["overdue", "resumed answer"]


def test_a_long_wait_is_not_overdue_until_it_is_over_for_an_interval(world: World) -> None:
    world.due_now("a")
    world.postpone(start(world).token, seconds=4 * 3600)
    world.pass_time(4 * 3600 * 1000 + EVERY_MS - 1000)
    look(world)
    assert not is_counted(world)
    world.pass_time(2000)
    look(world)
    assert is_counted(world)


def test_a_message_that_nobody_takes_is_no_poll(world: World) -> None:
    world.due_now("a")
    world.claim()
    assert world.state("a") == "dispatched"
    world.pass_time(EVERY_MS + 1000)
    assert "a" in look(world)
    assert is_counted(world)


def test_a_late_answer_does_not_end_the_spell(world: World) -> None:
    world.due_now("a")
    lost = start(world)
    world.pass_time(LEASE_MS + 1000)
    world.timetable.postpone(lost.token, 0, Counters(1, 0, 1, 1), Outcome(Kind.LOST, "LOST"))
    world.pass_time(EVERY_MS + 1000)
    look(world)
    assert world.settle(lost).result == "late"
    assert told(world) == ["overdue"]
    assert is_counted(world)


#: What keeps an account from being polled, and what lifts that.
OVERLAYS: dict[str, tuple[Callable[[World], object], Callable[[World], object]]] = {
    "paused": (lambda world: world.timetable.pause("a"), lambda world: world.timetable.resume("a")),
    "blocked": (lambda world: world.block(world.token("b")), lambda world: world.timetable.unblock("acme")),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_may_not_be_polled_is_not_overdue_and_counts_from_when_it_may(world: World, overlay: str) -> None:
    keep, lift = OVERLAYS[overlay]
    world.due_now("a")
    keep(world)
    world.pass_time(3 * EVERY_MS)
    assert "a" not in look(world)
    assert not is_counted(world)
    lift(world)
    world.pass_time(EVERY_MS - 1000)
    assert "a" not in look(world)
    world.pass_time(2000)
    assert "a" in look(world)
    assert is_counted(world)


def test_what_was_blocked_before_it_settled_is_not_overdue(world: World) -> None:
    world.due_now("a")
    begun = start(world)
    world.block(world.token("b"))
    world.settle(begun)
    world.pass_time(3 * EVERY_MS)
    assert look(world) == []
    assert not is_counted(world)


def test_a_pause_does_not_end_the_spell_but_a_paused_account_is_not_counted(world: World) -> None:
    make_overdue(world)
    world.timetable.pause("a")
    assert not is_counted(world)
    world.timetable.resume("a")
    world.pass_time(EVERY_MS + 1000)
    assert "a" not in look(world)
    assert is_counted(world)
    assert told(world) == ["overdue"]
    world.settle(start(world))
    assert told(world) == ["overdue", "resumed answer"]


def test_a_block_ends_the_spell_and_the_unblock_is_heard_once(world: World) -> None:
    make_overdue(world)
    world.block(world.token("b"))
    world.timetable.unblock("acme")
    world.settle(start(world))
    assert told(world) == ["overdue", "suspended", "resumed unblock"]


def test_a_suspension_ends_the_spell_and_the_redrive_is_heard_once(world: World) -> None:
    make_overdue(world)
    world.suspend(start(world).token)
    world.pass_time(3 * EVERY_MS)
    assert "a" not in look(world)
    world.timetable.redrive("a")
    world.check()
    world.settle(start(world))
    assert told(world) == ["overdue", "suspended", "resumed redrive"]


def test_what_left_the_accounts_file_is_not_overdue(world: World) -> None:
    make_overdue(world)
    world.apply(read("b"))
    assert not world.client.sismember("overdue", "a")
    world.pass_time(3 * EVERY_MS)
    assert "a" not in look(world)
    world.apply(read("a", "b"))
    world.due_now("a")
    world.settle(start(world))
    assert told(world) == ["overdue"], "a new life, of which nobody was told that it was late"


def test_an_accounts_own_interval_decides_also_where_it_changes(world: World) -> None:
    world.apply(read_entries(Entry("a", every="5m"), Entry("b", every="2h", login="beta")))
    world.due_now("a")
    world.due_now("b")
    world.pass_time(6 * MINUTE_MS)
    assert look(world) == ["a"]
    world.pass_time(115 * MINUTE_MS)
    assert look(world) == ["b"]
    world.apply(read_entries(Entry("a", every="1h"), Entry("b", every="2h", login="beta")))
    world.due_now("a")
    world.settle(start(world))
    world.due_now("a")
    world.pass_time(59 * MINUTE_MS)
    look(world)
    assert not is_counted(world)
    world.pass_time(2 * MINUTE_MS)
    look(world)
    assert is_counted(world)


def test_cron_goes_by_the_distance_of_its_slots(store: redis.Redis) -> None:
    """On working days from 9 to 12: the two slots after 12 on Friday are 9 and 10 on Monday, an hour apart."""
    world = World(store)
    world.set_clock(round(datetime.fromisoformat("2026-11-20T11:30:00-03:00").timestamp() * 1000))
    cron = b'cron = "0 9-12 * * 1-5"\ntimezone = "America/Santiago"'
    file = accounts_file("a").replace(b'every = "15m"', cron)
    world.apply(parse_accounts(file, "accounts.toml", callback_configured=False))
    world.pass_time(89 * MINUTE_MS)
    assert look(world) == []
    world.pass_time(2 * MINUTE_MS)
    assert look(world) == ["a"]


def test_one_look_tells_of_so_many_and_says_that_there_are_more(world: World) -> None:
    world.apply(read(*(f"m{number}" for number in range(7))))
    world.pass_time(3 * EVERY_MS)
    heard: list[str] = []
    for expected in (3, 3, 1):
        overdue = world.timetable.tell_overdue(3)
        assert (len(overdue.told), overdue.is_more) == (expected, expected == 3)
        heard += overdue.told
    assert sorted(heard) == [f"m{number}" for number in range(7)]
    assert not world.timetable.tell_overdue(3).told
