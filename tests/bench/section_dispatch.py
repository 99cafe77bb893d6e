"""How fast due accounts become messages, against stock beat, RedBeat and the limit; and what a beat costs at rest."""

from __future__ import annotations

import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from contestants import PEERS
from ours import Ours, accounts_file
from report import Section, Spread, ratio, table
from rig import ENVIRONMENTS, Rig, Running, until

from worker.celery import poll_template
from worker.timetable import CLAIM_BATCH, POLLS

#: Others that need longer are stopped as soon as they can be, and measured once only: no spread is as large as that.
PATIENCE_S = 5
OURS, LIMITED = "**balance-poller**", "the limit"
#: The others by their names in `peers/stock_beat.py`, and the sizes that their own start-up allows.
OTHERS = {"stock": ("stock PersistentScheduler", 100_000), "redbeat": ("RedBeat", 10_000)}
#: The template filled in and pushed, as claim does it, without any state.
LIMIT = """
local messages = {}
for i = 1, ARGV[2] do
  messages[i] = string.gsub(ARGV[1], '@(%l+)@', {
    login = 'login-' .. i, account = 'account-' .. i, poll = '1800000000000', attempt = '1', retries = '0',
  })
end
redis.call('LPUSH', 'balances.polls', unpack(messages))
"""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """`sent` of `due` messages in `seconds`; `cpu_s` of beat and of Valkey, `slowest_ms` of one call to the server."""

    due: int
    sent: int
    seconds: float
    cpu_s: float
    slowest_ms: float = 0.0

    @property
    def rate(self) -> float:
        return self.sent / self.seconds


def run(sizes: Sequence[int], rounds: int, unchanged: int, idle_s: float) -> Section:
    rows = [row for size in sizes for row in compare(size, rounds)]
    head = ("accounts due at once", "", "messages a second", "against ours", "CPU, µs a message", "slowest call, ms")
    words = (
        f"Due accounts, each on a login of its own, turned into messages in the queue: median of {rounds} rounds taken "
        "in turns (smallest–largest). CPU is beat's and Valkey's together. Who else needs more than "
        f"{PATIENCE_S} s is stopped after the entries of one turn, and measured once; its rate is that until then. "
        "RedBeat's own start-up leaves out the largest. The limit fills in the same template in a script and does "
        "nothing else."
    )
    return Section("dispatch", "Dispatch", f"{words}\n\n{table(head, rows)}\n{at_rest(unchanged, idle_s)}")


def compare(size: int, rounds: int) -> Iterable[tuple[str, ...]]:
    found: dict[str, list[Dispatch]] = defaultdict(list)
    with due_at_once(size) as deployment:
        for _ in range(rounds):
            for name, measure in measured(size, deployment).items():
                if not found[name] or name == OURS or found[name][0].seconds < PATIENCE_S:
                    found[name].append(measure())
                    print(f"  {size} {name}: {found[name][-1].rate:.0f}/s", flush=True)
    rates = {name: Spread.of(each.rate for each in runs) for name, runs in found.items()}
    for name, runs in found.items():
        slowest_ms = max(each.slowest_ms for each in runs)
        stopped = f", stopped at {runs[-1].sent:,}" if runs[-1].sent < runs[-1].due else ""
        cost = Spread.of(1e6 * each.cpu_s / each.sent for each in runs)
        against = ratio(rates[name].median, rates[OURS].median)
        shown = f"{slowest_ms:.0f}" if slowest_ms else ""
        yield f"{size:,}", name, rates[name].text(0) + stopped, against, cost.text(0), shown


@contextmanager
def due_at_once(size: int) -> Iterator[Ours]:
    """So many accounts that are due, in a file that each round begins with."""
    with Rig(enable_debug_command="local", slowlog_log_slower_than=1000, slowlog_max_len=10_000) as rig:
        deployment = Ours(rig, "http://127.0.0.1:1")
        deployment.fill(size)
        deployment.make_all_due()
        rig.store.save()
        yield deployment


