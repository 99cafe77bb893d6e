"""A deployment whose server is known to Sentinels: every process finds the master by them, and the one after it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import redis
from machine import DURABLE, PATIENCE_S, STREAM, Account, Machine
from servers import ValkeyServer, wait_until

from worker.store import LOOPBACK, free_port, server_binary, tethered
from worker.timetable import Timetable

MASTER = "balances-master"
#: With what means something in a URL, or to who takes one apart.
PASSWORD = "p;w/1%,"
#: A replica need not wait for others that might want to copy, too.
QUICK = {"masterauth": PASSWORD, "repl-diskless-sync-delay": 0}
SENTINEL = """
port {port}
bind {host}
sentinel monitor {master} {host} {server} 1
sentinel auth-pass {master} {password}
sentinel down-after-milliseconds {master} 1000
sentinel failover-timeout {master} 5000
"""


class Watched(Machine):
    """A machine that knows its server by two Sentinels, of which the first is away."""

    def __init__(self, directory: Path, accounts: list[Account]) -> None:
        super().__init__(directory, accounts, server={"requirepass": PASSWORD, **QUICK})
        self.sentinels = free_port(), free_port()

    def env(self) -> dict[str, str]:
        hosts = ",".join(f"{LOOPBACK}:{port}" for port in self.sentinels)
        url = f"sentinel://:{quote(PASSWORD, safe='')}@{hosts}/{MASTER}/0"
        return {**super().env(), "BALANCES_REDIS_URL": url}

    def master_port(self) -> int:
        """Where the Sentinel sends its clients; while it promotes a replica it closes all connections to that."""
        with redis.Redis(LOOPBACK, self.sentinels[1], decode_responses=True) as sentinel:
            return int(sentinel.sentinel_get_master_addr_by_name(MASTER)[1])

    @contextmanager
    def sentinel(self) -> Iterator[None]:
        values = {"port": self.sentinels[1], "server": self.server.port, "password": PASSWORD, "master": MASTER}
        path = self.directory / "sentinel.conf"
        path.write_text(SENTINEL.format(host=LOOPBACK, **values))
        with (self.directory / "sentinel.log").open("wb") as log:
            command = tethered([str(server_binary()), str(path), "--sentinel"])
            process = subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.kill()
            process.wait()


@contextmanager
def replica_of(machine: Machine) -> Iterator[ValkeyServer]:
    directory = machine.directory / "replica"
    directory.mkdir()
    options = {**DURABLE, "requirepass": PASSWORD, **QUICK}
    with ValkeyServer(directory, replicaof=f"{LOOPBACK} {machine.server.port}", **options) as replica:
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", what="a replica that follows")
        yield replica


def test_polls_go_on_with_the_server_that_sentinel_makes_master(tmp_path: Path) -> None:
    with Watched(tmp_path, [Account("acme")]) as machine, replica_of(machine) as replica, machine.sentinel():
        beat, worker = machine.beat(), machine.worker()
        machine.kick("acme")
        machine.until_entries("acme", 1)
        shown = machine.balances("accounts", "acme")
        assert shown.returncode == 0, shown.stderr

        with replica.client() as next_:
            wait_until(lambda: next_.xlen(STREAM) == 1, what="what was published has reached the replica")
            machine.server.kill()
            wait_until(lambda: machine.master_port() == replica.port, PATIENCE_S, "a failover that is over")
            assert Timetable(next_, stream=STREAM).poll("acme") is None
            wait_until(lambda: next_.xlen(STREAM) == 2, PATIENCE_S, "a poll with the new master")
        assert beat.is_alive, beat.text()
        assert worker.is_alive, worker.text()
