"""A beat's own rounds over a world's timetable, without the process and without Celery's schedule."""

from __future__ import annotations

from typing import Any

from world import World

from worker.beat import TimetableScheduler
from worker.clock import ClockWatch


class Beat(TimetableScheduler):
    """`claim` and `tell_overdue` are the real ones."""

    def __init__(self, world: World) -> None:
        self._wiring: Any = world
        self._clock = ClockWatch()
