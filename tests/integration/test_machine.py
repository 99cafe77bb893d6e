"""A machine that attacks the scripts: any script in any order, late, stale and twice, against a model and the promises.

Two judges look at every step. `model.py` says what each call must answer and where everything must stand afterwards.
`Promises` knows no rule of the scripts, only what is promised to the bank and the operator, and watches the server
from outside: a token is begun once, no account goes out early, no login has two requests at once …

`BALANCES_TEST_LONG=1` runs it for more than 10,000 steps. The clock stands still between steps, so that what fails once
fails again: one line of the scripts, the reading of the clock, is replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model import DEAD, DEADLINE_MS, HOLD_MS, MARGIN_MS, Model
from planted_faults import Patch, patched
from world import STREAM, Entry, Everything, World, answer, read_entries

from worker.accounts import Accounts
from worker.celery import settling_template
from worker.errors import Kind, Outcome
from worker.policy import Counters, Credential, DeadLetterQueue
from worker.timetable import Begun, CredentialRefused, Postponed, Timetable, Token

IS_LONG = bool(os.environ.get("BALANCES_TEST_LONG"))
#: Where the machine's clock begins.
START_MS = 1_790_000_000_000
FROZEN_CLOCK = Patch(
    "shared",
    "return real_now() + (tonumber(redis.call('GET', 'clock:offset')) or 0)",
    "return tonumber(redis.call('GET', 'clock:offset'))",
)
LOGINS = ("acme", "beta")
ALIASES = ("a", "b", "c", "d")
INSTITUTIONS = {"a": "bancosecurity.cl", "b": "bancosecurity.cl", "c": "bice.cl", "d": "bancosecurity.cl"}
SHORT_MS = 5_000
SPREAD_MS = 1_000
SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000
JUMPS = (1, SECOND, 20 * SECOND, MARGIN_MS, 5 * MINUTE, DEADLINE_MS + MARGIN_MS, 16 * MINUTE, 4 * HOUR, 25 * HOUR)
JUMPS_BACK = (-1, -SECOND, -2 * MINUTE, -5 * HOUR)


@lru_cache(maxsize=4096)
def accounts_file(entries: tuple[Entry, ...]) -> Accounts:
    return read_entries(*entries)


def entry(alias: str) -> st.SearchStrategy[Entry]:
    """An account as some accounts file may define it: on either login, with either number and interval."""
    return st.builds(
        Entry,
        st.just(alias),
        st.sampled_from(LOGINS),
        st.sampled_from((f"1{ord(alias)}", f"2{ord(alias)}")),
        st.sampled_from(("15m", "5m")),
        st.just(INSTITUTIONS[alias]),
        st.sampled_from(("callback", "callback", "sync")),
        st.sampled_from(("0s", "0s", "0s", "7m")),
    )


FILES = st.tuples(*(st.one_of(entry(alias), entry(alias), entry(alias), st.none()) for alias in ALIASES)).map(
    lambda entries: tuple(filter(None, entries))
)
TIMES = st.sampled_from((1, 1, 1, 2))
INDEX = st.sampled_from((0, 0, 0, 1, 2, 3))
BANK = st.sampled_from(("bank-1", "bank-1", "bank-1", "bank-2", "bank-2", "bank-3", ""))
KEY = st.sampled_from(("key-1", "key-1", "key-1", "key-2"))
CALLER = st.sampled_from("wwxy")
LOGIN = st.sampled_from(LOGINS)
ALIAS = st.sampled_from(ALIASES)


class FrozenTimetable(Timetable):
    """Its clock is the machine's."""

    clock_ms = START_MS

    def now_ms(self) -> int:
        return self.clock_ms


# ------------------------------------------------------------------------------------------------------------ promises


