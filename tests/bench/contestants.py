"""Who polls: ours, the limit without any queue, and what people would use instead; each with the poll of its users.

A contestant is started, is given numbers of polls to do, and is done when the stream has as many entries.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ours import Ours, alias_of
from rig import ENVIRONMENTS, HERE, Rig, Running, until

PEERS = HERE / "peers"
#: The stream that peers write to; ours has its own.
STREAM = "bench"
PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a contestant works with."""

    rig: Rig
    bank_url: str
    concurrency: int
    more_env: Mapping[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        return {
            "BENCH_REDIS_URL": self.rig.server.url,
            "BENCH_BANK_URL": self.bank_url,
            "BENCH_CONCURRENCY": str(self.concurrency),
            "PYTHONPATH": str(PEERS),
            **self.more_env,
        }


class Contestant:
    """One way to poll: `begin` starts its worker, `give` adds polls, `done` counts entries."""

    name: str
    workers: list[Running]

    def is_installed(self) -> bool:
        return True

    def begin(self, job: Job, processes: int = 1) -> None:
        """Starts its workers: so many processes, each with the job's concurrency."""
        raise NotImplementedError

    def cpu_s(self) -> float:
        return sum(worker.cpu_s for worker in self.workers)

    def memory_mb(self) -> float:
        return sum(worker.memory_mb for worker in self.workers)

    def prepare(self, count: int) -> None:
        """Makes so many accounts due, where accounts exist before their polls."""

    def give(self, count: int) -> None:
        raise NotImplementedError

    def done(self) -> int:
        raise NotImplementedError

    def poll(self, count: int, patience_s: float = PATIENCE_S) -> None:
        """Does so many polls more, and returns when they are done."""
        goal = self.done() + count
        self.give(count)
        self.until_done(goal, patience_s)

    def until_done(self, goal: int, patience_s: float = PATIENCE_S) -> None:
        def is_done() -> bool:
            for worker in self.workers:
                worker.must_live()
            return self.done() >= goal

        until(is_done, patience_s, f"{self.name}: {goal} polls")


@dataclass
class Peer(Contestant):
    """A queue from one of the environments: how its worker is started, and the program that enqueues."""

    name: str
    environment: str
    program: str
    command: Callable[[int], list[str]]
    prefix: list[str] = field(default_factory=list)
    _job: Job = field(init=False)
    workers: list[Running] = field(init=False)

    @property
    def _bin(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin"

    def is_installed(self) -> bool:
        return (self._bin / "python").exists()

    def begin(self, job: Job, processes: int = 1) -> None:
        self._job = job
        program, *arguments = self.command(job.concurrency)
        command = [*self.prefix, str(self._bin / program), *arguments]
        name = self.name.replace(" ", "-").replace(",", "")
        self.workers = [job.rig.start(f"{name}-{each}", command, job.env, cwd=PEERS) for each in range(processes)]

    def give(self, count: int) -> None:
        enqueue = [str(self._bin / "python"), str(PEERS / "give.py"), self.program, str(count)]
        subprocess.run(enqueue, env=self._job.env, cwd=PEERS, check=True)

    def done(self) -> int:
        return int(self._job.rig.store.xlen(STREAM))


class Bare(Contestant):
    """The limit: `requests` in a loop, no queue, from our own environment."""

    name = "requests in a loop"

    def begin(self, job: Job, processes: int = 1) -> None:
        assert processes == 1, "the limit is one loop"
        self._job = job
        self.workers = [job.rig.start("bare", [sys.executable, str(PEERS / "bare.py")], job.env)]

    def give(self, count: int) -> None:
        stdin = self.workers[0].popen.stdin
        assert stdin is not None
        stdin.write(f"{count}\n".encode())
        stdin.flush()

    def done(self) -> int:
        return int(self._job.rig.store.xlen(STREAM))


class OurWorker(Contestant):
    """Our worker as the Procfile starts it, with the timetable's whole state."""

    name = "balance-poller"

    def begin(self, job: Job, processes: int = 1) -> None:
        self._ours = Ours(job.rig, job.bank_url)
        self.workers = [self._ours.worker(job.concurrency, f"worker-{each}") for each in range(processes)]

    def prepare(self, count: int) -> None:
        if not self._ours.timetable.revisions():
            self._ours.fill(count)
        self._ours.make_due(*map(alias_of, range(count)))

    def give(self, count: int) -> None:
        self._ours.claim(count)

    def done(self) -> int:
        return self._ours.settled()


def celery_command(concurrency: int) -> list[str]:
    options = ["-E", "-P", "threads", "-c", str(concurrency), "--loglevel", "INFO"]
    return ["celery", "-A", "celery_plain", "worker", *options]


def dramatiq_command(concurrency: int) -> list[str]:
    return ["dramatiq", "dramatiq_peer", "--processes", "1", "--threads", str(concurrency)]


def huey_command(concurrency: int) -> list[str]:
    return ["huey_consumer", "huey_peer.huey", "-k", "thread", "-w", str(concurrency)]


def rq_command(_: int) -> list[str]:
    return ["python", "rq_worker.py"]


def arq_command(_: int) -> list[str]:
    return ["arq", "arq_peer.WorkerSettings"]


def taskiq_command(concurrency: int) -> list[str]:
    return ["taskiq", "worker", "taskiq_peer:broker", "--workers", "1", "--max-async-tasks", str(concurrency)]


#: Runs what follows where our workers of threads are by themselves: on one core, the last that is allowed.
ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.execv(sys.argv[1], sys.argv[1:])
"""


def on_one_core() -> list[Contestant]:
    """What others' threads would cost if their users kept them to one core."""
    prefix = [sys.executable, "-c", ON_ONE_CORE]
    everyone: list[Contestant] = [
        Peer("celery -E, on one core", "peers", "celery_plain", celery_command, prefix),
        Peer("dramatiq, on one core", "peers", "dramatiq_peer", dramatiq_command, prefix),
        Peer("huey, on one core", "peers", "huey_peer", huey_command, prefix),
    ]
    return [each for each in everyone if each.is_installed() and sys.platform == "linux"]


def contestants() -> list[Contestant]:
    """All of them, the limit first, ours last; those without an environment are left out."""
    everyone: list[Contestant] = [
        Bare(),
        Peer("celery -E", "peers", "celery_plain", celery_command),
        Peer("dramatiq", "peers", "dramatiq_peer", dramatiq_command),
        Peer("huey", "peers", "huey_peer", huey_command),
        Peer("rq", "peers", "rq_peer", rq_command),
        Peer("arq + aiohttp", "arq", "arq_peer", arq_command),
        Peer("taskiq + aiohttp", "peers", "taskiq_peer", taskiq_command),
        OurWorker(),
    ]
    return [each for each in everyone if each.is_installed()]
