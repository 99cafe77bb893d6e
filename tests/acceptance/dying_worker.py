"""`celery -A worker …`, word for word, with trap doors: at an armed point it sends one signal, to itself or another.

    claimed │ begun │ sent │ answered │ settled      a worker's five steps: the trap is *after* the step
    pushed │ lapsed                                  a beat's: after the claim that sent work out, before a decision

The trap is a file, `BALANCES_TEST_TRAP`, written by the test: `{"at", "account", "signal", "pid"}`, pid 0 for this
process. Whoever comes to the point first takes the file away, so that it happens once. Nothing else differs from the
real thing, but for one more remote control command, which tells what kombu remembers of the messages it delivered.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import structlog
from celery.__main__ import main
from celery.worker.control import inspect_command

from worker import beat, tasks, transport
from worker.timetable import Timetable

TRAP = Path(os.environ["BALANCES_TEST_TRAP"])


def trap(at: str, account: str | None = None) -> None:
    """Spring the trap if it is armed for this point and this account."""
    with suppress(FileNotFoundError):
        armed = json.loads(TRAP.read_text())
        if account is None:
            account = structlog.contextvars.get_contextvars().get("account", "")
        if (armed["at"], armed["account"]) == (at, account):
            TRAP.rename(TRAP.with_suffix(".sprung"))
            send(armed["signal"], armed["pid"])


def send(number: int, pid: int) -> None:
    if pid:
        os.kill(pid, number)
    else:  # to this thread: sent to the process, another thread may take it, and this one goes on a little further
        signal.pthread_kill(threading.get_ident(), number)


def before(owner: Any, name: str, at: str) -> None:
    real = getattr(owner, name)

    @wraps(real)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        trap(at)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, at: str) -> None:
    real = getattr(owner, name)

    @wraps(real)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        trap(at)
        return result

    setattr(owner, name, wrapped)


def trap_beat(claim: Callable[..., Any], conclude: Callable[..., Any]) -> None:
    """A beat's two steps name no account in a log's context."""

    @wraps(claim)
    def claimed(*args: Any, **kwargs: Any) -> Any:
        result = claim(*args, **kwargs)
        if result.dispatched or result.resent:
            trap("pushed", "")
        return result

    @wraps(conclude)
    def concluded(self: Any, lapse: Any) -> Any:
        trap("lapsed", lapse.token.account)
        return conclude(self, lapse)

    Timetable.claim = claimed  # type: ignore[method-assign]
    beat.TimetableScheduler.conclude = concluded  # type: ignore[method-assign]


before(tasks, "begin", "claimed")
after(tasks, "begin", "begun")
after(transport._Connection, "send", "sent")
after(tasks, "ask", "answered")
after(tasks, "settle", "settled")
trap_beat(Timetable.claim, beat.TimetableScheduler.conclude)


@inspect_command()  # type: ignore[untyped-decorator]
def tags(state: Any) -> dict[str, int]:
    """Tags that kombu keeps of delivered messages."""
    qos = state.consumer.task_consumer.channel.qos
    return {"delivered": len(qos._delivered), "dirty": len(qos._dirty)}


sys.argv = ["celery", "-A", "worker", *sys.argv[1:]]
sys.exit(main())
