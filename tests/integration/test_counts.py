"""What the scripts count, event by event; that it always fits the accounts is an invariant of the small world."""

from __future__ import annotations

from dataclasses import replace

import pytest
import redis
from test_callbacks import CallbackWorld
from world import BANK, MINUTE_MS, START_MS, STREAM, Entry, World, answer, read, read_entries

from worker import figures
from worker.clock import Jump
from worker.errors import Kind, Outcome
from worker.figures import Figures, Some, Worker
from worker.policy import Credential, DeadLetterQueue, ErrorType, class_of

OK = (BANK, "sync", "ok", "none", "ok")
UNAVAILABLE = (BANK, "sync", "answered", "RETRY_IMMEDIATELY", "E2xx")


@pytest.fixture
def world(store: redis.Redis) -> World:
    world = World(store)
    world.apply(read("a", "b"))
    return world


def look(world: World) -> Figures:
    """All figures; and everything fits together."""
    world.check()
    return figures.read(world.client, STREAM)


def states(world: World, institution: str = BANK) -> dict[str, int]:
    """How many accounts of the institution operators see in each state, but those where there is none."""
    found = look(world).accounts
    return {state: number for (name, state), number in found.items() if number and name == institution}


# -------------------------------------------------------------------------------------------------------------- states


def test_an_account_is_counted_in_each_state_of_a_poll(world: World) -> None:
    assert states(world) == {"scheduled": 2}
    world.due_now("a")
    world.claim()
    assert states(world) == {"scheduled": 1, "dispatched": 1}
    begun = world.begin(world.token("a"))
    assert states(world) == {"scheduled": 1, "polling": 1}
    world.postpone(begun.token, 20)
    assert states(world) == {"scheduled": 1, "waiting": 1}
    world.pass_time(20_000)
    world.claim()
    world.settle(world.begin(world.token("a")))
    assert states(world) == {"scheduled": 2}


def test_one_claim_counts_what_it_takes_from_several_states_and_institutions(store: redis.Redis) -> None:
    world = World(store)
    world.apply(read_entries(*(Entry(f"a{n}", f"l{n}", institution="one.cl" if n < 3 else "two.cl") for n in range(5))))
    world.postpone(world.start("a0").token, 20)
    world.pass_time(15 * MINUTE_MS)
    world.claim()
    assert (states(world, "one.cl"), states(world, "two.cl")) == ({"dispatched": 3}, {"dispatched": 2})


@pytest.mark.parametrize(("end", "state"), [("suspend", "suspended"), ("park", "parked")])
def test_a_dead_letter_is_counted_until_it_goes(world: World, end: str, state: str) -> None:
    getattr(world, end)(world.start("a").token)
    assert states(world) == {"scheduled": 1, state: 1}
    assert look(world).parked == (state == "parked")
    world.timetable.discard("a")
    assert states(world) == {"scheduled": 1, "paused": 1}
    world.timetable.resume("a")
    assert states(world) == {"scheduled": 2}


def test_a_block_counts_every_account_of_its_login_and_a_pause_lies_over_it(store: redis.Redis) -> None:
    world = World(store)
    world.apply(read_entries(Entry("a"), Entry("b"), Entry("c", "other")))
    world.block(world.start("a").token)
    assert states(world) == {"blocked": 2, "scheduled": 1}
    assert look(world).blocked_by == {Credential.BANK: 1, Credential.KEY: 0}
    world.timetable.pause("b")
    assert states(world) == {"blocked": 1, "paused": 1, "scheduled": 1}
    world.timetable.unblock("acme")
    assert states(world) == {"paused": 1, "scheduled": 2}
    assert look(world).blocked_by == {Credential.BANK: 0, Credential.KEY: 0}


def test_what_is_retired_is_not_counted_and_what_moves_is_counted_where_it_is(store: redis.Redis) -> None:
    world = World(store)
    world.apply(read_entries(Entry("a", institution="one.cl"), Entry("b", institution="one.cl")))
    world.apply(read_entries(Entry("a", institution="two.cl")))
    assert (states(world, "one.cl"), states(world, "two.cl")) == ({}, {"scheduled": 1})


# ---------------------------------------------------------------------------------------------------------------- ends


def test_an_attempts_end_is_counted_once_however_often_it_is_told(world: World) -> None:
    begun = world.start("a")
    world.pass_time(50_000)
    world.postpone(begun.token)
    world.postpone(begun.token)
    world.pass_time(30_000)
    begun = world.start("a")
    world.pass_time(100)
    for _ in range(2):
        world.settle(begun, operation="once")
    found = look(world)
    assert found.attempts == {(BANK, "sync"): 2}
    assert found.polls == {UNAVAILABLE: 1, OK: 1}
    [(whose, durations)] = found.durations.items()
    assert whose == (BANK, "sync")
    assert (durations.within, durations.later) == ({60: 1, 1: 1}, 0)
    assert 50_100 <= durations.sum_ms < 55_000
    assert {name: number for name, number in found.counts.items() if name.startswith("answer")} == {
        "answer published": 1,
        "answer repeated": 1,
    }


