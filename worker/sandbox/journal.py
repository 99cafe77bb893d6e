"""Remember what was asked and what was called back, in order, and count what was in flight at once: bounded, and
without any secret."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Generic, TypeVar

#: Records kept, of requests and of callbacks; about 300 bytes each.
HISTORY = 200_000

IN_FLIGHT = "in-flight"
ANSWERED = "answered"
DROPPED = "dropped"
ABORTED = "aborted"

SENDING = "sending"
ACKNOWLEDGED = "acknowledged"
REFUSED = "refused"
GIVEN_UP = "given-up"
NOT_SENT = "not-sent"


def _shown(record: object, names: tuple[str, ...], wall: float) -> dict[str, object]:
    shown: dict[str, object] = {name: getattr(record, name) for name in names if name != "wall"}
    shown["time"] = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
    return shown


def masked(number: str | None) -> str:
    """An account number as a log may show it."""
    return f"***{number[-2:]}" if number and len(number) > 4 else "***"


@dataclass(slots=True)
class Record:
    """One request. Times: `wall` as Unix seconds; `started_at` and `ended_at` by `time.monotonic()` of this machine.

    `log_on` names the session at the bank that it used (None: refused before any); `session`: it is in use now, `held`:
    until its callback is sent.
    `behaviour`: the step's label, or `refused:…`, `accepted` (202).
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
    session: bool = False
    held: bool = False
    callback: bool = False
    operation_id: str | None = None
    behaviour: str | None = None
    state: str = IN_FLIGHT
    status: int | None = None
    ended_at: float | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state != IN_FLIGHT

    def as_json(self) -> dict[str, object]:
        """The record as the control API shows it."""
        shown = _shown(self, Record.__slots__, self.wall)
        shown["answered_at"] = self.ended_at if self.state == ANSWERED else None
        shown["aborted"] = self.state == ABORTED
        return shown


@dataclass(slots=True)
class CallbackRecord:
    """One callback, however often it was tried. `request` is the `seq` of the request that it answers.

    `kind`: the label of what it carries; `copy` counts an operation's callbacks from 1. `token`: sha256 of the URL's
    last part. `statuses` has one entry per try, None where there was no answer; `status`, `body` (its beginning) and
    `trouble` are the last try's. `sent_at` and `ended_at` by `time.monotonic()`, from the first try to the last.
    """

    seq: int
    wall: float
    request: int
    number: str
    operation_id: str
    kind: str
    token: str
    modifiers: tuple[str, ...] = ()
    copy: int = 1
    state: str = SENDING
    tries: int = 0
    statuses: list[int | None] = field(default_factory=list)
    status: int | None = None
    body: str | None = None
    trouble: str | None = None
    sent_at: float | None = None
    ended_at: float | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state != SENDING

    def as_json(self) -> dict[str, object]:
        """The record as the control API shows it."""
        return _shown(self, CallbackRecord.__slots__, self.wall)


@dataclass(slots=True)
class Count:
    """What one account, or one log-on, went through. A log-on is in flight as long as its session is in use."""

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

    def leave(self) -> None:
        """One less in flight."""
        self.in_flight -= 1

    def note(self, record: Record) -> None:
        """How one ended."""
        self.answered += record.state == ANSWERED
        self.aborted += record.state == ABORTED
        label = record.behaviour or ""
        self.behaviours[label] = self.behaviours.get(label, 0) + 1

    def as_json(self) -> dict[str, object]:
        """The count as the control API shows it."""
        return {name: getattr(self, name) for name in Count.__slots__}


_Entry = TypeVar("_Entry", Record, CallbackRecord)


