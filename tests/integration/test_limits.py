"""What may go out, on a real server: `rate`, daily budgets, `min_gap`, the pause over everything, generic failures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import redis
from world import BANK, MINUTE_MS, OUTCOMES, START_MS, Entry, World, read, read_entries

from worker import ops
from worker.accounts import Accounts, Login
from worker.celery import settling_template
from worker.clock import Jump
from worker.errors import Kind, Outcome
from worker.policy import Cause, Counters, Credential, DeadLetterQueue, Retry
from worker.timetable import Begun, CredentialRefused, HeldBack, News, Token

OTHER_BANK = "bice.cl"
INSTITUTION = f"cl/business/{BANK}"
DAY_MS = 86_400_000
#: A failure for each cause, and one for none.
FAILED: dict[Cause | None, Outcome] = {
    Cause.GENERIC: Outcome(Kind.ANSWERED, "E999", "RETRY_IMMEDIATELY"),
    Cause.UNAVAILABLE: Outcome(Kind.ANSWERED, "E201", "RETRY_IMMEDIATELY"),
    Cause.GATEWAY: Outcome(Kind.SERVER_ERROR, "HTTP_504"),
    Cause.UNREADABLE: Outcome(Kind.UNREADABLE, "UNREADABLE"),
    None: Outcome(Kind.TIMEOUT, "TIMEOUT"),
}


@pytest.fixture
def world(store: redis.Redis) -> World:
    return World(store)


def many(number: int, *, bank: str = BANK, prefix: str = "x") -> tuple[Entry, ...]:
    """So many accounts, each with a login of its own."""
    names = [f"{prefix}{index:03}" for index in range(number)]
    return tuple(
        Entry(name, login=f"login-{name}", number=f"{prefix}{index}", institution=bank, every="1d")
        for index, name in enumerate(names)
    )


def limited(*entries: Entry, **limits: int | str) -> Accounts:
    """Their accounts file, with these `[limits]`."""
    written = "".join(f"{name} = {value!r}\n".replace("'", '"') for name, value in limits.items())
    return read_entries(*entries, head=f"[limits]\n{written}")


def budgeted(accounts: Accounts, login: str, daily_requests: int | None) -> Accounts:
    """The same with a daily budget of this login."""
    logins = {**accounts.logins, login: Login(daily_requests=daily_requests)}
    return replace(accounts, logins=logins, digest=f"{accounts.digest} {daily_requests}")


def taken(world: World) -> list[Token]:
    """The tokens of all messages in the queue, which is empty afterwards."""
    tokens = [
        Token(**dict(zip(("login", "account", "poll", "attempt"), _args(message), strict=True)))
        for message in world.messages()
    ]
    world.client.delete("balances.polls")
    return tokens


def _args(message: dict) -> tuple[str, str, int, int]:
    _, named, _ = json.loads(message["body"])
    return named["login"], named["account"], named["poll"], named["attempt"]


def place(world: World, login: str) -> int | None:
    score = world.client.zscore("timetable", login)
    return None if score is None else int(score)


# --------------------------------------------------------------------------------------------------------------- rate


def begun_over_time(world: World, minutes: int, *, delays_ms: tuple[int, ...] = (0,)) -> dict[str, int]:
    """Serves the timetable for so many minutes, each message after its delay; alias → when it was begun first."""
    begun: dict[str, int] = {}
    queue: list[tuple[int, Token]] = []
    end_ms = START_MS + minutes * MINUTE_MS
    while world.timetable.now_ms() < end_ms:
        world.claim()
        now_ms = world.timetable.now_ms()
        queue += [
            (now_ms + delays_ms[(len(begun) + index) % len(delays_ms)], token)
            for index, token in enumerate(taken(world))
        ]
        for at, token in sorted(queue, key=lambda each: each[0]):
            if at > now_ms:
                continue
            queue.remove((at, token))
            result = world.begin(token, f"caller {token}")
            if isinstance(result, Begun):
                begun.setdefault(token.account, world.timetable.now_ms())
                world.settle(result)
        world.check()
        nexts = [at for at, _ in queue] + [int(at) for _, at in world.client.zrange("timetable", 0, 0, withscores=True)]
        world.pass_time(max(1, min(nexts) - world.timetable.now_ms()))
    return begun


def most_in_a_minute(moments: list[int]) -> int:
    return max(sum(first <= moment < first + MINUTE_MS for moment in moments) for first in moments)


@pytest.mark.parametrize("delays_ms", [(0,), (0, 900, 3000, 40)], ids=["at once", "through a queue"])
def test_no_minute_has_more_requests_to_an_institution_than_its_rate(world: World, delays_ms: tuple[int, ...]) -> None:
    entries = (*many(20), *many(3, bank=OTHER_BANK, prefix="other"))
    world.apply(limited(*entries, rate=5))
    for entry in entries:
        world.due_now(entry.alias)
    begun = begun_over_time(world, 5, delays_ms=delays_ms)
    assert begun.keys() == {entry.alias for entry in entries}
    moments = sorted(at for alias, at in begun.items() if alias.startswith("x"))
    assert most_in_a_minute(moments) <= 5
    assert moments[-1] - moments[0] < 5 * MINUTE_MS, "and it is used"
    others = [at for alias, at in begun.items() if alias.startswith("other")]
    assert max(others) - START_MS < MINUTE_MS, "a full institution delays no other one"


def test_a_login_without_a_slot_is_moved_to_its_own_and_looked_at_no_sooner(world: World) -> None:
    entries = many(6)
    world.apply(limited(*entries, rate=2))
    for entry in entries:
        world.due_now(entry.alias)
    assert world.claim().dispatched == 1
    slots = sorted(place(world, entry.login) or 0 for entry in entries if world.state(entry.alias) == "scheduled")
    assert all(30_000 < later - slot < 32_000 for slot, later in pairwise(slots))
    assert slots[0] > world.timetable.now_ms() + 30_000
    before = world.snapshot()
    assert world.claim().dispatched == 0
    assert world.snapshot() == before
    world.check()


def over_the_rate(world: World, *entries: Entry) -> list[Token]:
    """All of them dispatched while there was no limit, one begun, and then a rate of one a minute."""
    world.apply(read_entries(*entries))
    for entry in entries:
        world.due_now(entry.alias)
    world.claim()
    world.apply(limited(*entries, rate=1))
    first, *others = taken(world)
    assert isinstance(world.begin(first), Begun)
    return others


def test_logins_that_wait_for_their_slots_take_nobodys_room(world: World) -> None:
    """More are due than a claim looks at, and the one whose institution has no limit reached is the last."""
    entries = (*many(30), *many(1, bank=OTHER_BANK, prefix="other"))
    world.apply(limited(*entries, rate=1))
    for entry in entries:
        world.due_now(entry.alias)
        world.pass_time(1)
    world.workers(2)
    for _ in range(4):
        world.timetable.claim(10)
    assert {token.account for token in taken(world)} == {"x000", "other000"}


def test_who_finds_no_licence_gives_the_account_back_as_it_was(world: World) -> None:
    entries = many(2)
    [token] = over_the_rate(world, *entries)
    due = world.account(token.account)["due"]
    result = world.begin(token)
    assert isinstance(result, HeldBack)
    assert result.why == "rate"
    assert 0 < result.wait_ms <= 62_000
    account = world.account(token.account)
    assert (account["state"], account["due"], account["losses"]) == ("scheduled", due, "0")
    assert "holder" not in world.login(token.login)
    assert abs((place(world, token.login) or 0) - world.timetable.now_ms() - result.wait_ms) < 1000
    world.check()
    assert world.begin(token) is None, "its token is void"
    world.pass_time(result.wait_ms)
    assert world.claim().dispatched == 1
    assert isinstance(world.begin(world.token(token.account)), Begun)


def test_a_retry_needs_a_licence_too_and_goes_on_waiting_without_one(world: World) -> None:
    entries = many(2)
    world.apply(read_entries(*entries))
    token = world.start(entries[0].alias).token
    world.postpone(token, 5)
    world.pass_time(5_000)
    world.claim()
    world.apply(limited(*entries, rate=1))
    world.start(entries[1].alias)
    due = world.account(token.account)["due"]
    assert isinstance(world.begin(world.token(token.account)), HeldBack)
    account = world.account(token.account)
    assert (account["state"], account["due"], account["tries"]) == ("waiting", due, "1")


def test_a_clock_that_was_put_back_gives_no_licence_twice(world: World) -> None:
    entries = many(3)
    second, third = over_the_rate(world, *entries)
    world.pass_time(-10 * MINUTE_MS)
    result = world.begin(second)
    assert isinstance(result, HeldBack)
    assert 60_000 < result.wait_ms <= 62_000
    world.pass_time(62_000)
    assert isinstance(world.begin(third), Begun)


def test_a_jump_of_the_clock_gives_no_licence_twice(world: World) -> None:
    entries = many(3)
    second, third = over_the_rate(world, *entries)
    world.pass_time(60 * MINUTE_MS)
    jump = Jump(by_ms=60 * MINUTE_MS, within_ms=0)
    assert world.timetable.hold(jump, world.claim()) is not None
    result = world.begin(second)
    assert isinstance(result, HeldBack)
    assert result.wait_ms <= 62_000
    world.pass_time(62_000)
    assert isinstance(world.begin(third), Begun)


def test_another_rate_gives_new_slots(world: World) -> None:
    entries = many(30)
    world.apply(limited(*entries, rate=1))
    for entry in entries:
        world.due_now(entry.alias)
    world.claim()
    taken(world)
    world.apply(limited(*entries, rate=1000))
    world.pass_time(5_000)
    for _ in range(2):
        world.claim()
        world.pass_time(5_000)
    assert len(taken(world)) == 29
    world.check()


EARLIER: dict[str, Callable[[World], object]] = {
    "poll": lambda world: world.timetable.poll("x001"),
    "pause, resume": lambda world: (world.timetable.pause("x001"), world.timetable.resume("x001")),
    "block, unblock": lambda world: (
        world.timetable.block(world.token("x001"), Credential.KEY, "other", OUTCOMES["block"]),
        world.timetable.unblock("login-x001"),
    ),
    "another interval": lambda world: world.apply(
        limited(many(2)[0], replace(many(2)[1], every="1h"), rate=1),
    ),
    "another account": lambda world: world.apply(
        limited(*many(2), Entry("new", "login-x001", number="7", every="1s"), rate=1)
    ),
}


@pytest.mark.parametrize("event", EARLIER)
def test_nothing_makes_a_login_earlier_than_its_slot_and_nothing_loses_it(world: World, event: str) -> None:
    world.apply(limited(*many(2), rate=1))
    for alias in ("x000", "x001"):
        world.due_now(alias)
    world.claim()
    taken(world)
    slot = place(world, "login-x001")
    assert slot is not None
    EARLIER[event](world)
    assert place(world, "login-x001") is not None
    assert (place(world, "login-x001") or 0) >= slot
    world.check()
    assert world.claim().dispatched == 0


def test_a_deadline_asks_nothing_and_waits_for_no_slot(world: World) -> None:
    entries = (Entry("a", mode="callback", every="1d"), Entry("b", every="1d"))
    world.apply(limited(*entries, rate=1))
    begun = world.start("a")
    deadline_ms = world.timetable.accept(begun, None)
    assert deadline_ms is not None
    world.client.hset("login:acme", mapping={"not_before": deadline_ms + DAY_MS, "held_by": "rate"})
    world.pass_time(deadline_ms - world.timetable.now_ms() + 1)
    world.claim()
    assert [lapse.token for lapse in world.claim().lapsed] == [begun.token]


# ------------------------------------------------------------------------------------------------------ daily budgets


def spend(world: World, alias: str) -> Begun | CredentialRefused | HeldBack | object | None:
    """One more request for this account, if it may be."""
    world.timetable.poll(alias)
    world.claim()
    result = world.begin(world.token(alias), f"caller {world.account(alias)['poll']}")
    if isinstance(result, Begun):
        world.settle(result)
    return result


def test_a_spent_budget_holds_its_login_until_the_next_day_and_no_other(world: World) -> None:
    accounts = budgeted(read_entries(Entry("a"), Entry("b", "beta")), "acme", 2)
    world.apply(accounts)
    assert [isinstance(spend(world, "a"), Begun) for _ in range(2)] == [True, True]
    world.timetable.poll("a")
    due = world.account("a")["due"]
    news = world.claim().news
    assert world.state("a") == "scheduled"
    midnight = (world.timetable.now_ms() // DAY_MS + 1) * DAY_MS
    assert 0 <= (place(world, "acme") or 0) - midnight <= MINUTE_MS
    assert (world.account("a")["due"], world.account("a")["waits"]) == (due, "0")
    assert isinstance(spend(world, "b"), Begun)
    told = [News("login budget spent", login="acme", until=ops.iso(midnight))]
    assert [*news, *world.claim().news] == told, "once"
    world.pass_time((place(world, "acme") or 0) - world.timetable.now_ms())
    assert world.claim().dispatched >= 1
    assert world.state("a") == "dispatched"
    assert isinstance(world.begin(world.token("a")), Begun)
    world.check()


def test_the_budget_of_all_logins_holds_all_of_them(world: World) -> None:
    world.apply(limited(Entry("a"), Entry("b", "beta"), daily_requests=2))
    assert isinstance(spend(world, "a"), Begun)
    assert isinstance(spend(world, "b"), Begun)
    for alias in ("a", "b"):
        world.timetable.poll(alias)
    assert world.claim().dispatched == 0
    midnight = (world.timetable.now_ms() // DAY_MS + 1) * DAY_MS
    assert all(0 <= (place(world, login) or 0) - midnight <= MINUTE_MS for login in ("acme", "beta"))
    [story] = ops.story(world.timetable, "a").limits
    assert story == f"daily budget of all logins spent until {ops.iso(midnight)[:10]}T00:00Z."
    world.check()


def test_a_new_day_begins_with_who_is_due_for_longest(world: World) -> None:
    world.apply(limited(Entry("a"), Entry("b", "beta"), Entry("c", "gamma"), daily_requests=1))
    spend(world, "c")
    for alias in ("b", "a"):
        world.timetable.poll(alias)
        world.pass_time(5 * MINUTE_MS)
        world.claim()
    assert (place(world, "beta") or 0) < (place(world, "acme") or 0)


def test_what_was_dispatched_before_the_budget_was_spent_gives_its_account_back(world: World) -> None:
    world.apply(limited(Entry("a"), Entry("b", "beta"), daily_requests=1))
    for alias in ("a", "b"):
        world.due_now(alias)
    world.claim()
    assert isinstance(world.begin(world.token("a")), Begun)
    result = world.begin(world.token("b"))
    assert isinstance(result, HeldBack)
    assert result.why == "total budget"
    assert world.state("b") == "scheduled"
    world.check()


def test_a_larger_budget_lets_go_at_once(world: World) -> None:
    accounts = read_entries(Entry("a"))
    world.apply(budgeted(accounts, "acme", 1))
    spend(world, "a")
    world.timetable.poll("a")
    assert world.claim().dispatched == 0
    world.apply(budgeted(accounts, "acme", None))
    assert world.claim().dispatched == 1
    assert isinstance(world.begin(world.token("a")), Begun)


def test_repeated_calls_of_one_attempt_are_one_request(world: World) -> None:
    world.apply(limited(Entry("a"), daily_requests=9))
    token = world.start("a").token
    for _ in range(3):
        assert isinstance(world.begin(token), Begun)
    [requests] = world.client.scan_iter("requests:*")
    assert world.client.hgetall(requests) == {"*": "1", "acme": "1"}


# ------------------------------------------------------------------------------------------------------------- min_gap

GAP_MS = 10 * MINUTE_MS


def gapped(every: str = "1d", gap: str = "10m", number: str = "") -> Accounts:
    return read("a", "b", every=every, more=f'min_gap = "{gap}"', **({"number": number} if number else {}))


def _suspended(world: World) -> None:
    world.suspend(world.start("a").token)


def _parked(world: World) -> None:
    world.park(world.start("a").token)


def _blocked(world: World) -> None:
    world.block(world.start("a").token)


def _paused(world: World) -> None:
    world.suspend(world.start("a").token)
    world.timetable.discard("a")


def _scheduled(world: World) -> None:
    world.settle(world.start("a"))


DUE_AGAIN: dict[str, tuple[Callable[[World], object], Callable[[World], object]]] = {
    "redrive": (_suspended, lambda world: world.timetable.redrive("a")),
    "release": (_parked, lambda world: world.timetable.release(["a"])),
    "unblock": (_blocked, lambda world: world.timetable.unblock("acme")),
    "resume": (_paused, lambda world: world.timetable.resume("a")),
    "apply, another interval": (_scheduled, lambda world: world.apply(gapped(every="1s"))),
}


@pytest.mark.parametrize("event", DUE_AGAIN)
def test_min_gap_binds_whatever_makes_an_account_due(world: World, event: str) -> None:
    arrange, happen = DUE_AGAIN[event]
    world.apply(gapped())
    arrange(world)
    happen(world)
    begun_at = int(world.account("a")["begun_at"])
    assert world.due("a") == begun_at + GAP_MS
    world.check()


def test_a_longer_gap_binds_what_was_due_already(world: World) -> None:
    world.apply(gapped(every="1s", gap="0s"))
    world.settle(world.start("a"))
    world.apply(gapped(every="1s"))
    assert world.due("a") == int(world.account("a")["begun_at"]) + GAP_MS


def test_poll_is_refused_inside_the_gap_and_says_when(world: World) -> None:
    world.apply(gapped())
    world.settle(world.start("a"))
    due = world.due("a")
    [(_, reason)] = ops.each(world.timetable, ops.poll(world.timetable), ["a"])
    begun_at = int(world.account("a")["begun_at"])
    moments = [ops.iso(at)[:19].replace("T", " ") + " UTC" for at in (begun_at, begun_at + GAP_MS)]
    assert reason == f"its last poll began at {moments[0]}, and its min_gap lets the next one begin at {moments[1]}"
    assert world.due("a") == due
    world.pass_time(GAP_MS)
    assert world.timetable.poll("a") is None


def test_a_clock_that_was_put_back_makes_no_gap_longer(world: World) -> None:
    world.apply(gapped())
    _suspended(world)
    world.pass_time(-DAY_MS)
    world.timetable.redrive("a")
    assert (world.due("a") or 0) - world.timetable.now_ms() <= GAP_MS


def test_a_retry_is_the_same_poll_and_knows_no_gap(world: World) -> None:
    world.apply(gapped())
    world.postpone(world.start("a").token, 5)
    assert (world.due("a") or 0) - world.timetable.now_ms() <= 5_000


# ------------------------------------------------------------------------------------------- the pause over everything


def test_nothing_goes_out_while_everything_is_paused(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "beta"), Entry("c", "gamma")))
    begun = world.start("a")
    world.due_now("b")
    world.claim()
    world.due_now("c")
    world.timetable.pause_all()
    assert world.state("b") == "scheduled", "its token is void"
    assert world.begin(world.token("b")) is None
    assert world.claim().dispatched == 0
    world.apply(read_entries(Entry("a"), Entry("b", "beta"), Entry("c", "gamma"), Entry("d", "delta", every="1s")))
    world.pass_time(10 * MINUTE_MS)
    assert world.claim().dispatched == 0
    assert taken(world)[0].account == "a", "only what went out before"
    assert {row.state for row in ops.accounts(world.timetable)} == {"paused"}
    settled = world.settle(begun)
    assert settled is not None
    assert settled.result == "published"
    world.check()


def test_a_paused_world_is_looked_at_once_a_minute(world: World) -> None:
    entries = many(5)
    world.apply(read_entries(*entries))
    for entry in entries:
        world.due_now(entry.alias)
    world.timetable.pause_all()
    world.claim()
    assert {(place(world, entry.login) or 0) - world.timetable.now_ms() > 59_000 for entry in entries} == {True}


def test_resuming_everything_brings_all_back_at_once_but_who_was_paused_alone(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "beta")))
    world.timetable.pause("b")
    for _ in range(2):
        world.timetable.pause_all()
    world.timetable.poll("a")
    world.pass_time(16 * MINUTE_MS)
    assert world.claim().dispatched == 0
    assert list(ops.resume_all(world.timetable)) == [("every account", None)]
    assert world.claim().dispatched == 1
    assert [world.state(alias) for alias in ("a", "b")] == ["dispatched", "paused scheduled"]
    assert list(ops.resume_all(world.timetable)) == [("b", None)]
    world.check()


@pytest.mark.parametrize("order", [ops.resume, ops.poll], ids=lambda order: order.__name__)
def test_under_it_one_account_cannot_be_resumed_or_polled(world: World, order: Callable[..., ops.Order]) -> None:
    world.apply(read("a"))
    world.timetable.pause("a")
    world.timetable.pause_all()
    [(_, reason)] = ops.each(world.timetable, order(world.timetable), ["a"])
    assert reason == "everything is paused; go on with: balances resume --all"
    assert world.state("a") == "paused scheduled"
    story = ops.story(world.timetable, "a")
    assert story.commands[0] == "balances resume --all"
    assert story.limits[0].startswith("everything is paused since 20")


def test_nobody_is_overdue_while_everything_is_paused(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", "beta")))
    world.pass_time(31 * MINUTE_MS)
    assert sorted(world.timetable.tell_overdue().told) == ["a", "b"]
    world.timetable.pause_all()
    assert world.client.scard("overdue") == 0
    world.pass_time(60 * MINUTE_MS)
    assert world.timetable.tell_overdue().told == ()
    assert not any(row.overdue for row in ops.accounts(world.timetable))
    world.timetable.resume_all()
    world.timetable.tell_overdue()
    assert world.client.scard("overdue") == 0, "an interval is theirs to be polled in"
    assert not any(row.overdue for row in ops.accounts(world.timetable))
    world.pass_time(16 * MINUTE_MS)
    world.timetable.tell_overdue()
    assert world.client.smembers("overdue") == {"a", "b"}
    world.check()


def test_a_moved_account_is_voided_where_it_is_now(world: World) -> None:
    """The login that it left still holds its place: that token is nobody's step any more."""
    world.apply(read("a"))
    world.due_now("a")
    world.claim()
    world.apply(read("a", login="beta"))
    world.due_now("a")
    world.claim()
    world.timetable.pause_all()
    assert (world.state("a"), world.client.zcard("due:acme")) == ("scheduled", 0)
    world.check()