class Promises:
    """What holds between one look at the server and the next, whatever the rules are."""

    def __init__(self) -> None:
        self.is_paused = False
        self.begun: set[tuple[str, int, int]] = set()
        self.leases: dict[str, dict[Token, int]] = {}
        self.before: Everything | None = None
        self.read = 0
        self.overdue: set[str] = set()

    def pass_time(self, now_ms: int) -> None:
        """A lease that was over once does not come back with the clock."""
        for leases in self.leases.values():
            for token in [token for token, end_ms in leases.items() if end_ms <= now_ms]:
                del leases[token]

    def accept(self, token: Token, until_ms: int) -> None:
        """The bank is at work for as long as the login is held."""
        if token in self.leases.get(token.login, {}):
            self.leases[token.login][token] = until_ms

    def end(self, token: Token) -> None:
        self.leases.get(token.login, {}).pop(token, None)

    def begin(self, token: Token, now_ms: int, lease_ms: int) -> None:
        """A worker was told to send: nobody was told so before, and nobody of this login is under way."""
        assert not self.is_paused, f"{token} was begun while everything was paused"
        assert token.args[1:] not in self.begun, f"{token} was begun twice"
        self.begun.add(token.args[1:])
        leases = self.leases.setdefault(token.login, {})
        assert not leases, f"{token} was begun while {leases} is under way"
        leases[token] = now_ms + lease_ms

    def look(self, event: str, now: Everything, now_ms: int) -> None:
        before, self.before = self.before, now
        self.is_paused = {"pause_all": True, "resume_all": False}.get(event, self.is_paused)
        operations = [event_id for _, event_id, type_ in events_of(now) if type_ == "balance.observed.v1"]
        assert len(operations) == len(set(operations)), operations
        self.listen([event for event, _, _ in events_of(now)][self.read :], now_ms)
        self.read = len(now.events)
        self.overdue &= now.accounts.keys()
        if before is not None:
            for alias in before.accounts.keys() & now.accounts.keys():
                self._look_at(event, alias, before, now, now_ms)

    def listen(self, events: list[dict[str, str]], now_ms: int) -> None:
        """As a ledger: an account is overdue once, until it hears otherwise, at the latest with the next answer."""
        for event in events:
            alias, data = event["subject"], json.loads(event["data"])
            if event["type"] == "account.overdue.v1":
                assert alias not in self.overdue, f"{alias} is overdue twice"
                assert milliseconds(data["since"]) + data["interval"] * SECOND <= now_ms, data
                self.overdue.add(alias)
            elif event["type"] != "balance.observed.v1":
                self.overdue.discard(alias)
        answered = {e["subject"] for e in events if e["type"] == "balance.observed.v1" and '"late":false' in e["data"]}
        assert not answered & self.overdue, f"{answered & self.overdue} still overdue"

    def _look_at(self, event: str, alias: str, before: Everything, now: Everything, now_ms: int) -> None:
        old, new = before.accounts[alias], now.accounts[alias]
        old_token, new_token = token_of(old), token_of(new)
        assert new_token >= old_token, (alias, old_token, new_token)
        is_same = old["generation"] == new["generation"] and event != "apply"
        what = (event, alias, old, new)
        if new["state"] == "dispatched" and new_token != old_token:
            assert event == "claim", what
            assert not self.is_paused, what
            assert old["state"] in {"scheduled", "waiting"}, what
            assert "paused" not in old, what
            assert "blocked" not in before.logins[old["login"]], what
            assert int(old["due"]) <= now_ms, what
        if new["state"] == "polling" and old["state"] != "polling":
            assert (event, old["state"], old_token) == ("begin", "dispatched", new_token), what
            assert "paused" not in new, what
            assert "blocked" not in now.logins[new["login"]], what
        if new["state"] == "awaiting" and old["state"] != "awaiting":
            assert (event, old["state"]) == ("accept", "polling"), what
        if is_same and old["state"] == "waiting":
            assert new["state"] in {"waiting", "dispatched"}, what
            assert new["due"] == old["due"], what
        if is_same and old["state"] in {"suspended", "parked"}:
            back = {"suspended": {"redrive", "discard"}, "parked": {"release", "discard"}}[old["state"]]
            assert new["state"] == old["state"] or event in back, what
        if is_same and (old["state"], new["state"]) == ("scheduled", "scheduled") and event != "poll":
            assert int(new["due"]) >= int(old["due"]), what


def token_of(account: dict[str, str]) -> tuple[int, int]:
    return int(account["poll"]), int(account["attempt"])


