"""What grows: cost of a poll and of a claim against accounts, accounts per login and workers; memory; and a million."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import redis
from ours import Ours, alias_of
from report import Plot, Section, ratio, table
from rig import Rig, Running, until

from worker.timetable import CLAIM_BATCH

CONCURRENCY = 8
#: How often a worker's memory is looked at after the first time.
STEPS = 3
#: What a million accounts are polled every.
EVERY_S = 900
DAY_S = 86_400
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Step:
    """Per poll: `claim_us` and `scripts_us` of Valkey's time (dispatching it; beginning and settling it), `commands` of
    Valkey's, those inside scripts included, and `worker_ms` of the workers' CPU. `rate`: polls a second."""

    claim_us: float
    scripts_us: float
    commands: float
    worker_ms: float
    rate: float


@dataclass(frozen=True, slots=True)
class Spent:
    """What Valkey did meanwhile: µs in claims and in other scripts, and commands."""

    claims_us: float = 0.0
    others_us: float = 0.0
    commands: int = 0

    def __add__(self, more: Spent) -> Spent:
        return Spent(self.claims_us + more.claims_us, self.others_us + more.others_us, self.commands + more.commands)


@dataclass(frozen=True, slots=True)
class Memory:
    """After so many `polls`: MB of the worker, and bytes that each poll added in Valkey (stream and dedupe)."""

    worker_mb: list[tuple[int, float]]
    bytes_a_poll: float
    bytes_an_account: float


def run(
    polls: int, sizes: Sequence[int], crowd: int, per_login: Sequence[int], workers: Sequence[int], long_run: int
) -> Section:
    by_accounts = {size: told("accounts", size, measure(size, 1, 1, polls)) for size in sizes}
    by_login = {count: told("a login", count, measure(crowd, count, 1, polls)) for count in per_login}
    by_workers = {1: by_accounts[sizes[0]]}
    by_workers |= {count: told("workers", count, measure(sizes[0], 1, count, polls)) for count in workers}
    memory = remember(long_run)
    text = "\n".join(
        [
            f"{polls:,} polls each, of accounts that were polled before; Valkey's time in scripts as it reports it.",
            "",
            table(HEAD, rows("accounts, each on a login of its own", by_accounts)),
            table(HEAD, rows(f"accounts per login, of {crowd:,}", by_login)),
            table(HEAD, rows(f"worker processes of {CONCURRENCY} threads, {sizes[0]:,} accounts", by_workers)),
            "![What a poll costs against the number of accounts](growth-accounts.svg)",
            "![What a poll costs against the accounts of a login](growth-login.svg)",
            "",
            table(("polls that a worker has done", "MB"), [(f"{at:,}", f"{mb:.0f}") for at, mb in memory.worker_mb]),
            projection(by_accounts[sizes[-1]], memory),
        ]
    )
    return Section(
        "growth",
        "Growth",
        text,
        {
            "growth-accounts.svg": plot("accounts", by_accounts),
            "growth-login.svg": plot("accounts of a login", by_login),
        },
    )


HEAD = (
    "",
    "",
    "claim, µs of Valkey",
    "begin and settle, µs of Valkey",
    "worker, ms",
    "against the first",
    "polls a second",
)


def told(what: str, number: int, step: Step) -> Step:
    print(f"  {what} {number}: {step}", flush=True)
    return step


def rows(what: str, steps: dict[int, Step]) -> Iterable[Sequence[str]]:
    first = next(iter(steps.values()))
    for number, step in steps.items():
        server = f"{step.claim_us:.0f}", f"{step.scripts_us:.0f}"
        worker = f"{step.worker_ms:.2f}", ratio(step.worker_ms, first.worker_ms)
        yield what, f"{number:,}", *server, *worker, f"{step.rate:,.0f}"


def plot(what: str, steps: dict[int, Step]) -> str:
    lines = {
        "worker, ms": [(number, step.worker_ms) for number, step in steps.items()],
        "claim, 100 µs": [(number, step.claim_us / 100) for number, step in steps.items()],
        "begin, settle, 100 µs": [(number, step.scripts_us / 100) for number, step in steps.items()],
    }
    return Plot(f"What a poll costs against the number of {what}", what, "", lines).svg()


def measure(accounts: int, per_login: int, processes: int, polls: int) -> Step:
    """Drives `polls` of these accounts as beat would, after they were polled once."""
    with Rig() as rig:
        deployment = Ours(rig, rig.bank().url)
        deployment.fill(accounts, per_login=per_login)
        workers = [deployment.worker(CONCURRENCY, f"worker-{number}") for number in range(processes)]
        aliases = [alias_of(number) for number in islice(spread(accounts, per_login), polls)]
        drive(deployment, workers, aliases, len(aliases))
        cpu_s, began_s = sum(each.cpu_s for each in workers), time.monotonic()
        spent = drive(deployment, workers, aliases, polls)
        lasted_s, spent_s = time.monotonic() - began_s, sum(each.cpu_s for each in workers) - cpu_s
        per_poll = (each / polls for each in (spent.claims_us, spent.others_us, spent.commands))
        return Step(*per_poll, 1000 * spent_s / polls, polls / lasted_s)


def spread(accounts: int, per_login: int) -> Iterable[int]:
    """All accounts, one of each login before another one of any, because a login has one in flight."""
    return chain.from_iterable(range(first, accounts, per_login) for first in range(per_login))


def drive(deployment: Ours, workers: list[Running], aliases: list[str], polls: int) -> Spent:
    """Polls these accounts, again and again until there were so many."""
    spent = Spent()
    while polls > 0:
        batch = aliases[:polls]
        polls -= len(batch)
        deployment.make_due(*batch)
        spent += drive_once(deployment, workers)
    return spent


def drive_once(deployment: Ours, workers: list[Running]) -> Spent:
    """Polls what is due, a claim at a time, until nothing is."""
    store, goal, claims_us = deployment.rig.store, deployment.settled(), 0.0
    before_us, before_commands = scripts_us(store), commands(store)
    dispatched = -1
    while dispatched:
        dispatched, spent_us = claim(deployment)
        claims_us += spent_us
        goal += dispatched
        until(lambda goal=goal: is_done(deployment, workers, goal), 120, "polls", pause_s=0.01)
    return Spent(claims_us, scripts_us(store) - before_us - claims_us, commands(store) - before_commands)


def commands(store: redis.Redis) -> int:
    """Commands that Valkey has carried out, those inside scripts too."""
    return int(store.info("stats")["total_commands_processed"])


def claim(deployment: Ours) -> tuple[int, float]:
    """One claim of whatever is due: how many it dispatched, and the µs that it took Valkey."""
    with deployment.room(), deployment.rig.store.pipeline(transaction=True) as pipeline:
        pipeline.info("commandstats")
        deployment.claim_script(args=[CLAIM_BATCH, *deployment.claim_arguments], client=pipeline)
        pipeline.info("commandstats")
        before, (dispatched, *_), after = pipeline.execute()
        return dispatched, usec(after) - usec(before)


def scripts_us(store: redis.Redis) -> float:
    """µs that Valkey has spent in scripts."""
    return usec(store.info("commandstats"))


def usec(stats: dict[str, Any]) -> float:
    return float(stats.get("cmdstat_evalsha", {}).get("usec", 0))


def is_done(deployment: Ours, workers: list[Running], goal: int) -> bool:
    for worker in workers:
        worker.must_live()
    return deployment.settled() >= goal


def remember(polls: int) -> Memory:
    """A worker's memory over many polls, and what they leave behind in Valkey."""
    accounts = min(polls, 10_000)
    with Rig() as rig:
        deployment = Ours(rig, rig.bank().url)
        empty = used(rig.store)
        deployment.fill(accounts)
        bytes_an_account = (used(rig.store) - empty) / accounts
        workers = [deployment.worker(CONCURRENCY)]
        poll_all(deployment, workers)
        polled, found, done = used(rig.store), [(accounts, workers[0].memory_mb)], accounts
        for _ in range(STEPS):
            for _ in range(max(1, (polls // accounts - 1) // STEPS)):
                poll_all(deployment, workers)
                done += accounts
            found.append((done, workers[0].memory_mb))
        return Memory(found, (used(rig.store) - polled) / (done - accounts), bytes_an_account)


def poll_all(deployment: Ours, workers: list[Running]) -> None:
    """Polls every account once."""
    deployment.make_all_due()
    drive_once(deployment, workers)


def used(store: redis.Redis) -> int:
    return int(store.info("memory")["used_memory"])


def projection(step: Step, memory: Memory) -> str:
    """What a million accounts would need, from what was measured above."""
    polls_s = MILLION / EVERY_S
    valkey = polls_s * (step.claim_us + step.scripts_us) / 1e6
    workers = polls_s * step.worker_ms / 1000
    stream_gb = memory.bytes_a_poll * polls_s * DAY_S / 2**30
    rows = [
        ("polls a second", f"{polls_s:,.0f}"),
        (
            "Valkey's memory for the accounts, before their first poll",
            f"{memory.bytes_an_account * MILLION / 2**30:.1f} GB",
        ),
        ("and for a day of the stream", f"{stream_gb:.1f} GB"),
        ("Valkey's commands a second, those inside scripts included", f"{polls_s * step.commands:,.0f}"),
        ("Valkey's time in our scripts, % of its one core", f"{100 * valkey:.0f}"),
        ("cores of workers, for the CPU alone", f"{workers:.1f}"),
    ]
    return (
        f"### A million accounts, every {EVERY_S // 60} minutes: projected, not measured\n\n{table(('', ''), rows)}\n"
        "Workers multiply: more processes on more hosts, each with threads for the polls that it has in flight. Valkey "
        "does not: its scripts run on one core, so that is what breaks first once the figure above nears 70 %, and "
        "its memory once `retention` is long; a day of the stream is the unit above. Then an operator splits the "
        "accounts over several deployments, by institution: each with a Valkey, a beat, workers and an accounts file "
        "of its own. Nothing is shared between them but the bank's limits, which are per institution anyway."
    )
