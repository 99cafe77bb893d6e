"""What the four-hour wait costs: in Valkey and in every process, against Celery's countdown."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from contestants import PEERS, Job, Peer, celery_command
from ours import Ours
from report import Section, table
from rig import ENVIRONMENTS, Rig, until

from worker.errors import Kind, Outcome
from worker.policy import Counters
from worker.timetable import CLAIM_BATCH, Token

FOUR_HOURS_MS = 4 * 3_600_000
#: A code of the account alone: what a whole bank answers would open its breaker.
WAIT = Outcome(Kind.ANSWERED, "E301", "WAIT_4_HOURS_BEFORE_RETRY")
#: A process has then read what it reads when it starts.
SETTLING_S = 2
#: One waits for the server while another has its turn.
THREADS = 4


@dataclass(frozen=True, slots=True)
class Waits:
    """Bytes for each account: in Valkey `defined` and `waiting`, in beat and a worker together `processes`."""

    defined: float
    waiting: float
    processes: float


def run(accounts: int, countdowns: int, starts: int) -> Section:
    """`starts`: how often processes are started to be weighed; two starts of the same differ by a megabyte."""
    ours = measure(accounts, starts)
    rows = [
        ("**balance-poller**, Valkey: an account that is scheduled", f"{accounts:,}", f"{ours.defined:,.0f}"),
        ("**balance-poller**, Valkey: one that waits, more than that", f"{accounts:,}", f"{ours.waiting:,.0f}"),
        ("**balance-poller**, beat and worker: one that waits", f"{accounts:,}", f"{round(ours.processes):,}"),
    ]
    if (ENVIRONMENTS / "peers").exists():
        worker, server = countdown(countdowns)
        rows.append(("celery, `countdown=14400`: in the worker", f"{countdowns:,}", f"{worker:,.0f}"))
        rows.append(("celery, `countdown=14400`: in Valkey", f"{countdowns:,}", f"{server:,.0f}"))
    words = (
        "Accounts in the four-hour wait after a failed first poll. The wait itself is a score that every account has; "
        "what is more than for an account that was never polled is its history: when, which attempt, how it ended. "
        f"What is found in our processes is noise: each figure is the least of {starts} starts."
    )
    return Section("waiting", "Waiting", f"{words}\n\n{table(('', 'how many', 'bytes each'), rows)}")


def measure(accounts: int, starts: int) -> Waits:
    with Rig() as rig:
        deployment = Ours(rig, "http://127.0.0.1:1")
        empty = used(rig)
        deployment.fill(accounts)
        defined = used(rig)
        scheduled_mb = memory_of_processes(deployment, starts)
        fail_everything(deployment, accounts)
        waiting, waiting_mb = used(rig), memory_of_processes(deployment, starts)
        soonest = rig.store.zcount("timetable", deployment.timetable.now_ms() + FOUR_HOURS_MS // 2, "+inf")
        assert soonest == accounts, "an account does not wait"
        return Waits(
            (defined - empty) / accounts,
            (waiting - defined) / accounts,
            2**20 * (waiting_mb - scheduled_mb) / accounts,
        )


def memory_of_processes(deployment: Ours, starts: int) -> float:
    """MB of a beat and a worker that have just started and have nothing to do: the least of so many starts."""
    return min(memory_of_a_start(deployment) for _ in range(starts))


def memory_of_a_start(deployment: Ours) -> float:
    running = [deployment.beat(), deployment.worker(8)]
    time.sleep(SETTLING_S)
    total_mb = sum(each.memory_mb for each in running)
    for each in running:
        each.stop()
    return total_mb


def used(rig: Rig) -> int:
    rig.store.execute_command("MEMORY PURGE")
    return int(rig.store.info("memory")["used_memory"])


def fail_everything(deployment: Ours, accounts: int) -> None:
    """Each account is claimed, begun and put off by four hours, as after WAIT_4_HOURS_BEFORE_RETRY."""
    timetable = deployment.timetable

    def fail(token: Token) -> None:
        timetable.begin(token, caller="bench 1", scheme="bearer", bank="", key="key")
        timetable.postpone(token, FOUR_HOURS_MS, Counters(waits=1), WAIT)

    deployment.make_all_due()
    left = accounts
    with ThreadPoolExecutor(THREADS) as pool:
        while left:
            deployment.claim(min(CLAIM_BATCH, left))
            left -= len(list(pool.map(fail, deployment.take())))


def countdown(count: int) -> tuple[float, float]:
    """Bytes that a Celery task costs which waits in its worker, and in Valkey."""
    with Rig() as rig:
        peer = Peer("celery -E", "peers", "celery_plain", celery_command)
        peer.begin(Job(rig, rig.bank().url, 8))
        peer.poll(1)
        worker_mb, server = peer.memory_mb(), used(rig)
        subprocess.run(
            [str(ENVIRONMENTS / "peers" / "bin" / "python"), str(PEERS / "countdown.py"), str(count)],
            env={
                **os.environ,
                "PYTHONPATH": str(PEERS),
                "BENCH_REDIS_URL": rig.server.url,
                "BENCH_BANK_URL": "http://x",
            },
            check=True,
        )
        until(lambda: rig.store.hlen("unacked") >= count, 300, "a worker that holds every countdown")
        return 2**20 * (peer.memory_mb() - worker_mb) / count, (used(rig) - server) / count
