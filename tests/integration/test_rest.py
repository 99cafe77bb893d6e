"""The rest of a login whose failures may each have been a bad log-on, on a real server: nothing of it goes out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import redis
from test_limits import FAILED, place, taken
from world import MINUTE_MS, OUTCOMES, Entry, World, read, read_entries

from worker import ops
from worker.celery import settling_template
from worker.clock import Jump
from worker.errors import Kind, Outcome, Refused
from worker.policy import Block, Cause, Credential, Publish, decide
from worker.timetable import Begun, HeldBack, News, Token

HOUR_MS = 60 * MINUTE_MS
REST_MS = 4 * HOUR_MS
E999 = FAILED[Cause.GENERIC]
CALLBACK = 'mode = "callback"'


@pytest.fixture
def world(store: redis.Redis) -> World:
    return World(store)


def fail(world: World, begun: Begun, outcome: Outcome = E999, *, is_answer: bool = False) -> object:
    """What a worker does with a failed attempt; without jitter."""
    decision = decide(outcome, begun.counters, 0.0, begun.retry)
    assert not isinstance(decision, Publish | Block)
    return world.timetable.conclude(begun.token, outcome, decision, begun.retry, is_answer=is_answer)


def resting(world: World, *aliases: str) -> int:
    """Three of the login's accounts have failed; returns until when it rests (ms)."""
    world.apply(read(*(aliases or "abcd")))
    for alias in "abc":
        fail(world, world.start(alias))
    assert is_resting(world)
    return int(world.login()["rests_until"])


def is_resting(world: World) -> bool:
    """Whether the login rests for as long as it should from now on, give or take what the test itself takes."""
    left_ms = int(world.login("acme").get("rests_until", 0)) - world.timetable.now_ms()
    return REST_MS - MINUTE_MS < left_ms <= REST_MS


def sent(world: World) -> Token:
    """The token of the only message that this claim sends."""
    taken(world)
    assert world.claim().dispatched == 1
    [token] = taken(world)
    return token


def serve(world: World, hours: int, outcome: Outcome = E999) -> list[tuple[int, str]]:
    """Every poll fails for so many hours; returns when each request went out (ms), and its account."""
    begin_ms, requests = world.timetable.now_ms(), []
    while (now_ms := world.timetable.now_ms()) < begin_ms + hours * HOUR_MS:
        world.claim()
        for token in taken(world):
            begun = world.begin(token, f"caller {token}")
            assert isinstance(begun, Begun)
            requests.append((now_ms - begin_ms, token.account))
            fail(world, begun, outcome)
        world.check()
        [(_, next_ms)] = world.client.zrange("timetable", 0, 0, withscores=True)
        world.pass_time(max(1, int(next_ms) - now_ms))
    return requests


# ---------------------------------------------------------------------------------------------------------- the promise


@pytest.mark.parametrize(
    "error_type", ["RETRY_IMMEDIATELY", "WAIT_4_HOURS_BEFORE_RETRY", "DO_NOT_RETRY", "RETRY_AFTER_NOTIFICATION", None]
)
def test_a_hundred_accounts_of_a_login_log_on_three_times_and_then_once_in_a_rest(
    world: World, error_type: str | None
) -> None:
    entries = tuple(Entry(f"x{index:03}", number=f"{index}", every="15m") for index in range(100))
    world.apply(read_entries(*entries))
    for entry in entries:
        world.due_now(entry.alias)
    requests = serve(world, 21, Outcome(Kind.ANSWERED, "E999", error_type))
    moments = [at for at, _ in requests]
    assert len([at for at in moments if at < MINUTE_MS]) == 3
    pauses = [later - at for at, later in pairwise(moments[2:])]
    assert len(pauses) == 5
    assert all(REST_MS <= pause < REST_MS + MINUTE_MS for pause in pauses)
    untouched = [world.account(entry.alias) for entry in entries if entry.alias not in {who for _, who in requests}]
    assert len(untouched) >= 90
    assert {(each["state"], each["attempt"], each["waits"]) for each in untouched} == {("scheduled", "0", "0")}


