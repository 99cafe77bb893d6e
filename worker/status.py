"""Find what an on-call person must know: what is wrong, why, and what to type; then the accounts that were asked for.

    figures, letters, logins ─▶ troubles, the gravest first        aliases by state ─▶ one page of accounts

Reads through `worker.figures` and `worker.ops`, orders nothing, and knows no HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from worker import figures, ops
from worker.figures import Figures
from worker.ops import LetterRow, Standing, Wanted
from worker.settings import format_duration
from worker.timetable import POLLS, Breaker, Timetable

#: Accounts on one page.
PAGE = 200
#: Cases that a trouble names one by one; a command lists them all.
NAMED = 5
#: A beat claims every second, and a worker says every few seconds that it is there.
SILENT_MS = 30_000
#: How long a poll may wait in the queue while no worker begins any.
IDLE_MS = 5 * 60_000
#: Khipu's own limit for a callback, where it names none.
MISSING_MS = 30 * 60_000
#: An answer is settled within a second; its settling is pushed again after a minute.
UNSETTLED_MS = 2 * 60_000
#: A token that ends so soon needs a person now.
ENDING_MS = 3 * 86_400_000


@dataclass(frozen=True, slots=True)
class Case:
    """One of those that a trouble is about: who, why, since when (ms), and what to type."""

    who: str
    why: str = ""
    since_ms: int | None = None
    command: str = ""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that is wrong: a sentence, what to do about it, what to type, and the oldest of its cases."""

    title: str
    advice: str
    command: str = ""
    cases: tuple[Case, ...] = ()
    more: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """All that the page shows. `found` accounts were asked for, of which `accounts` are this page's."""

    figures: Figures
    troubles: tuple[Trouble, ...]
    wanted: Wanted
    found: int
    page: int
    accounts: tuple[Standing, ...]

    @property
    def pages(self) -> int:
        """How many pages the accounts found fill."""
        return max(1, -(-self.found // PAGE))


def read(timetable: Timetable, stream: str, wanted: Wanted, page: int) -> Status:
    """Everything at this moment, with that page (from 1) of the accounts wanted. Raises what Redis raises."""
    found = figures.read(timetable.client, stream)
    aliases, count = ops.find(timetable, wanted, (page - 1) * PAGE, PAGE)
    return Status(
        figures=found,
        troubles=tuple(troubles(timetable, found)),
        wanted=wanted,
        found=count,
        page=page,
        accounts=tuple(ops.standing(timetable, aliases)),
    )


def troubles(timetable: Timetable, found: Figures) -> Iterator[Trouble]:
    """What is wrong, the gravest first; but first of all what somebody has ordered."""
    yield from _all_paused(found)
    yield from _silent_beat(found)
    yield from _missing_workers(found)
    yield from _held_claims(found)
    yield from _blocked(timetable, found)
    yield from _resting(found)
    yield from _held_institutions(found)
    yield from _spent_budgets(found)
    yield from _overdue(timetable, found)
    yield from _dead(timetable, found)
    yield from _missing_callbacks(timetable, found)
    yield from _missing_settlers(found)
    yield from _unsettled(found)
    yield from _ending_tokens(found)
    yield from _slow_groups(found)


def _all_paused(found: Figures) -> Iterator[Trouble]:
    if found.limits.paused_at_ms is not None:
        yield Trouble(
            "Everything is paused",
            "Nothing is sent for any account until an operator resumes; each keeps its place, and nothing is lost.",
            "balances resume --all",
            (Case("paused", since_ms=found.limits.paused_at_ms),),
        )


def _silent_beat(found: Figures) -> Iterator[Trouble]:
    if found.claimed_at_ms is None or found.now_ms - found.claimed_at_ms > SILENT_MS:
        yield Trouble(
            "Beat is silent",
            "Nothing is polled until a beat runs; what is due waits and is not lost. Start the Procfile's beat, then:",
            "balances check",
            () if found.claimed_at_ms is None else (Case("last claim", since_ms=found.claimed_at_ms),),
        )


def _missing_workers(found: Figures) -> Iterator[Trouble]:
    waiting = found.queues[POLLS]
    begins = [worker.last_begin_ms for worker in found.workers.values() if worker.last_begin_ms is not None]
    if not found.workers:
        yield Trouble(
            "No worker is alive",
            "Nothing is polled until a worker runs; what is due waits and is not lost. Start the Procfile's worker, "
            "then:",
            "balances check",
        )
    elif waiting and begins and found.now_ms - max(begins) > IDLE_MS:
        advice = f"{_many(waiting, 'poll')} in the queue, and nobody begins any. Restart the workers, one at a time:"
        cases = tuple(Case(name, "last began", worker.last_begin_ms) for name, worker in found.workers.items())
        yield Trouble("Workers are alive and consume nothing", advice, "balances check", *_named(cases, len(cases)))


def _held_claims(found: Figures) -> Iterator[Trouble]:
    if found.held_ms:
        yield Trouble(
            "Nothing is claimed after a jump of the clock",
            "What is under way may end first; all waits were moved along, and polling goes on by itself. Mend the "
            "clock of the Redis server, or it jumps again.",
            "",
            (Case("nothing is claimed until", since_ms=found.now_ms + found.held_ms),),
        )


def _held_institutions(found: Figures) -> Iterator[Trouble]:
    by_age = sorted(found.limits.breakers.items(), key=lambda each: each[1].opened_at_ms)
    if by_age:
        cases = [_held_case(name, breaker, found.now_ms) for name, breaker in by_age]
        yield Trouble(
            f"{_many(len(cases), 'institution')} held",
            "Many of its logins failed for one cause, so one poll at a time probes it, instead of all being paid for. "
            "Its first balance lets everybody go: nothing needs to be typed. See whether the bank or Khipu is away.",
            "",
            *_named(cases, len(cases)),
        )


def _held_case(institution: str, breaker: Breaker, now_ms: int) -> Case:
    wait = format_duration(timedelta(seconds=max(0, breaker.next_probe_ms - now_ms) // 1000))
    probe = f"next probe in {wait}" if breaker.next_probe_ms > now_ms else "the next probe may go now"
    return Case(institution, f"{probe}; {breaker.cause} since", breaker.opened_at_ms)


def _spent_budgets(found: Figures) -> Iterator[Trouble]:
    limits = found.limits
    whose = (["all logins"] if limits.is_all_spent else []) + sorted(limits.spent_logins)
    if whose:
        yield Trouble(
            "A daily budget is spent",
            f"Nothing of it goes out until {limits.next_day}; accounts stay due, and nothing is lost. It goes on by "
            "itself; to go on now, raise daily_requests in the accounts file, then:",
            "balances sync",
            *_named((Case(name, f"spent until {limits.next_day}") for name in whose), len(whose)),
        )


def _blocked(timetable: Timetable, found: Figures) -> Iterator[Trouble]:
    if found.blocked:
        cases = [_blocked_case(login, fields) for login, fields in ops.blocked_by_age(timetable, NAMED)]
        yield Trouble(
            f"{_many(len(found.blocked), 'login')} blocked",
            "Nothing of it goes out, so that the bank locks nobody out. Mend the credential first; a new one lifts the "
            "block by itself, unless this says that only an operator may.",
            "balances dead list --queue do-not-retry",
            *_named(cases, len(found.blocked)),
        )


def _blocked_case(login: str, fields: dict[str, str]) -> Case:
    who = "bank log-on" if fields["blocked"] == "bank" else "key or token"
    why = f"{who}: {_why(fields['code'], fields['type'], fields['description'])}"
    manual = "; only an operator may unblock" if "manual" in fields else ""
    return Case(login, why + manual, int(fields["blocked_at"]), f"balances unblock {login}")


def _resting(found: Figures) -> Iterator[Trouble]:
    if found.resting:
        cases = (
            Case(login, f"until {ops.iso(until_ms)}", command=f"balances unblock {login}")
            for login, until_ms in found.resting_ms.items()
        )
        yield Trouble(
            f"{_many(found.resting, 'login')} resting",
            "Three generic failures in a row: a bad password may hide behind them, so nothing of it goes out for the "
            "long wait. Ask whether the password is right; then one account may go first:",
            "balances accounts",
            *_named(cases, found.resting),
        )


def _overdue(timetable: Timetable, found: Figures) -> Iterator[Trouble]:
    if found.overdue.count:
        aliases, _ = ops.find(timetable, Wanted(state="overdue"), 0, NAMED)
        standing = ops.standing(timetable, aliases)
        cases = [
            Case(each.row.alias, each.why, each.due_ms, f"balances accounts {each.row.alias}") for each in standing
        ]
        yield Trouble(
            f"{_many(found.overdue.count, 'account')} overdue",
            "Due for longer than their own interval. With beat and workers alive there are too few threads, or a "
            "budget is spent; see what holds one up:",
            "",
            *_named(cases, found.overdue.count),
        )


def _dead(timetable: Timetable, found: Figures) -> Iterator[Trouble]:
    for queue, some in found.letters.items():
        letters = [row for row in ops.dead_letters(timetable, queue, NAMED + len(found.blocked)) if row.alias]
        count = some.count - len(found.blocked) * (queue == ops.BLOCKED_QUEUE)
        if count > 0:
            name = queue.removeprefix("balances.dead.")
            yield Trouble(
                f"{_many(count, 'dead letter')} in {name}",
                DEAD[name],
                f"balances dead list --queue {name}",
                *_named(map(_dead_case, letters), count),
            )


#: What to do about a queue's letters.
DEAD = {
    "do-not-retry": "The account is suspended: asking again changes nothing. Mend what the reason says, then redrive.",
    "after-notification": "The account is parked until Khipu notifies; without a notification, release it by hand.",
    "retries-exhausted": "The account is suspended: all tries and waits are spent. When the bank is back, redrive.",
    "bad-answer": "The account is suspended: the answer was another account's, or not to be read. Look, then redrive.",
}


def _dead_case(letter: LetterRow) -> Case:
    verb = "release" if letter.queue == ops.PARKED_QUEUE else "dead redrive"
    why = _why(letter.code, letter.type, letter.description)
    return Case(str(letter.alias), why, ops.to_ms(letter.last_at), f"balances {verb} {letter.alias}")


def _missing_callbacks(timetable: Timetable, found: Figures) -> Iterator[Trouble]:
    oldest_ms = found.awaiting.oldest_ms
    if oldest_ms is not None and found.now_ms - oldest_ms > MISSING_MS:
        late = [(alias, since_ms) for alias, since_ms in ops.longest_awaited(timetable, NAMED)]
        late = [(alias, since_ms) for alias, since_ms in late if found.now_ms - since_ms > MISSING_MS]
        yield Trouble(
            "Callbacks are missing",
            f"{_many(found.awaiting.count, 'callback')} awaited, the oldest for longer than "
            f"{format_duration(timedelta(milliseconds=MISSING_MS))}. Is the webhook running, and reachable at its "
            "public address?",
            "balances check",
            tuple(Case(alias, "asked", since_ms, f"balances accounts {alias}") for alias, since_ms in late),
        )


def _missing_settlers(found: Figures) -> Iterator[Trouble]:
    if not found.settlers and (found.awaiting.count or found.unsettled.count):
        yield Trouble(
            "No settler is alive",
            "Callbacks are awaited; what they bring is stored, not lost, and settled when a settler runs. Start the "
            "Procfile's settler, then:",
            "balances check",
        )


def _unsettled(found: Figures) -> Iterator[Trouble]:
    oldest_ms = found.unsettled.oldest_ms
    if oldest_ms is not None and found.now_ms - oldest_ms > UNSETTLED_MS:
        yield Trouble(
            f"{_many(found.unsettled.count, 'answer')} not settled",
            "Callbacks' answers are safe, but nobody settles them. Start the Procfile's settler, then:",
            "balances check",
            (Case("oldest answer", since_ms=oldest_ms),),
        )


def _ending_tokens(found: Figures) -> Iterator[Trouble]:
    ending = sorted((ends_s * 1000, login) for login, ends_s in found.token_expiry_s.items())
    cases = [Case(login, "ends", ends_ms) for ends_ms, login in ending if ends_ms - found.now_ms < ENDING_MS]
    if cases:
        yield Trouble(
            f"{_many(len(cases), 'token')} about to end",
            "Put a new token where the workers find their secrets; they take it by themselves.",
            "balances check",
            *_named(cases, len(cases)),
        )


def _slow_groups(found: Figures) -> Iterator[Trouble]:
    cases = [
        Case(lag.group, f"{lag.share:.0%} of the retention used, {lag.lost} entries lost")
        for lag in found.groups
        if lag.share > ops.LARGEST_LAG or lag.lost
    ]
    if cases:
        yield Trouble(
            f"{_many(len(cases), 'consumer group')} behind",
            "The stream forgets by age and waits for nobody: see to that consumer.",
            "balances check",
            *_named(cases, len(cases)),
        )


def _named(cases: Iterable[Case], count: int) -> tuple[tuple[Case, ...], int]:
    """The cases that are named one by one, and how many more there are."""
    named = tuple(cases)[:NAMED]
    return named, max(0, count - len(named))


def _why(code: str, type_: str, description: str) -> str:
    return " ".join(filter(None, (code, type_))) + (f": {description}" if description else "")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
