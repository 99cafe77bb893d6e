"""Say in one line and by exit 0 or 1 whether a process of this host does its work. Quick, so it loads no Celery.

    python -m worker.health beat|worker|settler           ready: it works, and Redis is there
    python -m worker.health beat|worker|settler --alive   the same, but while Redis is away nobody is to blame

What Redis knows is enough: when a beat last claimed, and which workers are present (`worker.lifecycle`): one that is
frozen, or lives on and takes nothing, is not. The webhook is asked by HTTP: `/healthz` (alive) and `/readyz`.
"""

from __future__ import annotations

import argparse
import socket
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from worker.errors import ConfigurationError, StoreUnavailable
from worker.settings import load_settings
from worker.timetable import Timetable, connect

#: A beat claims every second; applying a large accounts file takes it some seconds.
CLAIM_WITHIN_S = 60
#: Why a worker is not present.
ABSENT = "gone, frozen, or taking nothing although messages wait"
#: What the webhook's `/healthz` answers, so that nobody takes another service for it.
WEBHOOK_IS_WELL = {"status": "ok", "process": "webhook"}
#: A check answers within this, whatever hangs: a name that is not resolved, a server that accepts and is mute.
DEADLINE_S = 5.0


class Health(NamedTuple):
    """`is_blameless`: the process could not be judged, because Redis is away."""

    is_well: bool
    reason: str
    is_blameless: bool = False


def beat(timetable: Timetable) -> Health:
    """Whether any beat claims: two of them are one another's replacement."""
    claimed_at_ms = timetable.claimed_at_ms()
    if claimed_at_ms is None:
        return Health(False, "no beat has claimed yet")
    age_s = (timetable.now_ms() - claimed_at_ms) / 1000
    return Health(age_s <= CLAIM_WITHIN_S, f"last claim {age_s:.1f} s ago")


def worker(timetable: Timetable) -> Health:
    """Whether a worker of this host takes polls."""
    return _health_here("worker", present(timetable, takes_polls=True))


def settler(timetable: Timetable) -> Health:
    """Whether a worker of this host takes answers and nothing else."""
    return _health_here("settler", present(timetable, takes_polls=False))


def present(timetable: Timetable, *, takes_polls: bool) -> dict[str, int]:
    """The workers at work, on whatever host, or the settlers: name → how many polls it can run at once."""
    return {name: threads for name, threads in timetable.workers().items() if (threads > 0) == takes_polls}


def _health_here(what: str, names: Iterable[str]) -> Health:
    """Names are `<node>@<host>:<pid>`."""
    host = socket.gethostname()
    here = sorted(name for name in names if name.rpartition(":")[0].partition("@")[2] == host)
    if not here:
        return Health(False, f"no {what} of {host} is present: {ABSENT}")
    return Health(True, f"present: {', '.join(here)}")


PROCESSES: dict[str, Callable[[Timetable], Health]] = {"beat": beat, "worker": worker, "settler": settler}


def examine(process: str) -> Health:
    """The process's health as Redis tells it."""
    try:
        settings = load_settings()
        return PROCESSES[process](Timetable(connect(settings.store_url()), stream=settings.stream))
    except ConfigurationError as error:
        return Health(False, "; ".join(map(str, error.problems)))
    except StoreUnavailable as error:
        return Health(False, f"away: {error}", is_blameless=True)


def within(deadline_s: float, process: str) -> Health:
    """The same, but it never takes longer: a check that runs out of time counts as failed, and kills."""
    found: list[Health] = []
    thread = threading.Thread(target=lambda: found.append(examine(process)), daemon=True)
    thread.start()
    thread.join(deadline_s)
    return found[0] if found else Health(False, f"away: no answer from Redis in {deadline_s:g} s", is_blameless=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worker.health", description="Whether a process does its work.")
    parser.add_argument("process", choices=PROCESSES)
    parser.add_argument("--alive", action="store_true", help="stay 0 while Redis is away")
    arguments = parser.parse_args()
    health = within(DEADLINE_S, arguments.process)
    print(f"{arguments.process}: {health.reason}")
    raise SystemExit(not (health.is_well or (arguments.alive and health.is_blameless)))


if __name__ == "__main__":
    main()