def test_a_login_that_rests_leaves_others_alone(world: World) -> None:
    world.apply(read_entries(*(Entry(name) for name in "abc"), Entry("o", "beta")))
    for alias in "abc":
        fail(world, world.start(alias))
    assert isinstance(world.start("o"), Begun)


def test_it_is_said_once_when_a_login_begins_to_rest(world: World) -> None:
    end_ms = resting(world)
    told = News("login rests", login="acme", until=ops.iso(end_ms))
    assert [*world.claim().news, *world.claim().news] == [told]


ENDS: dict[str, Callable[[World], object]] = {
    "a balance": lambda world: (world.pass_time(REST_MS), world.settle(world.begin(sent(world)))),
    "an operator": lambda world: world.timetable.unblock("acme"),
}


@pytest.mark.parametrize("end", ENDS)
def test_who_rests_is_listed_until_the_rest_ends(world: World, end: str) -> None:
    end_ms = resting(world)
    assert world.client.zrange("resting", 0, -1, withscores=True) == [("acme", end_ms)]
    ENDS[end](world)
    assert world.client.zrange("resting", 0, -1) == []


def test_other_failures_are_no_reason_to_rest(world: World) -> None:
    world.apply(read(*"abcde"))
    for alias in "abcd":
        fail(world, world.start(alias), OUTCOMES["postpone"])
    assert isinstance(world.start("e"), Begun)


def test_other_accounts_keep_state_and_due_time(world: World) -> None:
    world.apply(read(*"abcd"))
    world.due_now("d")
    before = world.account("d")
    world.timetable.pause("d")
    for alias in "abc":
        fail(world, world.start(alias))
    world.timetable.resume("d")
    world.pass_time(HOUR_MS)
    assert world.claim().dispatched == 0
    after = world.account("d")
    assert {name: after[name] for name in ("state", "due", "tries", "waits", "attempt")} == {
        name: before[name] for name in ("state", "due", "tries", "waits", "attempt")
    }


# -------------------------------------------------------------------------------------------------- what comes after it


def test_after_the_rest_one_goes_first_and_a_balance_ends_it(world: World) -> None:
    resting(world)
    world.pass_time(REST_MS)
    begun = world.begin(sent(world))
    assert isinstance(begun, Begun)
    assert world.claim().dispatched == 0
    world.settle(begun)
    assert {"generic", "rests_until", "rested_at"}.isdisjoint(world.login())
    assert world.claim().dispatched == 1, "the next one goes at once"
    world.check()


def test_after_the_rest_another_failure_of_the_kind_begins_a_new_one(world: World) -> None:
    resting(world)
    world.pass_time(REST_MS)
    begun = world.begin(sent(world))
    assert isinstance(begun, Begun)
    fail(world, begun)
    assert is_resting(world)
    world.check()


def test_a_balance_that_was_on_its_way_ends_the_rest(world: World) -> None:
    world.apply(read(*"abcd", every="1d", more=CALLBACK))
    begun = world.start("d")
    world.timetable.accept(begun, None)
    world.pass_time(11 * MINUTE_MS)
    for alias in "abc":
        fail(world, world.start(alias))
    assert is_resting(world)
    world.settle(begun)
    assert "rests_until" not in world.login()


def test_with_callbacks_nobody_else_goes_before_the_first_has_ended(world: World) -> None:
    world.apply(read(*"abcd", every="1d", more=CALLBACK))
    for alias in "abc":
        fail(world, world.start(alias))
    world.pass_time(REST_MS)
    begun = world.begin(sent(world))
    assert isinstance(begun, Begun)
    deadline_ms = world.timetable.accept(begun, None)
    assert deadline_ms is not None
    world.pass_time(11 * MINUTE_MS)
    assert world.claim().dispatched == 0, "login_hold is over"
    assert place(world, "acme") == deadline_ms
    world.pass_time(deadline_ms - world.timetable.now_ms())
    assert world.claim().dispatched == 1


# ------------------------------------------------------------------------------------------------- answers by callback


def answered(world: World, token: Token, body: bytes = b"{}") -> Begun:
    """What a worker knows of the token when it settles this answer."""
    received = world.timetable.receive([(world.callback(token), body, "application/json")], is_durable=False)
    assert received[0].result == "stored"
    unsettled = world.timetable.unsettled(token)
    assert unsettled is not None
    return unsettled.begun


