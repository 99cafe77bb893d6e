"""Keep all threads of a worker on one core at a time, because they share one lock.

Python runs one of a process's threads at a time. Where the system spreads them over cores, every call to it hands the
lock to a thread on another core, which has to be woken and to fetch what it works with; that was a third of what a poll
cost (docs/performance.md). So a worker stays on one of the cores that it may use, and every few seconds it moves where
others crowd it and another core is idler. Many workers use many cores, as ever.

A thread that gets its answer would also interrupt the one that has the lock, only to wait for it. So they are scheduled
as a batch: who is woken runs when the one that runs waits, or has had its time. That halves the changes of thread.

Does nothing where there is one core, or no Linux.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: What others take of our core, beyond all that is taken of the idlest, before we move: a quarter of its time.
CROWDED = 0.25
#: Two workers on one core see the same and must not both leave for the same other core.
MOVES = 0.5
#: Seconds in which a look is worth nothing: the system counts in hundredths.
SHORTEST_S = 1.0

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used until `at_s` (monotonic): `own_s` by this process, `busy_s` of each core, by anybody."""

    at_s: float
    own_s: float
    busy_s: Mapping[int, float]

    @classmethod
    def now(cls) -> Usage:
        return cls(time.monotonic(), time.process_time(), busy_s(Path("/proc/stat").read_text()))

    def since(self, before: Usage) -> Usage:
        """The difference, `at_s` being the time between."""
        busy = {core: busy - before.busy_s.get(core, busy) for core, busy in self.busy_s.items()}
        return Usage(self.at_s - before.at_s, self.own_s - before.own_s, busy)


def busy_s(stat: str) -> dict[int, float]:
    """Seconds for which each core was not idle, from the text of /proc/stat."""
    found = {}
    for name, *ticks in map(str.split, stat.splitlines()):
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _waiting, *others = map(int, ticks[:8])
            found[int(name[3:])] = (user + nice + system + sum(others)) / _TICKS
    return found


def better_core(core: int, allowed: frozenset[int], used: Usage) -> int | None:
    """The idlest core, where it leaves us more than ours, which others crowd; None where it is well to stay.

    `used`: in the time since the last look, all of this process on `core`.
    """
    known = [other for other in allowed - {core} if other in used.busy_s]
    if used.at_s < SHORTEST_S or core not in used.busy_s or not known:
        return None
    idlest = min(known, key=used.busy_s.__getitem__)
    others_s = used.busy_s[core] - used.own_s
    return idlest if others_s - used.busy_s[idlest] > CROWDED * used.at_s else None


class OneCore:
    """This process's place: taken by `settle`, kept by `look`, now and then, and given up by `leave`.

    Where the system refuses, shows nothing or has other cores than before, the place is given up: it is worth having,
    and not worth an error. `chance`: from 0 to 1.
    """

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self._allowed = frozenset(os.sched_getaffinity(0)) if sys.platform == "linux" else frozenset()
        self._policy = os.sched_getscheduler(0) if sys.platform == "linux" else 0
        self._core: int | None = None

    def settle(self) -> None:
        """Chooses a core, where there are several."""
        if len(self._allowed) > 1:
            with self._giving_up():
                self._used = Usage.now()
                self._core = random.choice(sorted(self._allowed))  # noqa: S311 - no secret
                _place({self._core})

    def look(self) -> None:
        """Moves, where others crowd this core and another one is idler."""
        if self._core is None:
            return
        with self._giving_up():
            before, self._used = self._used, Usage.now()
            better = better_core(self._core, self._allowed, self._used.since(before))
            if better is not None and self._chance() < MOVES:
                self._core = better
                _place({better})

    def leave(self) -> None:
        """Back to every core: what is started in this process's place, as after a SIGHUP, chooses anew."""
        if self._core is not None:
            self._core = None
            for thread in _threads():
                with suppress(OSError):
                    os.sched_setaffinity(thread, self._allowed)
                with suppress(OSError):
                    os.sched_setscheduler(thread, self._policy, os.sched_param(0))

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            self.leave()


def _place(cores: AbstractSet[int]) -> None:
    """All threads there are; those to come are placed as the thread is that makes them."""
    for thread in _threads():
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(thread, cores)
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def _threads() -> Iterator[int]:
    """This process's threads, and those that they make meanwhile."""
    known: set[str] = set()
    while new := set(os.listdir("/proc/self/task")) - known:
        yield from map(int, new)
        known |= new
