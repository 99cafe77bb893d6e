"""Compare what the bank was asked with what went out and what was decided: every request is exactly one of these.

    published   its operation is on the stream once, in time
    late        its operation is on the stream once, marked late: its token was not current any more
    failed      a decision followed: the account's history says which (TIMEOUT, E201, LIFESPAN_EXCEEDED, …)
    overtaken   the worker decided too late, and says so in its log; beat had decided instead (LOST)
    abandoned   nobody could tell what came of it: beat decided LOST, and its very worker was **killed** or **frozen**
                meanwhile, or every process was **cut** off from the server (away, or behind a black hole)
    lost        anything else: a finding; above all a good answer that is not on the stream without such an excuse, and
                a good callback that our webhook acknowledged, for which there is no excuse at all

Each worker process sends an api key of its own, so that the bank's record of a request tells who sent it. Attempts come
from the server's append-only file, which has every one that ended, however short an account's own memory is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

#: Clocks are compared in seconds of one machine: the bank's to the millisecond, and rounding is not an offence.
ROUNDING_S = 0.05
GOOD = {"ok", "no-data"}

Window = tuple[float, float]


@dataclass
class Life:
    """One process of a worker, by the api key that it alone sends: when it was killed, and when it stood still."""

    name: str
    killed_s: float | None = None
    frozen: list[Window] = field(default_factory=list)

    def was_killed(self, start_s: float, end_s: float) -> bool:
        return self.killed_s is not None and start_s <= self.killed_s <= end_s

    def was_frozen(self, start_s: float, end_s: float) -> bool:
        return overlap(self.frozen, start_s, end_s)


def overlap(windows: Iterable[Window], start_s: float, end_s: float) -> bool:
    return any(first <= end_s and last >= start_s for first, last in windows)


@dataclass(frozen=True)
class Attempt:
    """One attempt of a poll, as its end was written to the server's file; times in seconds."""

    alias: str
    poll: str
    number: str
    begun_s: float
    ended_s: float
    outcome: str


@dataclass(frozen=True)
class Asked:
    """One request at the bank, and the callbacks that followed. `ended_s` and `called_s`: None for never."""

    seq: int
    alias: str
    login: str
    operation: str
    sender: str
    is_callback: bool
    behaviour: str
    state: str
    status: int | None
    started_s: float
    ended_s: float
    called_s: float | None
    acknowledged: tuple[str, ...]

    @property
    def is_good_answer(self) -> bool:
        return not self.is_callback and self.state == "answered" and self.status == 200 and self.behaviour in GOOD

    @property
    def is_good_callback(self) -> bool:
        return bool(GOOD & set(self.acknowledged))

    def session_end_s(self, hold_s: float) -> float:
        """Until when the bank's session is taken, as far as we can know: our login is free after `login_hold`."""
        if not self.is_callback:
            return self.ended_s
        taken_s = self.ended_s + hold_s if self.status == 202 else self.ended_s
        return taken_s if self.called_s is None else min(taken_s, self.called_s)


def read_requests(
    records: Iterable[Mapping[str, Any]], callbacks: Iterable[Mapping[str, Any]], aliases: Mapping[str, tuple[str, str]]
) -> list[Asked]:
    """The sandbox's journal; `aliases`: account number → alias and login."""
    called = defaultdict(list)
    for callback in callbacks:
        called[callback["request"]].append(callback)
    return [_read(record, called[record["seq"]], *aliases[record["number"]]) for record in records]


def _read(record: Mapping[str, Any], callbacks: Sequence[Mapping[str, Any]], alias: str, login: str) -> Asked:
    started_s = datetime.fromisoformat(record["time"]).timestamp()
    shift_s = started_s - record["started_at"]
    sent = [callback["sent_at"] for callback in callbacks if callback["sent_at"] is not None]
    return Asked(
        seq=record["seq"],
        alias=alias,
        login=login,
        operation=str(record["operation_id"]),
        sender=str(record["key_fingerprint"]),
        is_callback=record["callback"],
        behaviour=str(record["behaviour"]),
        state=record["state"],
        status=record["status"],
        started_s=started_s,
        ended_s=float("inf") if record["ended_at"] is None else record["ended_at"] + shift_s,
        called_s=min(sent) + shift_s if sent else None,
        acknowledged=tuple(each["kind"] for each in callbacks if each["state"] == "acknowledged"),
    )


def read_attempts(commands: Iterable[Sequence[bytes]], server_s: Any = float) -> list[Attempt]:
    """Every attempt that ended; `server_s` takes back what the test moved the server's clock by."""
    attempts = []
    for command in commands:
        if len(command) == 3 and command[0].upper() == b"LPUSH" and command[1].startswith(b"history:"):
            ended, poll, number, duration, outcome = command[2].decode().split(" ", 4)
            ended_ms, begun_ms = int(ended), int(ended) - int(duration)
            alias = command[1].decode().removeprefix("history:")
            times = server_s(begun_ms / 1000), server_s(ended_ms / 1000)
            attempts.append(Attempt(alias, poll, number, *times, outcome))
    return attempts


