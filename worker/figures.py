"""Read what the scripts count, in as many round trips however many accounts there are; changes nothing, scans nothing.

Beside the counts stand moments: ms since the epoch by the server's clock, None for that of something that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from typing import Any

import redis

from worker.policy import Credential, DeadLetterQueue
from worker.stream import GroupLag, group_lag
from worker.timetable import ANSWERS, POLLS, Reached, Timetable

#: Every state that operators see, the regular ones first.
STATES = (
    "scheduled",
    "dispatched",
    "polling",
    "awaiting",
    "waiting",
    "suspended",
    "parked",
    "paused",
    "blocked",
)
QUEUES = (POLLS, ANSWERS)
#: Of so many accounts that are overdue the oldest is looked for; after a night's outage all may be.
SAMPLE = 1_000


@dataclass(frozen=True, slots=True)
class Some:
    """How many there are, and since when the oldest of them."""

    count: int
    oldest_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    """A live worker that takes polls."""

    threads: int
    last_begin_ms: int | None


@dataclass(frozen=True, slots=True)
class Durations:
    """How many attempts ended within each bound (s; not those of a smaller one), how many later, and all their time."""

    within: Mapping[float, int]
    later: int
    sum_ms: int


@dataclass(frozen=True, slots=True)
class Figures:
    """All that is counted, at one moment."""

    now_ms: int
    accounts: Mapping[tuple[str, str], int]  #: (institution, state), a pause over everything included
    parked: int
    overdue: Some  #: with more than `SAMPLE` of them, the oldest of so many
    awaiting: Some
    last_ok_ms: Mapping[str, int]  #: institution
    as_of_ms: Mapping[str, int]  #: institution; the oldest of its accounts' newest; of none while everything is paused
    attempts: Mapping[tuple[str, ...], int]  #: (institution, mode)
    polls: Mapping[tuple[str, ...], int]  #: (institution, mode, outcome, type, code)
    durations: Mapping[tuple[str, str], Durations]  #: (institution, mode)
    counts: Mapping[str, int]
    blocked: Mapping[str, str]  #: login → kind of credential
    resting_ms: Mapping[str, int]  #: login → until when it rests; some of them, where there are more than `SAMPLE`
    resting: int
    logins_due: int
    token_expiry_s: Mapping[str, int]  #: login
    requests_today: int | None  #: None where no budget is set
    daily_requests: int | None
    letters: Mapping[DeadLetterQueue, Some]
    queues: Mapping[str, int]
    unsettled: Some
    entries: int
    retention_ms: int | None
    groups: Sequence[GroupLag]
    claimed_at_ms: int | None
    workers: Mapping[str, Worker]
    settlers: int
    limits: Reached
    held_ms: int  #: for how long nothing is claimed any more, after a jump of the clock

    @property
    def is_paused(self) -> bool:
        """Whether everything is."""
        return self.limits.paused_at_ms is not None

    @property
    def blocked_by(self) -> dict[Credential, int]:
        """How many logins are blocked by each kind of credential."""
        kinds = list(self.blocked.values())
        return {kind: kinds.count(kind) for kind in Credential}


def read(client: redis.Redis, stream: str) -> Figures:
    """Reads everything. Raises what redis-py raises."""
    timetable = Timetable(client, stream=stream)
    limits = timetable.reached()
    is_paused = limits.paused_at_ms is not None
    one = _first(client, stream)
    seconds, micros = one["time"]
    real_ms = seconds * 1000 + micros // 1000
    now_ms = real_ms + int(one["offset"] or 0)
    institutions = sorted(one["institutions"])
    two = _second(client, institutions, now_ms, real_ms, one["some overdue"])
    counted = {pair: two[_state_key(*pair)] for pair in product(institutions, STATES)}
    return Figures(
        now_ms=now_ms,
        accounts=_all_paused(counted) if is_paused else counted,
        parked=one["parked"],
        overdue=Some(one["overdue"], min((int(due) for due in two["dues"] if due), default=None)),
        awaiting=_some(one, "awaiting"),
        last_ok_ms=_numbers(one["last_ok"]),
        as_of_ms={} if is_paused else _oldest_as_of(two, institutions),
        attempts=_by_parts(one["attempts"]),
        polls=_by_parts(one["polls"]),
        durations=_durations(one["durations"]),
        counts=_numbers(one["counts"]),
        blocked=one["blocked"],
        resting_ms={login: int(until_ms) for login, until_ms in two["some resting"]},
        resting=two["resting"],
        logins_due=two["due"],
        token_expiry_s={login: int(expires_s) for login, expires_s in one["expiries"]},
        requests_today=_number(two["requests"]),
        daily_requests=json.loads(one["config"][2] or "{}").get("daily_requests"),
        letters={queue: Some(one[queue], _written_ms(one[f"oldest {queue}"])) for queue in DeadLetterQueue},
        queues={queue: one[queue] for queue in QUEUES},
        unsettled=_some(one, "received"),
        entries=one["entries"],
        retention_ms=_number(one["config"][1]),
        groups=group_lag(client, stream),
        claimed_at_ms=_number(one["config"][0]),
        workers=_workers(two["workers"], dict(two["begins"])),
        settlers=sum(map(_is_settler, two["workers"])),
        limits=limits,
        held_ms=timetable.held_ms(),
    )


def _first(client: redis.Redis, stream: str) -> dict[str, Any]:
    """What can be asked without knowing anything."""
    ask: Any = client.pipeline(transaction=False)
    return _answers(
        ask,
        {
            "time": ask.time(),
            "offset": ask.get("clock:offset"),
            "config": ask.hmget("config", "claimed_at", "retention_ms", "limits"),
            "institutions": ask.smembers("institutions"),
            "parked": ask.scard("parked"),
            **{name: ask.hgetall(name) for name in ("last_ok", "attempts", "polls", "durations", "counts", "blocked")},
            "expiries": ask.zrange("token_expires", 0, -1, withscores=True),
            "overdue": ask.scard("overdue"),
            "some overdue": ask.srandmember("overdue", SAMPLE),
            **{name: ask.llen(name) for name in (*DeadLetterQueue, *QUEUES)},
            **{f"oldest {queue}": ask.lindex(queue, -1) for queue in DeadLetterQueue},
            **{name: ask.zcard(name) for name in ("awaiting", "received")},
            **{f"oldest {name}": ask.zrange(name, 0, 0, withscores=True) for name in ("awaiting", "received")},
            "entries": ask.xlen(stream),
        },
    )


def _second(
    client: redis.Redis, institutions: Sequence[str], now_ms: int, real_ms: int, overdue: Sequence[str]
) -> dict[str, Any]:
    """What needs the time, the institutions, and some accounts that are overdue."""
    ask: Any = client.pipeline(transaction=False)
    today = datetime.fromtimestamp(now_ms / 1000, UTC).date()
    states = [_state_key(*pair) for pair in product(institutions, STATES)]
    answers = _answers(
        ask,
        {
            **{key: ask.scard(key) for key in states},
            **{f"as_of:{name}": ask.zrange(f"as_of:{name}", 0, 0, withscores=True) for name in institutions},
            "due": ask.zcount("timetable", "-inf", now_ms),
            "resting": ask.zcount("resting", f"({now_ms}", "+inf"),
            "some resting": ask.zrangebyscore("resting", f"({now_ms}", "+inf", 0, SAMPLE, withscores=True),
            "requests": ask.hget(f"requests:{today}", "*"),
            "workers": ask.zrangebyscore("workers", real_ms, "+inf"),
            "begins": ask.zrange("begins", 0, -1, withscores=True),
            **{f"due {alias}": ask.hget(f"account:{alias}", "due") for alias in overdue},
        },
    )
    return {**answers, "dues": [answers[f"due {alias}"] for alias in overdue]}


def _answers(pipeline: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Each name's answer: a pipeline's commands are answered in the order in which they were asked."""
    return dict(zip(asked, pipeline.execute(), strict=True))