@pytest.mark.parametrize(("ms", "expected"), [(500, {1.0: 1}), (86_000_000, {86_400.0: 1}), (90_000_000, {})])
def test_a_duration_lies_in_the_first_bucket_that_holds_it(world: World, ms: int, expected: dict[float, int]) -> None:
    begun = world.start("a")
    world.pass_time(ms)
    world.settle(begun)
    [durations] = look(world).durations.values()
    assert durations.within == expected
    assert durations.later == (not expected)


@pytest.mark.parametrize(
    ("end", "class_"),
    [
        ("suspend", ("answered", "DO_NOT_RETRY", "E4xx")),
        ("park", ("answered", "RETRY_AFTER_NOTIFICATION", "E3xx")),
        ("block", ("answered", "DO_NOT_RETRY", "E1xx")),
    ],
)
def test_every_way_to_fail_is_counted(world: World, end: str, class_: tuple[str, ...]) -> None:
    token = world.start("a").token
    for _ in range(2):
        getattr(world, end)(token)
    assert look(world).polls == {(BANK, "sync", *class_): 1}


def test_a_late_answer_is_no_second_end(world: World) -> None:
    begun = world.start("a")
    world.postpone(begun.token)
    world.settle(begun)
    found = look(world)
    assert found.polls == {UNAVAILABLE: 1}
    assert found.counts["answer late"] == 1


def test_another_accounts_answer_is_counted_as_such(world: World) -> None:
    world.settle(world.start("a"), ids=("1",))
    assert world.settle(world.start("a"), ids=("2",)) is None
    assert look(world).counts["answer foreign"] == 1


def test_unknown_fields_are_counted_by_answer(world: World) -> None:
    begun = world.start("a")
    event = replace(answer(begun, "1", None, ("1",), world.timetable.now_ms()), has_drift=True)
    world.timetable.settle(begun, event)
    assert look(world).counts["drift field"] == 1


