"""Backlog: the timetable is where work waits when nobody does it, and it leaves by due time and at a bounded rate."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest
import redis
from planted_faults import patched
from rounds import Beat
from test_machine import FROZEN_CLOCK, FrozenTimetable, token_in
from world import LEASE_MS, MINUTE_MS, STREAM, Entry, Everything, World, answer, read_entries

from worker.accounts import Accounts
from worker.timetable import Begun, Token

ACCOUNTS = 10_000
THREADS = 200
IN_FLIGHT = 50
HOUR_MS = 60 * MINUTE_MS


class StillWorld(World):
    """Time passes only when it is told to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        message, letter = self.template
        self.timetable = FrozenTimetable(self.client, stream=STREAM, message=message, letter=letter)

    def set_clock(self, now_ms: int) -> None:
        self.offset_ms = 0
        self.pass_time(now_ms)

    def pass_time(self, delta: int) -> None:  # type: ignore[override]
        super().pass_time(delta)
        self.now_ms = FrozenTimetable.clock_ms = self.offset_ms

    def take(self) -> Iterator[Begun]:
        """What workers do with the messages that wait, oldest first."""
        for text in self.client.rpop("balances.polls", ACCOUNTS) or ():
            begun = self.begin(token_in(text))
            assert isinstance(begun, Begun), begun
            yield begun

    def answer(self, begun: Begun, number: int) -> None:
        event = answer(begun, "10", f"operation-{number}", ("X",), self.now_ms)
        settled = self.timetable.settle(begun, event)
        assert settled is not None
        assert settled.result == "published"


@pytest.fixture
def world(store: redis.Redis) -> Iterator[StillWorld]:
    with patched(FROZEN_CLOCK):
        yield StillWorld(store)


def many(count: int, every: str) -> Accounts:
    """So many accounts, each on a login of its own."""
    names = [f"a{number:05}" for number in range(count)]
    return read_entries(*(Entry(name, login=name, number=f"9{name[1:]}", every=every) for name in names))


def told(everything: Everything) -> dict[str, list[str]]:
    """What the ledger was told of which accounts, in order, by type."""
    found: dict[str, list[str]] = {}
    for _, fields in everything.events:
        found.setdefault(fields["type"], []).append(fields["subject"])
    return found


def test_an_hour_without_workers_and_ten_thousand_accounts(world: StillWorld) -> None:
    world.apply(many(ACCOUNTS, "20m"))
    beat = Beat(world)
    world.pass_time(MINUTE_MS)
    world.workers(IN_FLIGHT)
    beat.claim()
    assert len(list(world.take())) == IN_FLIGHT, "polls that are under way when all workers die"
    world.client.delete("workers")
    for _ in range(6):
        world.pass_time(10 * MINUTE_MS)
        for _ in range(4):
            beat.claim()
        while world.timetable.tell_overdue().is_more:
            pass
    everything = world.check()
    assert not everything.polls
    assert everything.overdue == everything.revisions.keys()
    assert Counter(account["state"] for account in everything.accounts.values()) == {
        "scheduled": ACCOUNTS - IN_FLIGHT,
        "waiting": IN_FLIGHT,
    }
    due = {alias: int(account["due"]) for alias, account in everything.accounts.items()}

    world.workers(THREADS)
    order = []
    while len(order) < ACCOUNTS:
        beat.claim()
        assert 0 < world.client.llen("balances.polls") <= THREADS
        for begun in world.take():
            order.append(begun.token.account)
            world.answer(begun, len(order))
    beat.claim()
    everything = world.check()
    assert not everything.polls, "each was due once, not once for each slot"
    assert not any(everything.letters.values())
    assert not everything.overdue
    assert Counter(order) == Counter(due.keys())
    assert [due[alias] for alias in order] == sorted(due.values())
    heard = told(everything)
    assert heard.keys() == {"balance.observed.v1", "account.overdue.v1", "account.resumed.v1"}
    assert Counter(heard["account.overdue.v1"]) == Counter(due.keys())
    assert heard["account.resumed.v1"] == order


# --------------------------------------------------------------------------------------------- lapses behind a backlog


def starve(world: World) -> Token:
    """Of 45 logins the last one's worker was lost; the others are due for longer, and there is no room. The loss."""
    world.apply(many(45, "300d"))
    world.due_now("a00044")
    world.claim()
    assert isinstance(world.begin(world.token("a00044")), Begun)
    world.client.delete("balances.polls")
    for number in range(44):
        world.pass_time(1)
        world.due_now(f"a{number:05}")
    world.pass_time(LEASE_MS)
    world.workers(0)
    return world.token("a00044")


def test_without_room_every_lapse_is_found_all_the_same(world: World) -> None:
    lost = starve(world)
    for _ in range(2):  # again, until it is judged
        lapsed = [lapse.token for _ in range(5) for lapse in world.timetable.claim(10).lapsed]
        assert lapsed == [lost]


def test_with_a_little_room_lapses_are_found_and_the_oldest_go_first(world: World) -> None:
    lost = starve(world)
    order: list[str] = []
    lapses: list[Token] = []
    for _ in range(8):
        world.workers(2)
        lapses += [lapse.token for lapse in world.timetable.claim(10).lapsed]
        order += [token_in(text).account for text in reversed(world.client.lrange("balances.polls", 0, -1))]
        world.client.delete("balances.polls")
    assert order == [f"a{number:05}" for number in range(16)]
    assert lapses[0] == lost


def test_room_that_the_oldest_do_not_use_is_not_for_those_far_behind_them(world: World) -> None:
    """The two oldest lapse, and beat has yet to judge them; a claim before this one looked at ten more."""
    world.apply(many(30, "300d"))
    for number in range(2):
        world.due_now(f"a{number:05}")
    assert world.claim().dispatched == 2
    tokens = [world.token(f"a{number:05}") for number in range(2)]
    assert all(isinstance(world.begin(token), Begun) for token in tokens)
    world.client.delete("balances.polls")
    world.pass_time(LEASE_MS)
    for number in range(2, 30):
        world.pass_time(1)
        world.due_now(f"a{number:05}")
    world.workers(0)
    world.timetable.claim(10)
    world.workers(2)
    claim = world.timetable.claim(10)
    assert [lapse.token for lapse in claim.lapsed] == tokens
    assert claim.dispatched == 0


def test_what_waits_for_its_message_to_be_sent_again_is_no_loss_however_long(world: StillWorld) -> None:
    """Nobody takes messages for a day; nobody was lost."""
    world.apply(many(3, "300d"))
    for name in ("a00000", "a00001", "a00002"):
        world.due_now(name)
    beat = Beat(world)
    beat.claim()
    for _ in range(24):
        world.pass_time(HOUR_MS)
        beat.claim()
    accounts = world.check().accounts
    assert {(each["state"], each["losses"], each["attempt"]) for each in accounts.values()} == {
        ("dispatched", "0", "1")
    }
    messages = [json.loads(text)["headers"]["id"] for text in world.client.lrange("balances.polls", 0, -1)]
    assert len(set(messages)) == 3
    begun = [world.begin(world.token(name)) for name in sorted(accounts)]
    assert all(isinstance(each, Begun) and each.counters.losses == 0 for each in begun)
    assert not list(world.timetable.letters())