def events_of(everything: Everything) -> Iterator[tuple[dict[str, str], str, str]]:
    for _, event in everything.events:
        yield event, event["id"], event["type"]


# ------------------------------------------------------------------------------------------------------------- machine


class TimetableMachine(RuleBasedStateMachine):
    """Every rule makes its call on the server and on the model; `times`: again, as if the first reply was lost."""

    store: redis.Redis  #: set by the test that runs the machine
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.store.flushall()
        self.world = World(self.store, TEMPLATES)
        self.timetable = FrozenTimetable(
            self.store, stream=STREAM, message=TEMPLATES[0], letter=TEMPLATES[1], settling=settling_template()
        )
        self.world.timetable = self.timetable
        self.model = Model(START_MS)
        self.promises = Promises()
        self.tokens: list[Token] = []
        self.open: list[Begun] = []
        self.lapsed: list[Token] = []
        self.operations = 0
        self.event = ""
        self.set_clock(START_MS)

    def set_clock(self, now_ms: int) -> None:
        self.now_ms = self.model.now_ms = self.timetable.clock_ms = now_ms
        self.store.set("clock:offset", now_ms)
        self.promises.pass_time(now_ms)

    def both(self, event: str, times: int, server: Callable[[], Any], model: Callable[[], Any]) -> None:
        self.event = event
        for _ in range(times):
            answered, expected = server(), model()
            assert answered == expected, f"{event} answers {answered}, the model {expected}"

    # -------------------------------------------------------------------------------------------- surroundings

    @initialize(entries=FILES)
    def first_file(self, entries: tuple[Entry, ...]) -> None:
        self.file = {entry.alias: entry for entry in entries}
        self.apply(1)

    @rule(entry=ALIAS.flatmap(entry), times=TIMES)
    def define_an_account(self, entry: Entry, times: int) -> None:
        self.file[entry.alias] = entry
        self.apply(times)

    @rule(alias=ALIAS, times=TIMES)
    def remove_an_account(self, alias: str, times: int) -> None:
        self.file.pop(alias, None)
        self.apply(times)

    def apply(self, times: int) -> None:
        entries = tuple(self.file[alias] for alias in sorted(self.file))
        file = accounts_file(entries or (Entry("a", "acme", "197"),))
        self.both("apply", times, lambda: self._apply(file), lambda: self.model.apply(file))

    def _apply(self, file: Accounts) -> None:
        self.timetable.apply(file, force=True)

    @rule(jump_ms=st.sampled_from((*JUMPS, *JUMPS, *JUMPS_BACK)))
    def pass_time(self, jump_ms: int) -> None:
        self.event = "time"
        self.set_clock(self.now_ms + jump_ms)

    @rule(login=LOGIN, extra_ms=st.sampled_from((-1, 0, 1)))
    def pass_time_to_the_next_step(self, login: str, extra_ms: int) -> None:
        self.event = "time"
        place = self.model.place(login) if login in self.model.logins else None
        if place is not None and place + extra_ms > self.now_ms:
            self.set_clock(place + extra_ms)

    @rule(threads=st.sampled_from((0, 1, 2, 100, 100)))
    def change_workers(self, threads: int) -> None:
        self.event = "workers"
        self.model.threads = threads
        self.world.workers(threads)

    @precondition(lambda self: self.model.queue)
    @rule(index=INDEX, is_lost=st.booleans())
    def lose_or_double_a_message(self, index: int, is_lost: bool) -> None:
        self.event = "queue"
        index %= len(self.model.queue)
        messages = self.store.lrange("balances.polls", 0, -1)
        messages.reverse()
        message, token = messages.pop(index), self.model.queue.pop(index)
        copies = 0 if is_lost else 2
        self.model.queue[index:index] = [token] * copies
        messages[index:index] = [message] * copies
        self.store.delete("balances.polls")
        if messages:
            self.store.lpush("balances.polls", *messages)

    # -------------------------------------------------------------------------------------------- the steps of a poll

    @rule(times=TIMES)
    def claim(self, times: int) -> None:
        self._claim(times)

    @precondition(lambda self: any(map(self._is_idle, self.model.logins)))
    @rule(index=INDEX, bank=BANK, key=KEY)
    def start_a_poll(self, index: int, bank: str, key: str) -> None:
        """The way a poll usually begins: its time comes, beat claims it, a worker takes it and what lay before it."""
        logins = sorted(self.model.logins, key=lambda name: not self._is_idle(name))
        self.pass_time_to_the_next_step(logins[index % len(logins)], 0)
        self.look()
        self._claim(1)
        while self.model.queue:
            self.look()
            self.take_a_message(1, "w", bank, key)

    @precondition(lambda self: any(map(self._is_idle, self.model.logins)))
    @rule(index=INDEX, bank=BANK, key=KEY)
    def start_another_poll(self, index: int, bank: str, key: str) -> None:
        """The same, so that it happens more often."""
        self.start_a_poll(index, bank, key)

    def _is_idle(self, login: str) -> bool:
        return self.model.place(login) is not None and not self.model.logins[login].is_begun

    def _claim(self, times: int) -> None:
        def server() -> tuple[int, int, list[Token]]:
            waiting = self.store.llen("balances.polls")
            claim = self.timetable.claim()
            assert self.store.llen("balances.polls") <= max(self.model.threads, waiting), "more messages than threads"
            self.lapsed = [lapse.token for lapse in claim.lapsed] or self.lapsed
            return claim.dispatched, claim.resent, [lapse.token for lapse in claim.lapsed]

        self.both("claim", times, server, self.model.claim)

    @rule(times=TIMES)
    def tell_overdue(self, times: int) -> None:
        self.both("overdue", times, lambda: list(self.timetable.tell_overdue().told), self.model.tell_overdue)

    @rule(times=TIMES)
    def wait_until_one_is_overdue(self, times: int) -> None:
        """Nobody polls for long enough."""
        moments = [account.overdue_at_ms for account in self.model.accounts.values() if account.overdue_at_ms]
        self.event = "time"
        self.set_clock(max([self.now_ms, *sorted(moments)[:1]]))
        self.tell_overdue(times)

    @precondition(lambda self: self.model.queue)
    @rule(times=TIMES, caller=CALLER, bank=BANK, key=KEY)
    def take_a_message(self, times: int, caller: str, bank: str, key: str) -> None:
        token = token_in(self.store.rpop("balances.polls"))
        assert token == self.model.queue.pop(0)
        self.tokens = [token, *(each for each in self.tokens if each != token)][:12]
        self.begin(token, times, caller, bank, key)

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX, times=TIMES, caller=CALLER, bank=BANK, key=KEY)
    def begin_again(self, index: int, times: int, caller: str, bank: str, key: str) -> None:
        self.begin(self.tokens[index % len(self.tokens)], times, caller, bank, key)

    def begin(self, token: Token, times: int, caller: str, bank: str, key: str) -> None:
        def server() -> str:
            was_polling = self.world.account(token.account)["state"] == "polling"
            digest = self.world.callback(token)
            result = self.timetable.begin(token, caller=caller, scheme="api-key", bank=bank, key=key, callback=digest)
            if isinstance(result, CredentialRefused):
                return f"refused {result.credential} {result.times}"
            if not isinstance(result, Begun):
                return "stale"
            if not was_polling:
                self.promises.begin(token, self.now_ms, result.lease_ms)
                self.open = [result, *self.open][:12]
                self.sent_with(token, bank, key)
            return "begun"

        self.both("begin", times, server, lambda: self.model.begin(token, caller, bank, key))

    def sent_with(self, token: Token, bank: str, key: str) -> None:
        self.secrets = {**getattr(self, "secrets", {}), token: {"bank": bank, "key": key}}

    def some_poll(self, index: int) -> Begun:
        """One that somebody may still be busy with; those under way come first."""
        polls = sorted(self.open, key=lambda begun: not self.model.is_at(begun.token, "polling", "awaiting"))
        return polls[index % len(polls)]

    @precondition(lambda self: self.open)
    @rule(
        index=INDEX,
        times=TIMES,
        is_new=st.sampled_from((True, True, True, False)),
        ids=st.sampled_from((("X",), ("X",), (), ("Y",), ("X", "Y"))),
        amount=st.sampled_from(("10", "20")),
    )
    def settle(self, index: int, times: int, is_new: bool, ids: tuple[str, ...], amount: str) -> None:
        begun = self.some_poll(index)
        self.operations += is_new
        self._settle(begun, times, f"operation-{self.operations}", ids, amount)

    def _settle(self, begun: Begun, times: int, operation: str, ids: tuple[str, ...], amount: str) -> None:
        # A worker counts from begin by its monotonic clock, so an answer is never older than its poll.
        fetched_at_ms = max(self.now_ms, begun.now_ms)
        event = answer(begun, amount, operation, ids, fetched_at_ms)

        def server() -> str:
            settled = self.timetable.settle(begun, event)
            if settled is not None:
                self.promises.end(begun.token)
            return settled.result if settled else "foreign"

        self.both(
            "settle",
            times,
            server,
            lambda: self.model.settle(
                begun.token, begun.generation, begun.definition, operation, ids, amount, fetched_at_ms
            ),
        )

    @precondition(lambda self: self.open)
    @rule(
        index=INDEX,
        times=TIMES,
        countdown_ms=st.sampled_from((0, 20 * SECOND, 4 * HOUR)),
        tried=st.tuples(*[st.integers(0, 3)] * 3),
    )
    def postpone(self, index: int, times: int, countdown_ms: int, tried: tuple[int, int, int]) -> None:
        self._postpone(self.some_poll(index).token, times, countdown_ms, tried)

    def _postpone(
        self, token: Token, times: int, countdown_ms: int, tried: tuple[int, int, int], *, is_answer: bool = False
    ) -> None:
        def server() -> str:
            self.promises.end(token)
            counters = Counters(*tried, token.attempt)
            result = self.timetable.postpone(token, countdown_ms, counters, outcome("E201"), is_answer=is_answer)
            return f"postponed {result.due_ms}" if result else "stale"

        self.both(
            "postpone", times, server, lambda: self.model.postpone(token, countdown_ms, tried, is_answer=is_answer)
        )

    # -------------------------------------------------------------------------------------------- callbacks

    @precondition(lambda self: self.open)
    @rule(index=INDEX, times=TIMES, life_ms=st.sampled_from((None, None, 5 * MINUTE, -HOUR, 9 * 24 * HOUR)))
    def accept(self, index: int, times: int, life_ms: int | None) -> None:
        begun = self.some_poll(index)
        promised_ms = None if life_ms is None else self.now_ms + life_ms
        moment = None if promised_ms is None else datetime.fromtimestamp(promised_ms / 1000, UTC)

        def server() -> int | None:
            deadline_ms = self.timetable.accept(begun, moment)
            if deadline_ms is not None:
                self.promises.accept(begun.token, min(self.now_ms + HOLD_MS, deadline_ms))
            return deadline_ms

        self.both("accept", times, server, lambda: self.model.accept(begun.token, promised_ms))

    @precondition(lambda self: self.open)
    @rule(index=INDEX, times=TIMES, body=st.sampled_from("111223456"))
    def receive(self, index: int, times: int, body: str) -> None:
        token = self.some_poll(index).token
        callback = (self.world.callback(token), body.encode(), "application/json")
        self.both(
            "receive",
            times,
            lambda: self.timetable.receive([callback], is_durable=False)[0].result,
            lambda: self.model.receive(token, body),
        )

    @precondition(lambda self: self.model.settlings)
    @rule(index=INDEX, is_one=st.booleans())
    def lose_word_of_answers(self, index: int, is_one: bool) -> None:
        """One message of them, or every one."""
        self.event = "queue"
        for _ in range(1 if is_one else len(self.model.settlings)):
            message = self.store.lindex("balances.answers", index % len(self.model.settlings))
            self.model.settlings.remove(token_in(message))
            self.store.lrem("balances.answers", 1, message)

    @precondition(lambda self: self.model.answers)
    @rule(
        index=INDEX,
        times=TIMES,
        how=st.sampled_from(("settle", "settle", "postpone", "suspended", "parked", "nothing")),
        amount=st.sampled_from(("10", "20")),
        is_kept=st.sampled_from((False, False, False, True)),
    )
    def settle_an_answer(self, index: int, times: int, how: str, amount: str, is_kept: bool) -> None:
        """As a worker does with one body; `is_kept`: it dies before it lets go of it."""
        tokens = sorted(
            self.model.answers, key=lambda token: (not self.model.is_at(token, "polling", "awaiting"), *token.args)
        )
        token = tokens[index % len(tokens)]
        unsettled = self.timetable.unsettled(token)
        assert unsettled is not None
        assert sorted(body.decode() for body in unsettled.bodies.values()) == sorted(self.model.bodies[token])
        name, body = next(iter(unsettled.bodies.items()))
        if how == "settle":
            self._settle(unsettled.begun, times, f"{token.task_id}.{token.attempt}.{body.decode()}", ("X",), amount)
        elif how == "postpone":
            self._postpone(token, times, 20 * SECOND, (1, 0, 0), is_answer=True)
        elif how != "nothing":
            self._suspend(token, times, how, is_answer=True)
        if is_kept or how == "nothing":
            return
        self.look()
        for _ in range(times):
            self.event = "forget"
            self.timetable.forget_answer(token, [name])
            self.model.forget(token, body.decode())

    # -------------------------------------------------------------------------------------------- how polls fail

    @precondition(lambda self: self.lapsed)
    @rule(index=INDEX, times=TIMES, is_dead=st.booleans())
    def judge_a_lapse(self, index: int, times: int, is_dead: bool) -> None:
        """As beat does, perhaps a while after its claim, perhaps as the second of two beats."""
        token = self.lapsed[index % len(self.lapsed)]
        if is_dead:
            self._suspend(token, times, "suspended")
        else:
            self._postpone(token, times, 30 * SECOND, (1, 0, 1))

    @precondition(lambda self: self.open)
    @rule(index=INDEX, times=TIMES, state=st.sampled_from(("suspended", "parked", "parked")))
    def suspend(self, index: int, times: int, state: str) -> None:
        self._suspend(self.some_poll(index).token, times, state)

    def _suspend(self, token: Token, times: int, state: str, *, is_answer: bool = False) -> None:
        queue = DeadLetterQueue.AFTER_NOTIFICATION if state == "parked" else DeadLetterQueue.RETRIES_EXHAUSTED

        def server() -> str:
            self.promises.end(token)
            return named(self.timetable.suspend(token, queue, outcome("E401"), short_ms=SHORT_MS, is_answer=is_answer))

        self.both("suspend", times, server, lambda: self.model.suspend(token, state, SHORT_MS, is_answer=is_answer))

    @precondition(lambda self: self.open)
    @rule(index=INDEX, times=TIMES, kind=st.sampled_from(Credential))
    def block(self, index: int, times: int, kind: Credential) -> None:
        token = self.some_poll(index).token
        self._block(token, times, kind, self.secrets[token][kind], refused=False)

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX, times=TIMES, kind=st.sampled_from(Credential), fingerprint=st.one_of(BANK, KEY))
    def block_what_was_refused(self, index: int, times: int, kind: Credential, fingerprint: str) -> None:
        if fingerprint.startswith(kind) and fingerprint not in self.model.failed:
            return
        if not fingerprint or fingerprint.startswith(kind):
            self._block(self.tokens[index % len(self.tokens)], times, kind, fingerprint, refused=True)

    def _block(self, token: Token, times: int, kind: Credential, fingerprint: str, *, refused: bool) -> None:
        code = "E101" if kind is Credential.BANK else "A000"

        def server() -> str:
            self.promises.end(token)
            return named(
                self.timetable.block(token, kind, fingerprint, outcome(code), short_ms=SHORT_MS, refused=refused)
            )

        self.both(
            "block",
            times,
            server,
            lambda: self.model.block(token, kind.value, fingerprint, code, SHORT_MS, refused=refused),
        )

    # -------------------------------------------------------------------------------------------- operators

    @rule(what=st.sampled_from(("poll", "pause", "resume", "redrive", "discard")), index=INDEX, times=TIMES)
    def order(self, what: str, index: int, times: int) -> None:
        """To accounts that are likely to obey, first."""
        alias = sorted(ALIASES, key=lambda alias: not self._obeys(what, alias))[index]
        self._order(what, alias, times)

    def _order(self, what: str, alias: str, times: int) -> None:
        self.both(what, times, lambda: getattr(self.timetable, what)(alias), lambda: getattr(self.model, what)(alias))

    def _obeys(self, what: str, alias: str) -> bool:
        account = self.model.accounts.get(alias)
        states = {"poll": {"scheduled"}, "redrive": {"suspended"}, "discard": {"suspended", "parked"}}.get(what)
        if account is None or account.state == "retired":
            return False
        return account.state in states if states else account.is_paused == (what == "resume")

    @precondition(lambda self: self.model.queue or self.open)
    @rule(times=TIMES)
    def pause_everything(self, times: int) -> None:
        self.both("pause_all", times, self.timetable.pause_all, self.model.pause_all)

    @precondition(lambda self: self.model.is_paused)
    @rule(times=TIMES)
    def resume_everything(self, times: int) -> None:
        self.both("resume_all", times, self.timetable.resume_all, self.model.resume_all)

    @precondition(lambda self: self.model.is_paused)
    @rule()
    def resume_everything_soon(self) -> None:
        """So that most of what happens does not happen under it."""
        self.resume_everything(1)

    @precondition(lambda self: any(account.state in {"parked", "polling"} for account in self.model.accounts.values()))
    @rule(
        aliases=st.lists(st.sampled_from(ALIASES), max_size=2),
        institution=st.sampled_from(("", "", *INSTITUTIONS.values())),
        login=st.sampled_from(("", "", *LOGINS)),
        times=TIMES,
    )
    def release(self, aliases: list[str], institution: str, login: str, times: int) -> None:
        self.both(
            "release",
            times,
            lambda: self.timetable.release(aliases, institution=institution, login=login, spread_ms=SPREAD_MS),
            lambda: self.model.release(aliases, institution, login, SPREAD_MS),
        )

    @precondition(lambda self: any(login.blocked for login in self.model.logins.values()))
    @rule(index=INDEX, by=st.sampled_from(("operator", "bank", "key")), number=st.integers(0, 3), times=TIMES)
    def unblock(self, index: int, by: str, number: int, times: int) -> None:
        logins = sorted(self.model.logins, key=lambda name: not self.model.logins[name].blocked)
        login = logins[index % len(logins)]
        self._unblock(login, by, "" if by == "operator" or not number else f"{by}-{number}", times)

    def _unblock(self, login: str, by: str, fingerprint: str, times: int) -> None:
        def server() -> str | None:
            if by == "operator":
                return self.timetable.unblock(login)
            return self.timetable.unblock_with(login, Credential(by), fingerprint)

        self.both("unblock", times, server, lambda: self.model.unblock(login, by, fingerprint))

    @precondition(lambda self: any(map(self._is_down, ALIASES)))
    @rule()
    def bring_everything_back(self) -> None:
        """What a diligent operator does in the morning; without it most worlds end with everybody dead."""
        for login in [name for name, login in self.model.logins.items() if login.blocked]:
            self._unblock(login, "operator", "", 1)
            self.look()
        for alias in filter(self._is_down, ALIASES):
            for what in ("resume", "redrive"):
                self._order(what, alias, 1)
                self.look()
        self.release([], "", "", 1)

    def _is_down(self, alias: str) -> bool:
        account = self.model.accounts.get(alias)
        if account is None or account.state == "retired":
            return False
        return account.state in DEAD or account.is_paused or bool(self.model.logins[account.login].blocked)

    # -------------------------------------------------------------------------------------------- the two judges

    @invariant()
    def look(self) -> None:
        TimetableMachine.steps += 1
        everything = self.world.check()
        self.promises.look(self.event, everything, self.now_ms)
        assert accounts_on(everything) == accounts_in(self.model)
        assert logins_on(everything) == logins_in(self.model)
        assert everything.timetable == {
            name: place for name in self.model.logins if (place := self.model.place(name)) is not None
        }
        assert set(everything.failed) == self.model.failed
        assert [token_in(text) for text in reversed(everything.polls)] == self.model.queue
        assert sorted(token_in(text).args for text in everything.settlings) == sorted(
            token.args for token in self.model.settlings
        )
        assert everything.answers == {
            " ".join(map(str, token.args[1:])): at for token, at in self.model.answers.items()
        }
        assert sorted(told_on(everything)) == sorted(self.model.events)


