"""Wake for what is due: a Celery beat scheduler whose schedule is the timetable in Redis.

    tick: read the accounts file if it changed ─▶ claim what is due ─▶ decide what lapsed ─▶ sleep until the next

Any number of beats may run: a claim is one atomic script. `celery -A worker beat` finds this class by configuration.
Entries of Celery's own `beat_schedule` run as they always do.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import structlog
from celery.beat import Scheduler

from worker import capacity, logs
from worker.accounts import Accounts, file_digest, parse_accounts, read_file
from worker.celery import Wiring, exiting_on_mistakes, wiring
from worker.clock import ClockWatch, Jump, Reading
from worker.errors import ConfigurationError, Kind, Outcome, Refused, StoreUnavailable
from worker.policy import Publish, decide
from worker.settings import is_sandbox_file
from worker.timetable import CLAIM_BATCH, Claim, Lapse, News

log = structlog.get_logger()

#: The longest sleep: an account that becomes due by somebody else's hand is found within this.
MAX_SLEEP_S = 1.0
#: The sleep while work is due and the queue has no room: short, because a worker's thread may be free any moment.
FULL_SLEEP_S = 0.05

#: So long an accounts file must not have changed to be read, and to be believed that accounts are missing from it.
QUIET_S = 1.0
REMOVAL_QUIET_S = 5.0
#: After so long it is said that a change waits.
PATIENCE_S = 15.0
#: How often it is looked for accounts that have become overdue.
OVERDUE_EVERY_S = 5.0
#: Accounts that one line of the log names.
MOST_NAMES = 20
#: Problems of an accounts file that one line of the log names.
MOST_PROBLEMS = 20

#: What a lapse means, by the state it was found in.
LAPSES = {
    "polling": Outcome(Kind.LOST, code=Kind.LOST, description="the worker did not finish within its lease"),
    "awaiting": Outcome(Kind.LIFESPAN_EXCEEDED, code=Kind.LIFESPAN_EXCEEDED, description="no callback in time"),
}


def steady_s() -> float:
    """A clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class TimetableScheduler(Scheduler):
    """Claims what is due in the timetable, at the latest every second."""

    _next_overdue_s = 0.0
    _is_away = False
    _is_set_up = False

    def setup_schedule(self) -> None:
        """Reads everything that could be wrong before beat says that it has started; without a server, as it comes."""
        try:
            self._set_up()
        except StoreUnavailable as error:
            self._say_away(str(error))
        super().setup_schedule()

    def _set_up(self) -> None:
        with exiting_on_mistakes():
            self._wiring: Wiring = wiring()
            self._definitions = DefinitionsFile(self._wiring)
        self._clock = ClockWatch()
        self._is_set_up = True

    def _set_up_late(self) -> None:
        """As at the start, and a mistake ends the process with the same status: Celery's beat would make it 0."""
        try:
            self._set_up()
        except SystemExit as error:
            os._exit(cast(int, error.code))

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """One round; returns the seconds to sleep."""
        own_s = super().tick(*args, **kwargs)
        try:
            if not self._is_set_up:
                self._set_up_late()
            self._definitions.apply_when_changed()
            sleep_s = self.claim()
            self.tell_overdue()
        except StoreUnavailable as error:
            self._say_away(str(error))
            return MAX_SLEEP_S
        if self._is_away:
            log.info("the server is back")
        self._is_away = False
        return min(own_s, sleep_s)

    def claim(self) -> float:
        """Claims once and concludes what lapsed; returns the seconds until there is more to do."""
        sent_s = steady_s()
        claim = self._wiring.timetable.claim(expected_ms=self._clock.expected_ms(sent_s))
        reading = Reading(claim.clock_ms, claim.jumped_ms, sent_s, steady_s())
        jump = self._clock.look(reading)
        if jump is not None and self.hold(jump, claim):
            self._clock.note(jump, reading)
        for lapse in claim.lapsed:
            self.conclude(lapse)
        for news in claim.news:
            report(news)
        if claim.dispatched or claim.resent:
            level = logging.INFO if claim.resent else logging.DEBUG  # what is resent was lost, which is rare
            log.log(level, "claimed", dispatched=claim.dispatched, resent=claim.resent)
        if claim.lapsed or claim.dispatched + claim.resent >= CLAIM_BATCH:
            return 0.0
        if claim.wait_ms is None:
            return MAX_SLEEP_S
        return min(MAX_SLEEP_S, max(FULL_SLEEP_S, claim.wait_ms / 1000))

    def hold(self, jump: Jump, claim: Claim) -> bool:
        """Takes note of a jump of the server's clock, so that nobody claims for one lease; of two beats, one does."""
        try:
            held_ms = self._wiring.timetable.hold(jump, claim)
        except StoreUnavailable:  # done all the same, maybe: with many accounts it takes longer than a reply may
            log.error("the server's clock jumped", jump_s=jump.by_ms / 1000)
            raise
        if held_ms is not None:
            log.error("the server's clock jumped", jump_s=jump.by_ms / 1000, held_s=held_ms / 1000)
        return held_ms is not None

    def tell_overdue(self) -> None:
        """Tells the ledger of accounts that have become overdue, a batch at a time."""
        if time.monotonic() < self._next_overdue_s:
            return
        overdue = self._wiring.timetable.tell_overdue()
        if overdue.told:
            log.warning("overdue", count=len(overdue.told), accounts=overdue.told[:MOST_NAMES])
        self._next_overdue_s = time.monotonic() + (0 if overdue.is_more else OVERDUE_EVERY_S)

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
            account=lapse.token.account,
            attempt=lapse.token.attempt,
            code=outcome.code,
            **logs.decided(decision),
            applied=applied if isinstance(applied, str) else type(applied).__name__,
        )

    def _say_away(self, reason: str) -> None:
        if not self._is_away:
            log.error("the server is away", reason=reason)
        self._is_away = True

    @property
    def info(self) -> str:
        return "    . timetable -> Redis, at the latest every second"