# --------------------------------------------------------------------------------------------------- generic failures


def generic(world: World, token: Token) -> object:
    return world.timetable.postpone(token, 5_000, Counters(), FAILED[Cause.GENERIC])


def test_generic_failures_are_counted_by_login_until_one_of_its_accounts_succeeds(world: World) -> None:
    world.apply(read("a", "b", "c"))
    for number, alias in enumerate(("a", "b")):
        begun = world.start(alias)
        assert begun.counters.generic == number
        generic(world, begun.token)
        assert generic(world, begun.token), "repeated, and counted once"
    begun = world.start("c")
    assert begun.counters.generic == 2
    world.settle(begun)
    world.pass_time(30 * MINUTE_MS)
    world.claim()
    assert world.begin(world.token("a")).counters.generic == 0  # type: ignore[union-attr]


def test_what_decides_of_a_callbacks_answer_knows_the_count_too(world: World) -> None:
    world.timetable._settling = settling_template()
    world.apply(read("a", "b", more='mode = "callback"'))
    generic(world, world.start("a").token)
    begun = world.start("b")
    assert world.timetable.accept(begun, None)
    callback = (world.callback(begun.token), b"{}", "application/json")
    assert world.timetable.receive([callback], is_durable=False)[0].result == "stored"
    unsettled = world.timetable.unsettled(begun.token)
    assert unsettled is not None
    assert unsettled.begun.counters.generic == 1


def test_a_lapse_knows_the_count(world: World) -> None:
    world.apply(read("a", "b"))
    generic(world, world.start("a").token)
    token = world.start("b").token
    world.pass_time(5 * MINUTE_MS)
    [lapse] = world.claim().lapsed
    assert (lapse.token, lapse.counters.generic) == (token, 1)


def test_a_dead_letter_for_a_generic_failure_spends_of_the_budget_too(world: World) -> None:
    world.apply(read("a", "b"))
    outcome = Outcome(Kind.ANSWERED, "E000", "DO_NOT_RETRY", "custom error")
    world.timetable.suspend(world.start("a").token, DeadLetterQueue.DO_NOT_RETRY, outcome)
    assert world.start("b").counters.generic == 1


def test_conclude_hands_the_cause_on(world: World) -> None:
    world.apply(read("a", "b"))
    outcome = Outcome(Kind.ANSWERED, "T000", "RETRY_IMMEDIATELY", "scraping timeout")
    begun = world.start("a")
    decision = Retry(begun.retry.immediately[0], replace(begun.counters, tries=1))
    world.timetable.conclude(begun.token, outcome, decision, begun.retry)
    assert world.start("b").counters.generic == 1
