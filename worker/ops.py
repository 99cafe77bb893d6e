"""Operate: what an operator asks and orders, as data. It prints nothing, and every refusal says why."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import redis

from worker import capacity, stream
from worker.accounts import Accounts, Definition, load_accounts
from worker.credentials import CredentialStore, token_end
from worker.errors import ConfigurationError, MissingSecret, Refused
from worker.policy import DeadLetterQueue
from worker.server import Finding, check_server
from worker.settings import Settings, format_duration, is_sandbox_file
from worker.stream import group_lag
from worker.timetable import Breaker, Reached, Timetable

#: The share of the stream's retention that a consumer group may be behind.
LARGEST_LAG = 0.5

#: What a state means to an operator whose command it refuses; `{alias}`, `{login}` and `{due}` are its own.
ADVICE = {
    "unknown": "no such account; see: balances accounts",
    "retired": "it is no longer in the accounts file",
    "scheduled": "it is on its regular schedule",
    "dispatched": "its poll is about to begin",
    "polling": "its poll is under way",
    "awaiting": "its callback is awaited",
    "waiting": "it waits for its next try at {due}, and a wait is never shortened",
    "suspended": "it is suspended; bring it back with: balances dead redrive {alias}",
    "parked": "it awaits a notification; bring it back with: balances release {alias}",
    "paused": "it is paused; go on with: balances resume {alias}",
    "blocked": "its login {login} is blocked; after the fix: balances unblock {login}",
    "everything paused": "everything is paused; go on with: balances resume --all",
    "gap": "its last poll began at {begun}, and its min_gap lets the next one begin at {gap_end}",
}

#: What an order asks of an account, said before the advice where the account's state does not tell it.
WANTED = {
    "resume": "it is not paused",
    "redrive": "it is not suspended",
    "discard": "it has no dead letter",
    "purge": "only what was removed from the accounts file, and is over, is purged",
}

#: What an order to all of them is said to have been given to.
EVERY_ACCOUNT = "every account"

#: States in which an account's next step is a due time of its own.
PLANNED = frozenset({"scheduled", "waiting", "awaiting"})
#: States in which nobody has begun its poll.
WAITS = frozenset({"scheduled", "waiting", "dispatched"})
#: States as operators see them, trouble first.
BY_TROUBLE = (
    "blocked",
    "suspended",
    "parked",
    "waiting",
    "awaiting",
    "polling",
    "dispatched",
    "paused",
    "scheduled",
)
#: Where a blocked login's letter lies, and where the letters of parked accounts do.
BLOCKED_QUEUE, PARKED_QUEUE = DeadLetterQueue.DO_NOT_RETRY, DeadLetterQueue.AFTER_NOTIFICATION
#: How long `tail` lets a server that is away rest.
AWAY_S = 1.0


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
class AttemptRow:
    """One of an account's last attempts. `outcome`: "ok", an error code, or our own kind of failure."""

    ended_at: str
    poll: int
    attempt: int
    duration_s: float
    outcome: str


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an account or a login stands still. `since`: ISO 8601; `queue`: of its letter; `type` may be ""."""

    code: str
    type: str
    description: str
    since: str
    queue: str


@dataclass(frozen=True, slots=True)
class Story:
    """One account, with why it is where it is and what can be done.

    `underneath`: the state that lives on under a pause or a block, and `due` its due time. `limits`: sentences about
    those that hold it back, a pause that lies over everything among them. `holder`: the account in
    flight for this login, '' for none. `reason`: of a dead letter. `block`: of the login where it is blocked, by the
    credential `blocked_by` ("bank", "key"); `is_manual` where only an operator lifts it.
    `tries`, `waits`, `losses`: the counters of `policy.Counters`. `attempts`: newest first. `commands`: what to type.
    """

    row: AccountRow
    underneath: str
    due: str | None
    interval: str
    holder: str
    reason: Reason | None
    block: Reason | None
    blocked_by: str
    is_manual: bool
    tries: int
    waits: int
    max_waits: int
    losses: int
    attempts: tuple[AttemptRow, ...]
    commands: tuple[str, ...]
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which accounts are asked for; what is given adds up.

    `state`: as operators see it, or "overdue". `text`: a part of the alias, or a login's name.
    """

    state: str = ""
    institution: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """An account among others: its row, why it is where it is ('' where all is well), and what to type about it.

    `due_ms`: when its own next step is due, None where a person or a notification decides.
    """

    row: AccountRow
    why: str
    command: str
    due_ms: int | None


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One order: when, by whom, what, on which account or login ("?": none that is known), and what came of it."""

    at: str
    actor: str
    action: str
    subject: str
    outcome: str


# ------------------------------------------------------------------------------------------------------------- reading


def accounts(timetable: Timetable, aliases: Sequence[str] | None = None) -> list[AccountRow]:
    """Every account, or those named; raises `Refused` for one that is not defined."""
    now_ms = timetable.now_ms()
    blocked, is_paused = blocked_logins(timetable), timetable.is_paused()
    return [
        account_row(alias, _defined(alias, fields), fields["login"] in blocked, now_ms, is_paused=is_paused)
        for alias, fields in timetable.accounts(aliases)
        if aliases is not None or "definition" in fields  # one may have been retired while the others were read
    ]


def _defined(alias: str, fields: dict[str, str]) -> dict[str, str]:
    if "definition" not in fields:
        raise Refused(f"{alias}: {ADVICE[fields.get('state', 'unknown')]}")
    return fields


def blocked_logins(timetable: Timetable) -> set[str]:
    """The logins of which nothing goes out."""
    return set(timetable.blocked())


def find(timetable: Timetable, wanted: Wanted, first: int, most: int) -> tuple[list[str], int]:
    """From the accounts wanted, trouble first, those from `first` on, `most` of them; and how many are wanted.

    Reads no account, and without a text only the groups that it needs: a page of 100,000 is as quick as one of 100.
    """
    seen_as = "paused" if timetable.is_paused() else None
    states = [state for state in BY_TROUBLE if wanted.state in {"", "overdue", seen_as or state}]
    fits = _fitting(timetable, wanted)
    found: list[str] = []
    passed = 0
    for group, size in timetable.groups(states, wanted.institution):
        members: list[str] = []
        if size and (fits or (len(found) < most and passed + size > first)):
            members = sorted(filter(fits, timetable.members(group)))
            size = len(members)
        found += members[max(0, first - passed) :][: most - len(found)]
        passed += size
    return found, passed


def _fitting(timetable: Timetable, wanted: Wanted) -> Callable[[str], bool] | None:
    """Whether an alias fits what its group does not tell; None where every one does."""
    if not wanted.text and wanted.state != "overdue":
        return None
    of_login = timetable.accounts_of(wanted.text) if wanted.text else set()
    overdue = timetable.overdue() if wanted.state == "overdue" else None
    return lambda alias: (wanted.text in alias or alias in of_login) and (overdue is None or alias in overdue)


def standing(timetable: Timetable, aliases: Sequence[str]) -> list[Standing]:
    """How these accounts stand, in this order; without those that are not defined any more."""
    now_ms = timetable.now_ms()
    found = {alias: fields for alias, fields in timetable.accounts(aliases) if "definition" in fields}
    blocked = timetable.blocked()
    logins = timetable.logins({fields["login"] for fields in found.values()} & blocked.keys())
    is_paused = timetable.is_paused()
    return [_standing(alias, found[alias], logins, now_ms, is_paused=is_paused) for alias in aliases if alias in found]


def _standing(
    alias: str, fields: dict[str, str], logins: Mapping[str, dict[str, str]], now_ms: int, *, is_paused: bool
) -> Standing:
    login = logins.get(fields["login"], {})
    row = account_row(alias, fields, "blocked" in login, now_ms, is_paused=is_paused)
    due_ms = int(fields["due"]) if row.next_due else None
    return Standing(row, _why(row, fields, login), _commands(row, fields["state"], is_all_paused=is_paused)[0], due_ms)


def _why(row: AccountRow, fields: Mapping[str, str], login: Mapping[str, str]) -> str:
    """Why the account is where it is, in a few words."""
    match row.state:
        case "blocked":
            return _told(login)
        case "suspended" | "parked":
            return _told(fields)
        case "paused":
            return f"paused while {fields['state']}"
        case "awaiting":
            return "its callback is awaited"
        case "waiting":
            return f"after {row.last_outcome}; next is attempt {row.attempt + 1}"
    return "not polled yet" if row.last_outcome is None else "" if row.last_outcome == "ok" else row.last_outcome


def _told(fields: Mapping[str, str]) -> str:
    """The reason of a letter: code, type and description."""
    what = " ".join(filter(None, (fields.get("code"), fields.get("type"))))
    return f"{what}: {fields['description']}" if fields.get("description") else what


def blocked_by_age(timetable: Timetable, most: int) -> list[tuple[str, dict[str, str]]]:
    """The logins blocked for longest, each with the fields of its hash."""
    found = timetable.logins(timetable.blocked())
    blocked = [(login, fields) for login, fields in found.items() if "blocked" in fields]
    return sorted(blocked, key=lambda each: int(each[1]["blocked_at"]))[:most]


def longest_awaited(timetable: Timetable, most: int) -> list[tuple[str, int]]:
    """The accounts whose callbacks are awaited for longest, and since when (ms)."""
    return timetable.longest_awaited(most)


def account_row(alias: str, fields: Mapping[str, str], is_blocked: bool, now_ms: int, *, is_paused: bool) -> AccountRow:
    """The row of a defined account, from the fields of its hash. `is_paused`: everything is."""
    state = "paused" if is_paused or "paused" in fields else "blocked" if is_blocked else fields["state"]
    is_planned = state in PLANNED
    overdue_ms = int(fields.get("overdue_at", now_ms))
    return AccountRow(
        alias=alias,
        institution=fields["institution"],
        login=fields["login"],
        state=state,
        attempt=int(fields["attempt"]),
        poll=int(fields["poll"]),
        next_due=iso(int(fields["due"])) if is_planned else None,
        last_ok=iso(int(fields["last_ok"])) if "last_ok" in fields else None,
        last_outcome=fields.get("last_outcome"),
        overdue=state in WAITS and overdue_ms < now_ms,
    )


def story(timetable: Timetable, alias: str) -> Story:
    """One account's story; raises `Refused` for one that is not defined."""
    [(_, fields)] = timetable.accounts([alias])
    login = timetable.logins().get(_defined(alias, fields)["login"], {})
    now_ms, reached = timetable.now_ms(), timetable.reached()
    is_all_paused = reached.paused_at_ms is not None
    row = account_row(alias, fields, "blocked" in login, now_ms, is_paused=is_all_paused)
    definition = Definition.model_validate_json(fields["definition"])
    return Story(
        row=row,
        underneath=fields["state"],
        due=iso(int(fields["due"])) if fields["state"] in PLANNED else None,
        limits=tuple(_held_by(reached, fields, login, now_ms)),
        interval=_interval(definition),
        holder=login.get("holder", "").partition(" ")[0],
        reason=_reason(fields, fields["suspended_at"], fields["queue"]) if "letter" in fields else None,
        block=_reason(login, login["blocked_at"], DeadLetterQueue.DO_NOT_RETRY) if "blocked" in login else None,
        blocked_by=login.get("blocked", ""),
        is_manual="manual" in login,
        tries=int(fields["tries"]),
        waits=int(fields["waits"]),
        max_waits=timetable.retry().max_waits,
        losses=int(fields["losses"]),
        attempts=tuple(map(_attempt_row, timetable.history(alias))),
        commands=_commands(row, fields["state"], is_all_paused=is_all_paused, rests=_is_resting(login, now_ms)),
    )


