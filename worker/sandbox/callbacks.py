"""Call back: send what a 202 promised, when and as often as the step says, until somebody takes it.

    202 ──▶ owed ── latency, LifeSpan, or when told ──▶ POST ──▶ 2xx: acknowledged
                                                         ▲ └── 5xx or nobody: again after a pause, until given up
                                                         └──┘   else: refused

Whether, how often and when the real Khipu tries again is unknown; five tries with growing pauses are our choice, and
`PUT /_sandbox/callbacks` changes it. A `Retry-After` is not looked at. Each waiting callback costs one or two timers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import uuid4

from worker.sandbox import journal as states
from worker.sandbox.answers import Subject, promised, render
from worker.sandbox.bank import fingerprint
from worker.sandbox.behaviour import LIFE_SPAN_S, Behaviour, Step, Timing
from worker.sandbox.journal import CallbackRecord, Journal, Record, masked
from worker.sandbox.sender import NotHere, Post, Target, last_part, post, target_of, with_wrong_token

log = logging.getLogger("sandbox")

#: Connections that send at the same time; the others wait their turn.
SENDING_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Rules:
    """How callbacks are sent. Seconds between two tries, so one try more than pauses; seconds for one try.

    `hold_log_on`: a session at the bank counts as in use until its callback is sent (until LifeSpan, if that is
    earlier), and not only until the 202.
    """

    pauses_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    timeout_s: float = 10.0
    hold_log_on: bool = True


@dataclass(slots=True)
class Owed:
    """An accepted request whose callback is still to come. `before_accepting`: called once all of it was tried."""

    record: Record
    subject: Subject
    step: Step
    url: str
    before_accepting: Callable[[], None] | None = None
    timer: asyncio.TimerHandle | None = None
    log_off: asyncio.TimerHandle | None = None

    def accept(self) -> None:
        """Let the 202 go, if it waits for this."""
        if self.before_accepting is not None:
            self.before_accepting()
            self.before_accepting = None


class Callbacks:
    """All callbacks of one sandbox. `rules` may be replaced at any time."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.rules = Rules()
        self._owed: dict[int, Owed] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(SENDING_AT_ONCE)

    @property
    def owed(self) -> int:
        """How many requests wait for their callback to be sent."""
        return len(self._owed)

    def owe(self, owed: Owed, now: datetime, delay_s: float) -> None:
        """Send it when its step says; `now` is the moment of the request, `delay_s` counts from the 202.

        The session at the bank is given up no later than at LifeSpan, where the record says that it is held.
        """
        callback = owed.step.callback
        life_span_s = (promised(callback.life_span, now) - now).total_seconds()
        if callback.timing is Timing.ON_TIME:
            delay_s += callback.accept_s
        elif callback.timing is Timing.LATE:
            delay_s = max(life_span_s, 0.0) + callback.late_s
        self._owed[owed.record.seq] = owed
        loop = asyncio.get_running_loop()
        if callback.timing is not Timing.NEVER:
            owed.timer = loop.call_later(delay_s, self._send, owed)
        if owed.record.held:
            hold_s = life_span_s if life_span_s > 0 else LIFE_SPAN_S
            owed.log_off = loop.call_later(hold_s, self._journal.log_off, owed.record)

    def send(self, number: str, step: Step | None = None) -> int:
        """Send the account's waiting callbacks now, with another answer if there is a `step`; how many there were."""
        waiting = [owed for owed in self._owed.values() if owed.subject.number == number]
        for owed in waiting:
            if step is not None:
                owed.step = replace(step, callback=owed.step.callback)
            self._send(owed)
        return len(waiting)

    def drop(self) -> None:
        """Forget what waits, and stop trying."""
        for owed in self._owed.values():
            self._stop_timers(owed)
            self._log_off(owed)
            owed.accept()
        self._owed.clear()
        for task in self._tasks:
            task.cancel()

    @staticmethod
    def _stop_timers(owed: Owed) -> None:
        for timer in (owed.timer, owed.log_off):
            if timer is not None:
                timer.cancel()

    def _send(self, owed: Owed) -> None:
        del self._owed[owed.record.seq]
        self._stop_timers(owed)
        task = asyncio.get_running_loop().create_task(self._deliver(owed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, owed: Owed) -> None:
        """The step's callback, and the second one if it has any."""
        callback = owed.step.callback
        letters = _letters(owed)
        try:
            if callback.at_once:
                await asyncio.gather(*(self._try(owed, letter) for letter in letters))
                return
            for letter in letters:
                if letter is not letters[0]:
                    await asyncio.sleep(callback.pause_s)
                await self._try(owed, letter)
        finally:
            self._log_off(owed)
            owed.accept()

    async def _try(self, owed: Owed, letter: Letter) -> None:
        """Send one of them until it is dealt with."""
        url = with_wrong_token(owed.url) if owed.step.callback.wrong_token else owed.url
        record = self._journal.open_callback(owed.record, letter.operation_id, letter.kind, fingerprint(last_part(url)))
        record.modifiers, record.copy = owed.step.callback.modifiers, letter.copy
        state = states.GIVEN_UP
        try:
            state = await self._post(owed, target_of(url), letter.post, record)
        except NotHere as reason:
            state, record.trouble = states.NOT_SENT, str(reason)
        finally:
            self._journal.end_callback(record, state)
            _log(owed.record, record)

    async def _post(self, owed: Owed, target: Target, message: Post, record: CallbackRecord) -> str:
        """Try and try again; how it ended."""
        rules = self.rules
        for pause_s in (*rules.pauses_s, None):
            async with self._slots:
                record.sent_at = record.sent_at or time.monotonic()
                self._log_off(owed)
                reply = await post(target, message, rules.timeout_s)
            self._journal.tried(record, reply.status, reply.body.decode("utf-8", "replace"), reply.trouble)
            if reply.status is not None and reply.status < 500:
                return states.ACKNOWLEDGED if 200 <= reply.status < 300 else states.REFUSED
            owed.accept()
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        return states.GIVEN_UP

    def _log_off(self, owed: Owed) -> None:
        if owed.record.held:
            self._journal.log_off(owed.record)


@dataclass(frozen=True, slots=True)
class Letter:
    """One callback as it is sent; `kind` and `copy` are for its record."""

    kind: str
    operation_id: str
    copy: int
    post: Post


def _letters(owed: Owed) -> list[Letter]:
    """One, or two."""
    callback = owed.step.callback
    subject = replace(owed.subject, operation_id=str(uuid4())) if callback.other_operation else owed.subject
    first = _letter(owed.step, subject, 1)
    if callback.twice:
        return [first, replace(first, copy=2)]
    return [first] if callback.second is None else [first, _letter(callback.second, subject, 2)]


def _letter(step: Step, subject: Subject, copy: int) -> Letter:
    if step.operation_id is not None and not step.callback.other_operation:
        subject = replace(subject, operation_id=step.operation_id)
    response = render(step, subject)
    interval_s = step.interval_s if step.behaviour is Behaviour.DRIP else 0.0
    message = Post(response.body, response.content_type, response.headers, interval_s)
    return Letter(step.label, subject.operation_id, copy, message)


def _log(request: Record, record: CallbackRecord) -> None:
    log.info(
        "%s %s callback %s %s %s %s",
        request.institution,
        masked(request.number),
        record.kind,
        record.state,
        record.status or "-",
        record.tries,
    )