def _state_key(institution: str, state: str) -> str:
    return f"state:{institution}:{state}"


def _all_paused(counted: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """What operators see while everything is paused, from what lives on underneath."""
    seen = dict.fromkeys(counted, 0)
    for (institution, _), number in counted.items():
        seen[institution, "paused"] += number
    return seen


def _oldest_as_of(answers: Mapping[str, Any], institutions: Iterable[str]) -> dict[str, int]:
    return {name: int(found[0][1]) for name in institutions if (found := answers[f"as_of:{name}"])}


def _some(answers: Mapping[str, Any], name: str) -> Some:
    oldest = answers[f"oldest {name}"]
    return Some(answers[name], int(oldest[0][1]) if oldest else None)


def _written_ms(letter: str | None) -> int | None:
    if letter is None:
        return None
    return round(datetime.fromisoformat(json.loads(letter)["headers"]["reason"]["last_at"]).timestamp() * 1000)


def _number(found: str | None) -> int | None:
    return None if found is None else int(found)


def _numbers(found: Mapping[str, str]) -> dict[str, int]:
    return {name: int(number) for name, number in found.items()}


def _by_parts(found: Mapping[str, str]) -> dict[tuple[str, ...], int]:
    return {tuple(name.split("|")): int(number) for name, number in sorted(found.items())}


def _durations(found: Mapping[str, str]) -> dict[tuple[str, str], Durations]:
    gathered: dict[tuple[str, str], dict[str, int]] = {}
    for (institution, mode, bucket), number in _by_parts(found).items():
        gathered.setdefault((institution, mode), {})[bucket] = number
    return {
        whose: Durations(
            later=numbers.pop("more", 0),
            sum_ms=numbers.pop("sum"),
            within={float(bound): number for bound, number in numbers.items()},
        )
        for whose, numbers in gathered.items()
    }


def _workers(alive: Sequence[str], begins: Mapping[str, float]) -> dict[str, Worker]:
    """Of those alive, the ones that take polls."""
    workers = {}
    for name, threads in (member.rsplit(" ", 1) for member in alive if not _is_settler(member)):
        workers[name] = Worker(int(threads), int(begins[name]) if name in begins else None)
    return workers


def _is_settler(member: str) -> bool:
    """Whether this member of `workers` has no threads for polls."""
    return member.endswith(" 0")
