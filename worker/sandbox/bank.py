"""Be the bank behind Khipu: accounts with their plans and balances, log-ons that can be wrong and get locked.

PUT plan ──▶ Account ──▶ step, delay          PUT log-on ──▶ LogOn ──▶ None | E101 | E102 (locked)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from worker.sandbox.behaviour import Behaviour, Plan, Step
from worker.sandbox.notation import parse_plan

#: Wrong credentials in a row after which the bank locks a user out; banks take 3 to 5.
LOCK_AFTER = 3
#: The field of a credential that names its user, the first that is there.
USER_FIELDS = ("user", "username", "rut")
#: Digits after the decimal point, where a currency does not have two.
DIGITS = {"CLP": 0, "CLF": 4}

BAD_CREDENTIALS = Step(behaviour=Behaviour.ERROR, code="E101", type="DO_NOT_RETRY")
BLOCKED_ACCOUNT = Step(behaviour=Behaviour.ERROR, code="E102", type="DO_NOT_RETRY")
OK = parse_plan({"script": ["ok"]})


def fingerprint(value: object) -> str:
    """sha256 in hex of a string, or of any other value's JSON with sorted keys and no spaces."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def user_of(credential: object) -> str | None:
    """Whom a credential logs on, where it says so."""
    if not isinstance(credential, dict):
        return None
    names = (credential.get(name) for name in USER_FIELDS)
    return next((name for name in names if isinstance(name, str) and name), None)


@dataclass(slots=True)
class Account:
    """One account number: where it is in its plan, and what it holds. `plan` None: the bank's default."""

    number: str
    plan: Plan | None = None
    position: int = 0
    answers: int = 0
    minor_units: dict[str, int] = field(default_factory=dict)

    def amount(self, currency: str) -> str:
        """The balance now, as JSON number text: the same in every run, and about every second time another one."""
        chance = Random(f"{self.number}:{currency}:{self.answers}")  # noqa: S311 - plausible figures, not secrecy
        self.answers += 1
        held = self.minor_units.get(currency)
        if held is None:
            held = chance.randrange(200_000, 90_000_000)
        elif chance.random() < 0.5:
            held = abs(held + chance.randrange(-held // 20 - 1, held // 20 + 1))
        self.minor_units[currency] = held
        return _decimal(held, DIGITS.get(currency, 2))


def _decimal(minor_units: int, digits: int) -> str:
    """Text with exactly `digits` decimals, without a float."""
    if not digits:
        return str(minor_units)
    whole, rest = divmod(minor_units, 10**digits)
    return f"{whole}.{rest:0{digits}d}"


@dataclass(slots=True)
class LogOn:
    """A user of the bank: what is right (`expected`, matched field by field if an object), and what was tried."""

    expected: object
    wrong_in_a_row: int = 0
    wrong: int = 0
    locked: bool = False

    def try_(self, credential: object) -> Step | None:
        """Log on: None if it works, else the bank's answer."""
        if self.locked:
            return BLOCKED_ACCOUNT
        if self._matches(credential):
            self.wrong_in_a_row = 0
            return None
        self.wrong += 1
        self.wrong_in_a_row += 1
        self.locked = self.wrong_in_a_row >= LOCK_AFTER
        return BAD_CREDENTIALS

    def _matches(self, credential: object) -> bool:
        if isinstance(self.expected, Mapping) and isinstance(credential, Mapping):
            return all(credential.get(name) == value for name, value in self.expected.items())
        return self.expected == credential


class Bank:
    """All accounts and log-ons. Every account number exists; a log-on is checked only where one was told."""

    def __init__(self, plans: Mapping[str, Plan], log_ons: Mapping[str, object], default: Plan = OK) -> None:
        self._starting = (dict(plans), dict(log_ons), default)
        #: Fingerprint of each access token that `tokens` gave → whether it still counts.
        self.tokens: dict[str, bool] = {}
        self.reset()

    def reset(self) -> None:
        """Back to what the bank was opened with."""
        plans, log_ons, self.default = self._starting
        self.accounts = {number: Account(number, plan) for number, plan in plans.items()}
        self.log_ons = {user: LogOn(expected) for user, expected in log_ons.items()}
        self.keys: frozenset[str] | None = None

    def account(self, number: str) -> Account:
        """The account with this number."""
        if number not in self.accounts:
            self.accounts[number] = Account(number)
        return self.accounts[number]

    def define(self, number: str, plan: Plan) -> None:
        """Give an account a plan, from its first step. Its balance stays."""
        account = self.account(number)
        account.plan, account.position = plan, 0

    def define_default(self, plan: Plan) -> None:
        """Give all accounts without a plan of their own another one, from its first step."""
        self.default = plan
        for account in self.accounts.values():
            if account.plan is None:
                account.position = 0

    def next_step(self, account: Account) -> tuple[Step, float]:
        """The account's next step and its delay in seconds: consumed."""
        plan, position = account.plan or self.default, account.position
        account.position += 1
        step = plan.step(account.number, position)
        return step, plan.delay_s(step, account.number, position)

    def log_on(self, account: Account, credential: object) -> tuple[Step, float] | None:
        """None if the bank lets this credential in, else its answer and delay; the plan is not touched."""
        log_on = self.log_ons.get(user_of(credential) or "")
        refused = log_on.try_(credential) if log_on is not None else None
        if refused is None:
            return None
        plan = account.plan or self.default
        return refused, plan.delay_s(refused, account.number, account.position)

    def admits(self, key_fingerprint: str) -> bool:
        """Whether Khipu takes this api key or token: any, unless it was told which, or gave and ended it itself."""
        return self.tokens.get(key_fingerprint, self.keys is None or key_fingerprint in self.keys)