def _held_by(reached: Reached, fields: Mapping[str, str], login: Mapping[str, str], now_ms: int) -> Iterator[str]:
    """What holds the account back besides its own state, in words."""
    institution = fields["source"].removeprefix("/khipu/")
    if reached.paused_at_ms is not None:
        yield f"{_pause_words(reached.paused_at_ms)}."
    if reached.is_all_spent:
        yield f"{_budget_words(None, reached)}."
    elif fields["login"] in reached.spent_logins:
        yield f"{_budget_words(fields['login'], reached)}."
    if _is_resting(login, now_ms):
        yield f"its {_rest_words(fields['login'], login)}."
    if institution in reached.breakers:
        yield f"{_breaker_words(institution, reached.breakers[institution])}."
    elif login.get("held_by") == "rate" and int(login["not_before"]) > now_ms:
        turn = iso(int(login["not_before"]))
        yield f"The rate of institution {institution} is used up; the turn of login {fields['login']} comes at {turn}."


def _pause_words(paused_at_ms: int) -> str:
    return f"everything is paused since {iso(paused_at_ms)}; go on with: balances resume --all"


def _budget_words(login: str | None, reached: Reached) -> str:
    return f"daily budget of {f'login {login}' if login else 'all logins'} spent until {reached.next_day}"


