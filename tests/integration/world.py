"""A small world on a real server: one login with two accounts, moved through the timetable's scripts by their names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import uuid4

import redis

from worker.accounts import Accounts, Limits, Retry, parse_accounts
from worker.celery import letter_template, poll_template
from worker.errors import Kind, Outcome
from worker.policy import Counters, Credential, DeadLetterQueue
from worker.timetable import Begun, Claim, CredentialRefused, Event, OtherScheme, Postponed, Settled, Timetable, Token

STREAM = "balances"
#: Every account's interval; the accounts of a world are due within this time.
EVERY_S = 900
MINUTE_MS = 60_000
#: A lease: the request's deadline (190 s) and the margin (60 s).
LEASE_MS = 250_000

FILE = """
[[accounts]]
alias = "{alias}"
institution = "bancosecurity.cl"
number = "{number}"
login = "{login}"
every = "{every}"
{more}
"""


def accounts_file(*aliases: str, login: str = "acme", every: str = "15m", number: str = "", more: str = "") -> bytes:
    """An accounts file; each alias with a number of its own unless one is given."""
    logins = f"[logins.{login}]\n"
    return (
        logins
        + "".join(
            FILE.format(alias=alias, number=number or f"9{index:07}", login=login, every=every, more=more)
            for index, alias in enumerate(aliases)
        )
    ).encode()


def read(*aliases: str, **kwargs: str) -> Accounts:
    is_callback = "callback" in kwargs.get("more", "")
    return parse_accounts(accounts_file(*aliases, **kwargs), "accounts.toml", callback_configured=is_callback)


OUTCOMES = {
    "postpone": Outcome(Kind.ANSWERED, "E201", "RETRY_IMMEDIATELY", "unavailable"),
    "suspend": Outcome(Kind.ANSWERED, "E401", "DO_NOT_RETRY", "no such account"),
    "park": Outcome(Kind.ANSWERED, "E301", "RETRY_AFTER_NOTIFICATION", "later"),
    "block": Outcome(Kind.ANSWERED, "E101", "DO_NOT_RETRY", "bad credentials"),
}


@dataclass
class World:
    """The timetable, and what a test needs to push it around. `now` moves the one clock."""

    client: redis.Redis
    template: tuple[str, str] = field(default_factory=lambda: (poll_template(), letter_template()))
    offset_ms: int = 0
    bank: str = "bank-1"
    key: str = "key-1"

    def __post_init__(self) -> None:
        message, letter = self.template
        self.timetable = Timetable(self.client, stream=STREAM, message=message, letter=letter)
        self.workers(100)

    # -------------------------------------------------------------------------------------------- surroundings

    def workers(self, threads: int) -> None:
        self.client.delete("workers")
        self.timetable.register_worker("test", threads, ttl_s=3600)

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

    def begin(self, token: Token, caller: str = "caller") -> Begun | CredentialRefused | OtherScheme | None:
        return self.timetable.begin(token, caller=caller, scheme="api-key", bank=self.bank, key=self.key)

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
        now_ms = self.timetable.now_ms()
        data = {"account": begun.token.account, "poll": begun.token.poll, "balances": [{"amount": amount}]}
        operation = operation or str(uuid4())
        source = "/khipu/cl/business/bancosecurity.cl"
        return self.timetable.settle(begun, Event(operation, source, data, f"fp {amount}", ids, now_ms))

    def postpone(self, token: Token, seconds: float = 20) -> Postponed | None:
        return self.timetable.postpone(token, int(seconds * 1000), Counters(1, 0, 0, token.attempt), "E201")

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

    def messages(self, queue: str = "balances.polls") -> list[dict]:
        return [json.loads(text) for text in reversed(self.client.lrange(queue, 0, -1))]

    def events(self) -> list[dict]:
        return [{**attributes, "data": json.loads(attributes["data"])} for _, attributes in self.client.xrange(STREAM)]

    # -------------------------------------------------------------------------------------------- what always holds

    def check(self) -> None:
        """The invariants of the design, on everything that Redis holds."""
        for login in self.client.smembers("logins"):
            self._check_place(login)
        for alias in self.client.hkeys("revisions"):
            self._check_account(alias)
        self._check_letters()

    def _check_place(self, login: str) -> None:
        """Rule 1: the place follows from the login's state."""
        state = self.client.hgetall(f"login:{login}")
        first = self.client.zrange(f"due:{login}", 0, 0, withscores=True)
        expected = None if not first else first[0][1]
        if "probing" in state:
            expected = self.client.zscore(f"due:{login}", state.get("probe", ""))
        if "holder" in state:
            expected = float(state["until"])
        if "blocked" in state:
            expected = None
        assert self.client.zscore("timetable", login) == expected, (login, state, first)

    def _check_account(self, alias: str) -> None:
        """Exactly one next step: a due time, a place held, or a letter; unless it is paused."""
        account = self.client.hgetall(f"account:{alias}")
        login, state = account["login"], account["state"]
        is_due = self.client.zscore(f"due:{login}", alias) is not None
        holder = (self.client.hget(f"login:{login}", "holder") or "").split()
        is_holding = holder == [alias, account["poll"], account["attempt"]]
        is_planned = state in {"scheduled", "waiting"} or (
            state == "awaiting" and not is_holding and "answered" not in account
        )
        assert is_due == (is_planned and "paused" not in account), (alias, account)
        if state in {"dispatched", "polling"} and "answered" not in account:
            assert is_holding, (alias, account, holder)
        if state == "awaiting" and "answered" in account:
            assert self.client.zscore("answers", f"{alias} {account['poll']} {account['attempt']}") is not None
        if is_due:
            assert account["due"] == f"{self.client.zscore(f'due:{login}', alias):.0f}"
        assert ("letter" in account) == (state in {"suspended", "parked"}), (alias, account)
        assert bool(self.client.sismember("parked", alias)) == (state == "parked")

    def _check_letters(self) -> None:
        """Every letter has its account or login, and the other way round."""
        kept = [text for queue in DeadLetterQueue for text in self.client.lrange(queue, 0, -1)]
        accounts = [self.client.hget(f"account:{alias}", "letter") for alias in self.client.hkeys("revisions")]
        logins = [self.client.hget(f"login:{login}", "letter") for login in self.client.smembers("logins")]
        assert sorted(kept) == sorted(letter for letter in accounts + logins if letter)
        for login in self.client.smembers("logins"):
            state = self.client.hgetall(f"login:{login}")
            assert ("letter" in state) == ("blocked" in state)
