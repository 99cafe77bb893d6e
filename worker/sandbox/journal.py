"""Remember what was asked, in order, and count what was in flight at once: bounded, and without any secret."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

#: Records kept; about 300 bytes each.
HISTORY = 200_000

IN_FLIGHT = "in-flight"
ANSWERED = "answered"
DROPPED = "dropped"
ABORTED = "aborted"


@dataclass(slots=True)
class Record:
    """One request. Times: `wall` as Unix seconds; `started_at` and `ended_at` by `time.monotonic()` of this machine.

    `log_on` names the session at the bank that it used (None: refused before any). `behaviour`: the step's label, or
    `refused:…`, `accepted` (202).
    """

    seq: int
    wall: float
    started_at: float
    country: str = ""
    segment: str = ""
    institution: str = ""
    number: str | None = None
    currency: str | None = None
    scheme: str | None = None
    key_fingerprint: str | None = None
    credential_fingerprint: str | None = None
    log_on: str | None = None
    callback: bool = False
    operation_id: str | None = None
    behaviour: str | None = None
    state: str = IN_FLIGHT
    status: int | None = None
    ended_at: float | None = None

    def as_json(self) -> dict[str, object]:
        """The record as the control API shows it."""
        shown: dict[str, object] = {name: getattr(self, name) for name in Record.__slots__ if name != "wall"}
        shown["time"] = datetime.fromtimestamp(self.wall, UTC).isoformat(timespec="milliseconds")
        shown["answered_at"] = self.ended_at if self.state == ANSWERED else None
        shown["aborted"] = self.state == ABORTED
        return shown


@dataclass(slots=True)
class Count:
    """What one account, or one log-on, went through."""

    requests: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    overlaps: int = 0
    answered: int = 0
    aborted: int = 0
    behaviours: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        """One more in flight; an overlap if it is not alone."""
        self.requests += 1
        self.in_flight += 1
        self.overlaps += self.in_flight > 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def end(self, record: Record) -> None:
        """One less."""
        self.in_flight -= 1
        self.answered += record.state == ANSWERED
        self.aborted += record.state == ABORTED
        label = record.behaviour or ""
        self.behaviours[label] = self.behaviours.get(label, 0) + 1

    def as_json(self) -> dict[str, object]:
        """The count as the control API shows it."""
        return {name: getattr(self, name) for name in Count.__slots__}


class Journal:
    """The last `history` requests, and counts since the last `clear`."""

    def __init__(self, history: int = HISTORY) -> None:
        self._history = history
        self._last = 0
        self._changed = asyncio.Event()
        self._records: dict[int, Record] = {}
        self.clear()

    def clear(self) -> None:
        """Forget requests and counts. Numbers go on, and what is in flight is counted no more."""
        self._records = {}
        self._epoch = self._last
        self.total = Count()
        self.accounts: dict[str, Count] = {}
        self.log_ons: dict[str, Count] = {}

    @property
    def last(self) -> int:
        """The number of the newest request."""
        return self._last

    def open(self) -> Record:
        """A request came."""
        self._last += 1
        record = Record(self._last, time.time(), time.monotonic())
        self._records[record.seq] = record
        self._records.pop(record.seq - self._history, None)
        self.total.begin()
        return record

    def begin(self, record: Record) -> None:
        """It is understood: count it for its account, and for its log-on if it uses one."""
        for count in self._counts(record):
            count.begin()
        self._notify()

    def end(self, record: Record, state: str, status: int | None = None) -> None:
        """It is over."""
        record.state, record.status, record.ended_at = state, status, time.monotonic()
        if record.seq > self._epoch:
            for count in (self.total, *self._counts(record)):
                count.end(record)
        self._notify()

    def records(self, since: int) -> Iterator[Record]:
        """Those kept with a number above `since`, in order."""
        first = max(since + 1, self._epoch + 1, self._last - self._history + 1)
        return (self._records[seq] for seq in range(first, self._last + 1))

    async def change(self) -> None:
        """Wait until a request began or ended."""
        await self._changed.wait()

    def _counts(self, record: Record) -> list[Count]:
        counts = []
        if record.number is not None:
            counts.append(self.accounts.setdefault(record.number, Count()))
        if record.log_on is not None:
            counts.append(self.log_ons.setdefault(record.log_on, Count()))
        return counts

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
