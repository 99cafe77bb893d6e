"""Decide what follows a failed attempt: one pure function over one table, no I/O, no clock, no randomness.

    outcome + counters ──▶ decide ──▶ Publish | Retry(countdown) | DeadLetter(queue) | Block(credential)

`Error.Type` drives everything; the code may only make the answer stricter (`E1xx`, `A000`; `E000`, `E999` and `T000`
when they repeat, by which the login rests). Two ladders of short countdowns end in the long wait; after a wait there is
exactly one try; after `max_waits` waits in a row the poll is a dead letter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Protocol, assert_never

from worker.errors import Kind, Outcome


class ErrorType(StrEnum):
    """`Error.Type` of Khipu's envelope. Any other is contract drift and waits like `WAIT_4_HOURS_BEFORE_RETRY`."""

    RETRY_IMMEDIATELY = "RETRY_IMMEDIATELY"
    WAIT_4_HOURS_BEFORE_RETRY = "WAIT_4_HOURS_BEFORE_RETRY"
    DO_NOT_RETRY = "DO_NOT_RETRY"
    RETRY_AFTER_NOTIFICATION = "RETRY_AFTER_NOTIFICATION"


class DeadLetterQueue(StrEnum):
    """The four dead-letter queues, named as Celery queues."""

    DO_NOT_RETRY = "balances.dead.do-not-retry"
    AFTER_NOTIFICATION = "balances.dead.after-notification"
    RETRIES_EXHAUSTED = "balances.dead.retries-exhausted"
    BAD_ANSWER = "balances.dead.bad-answer"


class Credential(StrEnum):
    """Which credential failed: the log-on at the bank, or the key or token towards Khipu."""

    BANK = "bank"
    KEY = "key"


class Cause(StrEnum):
    """What an account's failure may have in common with others: with its login's (generic), or its institution's."""

    GENERIC = "generic"
    UNAVAILABLE = "unavailable"
    GATEWAY = "gateway"
    UNREADABLE = "unreadable"