class History(Generic[_Entry]):
    """The last `size` entries since they were last forgotten, by number. Numbers go on for ever."""

    def __init__(self, size: int) -> None:
        self.last = 0
        self._size = size
        self._changed = asyncio.Event()
        self._entries: dict[int, _Entry] = {}
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._entries)

    def next(self) -> int:
        """A new entry's number."""
        self.last += 1
        return self.last

    def add(self, entry: _Entry) -> _Entry:
        """Keep an entry, and not the oldest one."""
        self._entries[entry.seq] = entry
        self._entries.pop(entry.seq - self._size, None)
        return entry

    def forget(self) -> None:
        """Forget all entries."""
        self._entries = {}
        self._epoch = self.last

    def forgotten(self, entry: _Entry) -> bool:
        """Whether it is from before `forget`."""
        return entry.seq <= self._epoch

    def since(self, number: int) -> Iterator[_Entry]:
        """Those kept with a number above `number`, in order."""
        first = max(number + 1, self._epoch + 1, self.last - self._size + 1)
        return (self._entries[seq] for seq in range(first, self.last + 1))

    def notify(self) -> None:
        """Tell those who wait that something is new."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Wait until something is new."""
        await self._changed.wait()


class Journal:
    """The last `history` requests and callbacks, and counts since the last `clear`."""

    def __init__(self, history: int = HISTORY) -> None:
        self.requests: History[Record] = History(history)
        self.callbacks: History[CallbackRecord] = History(history)
        self.clear()

    def clear(self) -> None:
        """Forget records and counts. Numbers go on, and what is in flight is counted no more."""
        self.requests.forget()
        self.callbacks.forget()
        self.total = Count()
        self.accounts: dict[str, Count] = {}
        self.log_ons: dict[str, Count] = {}
        self.called_back: dict[str, int] = {}

    def open(self) -> Record:
        """A request came."""
        self.total.begin()
        return self.requests.add(Record(self.requests.next(), time.time(), time.monotonic()))

    def begin(self, record: Record) -> None:
        """It is understood: count it for its account, and for its log-on if it uses one."""
        if record.number is not None:
            self.accounts.setdefault(record.number, Count()).begin()
        if record.log_on is not None:
            record.session = True
            self.log_ons.setdefault(record.log_on, Count()).begin()
        self.requests.notify()

    def end(self, record: Record, state: str, status: int | None = None) -> None:
        """It is over; so is its session at the bank, unless it is held."""
        record.state, record.status, record.ended_at = state, status, time.monotonic()
        if not self.requests.forgotten(record):
            for count in self._counts(record):
                count.leave()
                count.note(record)
            if record.log_on is not None:
                self.log_ons[record.log_on].note(record)
        if not record.held:
            self.log_off(record)
        self.requests.notify()

    def log_off(self, record: Record) -> None:
        """Its session at the bank is over, if it was not before."""
        if record.session and record.log_on is not None and not self.requests.forgotten(record):
            self.log_ons[record.log_on].leave()
        record.session = record.held = False

    def _counts(self, record: Record) -> list[Count]:
        return [self.total] if record.number is None else [self.total, self.accounts[record.number]]

    def open_callback(self, record: Record, operation_id: str, kind: str, token: str) -> CallbackRecord:
        """An answer to `record` is about to be sent."""
        self._count(SENDING, 1)
        number, seq = str(record.number), self.callbacks.next()
        return self.callbacks.add(CallbackRecord(seq, time.time(), record.seq, number, operation_id, kind, token))

    def tried(self, callback: CallbackRecord, status: int | None, body: str, trouble: str | None) -> None:
        """Somebody answered it, or nobody."""
        callback.tries += 1
        callback.statuses.append(status)
        callback.status, callback.body, callback.trouble = status, body, trouble
        self.callbacks.notify()

    def end_callback(self, callback: CallbackRecord, state: str) -> None:
        """It is over."""
        callback.state, callback.ended_at = state, time.monotonic()
        if not self.callbacks.forgotten(callback):
            self._count(SENDING, -1)
            self._count(state, 1)
        self.callbacks.notify()

    def _count(self, state: str, change: int) -> None:
        self.called_back[state] = self.called_back.get(state, 0) + change
