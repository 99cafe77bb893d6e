"""Say what load an accounts file asks for that nothing can carry: arithmetic, before the first request.

    accounts ─▶ requests of each login, institution and day ─▶ a sentence, with its arithmetic, for each that cannot be

It knows regular polls only: retries come on top.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from math import ceil

from worker import schedule
from worker.accounts import Accounts, Definition
from worker.settings import format_duration

#: What one request keeps its log-on busy for: the median of 62 synchronous answers (24 to 173 s). It counts in
#: callback mode, too: the login's place is held until its callback is there.
ANSWER_S = 40

_MINUTE_MS = 60_000
_HOUR_MS = 60 * _MINUTE_MS


def impossible(accounts: Accounts) -> Iterator[str]:
    """What can never be kept up with, a sentence each."""
    definitions = accounts.definitions.values()
    for login, members in _grouped(definitions, lambda definition: definition.login):
        yield from _busy(login, members)
        budget = accounts.logins[login].daily_requests
        yield from _spent(f"login {login}", members, f"logins.{login}.daily_requests", budget)
    for institution, members in _grouped(definitions, institution_of):
        yield from _crowded(institution, members, accounts.limits.rate)
    yield from _spent("all logins", list(definitions), "limits.daily_requests", accounts.limits.daily_requests)


def institution_of(definition: Definition) -> str:
    """What `rate` is counted by."""
    return f"{definition.country}/{definition.segment}/{definition.institution}"


def _grouped(
    definitions: Iterable[Definition], key: Callable[[Definition], str]
) -> Iterator[tuple[str, list[Definition]]]:
    groups: dict[str, list[Definition]] = defaultdict(list)
    for definition in definitions:
        groups[key(definition)].append(definition)
    yield from sorted(groups.items())


def _interval_ms(definition: Definition) -> int:
    """Between two polls at the account's busiest time."""
    return max(schedule.density(definition).interval_ms, definition.min_gap_ms)


def _busy(login: str, members: list[Definition]) -> Iterator[str]:
    """More seconds of requests than a log-on, which has one at a time, has seconds."""
    intervals = {_interval_ms(definition) for definition in members}
    share = sum(ANSWER_S * 1000 / _interval_ms(definition) for definition in members)
    if share <= 1:
        return
    over = f"{share:.1f} times what one log-on can do"
    if len(intervals) > 1:
        asked = f"{len(members)} accounts × {ANSWER_S} s = {share * 3600:,.0f} s of requests in an hour"
        yield f"login {login}: {asked}: {over}"
        return
    [interval_ms] = intervals
    asked = f"{_accounts(members)} × {ANSWER_S} s every {_spoken(interval_ms)}"
    needed_s = len(members) * ANSWER_S
    most = interval_ms // (ANSWER_S * 1000)
    fewer = f"at most {most} account{'' if most == 1 else 's'}, or " if most else ""
    longest = f"every ≥ {ceil(needed_s / 60)}m"
    yield (
        f"login {login}: {asked} = {needed_s:,} s of requests in {interval_ms / 1000:,.0f} s: {over}; {fewer}{longest}"
    )


def _crowded(institution: str, members: list[Definition], rate: int | None) -> Iterator[str]:
    asked = sum(_MINUTE_MS / _interval_ms(definition) for definition in members)
    if rate is not None and asked > rate:
        asks = f"{_asks(members)} {asked:,.1f} times a minute"
        yield f"institution {institution}: {asks}, limits.rate allows {rate:,}"


def _spent(who: str, members: list[Definition], name: str, budget: int | None) -> Iterator[str]:
    asked = sum(_a_day(definition) for definition in members)
    if budget is not None and asked > budget:
        yield f"{who}: {_asks(members)} {asked:,.0f} times a day, {name} allows {budget:,}"


def _a_day(definition: Definition) -> float:
    return min(schedule.density(definition).a_day, 24 * _HOUR_MS / max(1, definition.min_gap_ms))


def _accounts(members: list[Definition]) -> str:
    return f"{len(members)} account{'' if len(members) == 1 else 's'}"


def _asks(members: list[Definition]) -> str:
    return f"{_accounts(members)} ask{'s' if len(members) == 1 else ''}"


def _spoken(ms: int) -> str:
    return format_duration(timedelta(milliseconds=ms))
