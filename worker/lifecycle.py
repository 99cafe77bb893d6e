"""Come and go as a worker: refuse to start without secrets, say how much room there is, leave within the grace period.

start ─▶ server fit? secrets there? ─▶ present every 5 s, secrets looked at every 15 s ─▶ SIGTERM ─▶ gone in time

A worker of threads keeps to one core (`worker.affinity`).

Present is only who works: a worker whose thread is free while messages wait, and that takes none, says nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import redis
import structlog
from celery import signals
from celery.concurrency.thread import TaskPool
from celery.worker import state

from worker.affinity import OneCore
from worker.celery import AWAY_S, Wiring, exiting_on_mistakes, until_there, wiring, worker_name
from worker.credentials import Credentials, Fingerprints, fingerprints, token_end
from worker.errors import ConfigurationError, MissingSecret, StoreUnavailable
from worker.policy import Credential
from worker.tasks import usable_credentials
from worker.timetable import POLLS, Timetable

log = structlog.get_logger()

#: How often a worker says that it is there, and how long it is believed.
PRESENT_EVERY_S = 5
PRESENT_TTL_S = 15
#: How often a worker looks at its secrets: a new one of a blocked login counts "within a minute of its appearing".
SECRETS_EVERY_S = 15
#: How often it looks when tokens end, which takes every login there is: a day or more ahead, and soon after its start.
TOKENS_EVERY_S = 300
DAY_MS = 86_400_000
#: Looks in a row at which messages waited, a thread was free and nothing had been taken: a free thread takes at once.
STALLED_LOOKS = 4

#: A login → the fields of its hash.
Logins = Mapping[str, Mapping[str, str]]


class Consumption:
    """Whether this worker takes what its queues hold; Celery's can live on without, and answer to a ping."""

    def __init__(self, timetable: Timetable, queues: Iterable[str], threads: int) -> None:
        self._timetable = timetable
        self._queues = tuple(queues)
        self._threads = threads
        self._taken = 0
        self._looks = 0

    def is_stalled(self) -> bool:
        """To be asked at every look."""
        taken = sum(state.total_count.values())
        is_free = taken == self._taken and len(state.reserved_requests) < self._threads
        self._taken = taken
        waits = is_free and any(map(self._timetable.waiting, self._queues))
        self._looks = self._looks + 1 if waits else 0
        return self._looks >= STALLED_LOOKS

    def start_over(self) -> None:
        """What waited during an outage says nothing of the time after it."""
        self._looks = 0


class Presence(threading.Thread):
    """Keeps this worker's threads in the queue's room, and lifts blocks for which it holds a new credential."""

    def __init__(
        self, wiring: Wiring, name: str, threads: int, consumption: Consumption, core: OneCore | None = None
    ) -> None:
        super().__init__(name="presence", daemon=True)
        self._wiring = wiring
        self._worker = (name, threads)
        self._consumption = consumption
        self._core = core
        self._is_stalled = False
        self._leaving = threading.Event()
        self._next_look_s = self._next_tokens_s = time.monotonic() + SECRETS_EVERY_S
        self._tokens = TokenWatch(wiring)

    def run(self) -> None:
        is_away = False
        while not self._leaving.is_set():
            try:
                self._round()
            except Exception as error:  # noqa: BLE001 - this thread must not end: its worker would get no more polls
                if not is_away:
                    tell(error)
                is_away = True
                self._consumption.start_over()
            else:
                if is_away:
                    log.info("the server is back")
                is_away = False
            # A worker that is no longer believed to be there gets no polls: back at once when the server is.
            self._leaving.wait(AWAY_S if is_away else PRESENT_EVERY_S)
        with suppress(StoreUnavailable, redis.RedisError):  # believed for some seconds more
            self._wiring.timetable.forget_worker(*self._worker)

    def leave(self) -> None:
        """No new polls for this worker from here on."""
        self._leaving.set()

    def _round(self) -> None:
        if self._core is not None:
            self._core.look()
        if self._consumption.is_stalled():
            self._stall()
            return
        self._is_stalled = False
        self._wiring.timetable.register_worker(*self._worker, PRESENT_TTL_S)
        if time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + SECRETS_EVERY_S
            timetable = self._wiring.timetable
            unblock_with_new_secrets(self._wiring, timetable.logins(timetable.blocked()))
        if time.monotonic() >= self._next_tokens_s:
            self._next_tokens_s = time.monotonic() + TOKENS_EVERY_S
            self._tokens.look(self._wiring.timetable.logins(self._wiring.timetable.schemes()))

    def _stall(self) -> None:
        self._wiring.timetable.forget_worker(*self._worker)
        if not self._is_stalled:
            log.error("messages wait and none is taken: this worker counts as gone")
        self._is_stalled = True


