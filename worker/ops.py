"""Operate: what an operator asks and orders, as data. It prints nothing, and every refusal says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from worker import schedule
from worker.accounts import Accounts, Definition, load_accounts
from worker.credentials import CredentialStore
from worker.errors import Refused
from worker.policy import DeadLetterQueue
from worker.settings import Settings
from worker.timetable import Timetable

#: The oldest servers that have what the scripts use (sharded Lua, XADD MINID, WAITAOF).
OLDEST = {"redis": (7, 2), "valkey": (8, 0)}

#: What an operator can do about a state that refuses a command.
ADVICE = {
    "unknown": "no such account; see: balances accounts",
    "retired": "it is no longer in the accounts file",
    "scheduled": "it is on its regular schedule",
    "dispatched": "its poll is about to begin",
    "polling": "its poll is under way",
    "awaiting": "its callback is awaited",
    "waiting": "it waits before its next try, and a wait is never shortened",
    "suspended": "it is suspended; see: balances dead show",
    "parked": "it awaits a notification; see: balances release",
    "paused": "it is paused; see: balances resume",
    "blocked": "its login is blocked; see: balances unblock",
}


@dataclass(frozen=True, slots=True)
class AccountRow:
    """One account as operators see it. Times are ISO 8601 in UTC; `next_due` is None while nothing is planned."""

    alias: str
    institution: str
    login: str
    state: str
    attempt: int
    poll: int
    next_due: str | None
    last_ok: str | None
    last_outcome: str | None
    overdue: bool


@dataclass(frozen=True, slots=True)
class LetterRow:
    """One dead letter; `alias` is None where it stands for a whole login."""

    alias: str | None
    login: str
    queue: str
    poll: int
    code: str
    type: str
    description: str
    attempts: int
    first_at: str
    last_at: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `check` looked at: `is_right`, and otherwise what is wrong and what would be right."""

    name: str
    is_right: bool
    detail: str


# ------------------------------------------------------------------------------------------------------------- reading


def accounts(timetable: Timetable, aliases: Sequence[str] | None = None) -> list[AccountRow]:
    """Every account, or those named; raises `Refused` for one that is not defined."""
    now_ms = timetable.now_ms()
    blocked = {login for login, fields in timetable.logins().items() if "blocked" in fields}
    rows = []
    for alias, fields in timetable.accounts(aliases):
        if "definition" not in fields:
            raise Refused(f"{alias}: {ADVICE['unknown']}")
        rows.append(_account_row(alias, fields, fields["login"] in blocked, now_ms))
    return rows


def _account_row(alias: str, fields: dict[str, str], is_blocked: bool, now_ms: int) -> AccountRow:
    state = "paused" if "paused" in fields else "blocked" if is_blocked else fields["state"]
    is_planned = state in {"scheduled", "waiting", "awaiting"}
    due_ms = int(fields["due"])
    return AccountRow(
        alias=alias,
        institution=fields["institution"],
        login=fields["login"],
        state=state,
        attempt=int(fields["attempt"]),
        poll=int(fields["poll"]),
        next_due=iso(due_ms) if is_planned else None,
        last_ok=iso(int(fields["last_ok"])) if "last_ok" in fields else None,
        last_outcome=fields.get("last_outcome"),
        overdue=is_planned and due_ms < now_ms and _is_overdue(fields["definition"], due_ms, now_ms),
    )


def _is_overdue(definition: str, due_ms: int, now_ms: int) -> bool:
    """Due for longer than its own interval, and not polled."""
    interval_ms = schedule.interval_ms(Definition.model_validate_json(definition), due_ms)
    return now_ms - due_ms > interval_ms


def dead_letters(timetable: Timetable, queue: str | None = None) -> list[LetterRow]:
    """Every dead letter, by queue and age."""
    return [_letter_row(name, letter) for name, letter in timetable.letters() if queue in {None, name}]


def _letter_row(queue: DeadLetterQueue, letter: dict[str, Any]) -> LetterRow:
    token, reason = json.loads(letter["body"])[1], letter["headers"]["reason"]
    return LetterRow(
        alias=None if "accounts" in reason else token["account"],
        login=token["login"],
        queue=queue,
        poll=token["poll"],
        code=reason["code"],
        type=reason["type"],
        description=reason["description"],
        attempts=reason["attempts"],
        first_at=reason["first_at"],
        last_at=reason["last_at"],
    )


def dead_letter(timetable: Timetable, name: str) -> tuple[LetterRow, dict[str, Any]]:
    """The letter of an account, or of a login, with the whole message; raises `Refused` where there is none."""
    for queue, letter in timetable.letters():
        row = _letter_row(queue, letter)
        if name == (row.alias or row.login):
            return row, letter
    raise Refused(f"{name}: has no dead letter; see: balances dead list")


