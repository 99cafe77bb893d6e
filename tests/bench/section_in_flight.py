"""Many slow polls at once: what each costs in memory, and when all are done, against the ideal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from contestants import Bare, Contestant, Job, OurWorker, contestants
from report import Section, ratio, table
from rig import Bank, Rig

#: One after the other, or a process for each: they have no many in one process.
LEFT_OUT = {Bare.name, "rq"}
#: Those that are shown with several processes too.
SEVERAL = {OurWorker.name, "celery -E"}
#: So many times the ideal is waited for.
PATIENCE = 2.5


@dataclass(frozen=True, slots=True)
class Flight:
    """`seconds` from the first request to the last entry (None: given up), `most` requests open at once at the bank."""

    seconds: float | None
    most: int
    kb_each: float


def run(polls: int, several: int, latency_s: float) -> Section:
    rows = []
    for processes in (1, several):
        flights = {}
        for contestant in contestants():
            if contestant.name not in LEFT_OUT and (processes == 1 or contestant.name in SEVERAL):
                flight = flights[contestant.name] = measure(contestant, polls, processes, latency_s)
                print(f"  {contestant.name} × {processes}: {flight}", flush=True)
        rows += [
            row(name, flight, polls * processes, processes, latency_s, flights[OurWorker.name])
            for name, flight in flights.items()
        ]
    words = (
        f"Polls of {latency_s:g} s, {polls:,} for each process with as many threads or tasks. Done: from the first "
        f"request to the last entry on the stream; given up after {PATIENCE} times the ideal. Memory: what the "
        "worker's processes hold at most beyond what they held before, for each poll. rq forks for each job and is "
        "left out; of several processes only Celery is shown beside ours: what a process costs stands above."
    )
    head = ("", "processes", "polls", "done, s", "of the ideal", "open at once", "kB a poll", "against ours")
    return Section("flight", "In flight", f"{words}\n\n{table(head, rows)}")


def row(name: str, flight: Flight, polls: int, processes: int, ideal_s: float, ours: Flight) -> Sequence[str]:
    done = ("given up", "") if flight.seconds is None else (f"{flight.seconds:.1f}", ratio(flight.seconds, ideal_s))
    shown = f"**{name}**" if name == OurWorker.name else name
    memory = (f"{flight.kb_each:.0f}", ratio(flight.kb_each, ours.kb_each or 1))
    return shown, str(processes), f"{polls:,}", *done, f"{flight.most:,}", *memory


def measure(contestant: Contestant, each: int, processes: int, latency_s: float) -> Flight:
    polls = each * processes
    with Rig() as rig:
        bank = rig.bank(latency_s)
        contestant.begin(Job(rig, bank.url, each), processes)
        contestant.prepare(polls + 1)
        contestant.poll(1)
        before_mb = contestant.memory_mb()
        contestant.give(polls)
        seconds, most_mb = until_done(contestant, polls + 1, bank, latency_s)
        return Flight(seconds, bank.stats()["most_open"], 1024 * (most_mb - before_mb) / polls)


def until_done(contestant: Contestant, goal: int, bank: Bank, latency_s: float) -> tuple[float | None, float]:
    """Seconds from the first of these requests to the last entry, and the most MB meanwhile."""
    most_mb, give_up_s = 0.0, time.monotonic() + PATIENCE * latency_s
    while contestant.done() < goal:
        if time.monotonic() > give_up_s:
            return None, most_mb
        most_mb = max(most_mb, contestant.memory_mb())
        time.sleep(0.2)
    return time.time() - bank.stats()["arrivals"][1][1] / 1000, most_mb