def measured(size: int, deployment: Ours) -> dict[str, Callable[[], Dispatch]]:
    """Everyone who can be measured at this size."""
    others = {
        name: partial(other, kind, size)
        for kind, (name, most) in OTHERS.items()
        if size <= most and (ENVIRONMENTS / "peers").exists()
    }
    return {OURS: partial(ours, size, deployment), LIMITED: partial(limit, size), **others}


def ours(size: int, deployment: Ours) -> Dispatch:
    """Beat's claims, one after the other, as beat makes them while there is more to do."""
    rig = deployment.rig
    rig.store.execute_command("DEBUG RELOAD NOSAVE")
    rig.store.slowlog_reset()
    cpu_s, server_s, began_s = time.process_time(), rig.server_cpu_s, time.monotonic()
    with deployment.room():
        while deployment.timetable.claim().dispatched:
            pass
    seconds = time.monotonic() - began_s
    spent_s = time.process_time() - cpu_s + rig.server_cpu_s - server_s
    slowest_us = max((call["duration"] for call in rig.store.slowlog_get(10_000)), default=0)
    return Dispatch(size, rig.store.llen(POLLS), seconds, spent_s, slowest_us / 1000)


def limit(size: int) -> Dispatch:
    with Rig() as rig:
        push = rig.store.register_script(LIMIT)
        template = poll_template()
        cpu_s, server_s, began_s = time.process_time(), rig.server_cpu_s, time.monotonic()
        for start in range(0, size, CLAIM_BATCH):
            push(args=[template, min(CLAIM_BATCH, size - start)])
        seconds = time.monotonic() - began_s
        return Dispatch(size, size, seconds, time.process_time() - cpu_s + rig.server_cpu_s - server_s)


def other(kind: str, size: int) -> Dispatch:
    """Stock beat or RedBeat, from the moment that it has its entries."""
    with Rig() as rig:
        env = {**os.environ, "BENCH_REDIS_URL": rig.server.url, "BENCH_SECONDS": str(PATIENCE_S)}
        command = [str(ENVIRONMENTS / "peers" / "bin" / "python"), str(PEERS / "stock_beat.py"), kind, str(size)]
        log = rig.directory / f"{kind}.log"  # stock beat cannot keep its file where it is stopped
        with (
            log.open("ab") as errors,
            subprocess.Popen(
                command, env=env, cwd=rig.directory, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as beat,
        ):
            assert beat.stdout is not None
            assert beat.stdout.readline() == "ready\n", log.read_text()
            server_s = rig.server_cpu_s
            sent, cpu_s, seconds = beat.stdout.read().split()
        return Dispatch(size, int(sent), float(seconds), float(cpu_s) + rig.server_cpu_s - server_s)


def at_rest(accounts: int, idle_s: float) -> str:
    """A beat whose accounts Redis knows already: until it is ready, and then with nothing due."""
    with Rig() as rig:
        deployment = Ours(rig, "http://127.0.0.1:1")
        (rig.directory / "accounts.toml").write_text(accounts_file(accounts))
        first_s, first = _ready(deployment)
        first.stop()
        again_s, beat = _ready(deployment)
        memory_mb, cpu_s, server_s = beat.memory_mb, beat.cpu_s, rig.server_cpu_s
        time.sleep(idle_s)
        rows = [
            (f"ready with {accounts:,} accounts that are new, s", f"{first_s:.1f}"),
            ("the same accounts again, unchanged, s", f"{again_s:.1f}"),
            ("memory of beat then, MB", f"{memory_mb:.0f}"),
            ("beat's CPU with nothing due, % of a core", f"{100 * (beat.cpu_s - cpu_s) / idle_s:.1f}"),
            ("Valkey's CPU then, % of a core", f"{100 * (rig.server_cpu_s - server_s) / idle_s:.1f}"),
        ]
        return table(("a beat at rest", ""), rows)


def _ready(deployment: Ours) -> tuple[float, Running]:
    """Starts a beat; how long until its first claim."""
    deployment.rig.store.hdel("config", "claimed_at")
    began_s = time.monotonic()
    beat = deployment.start("beat", "beat")

    def has_claimed() -> bool:
        beat.must_live()
        return deployment.rig.store.hexists("config", "claimed_at")

    until(has_claimed, 600, "a beat that claims", pause_s=0.01)
    return time.monotonic() - began_s, beat