def _is_resting(login: Mapping[str, str], now_ms: int) -> bool:
    """Whether nothing of the login goes out, after too many failures that may each have been a bad log-on."""
    return int(login.get("rests_until", 0)) > now_ms


def _rest_words(name: str, login: Mapping[str, str]) -> str:
    return (
        f"login {name} rests until {iso(int(login['rests_until']))}: {login['generic']} generic failures in a row; "
        f"a bad password may hide behind them; where it is right: balances unblock {name}"
    )


def _breaker_words(institution: str, breaker: Breaker) -> str:
    since = iso(breaker.opened_at_ms)
    return f"institution {institution} is held since {since} ({breaker.cause}), and probed with one poll at a time"


def _interval(definition: Definition) -> str:
    if definition.every_ms is None:
        return f"cron {definition.cron} in {definition.timezone}"
    return f"every {format_duration(timedelta(milliseconds=definition.every_ms))}"


def _reason(fields: Mapping[str, str], since_ms: str, queue: str) -> Reason:
    return Reason(fields["code"], fields["type"], fields["description"], iso(int(since_ms)), queue)


def _attempt_row(entry: str) -> AttemptRow:
    ended_ms, poll, attempt, duration_ms, outcome = entry.split(" ", 4)
    return AttemptRow(iso(int(ended_ms)), int(poll), int(attempt), int(duration_ms) / 1000, outcome)