def outcome(code: str) -> Outcome:
    return Outcome(Kind.ANSWERED, code, "DO_NOT_RETRY", "said the bank")


def named(result: Postponed | str | None) -> str:
    return f"postponed {result.due_ms}" if isinstance(result, Postponed) else result or "stale"


def token_in(text: str) -> Token:
    _, kwargs, _ = json.loads(json.loads(text)["body"])
    return Token(**kwargs)


def accounts_on(everything: Everything) -> dict[str, object]:
    return {
        alias: (
            account["state"],
            int(account["due"]) if account["state"] in {"scheduled", "waiting", "awaiting"} else None,
            "paused" in account,
            *token_of(account),
            account["login"],
            int(account["generation"]),
            tuple(int(account[name]) for name in ("tries", "waits", "losses")),
            everything.overdue_at.get(alias),
            alias in everything.overdue,
            "overdue" in account,
        )
        for alias, account in everything.accounts.items()
    }


def accounts_in(model: Model) -> dict[str, object]:
    return {
        alias: (
            account.state,
            account.due_ms if account.state in {"scheduled", "waiting", "awaiting"} else None,
            account.is_paused,
            account.poll,
            account.attempt,
            account.login,
            account.generation,
            account.counters,
            account.overdue_at_ms,
            account.is_overdue,
            account.is_told,
        )
        for alias, account in model.accounts.items()
        if account.state != "retired"
    }