def two_failed(world: World) -> None:
    """Two of the login have failed, and c awaits its callback."""
    world.timetable._settling = settling_template()
    world.apply(read(*"abcd", every="1d", more=CALLBACK))
    for alias in "ab":
        fail(world, world.start(alias))
        world.timetable.pause(alias)
    world.timetable.accept(world.start("c"), None)


def test_a_callback_counts_like_an_answer(world: World) -> None:
    two_failed(world)
    fail(world, answered(world, world.token("c")), is_answer=True)
    assert is_resting(world)
    world.check()


def lapsed(world: World) -> Token:
    """The token of c, whose deadline is over; it waits."""
    token = world.token("c")
    world.pass_time(HOUR_MS)
    [lapse] = world.claim().lapsed
    world.timetable.postpone(lapse.token, HOUR_MS, lapse.counters, FAILED[None])
    assert world.state("c") == "waiting"
    return token


@pytest.mark.parametrize("error_type", ["RETRY_IMMEDIATELY", "DO_NOT_RETRY"])
def test_a_callback_that_comes_too_late_spent_a_log_on_too_but_one_only(world: World, error_type: str) -> None:
    two_failed(world)
    token = lapsed(world)
    outcome = Outcome(Kind.ANSWERED, "E999", error_type)
    for body in (b"{}", b"[]"):
        fail(world, answered(world, token, body), outcome, is_answer=True)
    assert world.login()["generic"] == "3"
    assert world.state("c") == "waiting"
    assert is_resting(world)
    world.check()


def test_what_was_dispatched_when_the_rest_began_is_given_back(world: World) -> None:
    two_failed(world)
    token = world.token("c")
    world.pass_time(11 * MINUTE_MS)
    world.timetable.resume("a")
    dispatched = sent(world)
    assert dispatched.account != "c"
    due = world.account(dispatched.account)["due"]
    fail(world, answered(world, token), is_answer=True)
    result = world.begin(dispatched)
    assert isinstance(result, HeldBack)
    assert result.why == "rest"
    account = world.account(dispatched.account)
    assert (account["due"], account["losses"]) == (due, "0")
    assert is_resting(world)
    world.check()
    world.timetable.unblock("acme")
    assert world.claim().dispatched == 1, "and leaves no trace"


def test_a_place_that_becomes_free_lets_nobody_go_while_the_login_rests(world: World) -> None:
    world.timetable._settling = settling_template()
    world.apply(read(*"abcde", every="1d", more=CALLBACK))
    for alias in "abcd":
        world.pass_time(11 * MINUTE_MS)
        world.timetable.accept(world.start(alias), None)
    for alias in "abc":
        fail(world, answered(world, world.token(alias)), is_answer=True)
    world.due_now("e")
    world.pass_time(11 * MINUTE_MS)
    assert world.claim().dispatched == 0, "login_hold of d is over"
    assert world.state("e") == "scheduled"
    world.check()


# ------------------------------------------------------------------------------------------------- what does not end it


def _paused(world: World) -> None:
    world.timetable.pause_all()
    world.claim()
    world.pass_time(MINUTE_MS)
    world.claim()
    world.timetable.resume_all()


def _a_spent_budget(world: World) -> None:
    limits = "[limits]\ndaily_requests = {}\n"
    entries = [Entry(name) for name in "abcd"]
    world.apply(read_entries(*entries, head=limits.format(1)))
    world.client.hset("login:acme", mapping={"not_before": world.timetable.now_ms() + MINUTE_MS, "held_by": "rate"})
    world.claim()
    world.apply(read_entries(*entries, head=limits.format(1000)))