def _commands(row: AccountRow, underneath: str, *, is_all_paused: bool, rests: bool = False) -> tuple[str, ...]:
    """What an operator can type about this account now, the likeliest first."""
    alias = row.alias
    commands = {
        "suspended": (f"balances dead redrive {alias}", f"balances dead discard {alias}"),
        "parked": (f"balances release {alias}", f"balances dead discard {alias}"),
        "scheduled": (f"balances poll {alias}",) if row.state == "scheduled" else (),
    }.get(underneath, ())
    if is_all_paused:
        return ("balances resume --all", *commands)
    if row.state == "blocked" or rests:
        commands = (f"balances unblock {row.login}", *commands)
    return (f"balances resume {alias}", *commands) if row.state == "paused" else (*commands, f"balances pause {alias}")


def dead_letters(timetable: Timetable, queue: str | None = None, most: int = 0) -> list[LetterRow]:
    """Every dead letter, or the oldest `most` of each queue, by queue and age."""
    return [_letter_row(name, letter) for name, letter in timetable.letters(most) if queue in {None, name}]


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


def lacking(timetable: Timetable, alias: str, what: str) -> str:
    """Why nothing is shown of an account: it lacks `what`, or there is no such account."""
    [(_, fields)] = timetable.accounts([alias])
    return f"{what}; see: balances accounts {alias}" if fields else ADVICE["unknown"]


def latest(timetable: Timetable, alias: str | None = None) -> list[dict[str, Any]]:
    """The newest balance of every account that has one, or of the one named."""
    found = {name: json.loads(text) for name, text in sorted(timetable.latest().items())}
    if alias is None:
        return list(found.values())
    if alias not in found:
        raise Refused(f"{alias}: {lacking(timetable, alias, 'has no balance yet')}")
    return [found[alias]]


def follow(client: redis.Redis, name: str, *, after: str, is_away: Callable[[], None]) -> Iterator[stream.Entry]:
    """Every entry of the stream after `after`, for ever; `is_away` is called when the server goes away."""
    while True:
        try:
            for entry in stream.read(client, name, after=after, follow=True):
                after = entry.id
                yield entry
        except (redis.ConnectionError, redis.TimeoutError):
            is_away()
            time.sleep(AWAY_S)


def audit(timetable: Timetable, *, alias: str | None = None, limit: int = 50) -> list[AuditRow]:
    """The last orders that were given, newest first; about one account or login only, if one is named."""
    found = (AuditRow(iso(int(fields.pop("at"))), **fields) for fields in timetable.audit())
    return list(islice((row for row in found if alias in {None, row.subject}), limit))


# ------------------------------------------------------------------------------------------------------------ ordering