class Ladders(Protocol):
    """The `[retry]` table of the accounts file, as far as deciding needs it."""

    @property
    def immediately(self) -> tuple[timedelta, ...]: ...
    @property
    def transient(self) -> tuple[timedelta, ...]: ...
    @property
    def wait(self) -> timedelta: ...
    @property
    def max_waits(self) -> int: ...
    @property
    def max_losses(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Counters:
    """What an account has been through since its last balance.

    `tries`: short retries since the last wait · `waits`: long waits in a row · `losses`: polls in a row that never
    ended · `attempt`: requests of this poll, from 1 · `last`: code of the failure before this one, '' for none ·
    `generic`: failures of its login in a row, whichever account's, that may each have been a bad log-on.
    """

    tries: int = 0
    waits: int = 0
    losses: int = 0
    attempt: int = 1
    last: str = ""
    generic: int = 0


@dataclass(frozen=True, slots=True)
class Publish:
    """Put the answer's balances on the stream; the account goes on to its next slot."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask again after `countdown`; `counters` are the account's from now on.

    `rest`: for so long nothing of its login goes out, whichever account's; None where this one alone waits.
    """

    countdown: timedelta
    counters: Counters
    rest: timedelta | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Suspend (or, after-notification, park) the account, with a letter in `queue`; `rest` as of `Retry`."""

    queue: DeadLetterQueue
    rest: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Block the whole login: `credential` is never sent again until it is replaced or forgiven."""

    credential: Credential


Decision = Publish | Retry | DeadLetter | Block

#: Codes that tell of a failed log-on at the bank, whatever the type says: banks lock an account after 3–5 of them.
LOG_ON_ERROR = re.compile(r"E1\d\d")
#: "JWT expired, revoked or invalid".
TOKEN_ERROR = "A000"  # noqa: S105 - a code, not a secret
#: "Custom error", "generic error", "scraping timeout": banks answer a bad password so, too.
GENERIC_ERRORS = frozenset({"E000", "E999", "T000"})
#: The bank itself is unavailable, for whoever asks.
TARGET_ERROR = re.compile(r"E2\d\d")

#: From so many generic failures in a row on, each costs a login what a bad log-on may: it rests (banks lock after 3–5).
MAX_GENERIC = 3
#: A held institution is probed at least this often.
LONGEST_PROBE_PAUSE = timedelta(minutes=10)

#: What a code is counted by: Khipu's hundreds, and HTTP's.
CLASSIFIED = re.compile(r"(E[0-9]|HTTP_[1-5])[0-9]{2}")

#: Short countdowns are stretched by up to this share, so that accounts that failed together do not return together.
SHORT_JITTER = 0.2
#: Waits are stretched by up to this share, never shortened: nothing may be asked before the four hours are over.
WAIT_JITTER = 0.05

#: An accounts file that lacks more accounts than this, and more than this share, is not believed without `--force`.
MAX_REMOVED = 2
MAX_REMOVED_SHARE = 0.2


def decide(outcome: Outcome, counters: Counters, jitter: float, retry: Ladders) -> Decision:
    """What follows `outcome`, for an account with `counters`. `jitter` in [0, 1) is the caller's randomness."""
    if outcome.kind is not Kind.LOST:
        counters = replace(counters, losses=0)
    match outcome.kind:
        case Kind.ANSWERED:
            return _rest_too(_answered(outcome, counters, jitter, retry), outcome, counters, jitter, retry)
        case Kind.OK:
            return Publish()
        case Kind.UNAUTHORIZED | Kind.KEY_REFUSED:
            return Block(Credential.KEY)
        case Kind.LOG_ON_REFUSED:
            return Block(Credential.BANK)
        case Kind.FOREIGN:
            return DeadLetter(DeadLetterQueue.BAD_ANSWER)
        case Kind.UNREADABLE:
            return _climb_once(outcome, counters, jitter, retry, DeadLetterQueue.BAD_ANSWER)
        case Kind.BAD_REQUEST | Kind.NOT_FOUND:
            return _climb_once(outcome, counters, jitter, retry, DeadLetterQueue.DO_NOT_RETRY)
        case Kind.LOST:
            return _lost(outcome, counters, jitter, retry)
        case Kind.SERVER_ERROR | Kind.THROTTLED | Kind.TIMEOUT | Kind.CONNECTION | Kind.LIFESPAN_EXCEEDED:
            return _climb(outcome, retry.transient, counters, jitter, retry)
    assert_never(outcome.kind)


def cause_of(outcome: Outcome) -> Cause | None:
    """What this failure may say about more than its own account; None for nothing."""
    match outcome.kind:
        case Kind.ANSWERED if outcome.code in GENERIC_ERRORS:
            return Cause.GENERIC
        case Kind.ANSWERED if TARGET_ERROR.fullmatch(outcome.code):
            return Cause.UNAVAILABLE
        case Kind.SERVER_ERROR:
            return Cause.GATEWAY
        case Kind.UNREADABLE:
            return Cause.UNREADABLE
        case _:
            return None


def probe_pauses(retry: Ladders) -> tuple[timedelta, ...]:
    """Pauses between two probes of an institution that is held; the last one repeats."""
    return tuple(min(pause, LONGEST_PROBE_PAUSE) for pause in retry.transient)


def is_contract_drift(outcome: Outcome) -> bool:
    """Whether Khipu answered with a type that this table does not know."""
    return outcome.kind is Kind.ANSWERED and outcome.type not in set(ErrorType)


def class_of(outcome: Outcome) -> str:
    """What the outcome is counted as, "outcome|type|code": of bounded number, whatever Khipu answers."""
    return f"{outcome.kind.lower()}|{_class_of_type(outcome)}|{_class_of_code(outcome)}"


def _class_of_type(outcome: Outcome) -> str:
    if outcome.kind is not Kind.ANSWERED:
        return "none"
    return "other" if is_contract_drift(outcome) else str(outcome.type)


def _class_of_code(outcome: Outcome) -> str:
    """`E2xx` of a documented code, `HTTP_5xx` of a status, the kind of a failure of ours."""
    if outcome.code == TOKEN_ERROR:
        return outcome.code
    if match := CLASSIFIED.fullmatch(outcome.code):
        return f"{match[1]}xx"
    is_ours = outcome.kind is not Kind.ANSWERED and outcome.code in {outcome.kind, outcome.kind.lower()}
    return outcome.code if is_ours else "other"


def is_mass_removal(known: int, gone: int) -> bool:
    """Whether an accounts file that lacks `gone` of `known` accounts looks like an accident."""
    return gone > MAX_REMOVED and gone > known * MAX_REMOVED_SHARE


def _answered(outcome: Outcome, counters: Counters, jitter: float, retry: Ladders) -> Decision:
    """The table by `Error.Type`, after the two overrides by code."""
    if LOG_ON_ERROR.fullmatch(outcome.code):
        return Block(Credential.BANK)
    if outcome.code == TOKEN_ERROR:
        return Block(Credential.KEY)
    match outcome.type:
        case ErrorType.RETRY_IMMEDIATELY if _spends_a_log_on(outcome, counters):
            return _wait(outcome, counters, jitter, retry)
        case ErrorType.RETRY_IMMEDIATELY:
            return _climb(outcome, retry.immediately, counters, jitter, retry)
        case ErrorType.DO_NOT_RETRY:
            return DeadLetter(DeadLetterQueue.DO_NOT_RETRY)
        case ErrorType.RETRY_AFTER_NOTIFICATION:
            return DeadLetter(DeadLetterQueue.AFTER_NOTIFICATION)
        case _:  # WAIT_4_HOURS_BEFORE_RETRY, and every type that is missing or unknown
            return _wait(outcome, counters, jitter, retry)


def _spends_a_log_on(outcome: Outcome, counters: Counters) -> bool:
    """Whether this is one generic failure too many: banks report a bad password as a time-out or a generic error."""
    return outcome.code in GENERIC_ERRORS and counters.generic + 1 >= MAX_GENERIC


def _rest_too(decision: Decision, outcome: Outcome, counters: Counters, jitter: float, retry: Ladders) -> Decision:
    """The same, and a rest of the whole login: its other accounts would each try the same log-on."""
    if isinstance(decision, Retry | DeadLetter) and _spends_a_log_on(outcome, counters):
        return replace(decision, rest=retry.wait * (1 + WAIT_JITTER * jitter))
    return decision


def _lost(outcome: Outcome, counters: Counters, jitter: float, retry: Ladders) -> Decision:
    """A loss climbs like any transient failure, unless it is the last that `max_losses` allows."""
    counters = replace(counters, losses=counters.losses + 1)
    if counters.losses >= retry.max_losses:
        return DeadLetter(DeadLetterQueue.RETRIES_EXHAUSTED)
    return _climb(outcome, retry.transient, counters, jitter, retry)


def _climb_once(
    outcome: Outcome, counters: Counters, jitter: float, retry: Ladders, queue: DeadLetterQueue
) -> Decision:
    """Climb the transient ladder; what repeats after one long wait is a dead letter.

    Only what repeats: one bad deploy at Khipu must not suspend an account that was waiting for something else.
    """
    if counters.waits and counters.last == outcome.code:
        return DeadLetter(queue)
    return _climb(outcome, retry.transient, counters, jitter, retry)


def _climb(
    outcome: Outcome, ladder: tuple[timedelta, ...], counters: Counters, jitter: float, retry: Ladders
) -> Decision:
    """The next rung of `ladder`; past its end, and after any wait, the long wait."""
    if counters.waits or counters.tries >= len(ladder):
        return _wait(outcome, counters, jitter, retry)
    countdown = max(ladder[counters.tries], _asked_for(outcome, retry))
    return Retry(countdown * (1 + SHORT_JITTER * jitter), replace(counters, tries=counters.tries + 1))


def _wait(outcome: Outcome, counters: Counters, jitter: float, retry: Ladders) -> Decision:
    """One more long wait, or the end of all retrying."""
    if counters.waits >= retry.max_waits:
        return DeadLetter(DeadLetterQueue.RETRIES_EXHAUSTED)
    countdown = max(retry.wait, _asked_for(outcome, retry))
    return Retry(countdown * (1 + WAIT_JITTER * jitter), replace(counters, tries=0, waits=counters.waits + 1))


def _asked_for(outcome: Outcome, retry: Ladders) -> timedelta:
    """What `Retry-After` asked for, never longer than the long wait (a stranger's number is clamped)."""
    return min(outcome.retry_after or timedelta(0), retry.wait)
