"""Come and go as a worker: refuse to start without secrets, say how much room there is, leave within the grace period.

start ─▶ secrets there? ─▶ present every 5 s, new secrets looked for ─▶ SIGTERM ─▶ gone after the grace period

Present is only who works: a worker whose thread is free while messages wait, and that takes none, says nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import Any

import structlog
from celery import signals
from celery.worker import state

from worker.celery import Wiring, exiting_on_mistakes, wiring
from worker.credentials import Credentials, Fingerprints, fingerprints
from worker.errors import ConfigurationError, MissingSecret, StoreUnavailable
from worker.policy import Credential
from worker.timetable import POLLS, Timetable

log = structlog.get_logger()

#: How often a worker says that it is there, and how long it is believed.
PRESENT_EVERY_S = 5
PRESENT_TTL_S = 15
#: How often a worker looks for a new secret of a blocked login: "within a minute of its appearing".
SECRETS_EVERY_S = 15
#: Looks in a row at which messages waited, a thread was free and nothing had been taken: a free thread takes at once.
STALLED_LOOKS = 4


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


class Presence(threading.Thread):
    """Keeps this worker's threads in the queue's room, and lifts blocks for which it holds a new credential."""

    def __init__(self, wiring: Wiring, name: str, threads: int, consumption: Consumption) -> None:
        super().__init__(name="presence", daemon=True)
        self._wiring = wiring
        self._worker = (name, threads)
        self._consumption = consumption
        self._is_stalled = False
        self._leaving = threading.Event()
        self._next_look_s = time.monotonic() + SECRETS_EVERY_S

    def run(self) -> None:
        while not self._leaving.is_set():
            try:
                self._round()
            except StoreUnavailable as error:
                log.warning("the server is away", reason=str(error))
            self._leaving.wait(PRESENT_EVERY_S)
        try:
            self._wiring.timetable.forget_worker(*self._worker)
        except StoreUnavailable:
            log.debug("left without saying so; believed for some seconds more")

    def leave(self) -> None:
        """No new polls for this worker from here on."""
        self._leaving.set()

    def _round(self) -> None:
        if self._consumption.is_stalled():
            self._stall()
            return
        self._is_stalled = False
        self._wiring.timetable.register_worker(*self._worker, PRESENT_TTL_S)
        if time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + SECRETS_EVERY_S
            unblock_with_new_secrets(self._wiring)

    def _stall(self) -> None:
        self._wiring.timetable.forget_worker(*self._worker)
        if not self._is_stalled:
            log.error("messages wait and none is taken: this worker counts as gone")
        self._is_stalled = True


def unblock_with_new_secrets(wiring: Wiring) -> None:
    """Lifts the block of every login for which this worker holds another credential of the kind that failed."""
    for login, fields in wiring.timetable.logins().items():
        if "blocked" not in fields:
            continue
        try:
            credentials = wiring.credentials.credentials(login, fields["scheme"])  # type: ignore[arg-type]
        except (MissingSecret, ConfigurationError):
            continue
        kind = Credential(fields["blocked"])
        if _unblock(wiring, login, kind, credentials):
            log.info("unblocked with a new credential", login=login, credential=kind)


def _unblock(wiring: Wiring, login: str, kind: Credential, credentials: Credentials) -> bool:
    held: Fingerprints = fingerprints(credentials, wiring.salt)
    fingerprint = held.bank if kind is Credential.BANK else held.key
    return wiring.timetable.unblock_with(login, kind, fingerprint) is None


def check_secrets(wiring: Wiring) -> None:
    """Raises `ConfigurationError` for every secret of a login in Redis that this worker cannot find."""
    schemes = {login: fields["scheme"] for login, fields in wiring.timetable.logins().items()}
    problems = wiring.credentials.problems(schemes)  # type: ignore[arg-type]
    if problems:
        raise ConfigurationError(problems)


_presence: list[Presence] = []


@signals.celeryd_after_setup.connect
def _on_start(**_: object) -> None:
    with exiting_on_mistakes():
        try:
            check_secrets(wiring())
        except StoreUnavailable as error:
            log.warning("secrets not checked: the server is away", reason=str(error))


@signals.worker_ready.connect
def _on_ready(sender: Any, **_: object) -> None:
    queues, threads = sender.app.amqp.queues.consume_from, sender.controller.concurrency
    room = threads if POLLS in queues else 0
    consumption = Consumption(wiring().timetable, queues, threads)
    presence = Presence(wiring(), f"{sender.hostname}:{os.getpid()}", room, consumption)
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


def _cut_off() -> None:
    """The end of the grace period: what is still running comes back after its lease, and is named here."""
    log.warning("cut off at the end of the grace period", tasks=sorted(request.id for request in state.active_requests))
    os._exit(0)
