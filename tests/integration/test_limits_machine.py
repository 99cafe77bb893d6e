"""A machine that looks for a way around the limits: no rule of the scripts is known here, only what they promise.

No minute has more requests to an institution than `rate`, no day more than the budget; nothing begins while everything
is paused or its login rests, and behind an open breaker only its probe does; every account has exactly one next step;
and in the end, when all of it is lifted and the bank answers again, every account that is to be polled is.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import redis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from planted_faults import Patch, patched
from test_limits import FAILED
from test_machine import (
    FROZEN_CLOCK,
    INDEX,
    JUMPS,
    MINUTE,
    SECOND,
    START_MS,
    TEMPLATES,
    FrozenTimetable,
    profile,
    token_in,
)
from world import STREAM, Entry, World, read_entries

from worker.accounts import Accounts
from worker.celery import settling_template
from worker.errors import Kind, Outcome
from worker.policy import Cause, Counters, DeadLetterQueue
from worker.settings import to_ms
from worker.timetable import Begun, Token

#: Two logins are enough, so that breakers open and close all the time.
TWO_LOGINS = Patch(
    "shared", "local BREAKER_LOGINS, BREAKER_MS = 5, 600000", "local BREAKER_LOGINS, BREAKER_MS = 2, 600000"
)
BANK, OTHER = "bancosecurity.cl", "bice.cl"
ENTRIES = (
    *(Entry(name, f"login-{name}", f"1{name}", "15m", BANK, "callback") for name in "abc"),
    *(Entry(name, "shared", f"1{name}", "5m", BANK, "sync", "7m") for name in "de"),
    Entry("x", "elsewhere", "1x", "15m", OTHER),
)
ALIASES = tuple(entry.alias for entry in ENTRIES)
INSTITUTION_OF = {entry.alias: f"cl/business/{entry.institution}" for entry in ENTRIES}
BUDGET = 40
DAY_MS = 86_400_000
REST = timedelta(minutes=20)


def limited(rate: int, budget: int = BUDGET) -> Accounts:
    return read_entries(*ENTRIES, head=f"[limits]\nrate = {rate}\ndaily_requests = {budget}\n")


class LimitsMachine(RuleBasedStateMachine):
    store: redis.Redis  #: set by the test that runs the machine

    def __init__(self) -> None:
        super().__init__()
        self.store.flushall()
        self.world = World(self.store, TEMPLATES)
        self.timetable = FrozenTimetable(
            self.store, stream=STREAM, message=TEMPLATES[0], letter=TEMPLATES[1], settling=settling_template()
        )
        self.world.timetable = self.timetable
        self.open: list[Begun] = []
        self.requests: list[tuple[int, str, int]] = []  # elapsed ms, institution, server's day
        self.resting: dict[str, int] = {}  # login → until when (ms)
        self.elapsed_ms = 0
        self.set_clock(START_MS)

    def set_clock(self, now_ms: int) -> None:
        self.elapsed_ms += max(0, now_ms - getattr(self, "now_ms", now_ms))
        self.now_ms = self.timetable.clock_ms = now_ms
        self.store.set("clock:offset", now_ms)

    # -------------------------------------------------------------------------------------------- surroundings

    @initialize(rate=st.sampled_from((1, 2, 3)))
    def first_file(self, rate: int) -> None:
        self.put_another_rate_into_force(rate)
        for alias in ALIASES:
            self.timetable.poll(alias)

    @rule(rate=st.sampled_from((1, 2, 3, 100)))
    def put_another_rate_into_force(self, rate: int) -> None:
        self.rate = rate
        self.world.apply(limited(rate))

    @rule(jump_ms=st.sampled_from((*JUMPS[:6], *JUMPS[:6], -1, -SECOND, -2 * MINUTE)))
    def pass_time(self, jump_ms: int) -> None:
        self.set_clock(self.now_ms + jump_ms)

    @rule(extra_ms=st.sampled_from((-1, 0, 0, 1)))
    def pass_time_to_the_next_step(self, extra_ms: int) -> None:
        nexts = self.store.zrange("timetable", 0, 0, withscores=True)
        if nexts and int(nexts[0][1]) + extra_ms > self.now_ms:
            self.set_clock(int(nexts[0][1]) + extra_ms)

    @rule(is_paused=st.sampled_from((True, False, False)))
    def turn_the_switch(self, is_paused: bool) -> None:
        if is_paused:
            self.timetable.pause_all()
        else:
            self.timetable.resume_all()

    @rule(what=st.sampled_from(("poll", "poll", "pause", "resume", "redrive")), alias=st.sampled_from(ALIASES))
    def order(self, what: str, alias: str) -> None:
        getattr(self.timetable, what)(alias)

    # -------------------------------------------------------------------------------------------- polls

    @rule()
    def claim(self) -> None:
        claim = self.timetable.claim()
        assert not (claim.dispatched and self.timetable.is_paused())
        for lapse in claim.lapsed:
            self.timetable.postpone(lapse.token, 30 * SECOND, Counters(), FAILED[None])

    @rule(times=st.sampled_from((1, 2, 9)))
    def serve(self, times: int) -> None:
        """The way polls usually begin."""
        for _ in range(times):
            self.pass_time_to_the_next_step(0)
            self.claim()
            while self.store.llen("balances.polls"):
                self.take_a_message(0)

    @precondition(lambda self: self.store.llen("balances.polls"))
    @rule(index=INDEX)
    def take_a_message(self, index: int) -> None:
        message = self.store.lindex("balances.polls", index % self.store.llen("balances.polls"))
        self.store.lrem("balances.polls", 1, message)
        self.begin(token_in(message))

    def begin(self, token: Token) -> None:
        institution = INSTITUTION_OF[token.account]
        probe = self.store.hget(f"breaker:{institution}", "probe")
        is_held = self.store.sismember("breakers", institution)
        result = self.world.begin(token, f"caller {token}")
        if not isinstance(result, Begun):
            return
        assert not self.timetable.is_paused(), f"{token} was begun while everything was paused"
        assert self.resting.get(token.login, 0) <= self.now_ms, f"{token} was begun while its login rests"
        held = " ".join(map(str, token.args[1:]))
        assert not is_held or probe == held, f"{token} was begun behind the breaker of {probe}"
        day = self.now_ms // DAY_MS
        self.requests.append((self.elapsed_ms, institution, day))
        recent = [at for at, where, _ in self.requests if where == institution and at > self.elapsed_ms - MINUTE]
        assert len(recent) <= self.rate, f"{len(recent)} requests in a minute to {institution}"
        assert sum(on == day for *_, on in self.requests) <= BUDGET
        self.open = [result, *self.open][:8]

    @precondition(lambda self: self.open)
    @rule(index=INDEX, how=st.sampled_from(("settle", "accept", "suspend", *Cause, *Cause)))
    def end(self, index: int, how: str) -> None:
        begun = self.open[index % len(self.open)]
        match how:
            case "settle":
                settled = self.world.settle(begun)
                if settled and settled.result == "published":
                    self.resting.pop(begun.token.login, None)
            case "accept":
                self.timetable.accept(begun, None)
            case "suspend":
                outcome = Outcome(Kind.UNREADABLE, "UNREADABLE")
                self.timetable.suspend(begun.token, DeadLetterQueue.BAD_ANSWER, outcome)
            case Cause.GENERIC:
                self.fail_generically(begun)
            case cause:
                self.timetable.postpone(begun.token, 20 * SECOND, Counters(1), FAILED[Cause(cause)])

    def fail_generically(self, begun: Begun) -> None:
        """Every failure of the kind lets the login rest, the first one too: it is the policy that counts."""
        login, is_open = begun.token.login, self.world.account(begun.token.account)
        was_under_way = (is_open["state"], is_open["poll"], is_open["attempt"]) in {
            (state, str(begun.token.poll), str(begun.token.attempt)) for state in ("polling", "awaiting")
        }
        self.timetable.postpone(begun.token, 20 * SECOND, Counters(1), FAILED[Cause.GENERIC], rest=REST)
        if was_under_way:
            self.resting[login] = max(self.now_ms + to_ms(REST), self.resting.get(login, 0))

    @rule(login=st.sampled_from(sorted({entry.login for entry in ENTRIES})))
    def end_the_rest(self, login: str) -> None:
        self.timetable.unblock(login)
        self.resting.pop(login, None)

    @invariant()
    def every_account_has_exactly_one_next_step(self) -> None:
        everything = self.world.check()
        for alias, account in everything.accounts.items():
            if alias in everything.due[account["login"]]:
                assert account["login"] in everything.timetable, f"{account['login']} is lost"

    def teardown(self) -> None:
        """Everything is lifted, and the bank answers again."""
        self.timetable.resume_all()
        for alias in ALIASES:
            self.timetable.resume(alias)
            self.timetable.redrive(alias)
        self.world.apply(limited(100, 1_000_000))
        missing = set(ALIASES)
        for _ in range(200):
            nexts = self.store.zrange("timetable", 0, 0, withscores=True)
            self.set_clock(max(self.now_ms, int(nexts[0][1])))
            for lapse in self.timetable.claim().lapsed:
                self.timetable.postpone(lapse.token, SECOND, Counters(), FAILED[None])
            while message := self.store.rpop("balances.polls"):
                begun = self.world.begin(token_in(message), "last")
                if isinstance(begun, Begun):
                    self.world.settle(begun)
                    missing.discard(begun.token.account)
            if not missing:
                return
        raise AssertionError(f"{missing} are never polled again")


def run(store: redis.Redis, examples: int, *patches: Patch) -> None:
    with patched(FROZEN_CLOCK, TWO_LOGINS, *patches):
        run_state_machine_as_test(type("Machine", (LimitsMachine,), {"store": store}), settings=profile(examples, 40))


def test_there_is_no_way_around_the_limits(store: redis.Redis) -> None:
    run(store, 60)


FAULTS: dict[str, Patch] = {
    "begin asks for no licence": Patch("begin", "  if free_at > now then return 'rate', free_at end\n", ""),
    "begin lets anybody through an open breaker": Patch("begin", "    if b.probe ~= held then", "    if false then"),
    "begin does not know that a budget is spent": Patch(
        "begin", "  if spent then return spent, tomorrow(a.due) end\n", ""
    ),
    "claim does not know that everything is paused": Patch(
        "claim", "  if limits.is_paused then return now + PAUSE_LOOK_MS, 'pause' end\n", ""
    ),
    "a licence of the clock's future is worth nothing": Patch(
        "shared", "    redis.call('ZADD', key, whole(now), each)\n", "    redis.call('ZREM', key, each)\n"
    ),
    "begin keeps the place of what it gives back": Patch("begin", "  free(login, held)\n  if why", "  if why"),
    "begin and place know no rest": Patch(
        "shared", "  return l.rests_until ~= nil and tonumber(l.rests_until) > now\n", "  return false\n"
    ),
    "the window is half a minute": Patch(
        "shared", "WINDOW_MS, PACE_MS = 62000, 63000", "WINDOW_MS, PACE_MS = 30000, 31000"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_finds_a_planted_fault(store: redis.Redis, name: str) -> None:
    with pytest.raises(AssertionError):
        run(store, 300, FAULTS[name])
