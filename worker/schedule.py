"""Say when an account's next regular slot is: pure arithmetic on UTC milliseconds, with no clock of its own.

`every` is a grid with a phase of its own for each alias, so that accounts with the same interval are spread over it.
`cron` names wall-clock slots in the account's time zone, and each happens once, whatever the clocks do:

    clock put forward    the skipped slots run together, once, at the instant when the clock jumps
    clock put back       a slot in the repeated hour runs in its first pass only, `*/15` included: nothing runs
                         in the second pass
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim

from worker.accounts import Definition

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_DAY_MS = 86_400_000
_YEAR_MS = 366 * _DAY_MS
_DENSITY_FROM_MS = (datetime(2026, 1, 1, tzinfo=UTC) - _EPOCH) // _MILLISECOND


def next_slot_ms(definition: Definition, after_ms: int) -> int:
    """The first slot strictly after `after_ms`, both in UTC milliseconds."""
    return next(_slots_ms(definition, after_ms))


def interval_ms(definition: Definition, after_ms: int) -> int:
    """How far apart the two slots after `after_ms` are: what the account's owner calls its interval just then."""
    if definition.every_ms is not None:
        return definition.every_ms
    slots = _slots_ms(definition, after_ms)
    first = next(slots)
    return next(slots) - first


@dataclass(frozen=True, slots=True)
class Density:
    """A schedule at its busiest: the shortest interval, and the most slots of a day."""

    interval_ms: int
    a_day: float


def density(definition: Definition) -> Density:
    """How dense the account's schedule is; for cron, by its first two thousand slots of one year."""
    if definition.every_ms is not None:
        return Density(definition.every_ms, _DAY_MS / definition.every_ms)
    return _cron_density(definition.cron or "", definition.timezone or "")


@lru_cache(maxsize=1024)
def _cron_density(expression: str, timezone: str) -> Density:
    some = islice(_cron_ms(expression, ZoneInfo(timezone), _DENSITY_FROM_MS), 2000)
    slots = list(takewhile(lambda slot: slot < _DENSITY_FROM_MS + _YEAR_MS, some))
    days = Counter(slot // _DAY_MS for slot in slots)
    shortest_ms = min((later - slot for slot, later in pairwise(slots)), default=_YEAR_MS)
    return Density(shortest_ms, max(days.values(), default=0))


def phase_ms(alias: str, every_ms: int) -> int:
    """Where in an interval the alias has its slots: the same on every host and in every version."""
    return int.from_bytes(hashlib.sha256(alias.encode()).digest()[:8], "big") % every_ms


def _slots_ms(definition: Definition, after_ms: int) -> Iterator[int]:
    """Every slot after `after_ms`, ascending."""
    if definition.every_ms is not None:
        return _grid_ms(definition.alias, definition.every_ms, after_ms)
    if definition.cron is None or definition.timezone is None:
        raise ValueError(f"{definition.alias} has neither every nor cron with a timezone")
    return _cron_ms(definition.cron, ZoneInfo(definition.timezone), after_ms)


def _grid_ms(alias: str, every_ms: int, after_ms: int) -> Iterator[int]:
    slot_ms = after_ms - (after_ms - phase_ms(alias, every_ms)) % every_ms
    while True:
        slot_ms += every_ms
        yield slot_ms


def _cron_ms(expression: str, zone: ZoneInfo, after_ms: int) -> Iterator[int]:
    """cronsim runs on naive wall-clock time: given a zone, it runs `*/15` in both passes of the repeated hour."""
    wall_clock = (_EPOCH + after_ms * _MILLISECOND).astimezone(zone).replace(tzinfo=None)
    for slot in CronSim(expression, wall_clock):
        slot_ms = _instant_ms(slot, zone)
        if slot_ms > after_ms:  # not a slot in the repeated hour's second pass, nor one more of the skipped
            yield slot_ms
            after_ms = slot_ms


def _instant_ms(wall_clock: datetime, zone: ZoneInfo) -> int:
    """The first instant at which a clock on the wall shows this time or, where it skips it, a later one."""
    before = wall_clock.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if before.astimezone(zone).replace(tzinfo=None) == wall_clock:
        return (before - _EPOCH) // _MILLISECOND
    return _jump_ms(wall_clock, zone)


@lru_cache(maxsize=1024)
def _jump_ms(skipped: datetime, zone: ZoneInfo) -> int:
    """The instant at which the clock jumps over `skipped`, to the second.

    For a skipped time zoneinfo's fold=0 is read with the offset before the jump, fold=1 with the one after: the
    instants stand on both sides of the jump.
    """
    after = skipped.replace(tzinfo=zone, fold=0).astimezone(UTC)
    before = skipped.replace(tzinfo=zone, fold=1).astimezone(UTC)
    while after - before > timedelta(seconds=1):
        middle = before + (after - before) // 2
        is_before = middle.astimezone(zone).replace(tzinfo=None) < skipped
        before, after = (middle, after) if is_before else (before, middle)
    return (after - _EPOCH) // _MILLISECOND // 1000 * 1000
