"""Wake for what is due: a Celery beat scheduler whose schedule is the timetable in Redis.

    tick: read the accounts file if it changed ─▶ claim what is due ─▶ decide what lapsed ─▶ sleep until the next

Any number of beats may run: a claim is one atomic script. `celery -A worker beat` finds this class by configuration.
Entries of Celery's own `beat_schedule` run as they always do.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import structlog
from celery.beat import Scheduler

from worker.accounts import Accounts, load_accounts
from worker.celery import Wiring, exiting_on_mistakes, wiring
from worker.errors import ConfigurationError, Kind, Outcome, Refused, StoreUnavailable
from worker.policy import Publish, decide
from worker.timetable import CLAIM_BATCH, Lapse

log = structlog.get_logger()

#: The longest sleep: an account that becomes due by somebody else's hand is found within this.
MAX_SLEEP_S = 1.0
#: The sleep while work is due and the queue has no room: short, because a worker's thread may be free any moment.
FULL_SLEEP_S = 0.05

#: What a lapse means, by the state it was found in.
LAPSES = {
    "polling": Outcome(Kind.LOST, code=Kind.LOST, description="the worker did not finish within its lease"),
    "awaiting": Outcome(Kind.LIFESPAN_EXCEEDED, code=Kind.LIFESPAN_EXCEEDED, description="no callback in time"),
}


class TimetableScheduler(Scheduler):
    """Claims what is due in the timetable, at the latest every second."""

    _is_away = False

    def setup_schedule(self) -> None:
        """Reads everything that could be wrong before beat says that it has started."""
        with exiting_on_mistakes():
            self._wiring: Wiring = wiring()
            self._definitions = DefinitionsFile(self._wiring)
        super().setup_schedule()

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """One round; returns the seconds to sleep."""
        own_s = super().tick(*args, **kwargs)
        try:
            self._definitions.apply_when_changed()
            sleep_s = self.claim()
        except StoreUnavailable as error:
            self._say_away(str(error))
            return MAX_SLEEP_S
        if self._is_away:
            log.info("the server is back")
        self._is_away = False
        return min(own_s, sleep_s)

    def claim(self) -> float:
        """Claims once and concludes what lapsed; returns the seconds until there is more to do."""
        timetable = self._wiring.timetable
        claim = timetable.claim()
        for lapse in claim.lapsed:
            self.conclude(lapse)
        if claim.dispatched or claim.resent:
            log.info("claimed", dispatched=claim.dispatched, resent=claim.resent)
        if claim.lapsed or claim.dispatched + claim.resent >= CLAIM_BATCH:
            return 0.0
        if claim.wait_ms is None:
            return MAX_SLEEP_S
        return min(MAX_SLEEP_S, max(FULL_SLEEP_S, claim.wait_ms / 1000))

    def conclude(self, lapse: Lapse) -> None:
        """Decides what follows a lapse, as for any failed attempt, and applies it."""
        timetable, outcome = self._wiring.timetable, LAPSES[lapse.state]
        retry = timetable.retry()
        decision = decide(outcome, lapse.counters, random.random(), retry)  # noqa: S311 - jitter, no secret
        assert not isinstance(decision, Publish), "a lapse has no answer"  # noqa: S101
        applied = timetable.conclude(lapse.token, outcome, decision, retry)
        log.warning(
            "lapsed",
            task=lapse.token.task_id,
            login=lapse.token.login,
            code=outcome.code,
            decision=type(decision).__name__,
            applied=applied if isinstance(applied, str) else type(applied).__name__,
        )

    def _say_away(self, reason: str) -> None:
        if not self._is_away:
            log.error("the server is away; nothing is lost meanwhile", reason=reason)
        self._is_away = True

    @property
    def info(self) -> str:
        return "    . timetable -> Redis, at the latest every second"


class DefinitionsFile:
    """The accounts file under a running beat: applied when its content changes, the last good one kept.

    At start it is applied only if Redis has never seen that content, so that an old beat cannot revert a deploy.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._timetable = wiring.timetable
        self._path: Path = wiring.settings.accounts_path
        self._is_callback = wiring.settings.callback_url is not None
        self._seen = self._stamp()
        self._pending: Accounts | None = load_accounts(self._path, callback_configured=self._is_callback)
        self._is_start = True

    def apply_when_changed(self) -> None:
        """Looks at the file, and applies what is new. Raises `StoreUnavailable`, and tries again next time."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._pending = self._load() or self._pending
            self._seen = stamp
        if self._pending is not None:
            self._apply(self._pending)
            self._pending, self._is_start = None, False

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _load(self) -> Accounts | None:
        try:
            return load_accounts(self._path, callback_configured=self._is_callback)
        except ConfigurationError as error:
            log.error("accounts file not applied", problems=[str(problem) for problem in error.problems])
            return None

    def _apply(self, accounts: Accounts) -> None:
        current = self._timetable.current_content()
        if accounts.digest == current:
            return
        if self._is_start and self._timetable.knows_content(accounts.digest):
            log.warning("this accounts file was in force before and is not now; to go back to it: balances sync")
            return
        started_s = time.monotonic()
        try:
            changed = self._timetable.apply(accounts)
        except Refused as refusal:
            log.error("accounts file not applied", problems=[str(refusal)])
            return
        log.info(
            "accounts applied",
            accounts=len(accounts.definitions),
            changed=changed,
            duration_s=round(time.monotonic() - started_s, 3),
        )