def logins_on(everything: Everything) -> dict[str, object]:
    return {
        name: (
            login.get("holder"),
            "begun" in login,
            int(login.get("refusals", 0)),
            login.get("blocked", ""),
            login.get("fingerprint", ""),
            login.get("code", ""),
            "manual" in login,
            "probing" in login,
        )
        for name, login in everything.logins.items()
    }


def logins_in(model: Model) -> dict[str, object]:
    return {
        name: (
            f"{login.holder.account} {login.holder.poll} {login.holder.attempt}" if login.holder else None,
            login.is_begun,
            login.refusals,
            login.blocked,
            login.fingerprint,
            login.code if login.blocked else "",
            login.is_manual,
            login.is_probing,
        )
        for name, login in model.logins.items()
    }


def told_on(everything: Everything) -> Iterator[tuple[str, ...]]:
    for event, event_id, type_ in events_of(everything):
        data = json.loads(event["data"])
        if type_ == "balance.observed.v1":
            yield "balance", event_id, event["subject"], str(data["late"]), str(data["changed"])
        else:
            why = data.get("state") or data.get("by") or str(milliseconds(data["since"]))
            yield type_.split(".")[1], event["subject"], why


def milliseconds(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


# --------------------------------------------------------------------------------------------------------------- tests


TEMPLATES = World.templates()


def profile(examples: int, steps: int, *, shrink: bool = IS_LONG) -> settings:
    """The same examples in every run: what is red in CI is red here. Shrinking takes minutes, so only on demand."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=True,
        phases=[Phase.generate, *[Phase.shrink] * shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def machine_on(store: redis.Redis, *patches: Patch) -> Iterator[type[TimetableMachine]]:
    """The machine on this server, with the clock standing still and whatever else is patched into the scripts."""
    with patched(FROZEN_CLOCK, *patches):
        yield type("Machine", (TimetableMachine,), {"store": store})


def run(store: redis.Redis, chosen: settings, *patches: Patch) -> None:
    with machine_on(store, *patches) as machine:
        run_state_machine_as_test(machine, settings=chosen)


def test_the_scripts_do_what_the_model_does_and_keep_every_promise(store: redis.Redis) -> None:
    run(store, profile(120, 40))


@pytest.mark.skipif(not IS_LONG, reason="long; set BALANCES_TEST_LONG=1")
def test_the_same_for_more_than_ten_thousand_steps(store: redis.Redis) -> None:
    TimetableMachine.steps = 0
    run(store, profile(400, 60))
    print(f"{TimetableMachine.steps} steps")
    assert TimetableMachine.steps > 10_000