def actor() -> str:
    """Who gives orders here: user@host, and who became that user by sudo. Told, not proven."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    behind = os.environ.get("SUDO_USER")
    return as_text(f"{user}@{socket.gethostname()}" + (f" sudo {behind}" if behind else ""))


def as_text(given: str) -> str:
    """What an argument or the environment holds, which need be no text and could not be sent to Redis as one."""
    return given.encode(errors="replace").decode()


@dataclass(frozen=True, slots=True)
class Order:
    """A command for one account: its name, and what gives it; that returns None, or the state that refuses it."""

    name: str
    give: Callable[[str], str | None]


def each(timetable: Timetable, order: Order, aliases: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Gives the order for every alias, one at a time; yields it with None, or with the reason of its refusal."""
    for alias in aliases:
        state = order.give(alias)
        yield alias, None if state is None else _why_not(timetable, order, alias, state)


def _why_not(timetable: Timetable, order: Order, alias: str, state: str) -> str:
    """The refusal in words: what the order wanted, what the state means, and the block that lies over it."""
    logins = timetable.logins()
    if state == "unknown" and "blocked" in logins.get(alias, {}):
        return f"this is a login, and its letter goes with its block: balances unblock {alias}"
    [(_, fields)] = timetable.accounts([alias])
    if state == "everything paused":
        return ADVICE[state]
    parts = [WANTED[order.name]] if order.name in WANTED and state not in {"unknown", "retired"} else []
    if not (parts and state == "scheduled"):
        parts.append(ADVICE[state])
    if state not in {"unknown", "retired", "blocked"} and "blocked" in logins.get(fields["login"], {}):
        parts.append(ADVICE["blocked"])
    return _filled("; ".join(parts), alias, fields)


def _filled(advice: str, alias: str, fields: Mapping[str, str]) -> str:
    begun_ms = int(fields.get("begun_at", 0))
    gap_end_ms = begun_ms + int(fields.get("min_gap", 0))
    return advice.format(
        alias=alias,
        login=fields.get("login", ""),
        due=_moment(int(fields.get("due", 0))),
        begun=_moment(begun_ms),
        gap_end=_moment(gap_end_ms),
    )


