"""Measures what docs/sizing.md computes with: the store's bytes per account, and a worker's memory by polls in flight.

    python tests/bench/sizing.py

10,000 accounts go through the scripts into a server of their own, each polled once; then workers of 16, 300 and 1,000
threads get as many polls at a bank that does not answer. Prints the rows of two markdown tables.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), *(str(TESTS / each) for each in ("", "acceptance", "integration"))]

from machine import Account, Machine  # noqa: E402
from rig import shipped  # noqa: E402
from servers import ValkeyServer, wait_until  # noqa: E402
from world import STREAM, Entry, World, read_entries  # noqa: E402

from worker.timetable import Begun, Token  # noqa: E402

ACCOUNTS = 10_000
THREADS = (16, 300, 1_000)
PATIENCE_S = 120.0


def store(per_login: int) -> None:
    """One row: bytes of an account that was applied, what its first poll adds, and an entry of the stream."""
    with (
        tempfile.TemporaryDirectory() as directory,
        ValkeyServer(Path(directory), **shipped()) as server,
        server.client() as client,
    ):
        world = World(client)
        world.workers(ACCOUNTS)
        empty = client.info("memory")["used_memory"]
        entries = [Entry(f"account-{index:05}", f"login-{index // per_login:05}") for index in range(ACCOUNTS)]
        world.apply(read_entries(*entries))
        applied = client.info("memory")["used_memory"]
        world.pass_time(24 * 3_600_000)
        polled = 0
        while claimed := world.claim().dispatched:
            for message in world.messages():
                poll(world, token_of(message))
            client.delete("balances.polls")
            polled += claimed
        stream = client.memory_usage(STREAM, samples=0)
        operations = sum(client.memory_usage(key) for key in client.scan_iter("operation:*", count=1000))
        settled = client.info("memory")["used_memory"] - stream - operations
        print(
            f"| {per_login} | {(applied - empty) / ACCOUNTS:.0f} | {(settled - empty) / ACCOUNTS:.0f} "
            f"| {(stream + operations) / polled:.0f} |"
        )


def token_of(message: dict[str, Any]) -> Token:
    """Celery's body is (args, kwargs, embed)."""
    return Token(**json.loads(message["body"])[1])


def poll(world: World, token: Token) -> None:
    begun = world.begin(token)
    assert isinstance(begun, Begun), begun
    world.settle(begun)


class OneToken(Machine):
    """Every login has the same token: a fingerprint of each would take 40 ms and measure nothing here."""

    def secrets(self) -> dict[str, str]:
        return {"BALANCES_SECRET_DEFAULT_TOKEN": "token-canary"}


def worker(threads: int) -> None:
    """One row: resident memory of a worker before its first poll, and with every thread in a request."""
    accounts = [Account(f"account-{index:04}", ("hang",)) for index in range(threads)]
    logins = [account.alias for account in accounts]
    with OneToken(
        Path(tempfile.mkdtemp()), accounts, bearer=logins, limits={"request_deadline": "10m", "lease_margin": "10m"}
    ) as machine:
        machine.beat()
        process = machine.worker(BALANCES_CONCURRENCY=str(threads))
        idle = resident_mib(process.pid)
        machine.kick(*logins)
        wait_until(lambda: machine.sandbox.stats()["in_flight"] == threads, PATIENCE_S, "a request from each thread")
        print(f"| {threads} | {idle:.0f} | {resident_mib(process.pid):.0f} |")


def resident_mib(pid: int) -> float:
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kib) / 1024


def main() -> None:
    print("| accounts per login | bytes, applied | bytes, polled once | bytes per answer |\n|---|---|---|---|")
    for per_login in (1, 20):
        store(per_login)
    print("| threads | MiB, idle | MiB, all in a request |\n|---|---|---|")
    for threads in THREADS:
        worker(threads)


if __name__ == "__main__":
    main()