@dataclass
class Evidence:
    """All that is known after a run. `entries`: of the stream; `decided`: (alias, poll, attempt) of `failed` lines."""

    requests: list[Asked]
    attempts: list[Attempt]
    entries: list[Mapping[str, Any]]
    lives: Mapping[str, Life]
    outages: list[Window]
    decided: set[tuple[str, str, str]]
    lease_s: float
    hold_s: float

    def __post_init__(self) -> None:
        self._attempts = defaultdict(list)
        for attempt in sorted(self.attempts, key=lambda each: each.begun_s):
            self._attempts[attempt.alias].append(attempt)
        self._late = {entry["operation_id"]: entry["late"] for entry in self.entries}

    def attempt_of(self, asked: Asked) -> Attempt | None:
        """The attempt that the request belongs to: the account's last one that began before it, if it had not ended."""
        attempts = self._attempts[asked.alias]
        at = bisect_right(attempts, asked.started_s + ROUNDING_S, key=lambda each: each.begun_s)
        if not at or attempts[at - 1].ended_s + ROUNDING_S < asked.started_s:
            return None
        return attempts[at - 1]

    def class_of(self, asked: Asked) -> str:
        """One word of the module's docstring."""
        if asked.operation in self._late:
            return "late" if self._late[asked.operation] else "published"
        if asked.is_good_callback:
            return "lost"
        attempt = self.attempt_of(asked)
        gave_up = attempt is not None and attempt.outcome in {"TIMEOUT", "CONNECTION"}
        if asked.is_good_answer and not gave_up:
            return self._excuse(asked, attempt)
        if attempt is None or attempt.outcome == "ok":
            return self._excuse(asked, attempt)
        if attempt.outcome != "LOST":
            return "failed"
        if (attempt.alias, attempt.poll, attempt.number) in self.decided:
            return "overtaken"
        return self._excuse(asked, attempt)

    def _excuse(self, asked: Asked, attempt: Attempt | None) -> str:
        """Why nobody heard of the answer; "lost" where there is no reason."""
        life = self.lives.get(asked.sender)
        begun_s = asked.started_s if attempt is None else attempt.begun_s
        end_s = asked.started_s + self.lease_s if attempt is None else attempt.ended_s
        if life and life.was_killed(asked.started_s - ROUNDING_S, end_s):
            return "abandoned: killed"
        if life and life.was_frozen(begun_s, end_s):
            return "abandoned: frozen"
        if overlap(self.outages, min(asked.ended_s, end_s) - ROUNDING_S, begun_s + self.lease_s):
            return "abandoned: cut"
        return "lost"

    def doubled(self) -> list[str]:
        """Operations that are on the stream more than once."""
        counts = Counter(entry["operation_id"] for entry in self.entries)
        return sorted(operation for operation, count in counts.items() if count > 1)

    def unasked(self) -> list[str]:
        """Operations on the stream that the bank never gave."""
        return sorted({entry["operation_id"] for entry in self.entries} - {each.operation for each in self.requests})

    def overlaps(self) -> list[tuple[Asked, Asked]]:
        """Requests of one login at once, but for those whose worker stood still while it held the session.

        A callback-mode session that a killed worker left open (nobody told the timetable of its 202) is not counted
        either: its lease is all that can protect it.
        """
        of_login = defaultdict(list)
        for asked in sorted(self.requests, key=lambda each: each.started_s):
            of_login[asked.login].append(asked)
        return [
            (first, second)
            for requests in of_login.values()
            for first, second in pairwise(requests)
            if first.session_end_s(self.hold_s) > second.started_s + ROUNDING_S
            and not self._is_abandoned(first, second.started_s)
            and not self._is_abandoned(second, second.started_s)
        ]

    def _is_abandoned(self, asked: Asked, until_s: float) -> bool:
        life = self.lives.get(asked.sender)
        if life is None:
            return False
        start_s = min(asked.started_s, until_s) - self.lease_s
        is_killed = asked.is_callback and life.was_killed(asked.started_s - ROUNDING_S, until_s)
        return is_killed or life.was_frozen(start_s, until_s)

    def sent_twice(self) -> list[tuple[Asked, Asked]]:
        """Requests of one attempt, but for those of a worker that froze just before it sent."""
        first_of: dict[Attempt, Asked] = {}
        twice = []
        for asked in sorted(self.requests, key=lambda each: each.started_s):
            attempt = self.attempt_of(asked)
            if attempt is None or self._is_abandoned(asked, asked.started_s):
                continue
            if attempt in first_of:
                twice.append((first_of[attempt], asked))
            first_of[attempt] = asked
        return twice

    def unbegun(self) -> list[Asked]:
        """Requests that no attempt explains, with the same exception."""
        return [
            asked
            for asked in self.requests
            if self.attempt_of(asked) is None and not self._is_abandoned(asked, asked.started_s)
        ]

    def unpublished(self) -> list[Attempt]:
        """Attempts that ended well, as the timetable says, and whose balance is not on the stream in time."""
        there = {(entry["account"], str(entry["poll"])) for entry in self.entries if not entry["late"]}
        return [each for each in self.attempts if each.outcome == "ok" and (each.alias, each.poll) not in there]
