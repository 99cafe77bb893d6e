"""An institution that fails many logins for one cause is held, and probed with one poll at a time: on a real server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis
from test_limits import DAY_MS, FAILED, INSTITUTION, OTHER_BANK, many, place, taken
from world import BANK, MINUTE_MS, Entry, World, read_entries

from worker import ops
from worker.celery import settling_template
from worker.errors import Kind, Outcome
from worker.policy import Cause, Counters, DeadLetterQueue
from worker.timetable import Begun, HeldBack, News, Token

ENTRIES = many(9)
DOWN = Cause.UNAVAILABLE


def arranged(store: redis.Redis) -> World:
    """Nine logins of one bank, one account each, and a login of another bank."""
    world = World(store)
    world.apply(read_entries(*ENTRIES, *many(1, bank=OTHER_BANK, prefix="other")))
    return world


@pytest.fixture
def world(store: redis.Redis) -> World:
    return arranged(store)


def fail(world: World, token: Token, cause: Cause | None = DOWN) -> None:
    """The attempt ends; its account waits for hours, out of the way of what is looked at."""
    assert world.timetable.postpone(token, 24 * 60 * MINUTE_MS, Counters(), FAILED[cause])


def fail_some(world: World, number: int, *, first: int = 0, cause: Cause = DOWN) -> None:
    for entry in ENTRIES[first : first + number]:
        fail(world, world.start(entry.alias).token, cause)
    taken(world)


def held(world: World) -> None:
    """Five logins have failed, the other four are due."""
    fail_some(world, 5)
    for entry in ENTRIES[5:]:
        world.due_now(entry.alias)


def breaker(world: World) -> dict[str, str]:
    return world.client.hgetall(f"breaker:{INSTITUTION}")


def probe(world: World) -> Token:
    """Waits for the next probe: one poll, and no other."""
    world.pass_time(int(breaker(world)["next_probe"]) - world.timetable.now_ms())
    world.claim()
    [token] = taken(world)
    world.check()
    return token


def test_the_fifth_login_that_fails_for_one_cause_holds_its_institution(world: World) -> None:
    fail_some(world, 4)
    assert not breaker(world)
    fail_some(world, 1, first=4)
    assert breaker(world)["cause"] == "unavailable"
    for entry in ENTRIES[5:]:
        world.due_now(entry.alias)
    claim = world.claim()
    assert claim.dispatched == 0
    assert claim.news == (News("breaker opened", institution=INSTITUTION, cause="unavailable", logins=5),)
    world.check()


def test_what_is_held_keeps_its_state_and_due_and_loses_nothing(world: World) -> None:
    held(world)
    before = [world.account(entry.alias) for entry in ENTRIES[5:]]
    world.claim()
    assert [world.account(entry.alias) for entry in ENTRIES[5:]] == before
    next_probe = int(breaker(world)["next_probe"])
    assert [place(world, entry.login) for entry in ENTRIES[5:]] == [next_probe] * 4, "looked at no sooner"


def test_another_institution_goes_on(world: World) -> None:
    held(world)
    world.due_now("other000")
    assert world.claim().dispatched == 1
    assert isinstance(world.begin(world.token("other000")), Begun)


def one_login(world: World) -> None:
    world.apply(read_entries(*(Entry(f"a{number}", number=f"5{number}") for number in range(6))))
    for number in range(6):
        fail(world, world.start(f"a{number}").token)


def four_logins_twice(world: World) -> None:
    fail_some(world, 4)
    world.pass_time(25 * 60 * MINUTE_MS)
    for entry in ENTRIES[:4]:
        fail(world, world.start(entry.alias).token)


def two_causes(world: World) -> None:
    fail_some(world, 4)
    fail_some(world, 4, first=4, cause=Cause.GATEWAY)


def too_slowly(world: World) -> None:
    for number in range(7):
        fail_some(world, 1, first=number)
        world.pass_time(3 * MINUTE_MS)


def with_a_success_between(world: World) -> None:
    fail_some(world, 4)
    world.settle(world.start(ENTRIES[8].alias))
    fail_some(world, 4, first=4)


def for_no_common_cause(world: World) -> None:
    for entry in ENTRIES[:3]:
        fail(world, world.start(entry.alias).token, None)
    for entry in ENTRIES[3:]:
        fail(world, world.start(entry.alias).token, Cause.GENERIC)


def after_their_leases(world: World) -> None:
    """Answers to stale tokens: whatever they say is old."""
    tokens = [world.start(entry.alias).token for entry in ENTRIES[:5]]
    for token in tokens:
        world.timetable.postpone(token, 1000, Counters(), FAILED[None])
        world.pass_time(1000)
        world.claim()
        world.timetable.postpone(token, 1000, Counters(), FAILED[DOWN])


NEVER = [
    one_login,
    four_logins_twice,
    two_causes,
    too_slowly,
    with_a_success_between,
    for_no_common_cause,
    after_their_leases,
]


@pytest.mark.parametrize("history", NEVER, ids=lambda history: history.__name__)
def test_nothing_less_holds_an_institution(world: World, history: Callable[[World], None]) -> None:
    history(world)
    assert world.client.smembers("breakers") == set()


def test_dead_letters_count_like_waits(world: World) -> None:
    outcome = Outcome(Kind.UNREADABLE, "UNREADABLE")
    for entry in ENTRIES[:5]:
        world.timetable.suspend(world.start(entry.alias).token, DeadLetterQueue.BAD_ANSWER, outcome)
    assert breaker(world).get("cause") == "unreadable"


def test_it_is_probed_with_one_poll_at_a_time_after_growing_pauses(world: World) -> None:
    held(world)
    pauses, ended_ms = [], world.timetable.now_ms()
    for _ in range(4):
        token = probe(world)
        pauses.append(round((world.timetable.now_ms() - ended_ms) / 1000))
        assert isinstance(world.begin(token), Begun)
        world.pass_time(3 * MINUTE_MS)
        assert world.claim().dispatched == 0, "while the probe is under way"
        fail(world, token)
        ended_ms = world.timetable.now_ms()
    assert pauses == [30, 120, 600, 600]


def test_the_pause_begins_anew_at_the_probes_end(world: World) -> None:
    held(world)
    token = probe(world)
    world.begin(token)
    world.pass_time(150_000)
    fail(world, token, None)
    assert abs(int(breaker(world)["next_probe"]) - world.timetable.now_ms() - 120_000) < 1000


def test_a_success_lets_everybody_go_at_once(world: World) -> None:
    held(world)
    begun = world.begin(probe(world))
    assert isinstance(begun, Begun)
    world.claim()
    world.settle(begun)
    claim = world.claim()
    assert claim.dispatched == 3
    assert claim.news[-1] == News("breaker closed", institution=INSTITUTION)
    assert not breaker(world)
    assert world.client.smembers("breakers") == set()
    world.check()


def test_a_success_of_what_was_under_way_before_counts_too(world: World) -> None:
    begun = world.start(ENTRIES[8].alias)
    fail_some(world, 5)
    world.settle(begun)
    assert not breaker(world)


def test_what_was_dispatched_before_gives_its_account_back(world: World) -> None:
    for entry in ENTRIES:
        world.due_now(entry.alias)
    world.claim()
    for token in taken(world)[:5]:
        begun = world.begin(token)
        assert isinstance(begun, Begun)
        fail(world, token)
    token = world.token(ENTRIES[5].alias)
    due = world.account(token.account)["due"]
    result = world.begin(token)
    assert isinstance(result, HeldBack)
    assert result.why == "breaker"
    assert 0 < result.wait_ms <= 30_000
    account = world.account(token.account)
    assert (account["state"], account["due"], account["losses"]) == ("scheduled", due, "0")
    world.check()


LOST: dict[str, Callable[[World, Token], object]] = {
    "paused": lambda world, token: world.timetable.pause(token.account),
    "retired": lambda world, token: world.apply(
        read_entries(*(entry for entry in ENTRIES if entry.alias != token.account))
    ),
    "suspended": lambda world, token: (world.begin(token), world.suspend(token)),
}


@pytest.mark.parametrize("how", LOST)
def test_a_probe_that_is_gone_is_followed_by_another(world: World, how: str) -> None:
    held(world)
    token = probe(world)
    LOST[how](world, token)
    assert probe(world).account != token.account


def test_a_breaker_that_nobody_probes_for_a_day_is_forgotten(world: World) -> None:
    """Its accounts were removed, for example. The server forgets it by its own clock, so that is done here by hand."""
    held(world)
    world.claim()
    assert DAY_MS - 60_000 < world.client.pttl(f"breaker:{INSTITUTION}") <= DAY_MS
    world.client.delete(f"breaker:{INSTITUTION}")
    assert world.timetable.reached().breakers == {}
    assert world.claim().dispatched == 4
    assert world.client.smembers("breakers") == set()
    world.check()


def test_an_awaited_callback_is_a_probe_under_way(world: World) -> None:
    world.timetable._settling = settling_template()
    callbacks = [Entry(entry.alias, entry.login, entry.number, "1d", BANK, "callback") for entry in ENTRIES]
    world.apply(read_entries(*callbacks))
    held(world)
    begun = world.begin(probe(world))
    assert isinstance(begun, Begun)
    world.timetable.accept(begun, None)
    world.pass_time(15 * MINUTE_MS)
    assert world.claim().dispatched == 0
    world.pass_time(30 * MINUTE_MS)
    claim = world.claim()
    assert [lapse.token for lapse in claim.lapsed] == [begun.token] or claim.dispatched == 0


def test_check_and_the_accounts_story_tell_it(world: World) -> None:
    held(world)
    reached = world.timetable.reached()
    [finding] = ops._check_limits(reached)
    since = ops.iso(reached.breakers[INSTITUTION].opened_at_ms)
    told = f"institution {INSTITUTION} is held since {since} (unavailable), and probed with one poll at a time"
    assert (finding.is_right, finding.detail) == (False, told)
    assert ops.story(world.timetable, ENTRIES[8].alias).limits == (f"{told}.",)
    assert ops.story(world.timetable, "other000").limits == ()