def _moment(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def poll(timetable: Timetable) -> Order:
    """Makes a scheduled account due now."""
    return Order("poll", timetable.poll)


def pause(timetable: Timetable) -> Order:
    """Pauses an account; a poll under way ends as it would."""
    return Order("pause", timetable.pause)


def resume(timetable: Timetable) -> Order:
    """Takes the pause off an account."""
    return Order("resume", timetable.resume)


def pause_all(timetable: Timetable) -> None:
    """Pauses everything with one switch, what is defined later included."""
    timetable.pause_all()


def resume_all(timetable: Timetable) -> Iterator[tuple[str, str | None]]:
    """Takes off the pause that lies over everything; where there is none, that of every account that has its own."""
    if timetable.resume_all():
        yield EVERY_ACCOUNT, None
        return
    yield from each(timetable, resume(timetable), [row.alias for row in accounts(timetable) if row.state == "paused"])


def redrive(timetable: Timetable, *, dry_run: bool = False) -> Order:
    """Brings a suspended account back; a dry run only looks whether it would."""
    return Order("redrive", (lambda alias: _unless_suspended(timetable, alias)) if dry_run else timetable.redrive)


def _unless_suspended(timetable: Timetable, alias: str) -> str | None:
    [(_, fields)] = timetable.accounts([alias])
    state = fields.get("state", "unknown")
    return None if state == "suspended" else state


def discard(timetable: Timetable) -> Order:
    """Throws an account's letter away and pauses the account."""
    return Order("discard", timetable.discard)


def redrivable(timetable: Timetable, queue: str) -> list[str]:
    """The suspended accounts with a letter in this queue, the oldest first; a blocked login's letter is none."""
    if queue == DeadLetterQueue.AFTER_NOTIFICATION:
        raise Refused(f"{queue}: what waits there is parked; bring it back with: balances release")
    return [row.alias for row in dead_letters(timetable, queue) if row.alias]


def release(
    timetable: Timetable, aliases: Sequence[str], *, institution: str, login: str
) -> list[tuple[str, str | None]]:
    """Brings parked accounts back, filters adding up; each with None, or with why it was not released."""
    released = timetable.release(aliases, institution=institution, login=login)
    return [(alias, None) for alias in released] + [
        (alias, _why_not_released(timetable, alias)) for alias in aliases if alias not in released
    ]


def _why_not_released(timetable: Timetable, alias: str) -> str:
    [(_, fields)] = timetable.accounts([alias])
    state = fields.get("state", "unknown")
    if state == "parked":
        return "it is parked, but not of that institution or login"
    if state in {"unknown", "retired"}:
        return ADVICE[state]
    return _filled(f"it is not parked; {ADVICE[state]}", alias, fields)


def unblock(timetable: Timetable, login: str) -> str:
    """Lifts a login's block, or ends its rest; returns what it did. Raises `Refused` where there is neither."""
    fields = timetable.logins().get(login)
    if fields is None:
        raise Refused(f"{login}: no such login; see: balances accounts")
    reason = timetable.unblock(login)
    if reason:
        raise Refused(f"{login}: {reason}")
    return "unblocked" if "blocked" in fields else "its rest is over"


def purge(timetable: Timetable) -> Order:
    """Deletes all that is kept of a retired account, its entries on the stream included."""
    return Order("purge", timetable.purge)


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
    if not is_sandbox_file(settings.accounts_path):  # whose bank answers at once
        findings += [Finding("load", False, detail) for detail in capacity.impossible(accounts)]
    findings += _check_secrets(accounts, credentials)
    findings += check_server(client)
    if findings[-1].name != "server":  # it could be asked
        findings += _check_groups(client, settings.stream)
        timetable = Timetable(client, stream=settings.stream)
        findings += _check_tokens(accounts, credentials, timetable.now_ms())
        findings += _check_limits(timetable.reached())
        findings += _check_rests(timetable.logins(), timetable.now_ms())
    return findings


def _check_limits(reached: Reached) -> Iterator[Finding]:
    """What keeps polls from going out although they are due."""
    if reached.paused_at_ms is not None:
        yield Finding("pause", False, _pause_words(reached.paused_at_ms))
    for institution, breaker in reached.breakers.items():
        yield Finding("institution", False, _breaker_words(institution, breaker))
    for login in sorted(reached.spent_logins):
        yield Finding("budget", False, _budget_words(login, reached))
    if reached.is_all_spent:
        yield Finding("budget", False, _budget_words(None, reached))


def _check_rests(logins: Mapping[str, dict[str, str]], now_ms: int) -> Iterator[Finding]:
    for name, fields in logins.items():
        if _is_resting(fields, now_ms):
            yield Finding("login", False, _rest_words(name, fields))


def _check_groups(client: redis.Redis, stream: str) -> Iterator[Finding]:
    """Whether a consumer group is about to fall off the end of the stream, which waits for nobody."""
    for lag in group_lag(client, stream):
        is_right = lag.share <= LARGEST_LAG and not lag.lost
        detail = f"{lag.group} has used {lag.share:.0%} of the retention, {lag.lost} entries lost"
        yield Finding("consumer group", is_right, detail)


def _check_secrets(accounts: Accounts, credentials: CredentialStore) -> Iterator[Finding]:
    problems = credentials.problems(accounts.schemes)
    for problem in problems:
        yield Finding("secrets", False, str(problem))
    for warning in credentials.warnings():
        yield Finding("secrets", False, warning)
    if not problems:
        yield Finding("secrets", True, f"found for {len(accounts.schemes)} logins")


def _check_tokens(accounts: Accounts, credentials: CredentialStore, now_ms: int) -> Iterator[Finding]:
    """The tokens that end within `token_days`, or have ended; by the server's clock, as workers see them."""
    for login, scheme in sorted(accounts.schemes.items()):
        try:
            end_s = token_end(credentials.credentials(login, scheme))
        except (MissingSecret, ConfigurationError):
            continue  # told already
        if end_s is None:
            continue
        days = (end_s * 1000 - now_ms) / 86_400_000
        if days <= 0:
            yield Finding("token", False, f"login {login}: its token ended at {iso(end_s * 1000)}; replace it")
        elif days <= accounts.logins[login].token_days:
            detail = f"login {login}: its token ends at {iso(end_s * 1000)}, in {days:.0f} days; replace it"
            yield Finding("token", False, detail)


def iso(ms: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_ms(moment: str) -> int:
    """The inverse of `iso`."""
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


def as_dict(row: AccountRow | LetterRow | Finding | AuditRow) -> dict[str, Any]:
    """The row as `--json` prints it."""
    return asdict(row)
