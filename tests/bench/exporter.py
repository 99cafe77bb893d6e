"""Measures a scrape and the status page at many accounts.

    PYTHONPATH=.:tests:tests/integration .venv/bin/python tests/bench/exporter.py [accounts] [accounts per login]

A server of its own, defined by `apply` as beat does; two thousand accounts have been polled, some of them in vain.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis
import requests
from served import served
from servers import ValkeyServer
from world import STREAM, Entry, World, read_entries

from worker.exporter import make_app
from worker.timetable import Begun, Token

INSTITUTIONS = 12
ROUNDS = 21
POLLS = 2_000


def main() -> None:
    accounts = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    per_login = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    with tempfile.TemporaryDirectory() as directory, ValkeyServer(Path(directory)) as server, server.client() as client:
        fill(client, accounts, per_login)
        print(f"{bytes_of(client, 'state:*') / accounts:.0f} bytes an account for the sets that count it")
        print(f"{accounts} accounts, {accounts // per_login} logins, {INSTITUTIONS} institutions")
        with served(make_app(client, STREAM)) as url:
            for path in ("/metrics", "/", "/?state=suspended", "/?q=777", "/?institution=bank3.cl&state=scheduled"):
                told(f"GET {path}", lambda path=path: requests.get(url + path, timeout=60).raise_for_status())


def bytes_of(client: redis.Redis, pattern: str) -> int:
    return sum(client.memory_usage(key, samples=0) for key in client.scan_iter(pattern, 1000))


def fill(client: redis.Redis, accounts: int, per_login: int) -> None:
    world = World(client)
    entries = [
        Entry(f"account-{n}", f"login-{n // per_login}", f"{n:09}", institution=f"bank{n % INSTITUTIONS}.cl")
        for n in range(accounts)
    ]
    world.apply(read_entries(*entries))
    world.workers(POLLS)
    world.pass_time(10 * 60_000)
    for _ in range(0, POLLS, 500):
        world.claim()
        for number, message in enumerate(world.messages()):
            end(world, Token(**json.loads(message["body"])[1]), number)
        client.delete("balances.polls")


def end(world: World, token: Token, number: int) -> None:
    """Three of five are settled; of the others some wait, some are dead, and each hundredth login is blocked."""
    world.bank = f"log-on of {token.login}"
    begun = world.begin(token, "worker@bench:1 x")
    assert isinstance(begun, Begun)
    match number % 5, number % 100:
        case _, 99:
            world.block(token)
        case 0, _:
            world.suspend(token)
        case 1, _:
            world.postpone(token)
        case _:
            world.settle(begun)


def told(name: str, call: Callable[[], object]) -> None:
    """The median, and the slowest, of some rounds."""
    took_ms = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        call()
        took_ms.append((time.perf_counter() - started_s) * 1000)
    print(f"{name:<50} median {statistics.median(took_ms):6.1f} ms, slowest {max(took_ms):6.1f} ms")


if __name__ == "__main__":
    main()
