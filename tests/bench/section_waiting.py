"""What the four-hour wait costs: in Valkey and in every process, against Celery's countdown."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from contestants import PEERS, Job, Peer, celery_command
from ours import Ours
from report import Section, ratio, table
from rig import ENVIRONMENTS, Rig, until

from worker.errors import Kind, Outcome
from worker.policy import Counters
from worker.timetable import CLAIM_BATCH, Token

FOUR_HOURS_MS = 4 * 3_600_000
#: A code of the account alone: what a whole bank answers would open its breaker.
WAIT = Outcome(Kind.ANSWERED, "E301", "WAIT_4_HOURS_BEFORE_RETRY")
#: The same as four hours under the default, in seconds, as long as kombu takes between two looks for what to send again
#: (100 s); and how many tasks.
COUNTDOWN_S, VISIBILITY_S, DOUBLED = 120, 30, 20
#: A process has then read what it reads when it starts.
SETTLING_S = 2
#: One waits for the server while another has its turn.
THREADS = 4


HEAD = ("", "how many", "bytes each", "against ours")


@dataclass(frozen=True, slots=True)
class Waits:
    """Bytes for each account: in Valkey `defined` and `waiting`, in beat and a worker together `processes`."""

    defined: float
    waiting: float
    processes: float


def run(accounts: int, countdowns: int, starts: int) -> Section:
    """`starts`: how often processes are started to be weighed; two starts of the same differ by a megabyte."""
    is_compared = (ENVIRONMENTS / "peers").exists()
    with ThreadPoolExecutor(1) as beside:  # it only waits, for minutes
        runs = beside.submit(runs_of_each, DOUBLED) if is_compared else None
        ours = measure(accounts, starts)
        held = countdown(countdowns) if is_compared else None
    waits = ours.waiting + max(0.0, ours.processes)
    rows = [
        ("**balance-poller**, Valkey: an account that is scheduled", f"{accounts:,}", f"{ours.defined:,.0f}", ""),
        ("**balance-poller**, Valkey: one that waits, more than that", f"{accounts:,}", f"{ours.waiting:,.0f}", ""),
        ("**balance-poller**, beat and worker: one that waits", f"{accounts:,}", f"{round(ours.processes):,}", ""),
        ("**balance-poller**, both", f"{accounts:,}", f"{waits:,.0f}", ratio(waits, waits)),
    ]
    doubled = ""
    if runs and held:
        doubled = (
            f"\n\nA countdown of {COUNTDOWN_S} s under a visibility timeout of {VISIBILITY_S} s, which is to it as the "
            f"default of an hour to four: Celery ran each of {DOUBLED} tasks {runs.result():.1f} times. An "
            "account of ours has one due time, and a message that came twice finds it begun."
        )
        worker, server = held
        both = worker + server
        rows.append(("celery, `countdown=14400`: in the worker", f"{countdowns:,}", f"{worker:,.0f}", ""))
        rows.append(("celery, `countdown=14400`: in Valkey", f"{countdowns:,}", f"{server:,.0f}", ""))
        rows.append(("celery, `countdown=14400`: both", f"{countdowns:,}", f"{both:,.0f}", ratio(both, waits)))
    words = (
        "Accounts in the four-hour wait after a failed first poll. The wait itself is a score that every account has; "
        "what is more than for an account that was never polled is its history: when, which attempt, how it ended. "
        f"What is found in our processes is noise: each figure is the least of {starts} starts."
    )
    return Section("waiting", "Waiting", f"{words}\n\n{table(HEAD, rows)}{doubled}")


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
        job = Job(rig, rig.bank().url, 8)
        peer = Peer("celery -E", "peers", "celery_plain", celery_command)
        peer.begin(job)
        peer.poll(1)
        worker_mb, server = peer.memory_mb(), used(rig)
        send_countdowns(job, count, FOUR_HOURS_MS // 1000)
        until(lambda: rig.store.hlen("unacked") >= count, 300, "a worker that holds every countdown")
        return 2**20 * (peer.memory_mb() - worker_mb) / count, (used(rig) - server) / count


def runs_of_each(count: int) -> float:
    """How often Celery runs a task whose countdown is longer than the visibility timeout."""
    with Rig() as rig:
        job = Job(rig, rig.bank().url, 8, {"BENCH_VISIBILITY_S": str(VISIBILITY_S)})
        peer = Peer("celery -E", "peers", "celery_plain", celery_command)
        peer.begin(job)
        peer.poll(1)
        send_countdowns(job, count, COUNTDOWN_S)
        until(lambda: peer.done() > count and not rig.store.hlen("unacked"), 300, "every countdown over")
        return (peer.done() - 1) / count


def send_countdowns(job: Job, count: int, seconds: int) -> None:
    program = [str(ENVIRONMENTS / "peers" / "bin" / "python"), str(PEERS / "countdown.py")]
    subprocess.run([*program, str(count), str(seconds)], env={**os.environ, **job.env}, check=True)