def test_a_202_that_is_not_what_was_agreed_is_counted_once(world: World) -> None:
    begun = world.start("a")
    for _ in range(2):
        world.timetable.accept(begun, None, has_drift=True)
    assert look(world).counts["drift field"] == 1


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome(Kind.OK, "ok"), "ok|none|ok"),
        (Outcome(Kind.ANSWERED, "E101", "DO_NOT_RETRY"), "answered|DO_NOT_RETRY|E1xx"),
        (Outcome(Kind.ANSWERED, "A000", "DO_NOT_RETRY"), "answered|DO_NOT_RETRY|A000"),
        (Outcome(Kind.ANSWERED, "A001", "TRY_TOMORROW"), "answered|other|other"),
        (Outcome(Kind.ANSWERED, "HTTP_504|x", None), "answered|other|other"),
        (Outcome(Kind.ANSWERED, "TIMEOUT", "DO_NOT_RETRY"), "answered|DO_NOT_RETRY|other"),
        (Outcome(Kind.SERVER_ERROR, "HTTP_504"), "server_error|none|HTTP_5xx"),
        (Outcome(Kind.THROTTLED, "HTTP_429"), "throttled|none|HTTP_4xx"),
        (Outcome(Kind.TIMEOUT, "TIMEOUT"), "timeout|none|TIMEOUT"),
        (Outcome(Kind.LOST, "LOST"), "lost|none|LOST"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_khipu_answers_the_classes_are_few(outcome: Outcome, expected: str) -> None:
    assert class_of(outcome) == expected


def test_every_documented_type_keeps_its_name() -> None:
    types = [class_of(Outcome(Kind.ANSWERED, "E201", type_)).split("|")[1] for type_ in ErrorType]
    assert types == list(ErrorType)


# ------------------------------------------------------------------------------------------------------------- moments


def test_the_newest_ok_and_the_oldest_as_of_of_an_institution(world: World) -> None:
    def settle(alias: str, as_of_ms: int | None) -> None:
        begun = world.start(alias)
        event = replace(answer(begun, "1", None, ("1",), world.timetable.now_ms()), as_of_ms=as_of_ms)
        world.timetable.settle(begun, event)

    settle("a", 1_000)
    settle("b", 2_000)
    at_ms = int(world.account("b")["last_ok"])
    found = look(world)
    assert (found.last_ok_ms, found.as_of_ms) == ({BANK: at_ms}, {BANK: 1_000})
    settle("a", 3_000)
    assert look(world).as_of_ms == {BANK: 2_000}
    settle("b", None)
    assert look(world).as_of_ms == {BANK: 2_000}, "an answer without balances makes none newer"


@pytest.mark.parametrize(
    ("leave", "come_back"),
    [
        (lambda w: w.timetable.pause("a"), lambda w: w.timetable.resume("a")),
        (lambda w: w.suspend(w.start("a").token), lambda w: w.timetable.redrive("a")),
        (lambda w: w.block(w.start("a").token), lambda w: w.timetable.unblock("acme")),
    ],
    ids=["paused", "suspended", "blocked"],
)
def test_only_what_is_being_polled_can_be_old(world: World, leave: object, come_back: object) -> None:
    world.settle(world.start("a"))
    before = look(world).as_of_ms
    assert before
    leave(world)
    assert look(world).as_of_ms == {}
    come_back(world)
    assert look(world).as_of_ms == before


def test_a_late_answer_that_is_newer_is_ranked(world: World) -> None:
    begun = world.start("a")
    world.postpone(begun.token, 3600)
    world.settle(begun)
    assert look(world).as_of_ms.keys() == {BANK}


def test_letters_tell_when_the_oldest_was_written(world: World) -> None:
    world.suspend(world.start("a").token)
    first_ms = int(world.account("a")["suspended_at"])
    world.pass_time(MINUTE_MS)
    world.suspend(world.start("b").token)
    letters = look(world).letters
    assert letters.pop(DeadLetterQueue.DO_NOT_RETRY) == Some(2, first_ms)
    assert set(letters.values()) == {Some(0)}


# ----------------------------------------------------------------------------------------------------------- callbacks


def test_a_callback_is_awaited_until_it_comes_and_unsettled_until_it_is_settled(store: redis.Redis) -> None:
    world = CallbackWorld(store, "a", "b")
    begun = world.start("a")
    assert look(world).awaiting == Some(0)
    world.timetable.accept(begun, None)
    since_ms = look(world).awaiting.oldest_ms
    world.pass_time(MINUTE_MS)
    world.timetable.accept(begun, None)
    found = look(world)
    assert (found.awaiting, found.unsettled) == (Some(1, since_ms), Some(0))
    assert START_MS < since_ms <= found.now_ms - MINUTE_MS
    assert [world.receive(begun.token) for _ in range(2)] == ["stored", "repeated"]
    world.receive(replace(begun.token, poll=1))
    received_ms = look(world).unsettled.oldest_ms
    world.pass_time(MINUTE_MS)
    assert [world.receive(begun.token, f"{n}".encode()) for n in range(4)] == ["stored"] * 3 + ["full"]
    found = look(world)
    assert (found.awaiting, found.unsettled) == (Some(0), Some(1, received_ms))
    assert {name: number for name, number in found.counts.items() if name.startswith("callback")} == {
        "callback stored": 4,
        "callback repeated": 1,
        "callback full": 1,
        "callback unknown": 1,
    }
    world.settle(begun)
    world.timetable.forget_answer(begun.token, world.timetable.unsettled(begun.token).bodies)
    found = look(world)
    assert found.unsettled == Some(0)
    assert found.polls == {(BANK, "callback", "ok", "none", "ok"): 1}


def test_what_is_awaited_does_not_grow_old_by_a_jump_of_the_clock(store: redis.Redis) -> None:
    world = CallbackWorld(store, "a", "b")
    world.timetable.accept(world.start("a"), None)
    world.pass_time(2 * MINUTE_MS)  # what was written since the jump stands
    since_ms = look(world).awaiting.oldest_ms
    claim = world.claim()
    assert world.timetable.hold(Jump(3_600_000, 0), claim) is not None
    assert look(world).awaiting == Some(1, since_ms + 3_600_000)
    assert look(world).counts["clock jump"] == 1


# ------------------------------------------------------------------------------------------------------------- workers


def test_a_worker_is_known_by_its_threads_and_its_last_begin(world: World) -> None:
    world.client.delete("workers")
    world.timetable.register_worker("worker@one:1", 4, ttl_s=60)
    world.timetable.register_worker("worker@two:2", 8, ttl_s=60)
    world.timetable.register_worker("worker@gone:3", 8, ttl_s=-1)
    world.timetable.register_worker("settler@one:4", 0, ttl_s=60)
    world.due_now("a")
    world.claim()
    world.begin(world.token("a"), "worker@one:1 3f2a")
    began_ms = int(world.account("a")["begun_at"])
    assert look(world).workers == {"worker@one:1": Worker(4, began_ms), "worker@two:2": Worker(8, None)}


def test_begins_of_workers_long_gone_are_forgotten(world: World) -> None:
    seconds, _ = world.client.time()
    eight_days_ms = 8 * 86_400_000
    world.client.zadd("begins", {"worker@gone:3": seconds * 1000 - eight_days_ms, "worker@one:1": seconds * 1000})
    world.timetable.register_worker("worker@one:1", 4, ttl_s=60)
    assert world.client.zrange("begins", 0, -1) == ["worker@one:1"]


def test_logins_that_are_due_are_counted(world: World) -> None:
    assert look(world).logins_due == 0
    world.due_now("a")
    assert look(world).logins_due == 1
    world.claim()
    assert look(world).logins_due == 0


def test_the_end_of_a_token_is_read_where_it_is_known(world: World) -> None:
    assert look(world).token_expiry_s == {}
    world.timetable.note_token_end("acme", 1_900_000_000)
    assert look(world).token_expiry_s == {"acme": 1_900_000_000}
    world.timetable.note_token_end("acme", None)
    assert look(world).token_expiry_s == {}


def test_an_empty_server_has_nothing_to_count(store: redis.Redis) -> None:
    found = figures.read(store, STREAM)
    assert found.accounts == found.polls == found.durations == {}
    assert (found.claimed_at_ms, found.entries, found.groups) == (None, 0, [])