def report(news: News) -> None:
    """Logs, once, what the scripts found when a limit was reached or left."""
    match news.what:
        case "breaker opened":
            log.error("institution held", institution=news.institution, cause=news.cause, logins=news.logins)
        case "breaker closed":
            log.info("institution back", institution=news.institution)
        case "login rests":
            log.warning("login rests", login=news.login, until=news.until)
        case _:
            log.warning("daily budget spent", login=news.login or None, until=news.until)


class DefinitionsFile:
    """The accounts file under a running beat: applied when its content changes, the last good one kept.

    changed ─▶ quiet for a while, nobody writing ─▶ read ─▶ other content than last time? ─▶ applied, or why not

    At start it is applied only if Redis has never seen that content, so that an old beat cannot revert a deploy; the
    very file that is in force is not even read. A file that lacks accounts must be quiet for longer: it may be half
    written.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._timetable = wiring.timetable
        self._path: Path = wiring.settings.accounts_path
        self._is_callback = wiring.settings.callback_url is not None
        self._stamp = self._look()
        self._changed_s = time.monotonic()
        self._told: tuple[int, ...] | None = None
        self._is_start = True
        #: Digests of the file last dealt with, and of what it held; then what is still to be applied, of which file.
        self._done = self._done_content = ""
        self._accounts: Accounts | None = None
        self._accounts_file = ""
        self._take(read_file(self._path))
        self._is_start = self._accounts is not None
        self._step: Literal["read", "apply", "done"] = "apply" if self._accounts else "done"

    def apply_when_changed(self) -> None:
        """Looks at the file, and applies what is new. Raises `StoreUnavailable`, and tries again next time."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp, self._changed_s, self._step = stamp, time.monotonic(), "read"
        if self._step == "read" and self._is_quiet(QUIET_S):
            self._read()
            self._step = "apply" if self._accounts else "done"
        if self._accounts and self._step == "apply" and self._is_believable(self._accounts):
            self._apply(self._accounts)
            self._done, self._done_content = self._accounts_file, self._accounts.digest
            self._step, self._is_start, self._accounts = "done", False, None
        self._tell_delay()

    def _look(self) -> tuple[int, ...] | None:
        """Changes with every write: `ctime` also where size and `mtime` were kept, or set back."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino

    def _is_quiet(self, for_s: float) -> bool:
        return time.monotonic() - self._changed_s >= for_s and not _is_being_written(self._path)

    def _tell_delay(self) -> None:
        """Says once what a change waits for, where somebody keeps the file open."""
        if self._step != "done" and self._told != self._stamp and time.monotonic() - self._changed_s >= PATIENCE_S:
            self._told = self._stamp
            log.warning("accounts file not applied yet: another process has it open for writing")

    def _read(self) -> None:
        self._accounts = None
        try:
            self._take(read_file(self._path))
        except ConfigurationError as error:
            problems = [str(problem) for problem in error.problems]
            log.error("accounts file not applied", problems=problems[:MOST_PROBLEMS], count=len(problems))

    def _take(self, text: bytes) -> None:
        """Finds out what there is to apply. A touched file is no news: it must not revert a deploy."""
        file = file_digest(text, callback_configured=self._is_callback)
        if self._is_start and (content := self._timetable.content_of_file(file)):
            self._done, self._done_content = file, content
        if file == self._done:
            return
        accounts = parse_accounts(text, str(self._path), callback_configured=self._is_callback)
        if accounts.digest != self._done_content:
            self._accounts, self._accounts_file = accounts, file
            self._warn_of_load(accounts)

    def _warn_of_load(self, accounts: Accounts) -> None:
        """Says what can never be kept up with; it is polled all the same, as far as that goes."""
        if not is_sandbox_file(self._path):  # whose bank answers at once
            for detail in capacity.impossible(accounts):
                log.warning("impossible load", detail=detail)

    def _is_believable(self, accounts: Accounts) -> bool:
        """Whether nothing is missing, or the file has been quiet for long enough to mean it."""
        if _is_being_written(self._path):
            return False
        if time.monotonic() - self._changed_s >= REMOVAL_QUIET_S:
            return True
        return self._timetable.revisions().keys() <= accounts.definitions.keys()

    def _apply(self, accounts: Accounts) -> None:
        if accounts.digest == self._timetable.current_content():
            self._timetable.remember_file(self._accounts_file, accounts.digest)
            return
        if self._is_start and self._timetable.knows_content(accounts.digest):
            log.warning("this accounts file was in force before and is not now; to go back to it: balances sync")
            return
        started_s = time.monotonic()
        try:
            changed = self._timetable.apply(accounts, actor=f"beat {socket.gethostname()}")
        except Refused as refusal:
            log.error("accounts file not applied", problems=[str(refusal)])
            return
        log.info(
            "accounts applied",
            accounts=len(accounts.definitions),
            changed=changed,
            duration_s=round(time.monotonic() - started_s, 3),
        )
        self._timetable.remember_file(self._accounts_file, accounts.digest)


def _is_being_written(path: Path) -> bool:
    """Whether somebody has the file open for writing: then, and only then, the kernel gives no read lease on it.

    Where it cannot tell (not Linux, a network's file system, another user's file, another thread's signals) the answer
    is no.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return False
    with suppress(OSError), path.open("rb") as file:
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # who opens it right now waits, and the kernel tells us
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            return True
        finally:
            signal.signal(signal.SIGIO, before)
    return False
