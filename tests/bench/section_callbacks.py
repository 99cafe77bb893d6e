"""Callback mode under its daily load: what each process costs, and how punctual a poll is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

from ours import Ours, alias_of
from report import Section, table
from rig import Bank, Rig, until

from worker.schedule import phase_ms
from worker.store import LOOPBACK, free_port
from worker.timetable import ANSWERS, POLLS

#: What became due while the deployment was starting is not counted: it is worked off before, for so long at least.
WARM_UP_S = 10
#: Nothing waits that was due so long ago: the deployment keeps up.
PUNCTUAL_MS = 1000
CALLBACK_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """`seconds` of load: `requests` at the bank, `callbacks` acknowledged, `entries` on the stream, of it all.

    `spent_s`: CPU of each process. `late_ms`: due → request at the bank, ascending.
    """

    seconds: float
    requests: int
    callbacks: int
    refused: int
    entries: int
    spent_s: dict[str, float]
    late_ms: list[int]


def run(accounts: int, every: timedelta, seconds: float, warm_up_s: float = WARM_UP_S) -> Section:
    load = measure(accounts, every, seconds, warm_up_s)
    polls = len(load.late_ms)
    core_s = sum(load.spent_s.values())
    rows = [
        ("requests at the bank, warm-up included", f"{load.requests:,}"),
        ("callbacks acknowledged, refused", f"{load.callbacks:,}, {load.refused:,}"),
        ("balances on the stream", f"{load.entries:,}"),
        ("polls a second", f"{polls / load.seconds:.1f}, due: {accounts / every.total_seconds():.1f}"),
        ("polls a second and core", f"{polls / core_s:.0f}"),
        *((f"due → request at the bank, {name}, ms", f"{value:,}") for name, value in punctuality(load.late_ms)),
    ]
    shares = [
        (name, f"{1000 * spent_s / polls:.2f}", f"{100 * spent_s / load.seconds:.1f}", f"{100 * spent_s / core_s:.0f}")
        for name, spent_s in load.spent_s.items()
    ]
    words = (
        f"{accounts:,} accounts, each on a login of its own, every {every.total_seconds() / 60:g} minutes, for "
        f"{seconds:.0f} s after {warm_up_s:.0f} s of warm-up or more, until nothing waits any more; the bank calls "
        f"back after {CALLBACK_AFTER_S:g} s. Valkey keeps its append-only file. One beat, one worker with 16 threads, "
        "one settler with 4, one webhook, as in the Procfile. The logins share one token, so that one fingerprint "
        "serves all; a bank log-on costs each worker process one scrypt of 40 ms when it sees it first."
    )
    return Section(
        "callbacks",
        "Callback mode",
        f"{words}\n\n{table(('', ''), rows)}\n{table(('', 'CPU, ms a poll', '% of a core', '% of all'), shares)}",
    )


def punctuality(late_ms: list[int]) -> list[tuple[str, int]]:
    last = len(late_ms) - 1
    return [("p50", late_ms[last // 2]), ("p99", late_ms[int(last * 0.99)]), ("most", late_ms[last])]


def measure(accounts: int, every: timedelta, seconds: float, warm_up_s: float) -> Load:
    with Rig(appendonly="yes") as rig:
        port = free_port()
        environ = {"BALANCES_CALLBACK_URL": f"http://{LOOPBACK}:{port}", "BALANCES_WEBHOOK_PORT": str(port)}
        bank = rig.bank(0.0, CALLBACK_AFTER_S)
        deployment = Ours(rig, bank.url, **environ)
        deployment.fill(accounts, every=every, mode="callback")
        processes = {
            "webhook": deployment.start("webhook", "webhook"),
            "settler": deployment.start("settler", "settler"),
            "worker": deployment.worker(16),
            "beat": deployment.beat(),
        }
        time.sleep(warm_up_s)  # the load itself, not a wait for something
        until(lambda: is_punctual(rig), 120, "the end of what became due at the start", pause_s=0.5)
        since_ms, began_s = time.time() * 1000, time.monotonic()
        before_s = {name: each.cpu_s for name, each in processes.items()} | {"Valkey": rig.server_cpu_s}
        time.sleep(seconds)
        spent_s = {name: each.cpu_s - before_s[name] for name, each in processes.items()}
        spent_s["Valkey"] = rig.server_cpu_s - before_s["Valkey"]
        lasted_s, until_ms = time.monotonic() - began_s, time.time() * 1000
        processes["beat"].stop()
        quieten(deployment, bank)
        stats, every_ms = bank.stats(), int(every.total_seconds() * 1000)
        arrivals = [(alias_of(int(number)), ms) for number, ms in stats["arrivals"] if since_ms <= ms < until_ms]
        return Load(
            lasted_s,
            stats["requests"],
            stats["acknowledged"],
            stats["refused"],
            deployment.settled(),
            spent_s,
            sorted((ms - phase_ms(alias, every_ms)) % every_ms for alias, ms in arrivals),
        )


def is_punctual(rig: Rig) -> bool:
    return not rig.store.zcount("timetable", "-inf", time.time() * 1000 - PUNCTUAL_MS)


def quieten(deployment: Ours, bank: Bank) -> None:
    """Waits until everything that was asked is settled."""

    def is_quiet() -> bool:
        stats = bank.stats()
        waiting = stats["requests"] - stats["acknowledged"] - stats["refused"]
        store = deployment.rig.store
        return not waiting and not store.exists("answers") and not store.llen(ANSWERS) and not store.llen(POLLS)

    until(is_quiet, 120, "the last callbacks", pause_s=0.5)
