"""What one poll costs: CPU of the worker's process tree, against what people would use instead."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from contestants import Contestant, Job, OurWorker, contestants, on_one_core
from report import Section, Spread, ratio, table
from rig import Rig

#: rq forks for every job, and is measured with fewer.
FEWER = {"rq": 40}
CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """ms of CPU per poll: `worker` of the contestant's processes, `server` of Valkey; `start_s` until the first."""

    worker: float
    server: float
    start_s: float


def run(polls: int, rounds: int) -> Section:
    """Everyone `rounds` times, in turns."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    for _ in range(rounds):
        for contestant in (*contestants(), *on_one_core()):
            count = polls // FEWER.get(contestant.name, 1)
            cost = measure(contestant, count)
            costs[contestant.name].append(cost)
            print(f"  {contestant.name}: {cost.worker:.2f} ms", flush=True)
    return Section("poll", "Cost of a poll", words(polls, rounds) + "\n\n" + rows(costs))


def measure(contestant: Contestant, polls: int) -> Cost:
    """What `polls` cost a worker that has done each of them once before."""
    with Rig() as rig:
        contestant.begin(Job(rig, rig.bank().url, CONCURRENCY))
        contestant.prepare(polls)
        contestant.poll(1)
        start_s = contestant.cpu_s()
        contestant.poll(polls - 1)
        contestant.prepare(polls)
        worker_s, server_s = contestant.cpu_s(), rig.server_cpu_s
        contestant.poll(polls)
        spent_s, server_spent_s = contestant.cpu_s() - worker_s, rig.server_cpu_s - server_s
        return Cost(1000 * spent_s / polls, 1000 * server_spent_s / polls, start_s)


def words(polls: int, rounds: int) -> str:
    return (
        f"CPU of the worker's process tree, ms per poll: median of {rounds} rounds taken in turns (smallest–largest); "
        f"{polls:,} polls each (rq a fortieth) in a process that had done them before, {CONCURRENCY} at a time, "
        "against a bank that answers at once. Valkey's CPU includes the enqueuing; start-up, the first poll. Peers "
        "POST, parse and XADD with a session and connections that are kept; ours does it on the full timetable, with "
        "Flower's events on. A worker of ours keeps to one core by itself; *on one core*: others' threads that were "
        "told to."
    )


def rows(costs: dict[str, list[Cost]]) -> str:
    """The table, cheapest first."""
    workers = {name: Spread.of(cost.worker for cost in each) for name, each in costs.items()}
    servers = {name: Spread.of(cost.server for cost in each) for name, each in costs.items()}
    starts = {name: Spread.of(cost.start_s for cost in each) for name, each in costs.items()}
    ours = workers[OurWorker.name].median
    order = sorted(workers, key=lambda name: workers[name].median)
    return table(
        ("", "worker, ms", "against ours", "Valkey, ms", "start-up, s of CPU"),
        (
            (
                f"**{name}**" if name == OurWorker.name else name,
                workers[name].text(),
                ratio(workers[name].median, ours),
                servers[name].text(),
                starts[name].text(1),
            )
            for name in order
        ),
    )