#: Everything that could make an account of the login due, or looks anew at what is held back.
EVENTS: dict[str, Callable[[World], object]] = {
    "pause all, resume all": _paused,
    "a hold for another reason": _a_spent_budget,
    "poll": lambda world: world.timetable.poll("d"),
    "pause, resume": lambda world: (world.timetable.pause("d"), world.timetable.resume("d")),
    "a new account": lambda world: world.apply(read(*"abcde", every="1s")),
    "an account that comes from another login": lambda world: (
        world.apply(read_entries(*(Entry(name) for name in "abcd"), Entry("m", "beta"))),
        world.apply(read_entries(*(Entry(name) for name in "abcdm"))),
    ),
    "a new key lifts a block": lambda world: (
        world.timetable.block(world.token("d"), Credential.KEY, "key-1", OUTCOMES["block"]),
        world.timetable.unblock_with("acme", Credential.KEY, "key-2"),
    ),
}


@pytest.mark.parametrize("event", EVENTS)
def test_nothing_goes_out_before_the_rest_is_over_whatever_happens(world: World, event: str) -> None:
    end_ms = resting(world)
    world.pass_time(MINUTE_MS)
    EVENTS[event](world)
    world.check()
    for _ in range(3):
        world.pass_time((end_ms - world.timetable.now_ms()) // 2)
        assert world.claim().dispatched == 0
    world.pass_time(end_ms - world.timetable.now_ms())
    world.pass_time(24 * HOUR_MS)
    assert world.claim().dispatched == 1


@pytest.mark.parametrize("jump_ms", [-6 * HOUR_MS, 6 * HOUR_MS])
def test_a_jump_of_the_clock_moves_the_rest(world: World, jump_ms: int) -> None:
    end_ms = resting(world)
    world.pass_time(HOUR_MS)
    seen = world.claim()
    world.pass_time(jump_ms)
    assert world.timetable.hold(Jump(by_ms=jump_ms, within_ms=0), seen) is not None
    world.workers(100)
    assert place(world, "acme") == world.client.zscore("resting", "acme") == end_ms + jump_ms
    world.pass_time(2 * HOUR_MS)
    assert world.claim().dispatched == 0
    world.pass_time(HOUR_MS)
    assert world.claim().dispatched == 1
    world.check()


def test_a_rest_that_began_after_the_jump_is_not_moved(world: World) -> None:
    claim = world.claim()
    world.pass_time(-HOUR_MS)
    end_ms = resting(world)
    assert world.timetable.hold(Jump(by_ms=-HOUR_MS, within_ms=MINUTE_MS), claim) is not None
    assert int(world.login()["rests_until"]) == end_ms


# ------------------------------------------------------------------------------------------------------- the operator


def test_an_operator_ends_it_and_one_more_failure_begins_another(world: World) -> None:
    resting(world)
    assert ops.unblock(world.timetable, "acme") == "its rest is over"
    row = ops.audit(world.timetable)[0]
    assert (row.actor, row.action, row.subject, row.outcome) == ("anna@desk", "unblock", "acme", "rest ended")
    world.check()
    fail(world, world.start("d"))
    assert is_resting(world)
    world.pass_time(REST_MS)
    with pytest.raises(Refused, match="not blocked"):
        ops.unblock(world.timetable, "acme")


@pytest.mark.parametrize(
    "unblock",
    [
        lambda world: ops.unblock(world.timetable, "acme"),
        lambda world: world.timetable.unblock_with("acme", Credential.BANK, "bank-2"),
    ],
    ids=["operator", "new secret"],
)
def test_what_unblocks_the_bank_log_on_ends_the_rest_below(world: World, unblock: Callable[[World], object]) -> None:
    world.apply(read(*"abcde", every="1d", more=CALLBACK))
    begun = world.start("d")
    world.timetable.accept(begun, None)
    world.pass_time(11 * MINUTE_MS)
    for alias in "abc":
        fail(world, world.start(alias))
    world.block(begun.token)
    unblock(world)
    world.bank = "bank-2"
    assert world.claim().dispatched == 1
    world.check()


def test_a_story_tells_of_the_rest_and_what_ends_it(world: World) -> None:
    end_ms = resting(world)
    story = ops.story(world.timetable, "d")
    assert story.limits == (
        f"its login acme rests until {ops.iso(end_ms)}: 3 generic failures in a row; a bad password may hide behind "
        "them; where it is right: balances unblock acme.",
    )
    assert story.commands[0] == "balances unblock acme"
    world.pass_time(REST_MS)
    assert ops.story(world.timetable, "d").limits == ()
