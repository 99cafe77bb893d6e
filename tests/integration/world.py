"""A small world on a real server: one login with two accounts, moved through the timetable's scripts by their names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from uuid import uuid4

import redis

from worker.accounts import Accounts, Limits, Retry, parse_accounts
from worker.balances import Answer, Balance
from worker.celery import letter_template, poll_template
from worker.errors import Kind, Outcome
from worker.policy import Counters, Credential, DeadLetterQueue
from worker.stream import observed
from worker.timetable import (
    Begun,
    Claim,
    CredentialRefused,
    Event,
    HeldBack,
    OtherScheme,
    Postponed,
    Settled,
    Timetable,
    Token,
    source_of,
)

STREAM = "balances"
#: Every account's interval; the accounts of a world are due within this time.
EVERY_S = 900
MINUTE_MS = 60_000
#: When every world begins. The next regular slots of a, b, c and d are 862, 788, 565 and 472 s away then.
START_MS = 1_800_000_200_000
#: A lease: the request's deadline (190 s) and the margin (60 s).
LEASE_MS = 250_000

FILE = """
[[accounts]]
alias = "{alias}"
institution = "{institution}"
number = "{number}"
login = "{login}"
every = "{every}"
{more}
"""
BANK = "bancosecurity.cl"


def accounts_file(*aliases: str, login: str = "acme", every: str = "15m", number: str = "", more: str = "") -> bytes:
    """An accounts file; each alias with a number of its own unless one is given."""
    logins = f"[logins.{login}]\n"
    return (
        logins
        + "".join(
            FILE.format(
                alias=alias, number=number or f"9{index:07}", login=login, every=every, more=more, institution=BANK
            )
            for index, alias in enumerate(aliases)
        )
    ).encode()


def read(*aliases: str, **kwargs: str) -> Accounts:
    is_callback = "callback" in kwargs.get("more", "")
    return parse_accounts(accounts_file(*aliases, **kwargs), "accounts.toml", callback_configured=is_callback)


@dataclass(frozen=True)
class Entry:
    """One account of a file with several logins."""

    alias: str
    login: str = "acme"
    number: str = ""
    every: str = "15m"
    institution: str = BANK
    mode: str = "sync"
    min_gap: str = "0s"


def read_entries(*entries: Entry, head: str = "") -> Accounts:
    """An accounts file of these entries, each with a number of its own unless one is given."""
    logins = "".join(f"[logins.{login}]\n" for login in sorted({entry.login for entry in entries}))
    tables = "".join(
        FILE.format(
            alias=entry.alias,
            number=entry.number or f"1{int.from_bytes(entry.alias.encode()[-4:], 'big'):012}",
            login=entry.login,
            every=entry.every,
            institution=entry.institution,
            more=f'mode = "{entry.mode}"\nmin_gap = "{entry.min_gap}"',
        )
        for entry in entries
    )
    return parse_accounts((head + logins + tables).encode(), "accounts.toml", callback_configured=True)


OUTCOMES = {
    "postpone": Outcome(Kind.ANSWERED, "E201", "RETRY_IMMEDIATELY", "unavailable"),
    "suspend": Outcome(Kind.ANSWERED, "E401", "DO_NOT_RETRY", "no such account"),
    "park": Outcome(Kind.ANSWERED, "E301", "RETRY_AFTER_NOTIFICATION", "later"),
    "block": Outcome(Kind.ANSWERED, "E101", "DO_NOT_RETRY", "bad credentials"),
}


def answer(begun: Begun, amount: str, operation: str | None, ids: tuple[str, ...], fetched_at_ms: int) -> Event:
    """A balance as a worker would have it published."""
    as_of = datetime(2017, 7, 21, 17, 32, 28, tzinfo=timezone(timedelta(hours=-4)))
    balances = tuple(Balance(each, "ClosingAvailable", "Credit", Decimal(amount), "CLP", as_of) for each in ids)
    said = Answer(operation or str(uuid4()), balances)
    poll = max(begun.token.poll, 0)  # the one before the first is none that could be published
    data = {**observed(begun.definition, poll, said, fetched_at_ms), "account": begun.token.account}
    as_of_ms = int(as_of.timestamp() * 1000) if ids else None
    return Event(said.operation_id, source_of(begun.definition), data, f"fp {amount}", ids, fetched_at_ms, as_of_ms)


@dataclass
class World:
    """The timetable, and what a test needs to push it around. `now` moves the one clock."""

    client: redis.Redis
    template: tuple[str, str] = field(default_factory=lambda: World.templates())
    offset_ms: int = 0
    bank: str = "bank-1"
    key: str = "key-1"

    def __post_init__(self) -> None:
        message, letter = self.template
        self.timetable = Timetable(self.client, stream=STREAM, message=message, letter=letter, actor="anna@desk")
        self.set_clock(START_MS)
        self.workers(100)

    @staticmethod
    @lru_cache(maxsize=1)
    def templates() -> tuple[str, str]:
        """Of a poll's message and of a dead letter."""
        return poll_template(), letter_template()

    # -------------------------------------------------------------------------------------------- surroundings

    def workers(self, threads: int) -> None:
        self.client.delete("workers")
        self.timetable.register_worker("test", threads, ttl_s=3600)

    def set_clock(self, now_ms: int) -> None:
        """Let it go on from this moment, so that no test depends on the time of day at which it runs."""
        seconds, micros = self.client.time()
        self.offset_ms = 0
        self.pass_time(now_ms - seconds * 1000 - micros // 1000)

    def pass_time(self, delta: timedelta | int) -> None:
        """Move the one clock on, by a timedelta or milliseconds."""
        self.offset_ms += delta if isinstance(delta, int) else int(delta.total_seconds() * 1000)
        self.client.set("clock:offset", self.offset_ms)

    def apply(self, accounts: Accounts, *, force: bool = True) -> int:
        return self.timetable.apply(accounts, force=force)

    def due_now(self, alias: str) -> None:
        """Make the account the first of its login, as an operator would."""
        assert self.timetable.poll(alias) is None

    # -------------------------------------------------------------------------------------------- one account's steps

    def claim(self) -> Claim:
        return self.timetable.claim()

    def token(self, alias: str) -> Token:
        """The account's last token, open or not."""
        account = self.account(alias)
        return Token(account.get("login", "acme"), alias, int(account.get("poll", 0)), int(account.get("attempt", 0)))

    def known(self, alias: str) -> Begun:
        """What a worker knows of the account's last token, open or not, while it waits for the answer."""
        definition = read(alias).definitions[alias]
        generation = int(self.account(alias).get("generation", 1))
        now_ms = self.timetable.now_ms()
        return Begun(self.token(alias), now_ms, LEASE_MS, generation, definition, Retry(), Limits(), Counters())

    def begin(self, token: Token, caller: str = "caller") -> Begun | CredentialRefused | HeldBack | OtherScheme | None:
        return self.timetable.begin(
            token, caller=caller, scheme="api-key", bank=self.bank, key=self.key, callback=self.callback(token)
        )

    def callback(self, token: Token) -> str:
        """The digest of the token that this attempt would be called back with, in callback mode."""
        return f"digest of {token.account} {token.poll} {token.attempt}"

    def start(self, alias: str) -> Begun:
        """Claim and begin the account's poll, at once."""
        if self.state(alias) == "scheduled":
            self.due_now(alias)
        self.claim()
        begun = self.begin(self.token(alias))
        assert isinstance(begun, Begun), begun
        return begun

    def settle(
        self, begun: Begun, *, amount: str = "10000", operation: str | None = None, ids: tuple[str, ...] = ("873458",)
    ) -> Settled | None:
        return self.timetable.settle(begun, answer(begun, amount, operation, ids, self.timetable.now_ms()))

    def postpone(self, token: Token, seconds: float = 20) -> Postponed | None:
        counters = Counters(1, 0, 0, token.attempt)
        return self.timetable.postpone(token, int(seconds * 1000), counters, OUTCOMES["postpone"])

    def suspend(self, token: Token) -> object:
        return self.timetable.suspend(token, DeadLetterQueue.DO_NOT_RETRY, OUTCOMES["suspend"])

    def park(self, token: Token) -> object:
        return self.timetable.suspend(token, DeadLetterQueue.AFTER_NOTIFICATION, OUTCOMES["park"], short_ms=5000)

    def block(self, token: Token, *, refused: bool = False, credential: Credential = Credential.BANK) -> object:
        failed = self.bank if credential is Credential.BANK else self.key
        return self.timetable.block(token, credential, failed, OUTCOMES["block"], short_ms=5000, refused=refused)

    # -------------------------------------------------------------------------------------------- looking

    def account(self, alias: str) -> dict[str, str]:
        return dict(self.timetable.accounts([alias]))[alias]

    def login(self, name: str = "acme") -> dict[str, str]:
        return self.timetable.logins()[name]

    def state(self, alias: str) -> str:
        """The state with what lies over it, in the words of docs/states.md."""
        account = self.account(alias)
        if not account:
            return "unknown"
        login = self.client.hgetall(f"login:{account['login']}")
        overlays = ("paused",) * ("paused" in account) + ("blocked",) * ("blocked" in login)
        if account["state"] == "retired":
            overlays = ()
        return " ".join((*overlays, account["state"]))

    def due(self, alias: str) -> int | None:
        score = self.client.zscore(f"due:{self.account(alias)['login']}", alias)
        return None if score is None else int(score)

    def latest(self, alias: str) -> dict | None:
        text = self.timetable.latest().get(alias)
        return None if text is None else json.loads(text)

    def snapshot(self) -> dict[str, object]:
        """Everything that Redis holds, but what counts and records calls."""
        readers = {
            "string": self.client.get,
            "hash": self.client.hgetall,
            "zset": lambda key: self.client.zrange(key, 0, -1, withscores=True),
            "set": self.client.smembers,
            "list": lambda key: self.client.lrange(key, 0, -1),
            "stream": self.client.xrange,
        }
        kept = {key: readers[self.client.type(key)](key) for key in self.client.scan_iter()}
        kept.get("config", {}).pop("claimed_at", None)
        return {key: value for key, value in kept.items() if key not in {"counts", "releases", "audit"}}

    def messages(self, queue: str = "balances.polls") -> list[dict]:
        return [json.loads(text) for text in reversed(self.client.lrange(queue, 0, -1))]

    def events(self) -> list[dict]:
        return [{**attributes, "data": json.loads(attributes["data"])} for _, attributes in self.client.xrange(STREAM)]

    # -------------------------------------------------------------------------------------------- what always holds

    def check(self) -> Everything:
        """The invariants of the timetable, on everything that Redis holds."""
        everything = Everything.read(self.client)
        for login in everything.logins:
            everything.check_place(login)
        for alias in everything.revisions:
            everything.check_account(alias)
        everything.check_letters()
        everything.check_counts()
        return everything


@dataclass(frozen=True)
class Everything:
    """What Redis holds of the timetable, read in one go."""

    timetable: dict[str, float]
    answers: dict[str, float]
    overdue_at: dict[str, float]
    overdue: set[str]
    revisions: dict[str, str]
    parked: set[str]
    failed: dict[str, str]
    polls: list[str]
    settlings: list[str]
    letters: dict[DeadLetterQueue, list[str]]
    events: list[tuple[str, dict[str, str]]]
    logins: dict[str, dict[str, str]]
    due: dict[str, dict[str, float]]
    accounts: dict[str, dict[str, str]]
    counted: Counted

    @classmethod
    def read(cls, client: redis.Redis) -> Everything:
        pipeline = client.pipeline()
        for key in ("timetable", "answers", "overdue:at"):
            pipeline.zrange(key, 0, -1, withscores=True)
        for key in ("revisions", "failed"):
            pipeline.hgetall(key)
        for key in ("logins", "parked", "overdue"):
            pipeline.smembers(key)
        for key in ("balances.polls", "balances.answers", *DeadLetterQueue):
            pipeline.lrange(key, 0, -1)
        pipeline.xrange(STREAM)
        timetable, answers, overdue_at, revisions, failed, logins, parked, overdue, *lists, events = pipeline.execute()
        polls, settlings, *letters = lists
        names, aliases = sorted(logins), sorted(revisions)
        for name in names:
            pipeline.hgetall(f"login:{name}")
            pipeline.zrange(f"due:{name}", 0, -1, withscores=True)
        for alias in aliases:
            pipeline.hgetall(f"account:{alias}")
        found = pipeline.execute()
        of_logins, accounts = found[: 2 * len(names)], found[2 * len(names) :]
        return cls(
            timetable=dict(timetable),
            answers=dict(answers),
            overdue_at=dict(overdue_at),
            overdue=overdue,
            revisions=revisions,
            parked=parked,
            failed=failed,
            polls=polls,
            settlings=settlings,
            letters=dict(zip(DeadLetterQueue, letters, strict=True)),
            events=events,
            logins=dict(zip(names, of_logins[::2], strict=True)),
            due={name: dict(due) for name, due in zip(names, of_logins[1::2], strict=True)},
            accounts=dict(zip(aliases, accounts, strict=True)),
            counted=Counted.read(client),
        )

    def check_place(self, login: str) -> None:
        """The place follows from the login's state."""
        state, due = self.logins[login], self.due[login]
        expected = min(due.values(), default=None)
        if "probing" in state:
            expected = due.get(state.get("probe", ""), expected)
        if expected is not None:
            held = max(float(state.get("not_before", 0)), float(state.get("rests_until", 0)))
            deadlines = [at for alias, at in due.items() if self.accounts[alias]["state"] == "awaiting"]
            expected = min(held, *deadlines) if held > expected and deadlines else max(held, expected)
        if "holder" in state:
            expected = float(state["until"])
        if "blocked" in state:
            expected = None
        assert self.timetable.get(login) == expected, (login, state, due)
        assert ("holder" in state) == ("until" in state), (login, state)
        assert "holder" in state or state.keys().isdisjoint({"begun", "refusals", "refused_by"}), (login, state)
        assert all(self.accounts[alias]["login"] == login for alias in due), (login, due)

    def check_account(self, alias: str) -> None:
        """Exactly one next step: a due time, a place held, or a letter; unless it is paused."""
        account = self.accounts[alias]
        state, login, due = account["state"], self.logins[account["login"]], self.due[account["login"]]
        holder = login.get("holder", "").split()
        is_holding = holder == [alias, account["poll"], account["attempt"]]
        is_planned = state in {"scheduled", "waiting"} or (
            state == "awaiting" and not is_holding and "answered" not in account
        )
        assert (alias in due) == (is_planned and "paused" not in account), (alias, account)
        if alias in due:
            assert account["due"] == f"{due[alias]:.0f}"
        if state in {"dispatched", "polling"} and "answered" not in account:
            assert is_holding, (alias, account, holder)
            assert ("begun" in login) == (state == "polling"), (alias, account, login)
        if state in {"polling", "awaiting"} and "answered" in account:
            assert f"{alias} {account['poll']} {account['attempt']}" in self.answers
        if state == "dispatched":
            assert "paused" not in account, (alias, account)
            assert "blocked" not in login, (alias, login)
        if state in {"suspended", "parked"}:
            assert not is_holding, (alias, account, holder)
        if state == "scheduled":
            assert [account[name] for name in ("tries", "waits", "losses")] == ["0"] * 3, (alias, account)
        is_waiting = state in {"scheduled", "waiting", "dispatched"}
        if is_waiting and "paused" not in account and "blocked" not in login:
            assert (alias in self.overdue) != (alias in self.overdue_at), (alias, account)
        else:
            assert alias not in self.overdue, (alias, account)
        assert ("letter" in account) == (state in {"suspended", "parked"}), (alias, account)
        assert (alias in self.parked) == (state == "parked")

    def check_letters(self) -> None:
        """Every letter has its account or login, and the other way round."""
        kept = [letter for letters in self.letters.values() for letter in letters]
        held = [state["letter"] for state in (*self.accounts.values(), *self.logins.values()) if "letter" in state]
        assert sorted(kept) == sorted(held)
        for login, state in self.logins.items():
            assert ("letter" in state) == ("blocked" in state), (login, state)

    def check_counts(self) -> None:
        """What the scripts count is what somebody finds who looks at everything."""
        states: dict[str, set[str]] = {}
        as_of: dict[str, dict[str, float]] = {}
        for alias, account in self.accounts.items():
            seen, institution = self.seen(account), account["institution"]
            states.setdefault(f"state:{institution}:{seen}", set()).add(alias)
            if "as_of" in account and seen in POLLED:
                as_of.setdefault(f"as_of:{institution}", {})[alias] = float(account["as_of"])
        assert self.counted.states == states
        assert self.counted.as_of == as_of
        assert self.counted.awaiting == {
            alias
            for alias, account in self.accounts.items()
            if account["state"] == "awaiting" and "answered" not in account
        }
        assert self.counted.received == self.answers.keys()
        assert self.counted.blocked == {
            login: state["blocked"] for login, state in self.logins.items() if "blocked" in state
        }

    def seen(self, account: dict[str, str]) -> str:
        """The account's state as operators see it."""
        if "paused" in account:
            return "paused"
        return "blocked" if "blocked" in self.logins[account["login"]] else account["state"]


#: States, as operators see them, of accounts that are being polled.
POLLED = {"scheduled", "dispatched", "polling", "awaiting", "waiting"}


@dataclass(frozen=True)
class Counted:
    """What the scripts keep for whoever counts."""

    states: dict[str, set[str]]
    as_of: dict[str, dict[str, float]]
    awaiting: set[str]
    received: set[str]
    blocked: dict[str, str]

    @classmethod
    def read(cls, client: redis.Redis) -> Counted:
        names = sorted(client.scan_iter("state:*", 1000)), sorted(client.scan_iter("as_of:*", 1000))
        pipeline = client.pipeline()
        for name in names[0]:
            pipeline.smembers(name)
        for name in names[1]:
            pipeline.zrange(name, 0, -1, withscores=True)
        pipeline.zrange("awaiting", 0, -1)
        pipeline.zrange("received", 0, -1)
        pipeline.hgetall("blocked")
        *found, awaiting, received, blocked = pipeline.execute()
        return cls(
            states=dict(zip(names[0], found[: len(names[0])], strict=True)),
            as_of={name: dict(found) for name, found in zip(names[1], found[len(names[0]) :], strict=True)},
            awaiting=set(awaiting),
            received=set(received),
            blocked=blocked,
        )