def tell(error: Exception) -> None:
    """Why this worker cannot say that it is there: a server that is away, or one that refuses."""
    if isinstance(error, StoreUnavailable):
        log.error("the server is away", reason=str(error))
    else:
        log.error("presence failed", exc_info=error)


def unblock_with_new_secrets(wiring: Wiring, logins: Logins) -> None:
    """Lifts the block of every login for which this worker holds another credential of the kind that failed."""
    for login, fields in logins.items():
        if "blocked" not in fields:
            continue
        try:
            credentials = usable_credentials(wiring, login, fields["scheme"])  # type: ignore[arg-type]
        except (MissingSecret, ConfigurationError):
            continue
        kind = Credential(fields["blocked"])
        if _unblock(wiring, login, kind, credentials):
            log.info("unblocked with a new credential", login=login, credential=kind)


def _unblock(wiring: Wiring, login: str, kind: Credential, credentials: Credentials) -> bool:
    held: Fingerprints = fingerprints(credentials, wiring.salt)
    fingerprint = held.bank if kind is Credential.BANK else held.key
    actor = f"worker {socket.gethostname()}"
    return wiring.timetable.unblock_with(login, kind, fingerprint, actor=actor) is None


class TokenWatch:
    """Warns of tokens that end, once a day each, and leaves their ends where the exporter reads them.

    A worker without the token says nothing: another host may have it.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._warned_ms: dict[str, int] = {}

    def look(self, logins: Logins) -> None:
        now_ms = self._wiring.timetable.now_ms()
        for login, fields in logins.items():
            if fields["scheme"] == "bearer":
                self._look_at(login, fields, now_ms)
            elif "token_expires" in fields:
                self._wiring.timetable.note_token_end(login, None)

    def _look_at(self, login: str, fields: Mapping[str, str], now_ms: int) -> None:
        try:
            end_s = token_end(self._wiring.credentials.credentials(login, "bearer"))
        except (MissingSecret, ConfigurationError):
            return
        if fields.get("token_expires") != (None if end_s is None else str(end_s)):
            self._wiring.timetable.note_token_end(login, end_s)
        days = int(fields.get("token_days") or 0)
        if end_s is not None and end_s * 1000 - now_ms <= days * DAY_MS:
            self._warn(login, end_s, now_ms)

    def _warn(self, login: str, end_s: int, now_ms: int) -> None:
        if now_ms - self._warned_ms.get(login, -DAY_MS) < DAY_MS:
            return
        self._warned_ms[login] = now_ms
        end = datetime.fromtimestamp(end_s, UTC).isoformat()
        days = (end_s * 1000 - now_ms) // DAY_MS
        if days < 0:
            log.error("token has ended", login=login, ended_at=end)
        else:
            log.warning("token ends soon", login=login, ends_at=end, days=days)


def check_secrets(wiring: Wiring) -> None:
    """Raises `ConfigurationError` for every secret of a login in Redis that this worker cannot find."""
    problems = wiring.credentials.problems(wiring.timetable.schemes())
    if problems:
        raise ConfigurationError(problems)
    for warning in wiring.credentials.warnings():
        log.warning("secret open to others", where=warning)


_core = OneCore()
_presence: list[Presence] = []


@signals.celeryd_after_setup.connect
def _on_start(**_: object) -> None:
    with exiting_on_mistakes():
        until_there(lambda: check_secrets(wiring()))
        until_there(lambda: wiring().salt)  # here, not by the first poll: that one may meet a server without memory


@signals.worker_ready.connect
def _on_ready(sender: Any, **_: object) -> None:
    queues, threads = sender.app.amqp.queues.consume_from, sender.controller.concurrency
    room = threads if POLLS in queues else 0
    consumption = Consumption(wiring().timetable, queues, threads)
    if isinstance(sender.pool, TaskPool):  # processes have a lock each
        _core.settle()
    presence = Presence(wiring(), worker_name(sender.hostname), room, consumption, _core)
    presence.start()
    _presence.append(presence)


@signals.worker_shutting_down.connect
def _on_leaving(**_: object) -> None:
    for presence in _presence:
        presence.leave()
    grace_s = wiring().settings.grace.total_seconds()
    # Celery's threads pool waits for its tasks however long they are, and a bank may take minutes.
    timer = threading.Timer(grace_s, _cut_off)
    timer.daemon = True
    timer.start()


@signals.worker_shutdown.connect
def _on_shutdown(**_: object) -> None:
    _core.leave()


def _cut_off() -> None:
    """The end of the grace period: what is still running comes back after its lease, and is named here if possible."""
    try:
        tasks = sorted(request.id for request in tuple(state.active_requests))
        log.warning("cut off at the end of the grace period", tasks=tasks)
    finally:
        os._exit(0)
