"""Callback mode at scale on one machine: every poll, callback and balance accounted for, and what it cost.

    python tests/bench/callbacks.py [ACCOUNTS] [SECONDS]

Twenty accounts a login, each polled every two minutes; a worker with 8 threads, a settler with 4, one webhook,
one beat. Prints a markdown table; exits 1 unless requests, callbacks and entries of the stream are the same.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), *(str(Path(__file__).parents[1] / each) for each in ("", "acceptance"))]

from machine import Account, Machine, Process  # noqa: E402
from servers import wait_until  # noqa: E402
from test_callback_orders import Site  # noqa: E402

from worker.timetable import ANSWERS  # noqa: E402

EVERY = "2m"
#: Seconds from the 202 to the callback.
CALLBACK_AFTER = "ok@2s"
ACCOUNTS_PER_LOGIN = 20


def main(count: int, seconds: float) -> int:
    accounts = [
        Account(f"account-{index:05}", (CALLBACK_AFTER,), EVERY, f"login-{index // ACCOUNTS_PER_LOGIN}")
        for index in range(count)
    ]
    limits = {"callback_grace": "2m", "login_hold": "1m", "life_span": "5m", "request_deadline": "30s"}
    with Site(Path(tempfile.mkdtemp()), accounts, limits=limits) as site:
        processes = {
            "webhook": site.webhook(),
            "settler": site.begin_worker("settler", "-E", "--loglevel", "WARNING", "-Q", ANSWERS, "-c", "4"),
            "worker": site.worker("worker", "-E", "--loglevel", "WARNING", "-Q", "balances.polls", "-c", "8"),
        }
        processes["beat"] = site.beat()
        started, before = time.monotonic(), usage(processes)
        time.sleep(seconds)  # the load itself, not a wait for something
        spent = {name: usage(processes)[name] - before[name] for name in processes}
        lasted = time.monotonic() - started
        for alias in site.accounts:
            site.timetable.pause(alias)
        wait_until(lambda: is_quiet(site), 60, "the last callbacks")
        return report(site, count, lasted, spent)


def usage(processes: dict[str, Process]) -> dict[str, float]:
    """Seconds of CPU that each process has used."""
    ticks = os.sysconf("SC_CLK_TCK")
    fields = {name: Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2].split() for name, p in processes.items()}
    return {name: (int(each[11]) + int(each[12])) / ticks for name, each in fields.items()}


def is_quiet(site: Machine) -> bool:
    stats = site.sandbox.stats()
    waiting = stats["in_flight"] + stats["callbacks"].get("waiting", 0) + stats["callbacks"].get("sending", 0)
    return not waiting and not site.store.exists("answers") and not site.store.llen(ANSWERS)


def report(site: Machine, count: int, lasted: float, spent: dict[str, float]) -> int:
    stats = site.sandbox.stats()
    requests, acknowledged = stats["requests"], stats["callbacks"].get("acknowledged", 0)
    entries = site.entries()
    operations = {entry["operation_id"] for entry in entries}
    late = sum(bool(entry["late"]) for entry in entries)
    print(f"| accounts | {count} |\n|---|---|\n| seconds | {lasted:.0f} |")
    print(f"| requests at the bank | {requests} |\n| callbacks acknowledged | {acknowledged} |")
    print(
        f"| entries on the stream | {len(entries)} |\n| operations among them | {len(operations)} |\n| late | {late} |"
    )
    print(
        f"| two requests of one login at once | {stats['overlaps']} |\n| polls per second | {requests / lasted:.1f} |"
    )
    for name, seconds in spent.items():
        print(f"| CPU of {name}, ms per poll | {1000 * seconds / requests:.2f} |")
    return 0 if requests == acknowledged == len(entries) == len(operations) else 1


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("10000", "150")[len(sys.argv) - 1 :]]
    sys.exit(main(int(arguments[0]), float(arguments[1])))
