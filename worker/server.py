"""Look at the server that keeps everything: whether it may be trusted with the timetable."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import redis
import structlog
from redis.exceptions import NoPermissionError

from worker.clock import TOLERANCE_MS
from worker.errors import ConfigurationError, Problem, StoreUnavailable

log = structlog.get_logger()

#: The oldest servers that have what the scripts use (sharded Lua, XADD MINID, WAITAOF).
OLDEST = {"redis": (7, 2), "valkey": (8, 0)}
#: Where nothing may start: the scripts would fail, or the timetable be silently thrown away.
REFUSED = frozenset({"server", "eviction"})
#: What is said of its append-only file.
KEPT = "append-only file on"
NOT_KEPT = "appendonly is off: acknowledged answers live in memory only; it must be on"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `is_right`, and otherwise what is wrong and what would be right."""

    name: str
    is_right: bool
    detail: str


def check_server(client: redis.Redis) -> Iterator[Finding]:
    """Version, eviction, persistence, permission to ask for these, and the clock; or that it cannot be asked."""
    try:
        findings = _ask(client)
    except redis.RedisError as error:
        advice = "is it running, new enough, and BALANCES_REDIS_URL right?"
        findings = [Finding("server", False, f"{type(error).__name__}; {advice}")]
    yield from findings


def require_fit(client: redis.Redis) -> bool:
    """Warns of what is wrong with the server, and returns whether it keeps an append-only file, as far as one can ask.

    Raises `ConfigurationError` for one that nothing may start on, `StoreUnavailable` for one that is away.
    """
    try:
        findings = _ask(client)
    except redis.RedisError as error:
        raise StoreUnavailable(f"Redis: {type(error).__name__}") from error
    if problems := problems_of(finding for finding in findings if finding.name in REFUSED):
        raise ConfigurationError(problems)
    wrong = {finding.name: finding.detail for finding in findings if not finding.is_right and finding.name != "clock"}
    for name, detail in wrong.items():
        log.warning("the server is not as it should be", what=name, reason=detail)
    return "persistence" not in wrong


def problems_of(findings: Iterable[Finding]) -> list[Problem]:
    """What is not right, as mistakes of the configuration."""
    return [
        Problem(f"BALANCES_REDIS_URL: {finding.name}", finding.detail, "see: balances check")
        for finding in findings
        if not finding.is_right
    ]


def _ask(client: redis.Redis) -> list[Finding]:
    try:
        found = [*read_info({name: client.info(name) for name in ("server", "memory", "persistence")})]
    except NoPermissionError:
        found = [Finding("permissions", False, "this user may not use INFO: version, eviction and file not checked")]
    is_moved = bool(client.exists("clock:offset"))
    detail = "not moved" if not is_moved else "clock:offset moves it; delete that key, it is for tests only"
    return [*found, Finding("clock", not is_moved, detail)]


def compare_clocks(client: redis.Redis) -> Finding:
    """The server's own clock against this host's, whatever tests do to the one clock; a slow reply is no difference."""
    sent_s = time.time()
    seconds, micros = client.time()
    received_s = time.time()
    server_s = seconds + micros / 1e6
    apart_s = server_s - min(max(server_s, sent_s), received_s)
    if abs(apart_s) * 1000 <= TOLERANCE_MS:
        return Finding("clock", True, f"{abs(apart_s):.1f} s from this host's")
    way = "ahead of" if apart_s > 0 else "behind"
    return Finding("clock", False, f"{abs(apart_s):.0f} s {way} this host's; let NTP set both")


def read_info(info: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """What the sections `server`, `memory` and `persistence` of INFO say."""
    yield _check_version(info["server"])
    policy = info["memory"].get("maxmemory_policy", "noeviction")
    yield Finding("eviction", policy == "noeviction", f"maxmemory-policy is {policy}; it must be noeviction")
    is_kept = bool(info["persistence"].get("aof_enabled"))
    yield Finding("persistence", is_kept, KEPT if is_kept else NOT_KEPT)


def _check_version(server: Mapping[str, Any]) -> Finding:
    name = server.get("server_name", "redis")
    text = str(server.get("valkey_version") or server["redis_version"])
    version = tuple(int(part) for part in text.split(".")[:2])
    oldest = OLDEST.get(name, OLDEST["redis"])
    wanted = ".".join(map(str, oldest))
    return Finding("server", version >= oldest, f"{name} {text}; at least {wanted}")
