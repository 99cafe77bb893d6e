"""Name every way in which things go wrong: how a poll ended, and what this package raises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


class Kind(StrEnum):
    """How a poll ended, as far as it decides what happens next (sources: khipu's HTTP codes and envelope).

    The value is what operators see as the code where Khipu itself gave none.
    """

    OK = "OK"  #: an envelope with `Status: OK` that reads well and belongs to the account
    ANSWERED = "ANSWERED"  #: an envelope with `Status: ERROR`; its `Error.Type` and `Error.Code` decide
    UNAUTHORIZED = "UNAUTHORIZED"  #: HTTP 401 or 403: the token or the key fails, not the bank log-on
    BAD_REQUEST = "BAD_REQUEST"  #: HTTP 400, a redirect, or another 4xx
    NOT_FOUND = "NOT_FOUND"  #: HTTP 404
    SERVER_ERROR = "SERVER_ERROR"  #: HTTP 5xx
    THROTTLED = "THROTTLED"  #: HTTP 408, 425 or 429
    TIMEOUT = "TIMEOUT"  #: the total deadline of the request passed
    CONNECTION = "CONNECTION"  #: no connection, or it broke
    UNREADABLE = "UNREADABLE"  #: not JSON, not the schema, or too large
    FOREIGN = "FOREIGN"  #: another account's `AccountId`, or another currency: never a balance
    LOST = "LOST"  #: the worker began the poll and its lease ended without an end
    LIFESPAN_EXCEEDED = "LIFESPAN_EXCEEDED"  #: no callback by `LifeSpan` + grace
    LOG_ON_REFUSED = "LOG_ON_REFUSED"  #: no host has a bank log-on but the one that already failed
    KEY_REFUSED = "KEY_REFUSED"  #: no host has a key or token but the one that already failed


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended. Holds no money, no account number and no secret.

    `code`: `Error.Code` where Khipu gave one, else the kind's name, with HTTP's status where there is one (`HTTP_504`).
    `type`: `Error.Type` as received, None where there was none. `description`: at most 200 characters, scrubbed.
    `retry_after`: what a `Retry-After` header asked for, not yet clamped.
    """

    kind: Kind
    code: str
    type: str | None = None
    description: str = ""
    retry_after: timedelta | None = None


class BalancesError(Exception):
    """Everything this package raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in the configuration: where it stands, what is wrong, what would be right. Never a secret."""

    where: str
    wrong: str
    right: str

    def __str__(self) -> str:
        return f"{self.where}: {self.wrong}; {self.right}"


class ConfigurationError(BalancesError):
    """The configuration is wrong; every mistake found is in `problems`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


@contextmanager
def collected(problems: list[Problem]) -> Iterator[None]:
    """Adds the mistakes that the block finds to `problems` instead of raising them: the next block finds its own."""
    try:
        yield
    except ConfigurationError as error:
        problems += error.problems


class KhipuFailure(BalancesError):
    """An attempt brought no answer that counts; `outcome` says how it failed.

    `sent`: some of the request had been written by then, perhaps all of it, so Khipu may be working on it.
    """

    def __init__(self, outcome: Outcome, *, sent: bool = False) -> None:
        self.outcome = outcome
        self.sent = sent
        super().__init__(f"{outcome.code} {outcome.type or outcome.kind}")


class MissingSecret(BalancesError):
    """A login has no such secret here, or a token that has ended. Names what would hold it, never its content."""


class Refused(BalancesError):
    """An operator's command does not fit the account's or the login's state; the message is the reason."""


class StoreUnavailable(BalancesError):
    """Redis cannot be reached, or refuses to work."""


class DeadLettered(BalancesError):
    """The poll went to a dead-letter queue: code and type, nothing else (Flower shows this text)."""


class Waiting(BalancesError):
    """The poll is to be tried again: code, type and countdown, nothing else (Flower shows this text)."""


class PollCrashed(BalancesError):
    """A fault of ours ended the poll; the name of its type, nothing else. The lease brings the poll back."""