def latest(timetable: Timetable, alias: str | None = None) -> list[dict[str, Any]]:
    """The newest balance of every account that has one, or of the one named."""
    found = {name: json.loads(text) for name, text in sorted(timetable.latest().items())}
    if alias is None:
        return list(found.values())
    if alias not in found:
        raise Refused(f"{alias}: has no balance yet; see: balances accounts {alias}")
    return [found[alias]]


# ------------------------------------------------------------------------------------------------------------ ordering


def each(aliases: Iterable[str], order: Callable[[str], str | None]) -> Iterator[tuple[str, str | None]]:
    """Gives the order for every alias; yields it with None, or with the reason of its refusal."""
    for alias in aliases:
        state = order(alias)
        yield alias, None if state is None else ADVICE.get(state, state)


def unblock(timetable: Timetable, login: str) -> None:
    """Lifts a login's block; raises `Refused` where there is none."""
    if login not in timetable.logins():
        raise Refused(f"{login}: no such login; see: balances accounts")
    reason = timetable.unblock(login)
    if reason:
        raise Refused(f"{login}: {reason}")


def redrive(timetable: Timetable, alias: str) -> str | None:
    """Brings a suspended account back; returns None, or why not."""
    return _why_not(timetable, alias, timetable.redrive(alias))


def discard(timetable: Timetable, alias: str) -> str | None:
    """Throws an account's letter away and pauses it; returns None, or why not."""
    return _why_not(timetable, alias, timetable.discard(alias))


def _why_not(timetable: Timetable, alias: str, state: str | None) -> str | None:
    """A login's letter is the login's: it goes with `unblock`, not one by one."""
    if state == "unknown" and "blocked" in timetable.logins().get(alias, {}):
        return f"this letter is a blocked login's; see: balances unblock {alias}"
    return state


def all_aliases(timetable: Timetable) -> list[str]:
    """Every account defined now."""
    return sorted(timetable.revisions())


def sync(settings: Settings, timetable: Timetable, *, force: bool) -> tuple[Accounts, int]:
    """Makes Redis hold the accounts file; returns it with how many accounts changed."""
    accounts = load_accounts(settings.accounts_path, callback_configured=settings.callback_url is not None)
    return accounts, timetable.apply(accounts, force=force)


# ------------------------------------------------------------------------------------------------------------ checking


def check(settings: Settings, accounts: Accounts, credentials: CredentialStore, client: redis.Redis) -> list[Finding]:
    """Looks at everything that must be right before, and while, the processes run. The configuration was read."""
    findings = [Finding("configuration", True, f"{len(accounts.definitions)} accounts in {settings.accounts_path}")]
    findings += _check_secrets(accounts, credentials)
    findings += check_server(client)
    return findings


def _check_secrets(accounts: Accounts, credentials: CredentialStore) -> Iterator[Finding]:
    schemes = {login: accounts.logins[login].scheme for login in {d.login for d in accounts.definitions.values()}}
    problems = credentials.problems(schemes)
    for problem in problems:
        yield Finding("secrets", False, str(problem))
    for warning in credentials.warnings():
        yield Finding("secrets", False, warning)
    if not problems:
        yield Finding("secrets", True, f"found for {len(schemes)} logins")


def check_server(client: redis.Redis) -> Iterator[Finding]:
    """Whether the server can be trusted with the timetable: version, eviction, persistence, clock."""
    try:
        server, memory, persistence = (client.info(section) for section in ("server", "memory", "persistence"))
        is_moved = bool(client.exists("clock:offset"))
    except redis.RedisError as error:
        yield Finding("server", False, f"{type(error).__name__}; is it running, and is BALANCES_REDIS_URL right?")
        return
    yield _check_version(server)
    policy = memory.get("maxmemory_policy", "noeviction")
    yield Finding("eviction", policy == "noeviction", f"maxmemory-policy is {policy}; it must be noeviction")
    is_kept = bool(persistence.get("aof_enabled"))
    yield Finding("persistence", is_kept, "append-only file on" if is_kept else "appendonly is off; it must be on")
    detail = "not moved" if not is_moved else "clock:offset moves it; delete that key, it is for tests only"
    yield Finding("clock", not is_moved, detail)


def _check_version(server: dict[str, Any]) -> Finding:
    name = server.get("server_name", "redis")
    text = str(server.get("valkey_version") or server["redis_version"])
    version = tuple(int(part) for part in text.split(".")[:2])
    oldest = OLDEST.get(name, OLDEST["redis"])
    wanted = ".".join(map(str, oldest))
    return Finding("server", version >= oldest, f"{name} {text}; at least {wanted}")


def iso(ms: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def as_dict(row: AccountRow | LetterRow | Finding) -> dict[str, Any]:
    """The row as `--json` prints it."""
    return asdict(row)
