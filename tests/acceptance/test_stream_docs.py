"""docs/stream.md is true: its tables name what is there, and its examples run, each as it stands, on a real stream.

`redis-cli` is not in the wheel that brings the server, so a socket of our own sends what it would send.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import ROOT, ValkeyServer, wait_until
from world import STREAM, World, read

from worker.events import TYPES, schema
from worker.reader import BalanceReader
from worker.store import LOOPBACK, tethered

PAGE = (ROOT / "docs" / "stream.md").read_text("utf-8")
NODE = ROOT / "docs" / "examples" / "follow.mjs"
URL = "redis://127.0.0.1:6379/0"
#: The page's example of an entry's id, and of a moment before all of them.
ID, MOMENT = "1795343223255-0", "1795341600000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def python(word: str) -> str:
    """The one example in Python in which this word stands."""
    [block] = [block for block in blocks("python") if word in block]
    return block


@pytest.fixture
def published(store: redis.Redis) -> list[str]:
    """Two balances of one account, then its suspension; one of another. The ids of their entries."""
    world = World(store)
    world.apply(read("acme-operating", "acme-payroll"))
    for amount in ("10000", "12345678901234567.89"):
        world.settle(world.start("acme-operating"), amount=amount)
    world.suspend(world.start("acme-operating").token)
    world.settle(world.start("acme-payroll"), amount="7")
    return [entry for entry, _ in store.xrange(STREAM)]


def start(code: str, url: str, directory: Path) -> subprocess.Popen[str]:
    assert URL in code
    script = directory / "example.py"
    script.write_text(code.replace(URL, url))
    command = tethered([sys.executable, "-W", "error", str(script)])
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen[str]) -> list[str]:
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0, said
    return said.splitlines()


# -------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.usefixtures("published")
def test_the_typed_reader(store: redis.Redis, valkey_server: ValkeyServer, tmp_path: Path) -> None:
    process = start(python("reader.run(handle)"), valkey_server.url, tmp_path)

    def is_done() -> bool:
        return [(group["pending"], group["lag"]) for group in store.xinfo_groups(STREAM)] == [(0, 0)]

    wait_until(lambda: store.exists(STREAM) and is_done(), 20, "everything acknowledged")
    process.send_signal(signal.SIGTERM)
    assert output(process) == [
        "acme-operating ClosingAvailable 10000 CLP",
        "acme-operating ClosingAvailable 12345678901234567.89 CLP",
        "acme-operating is suspended: E401",
        "acme-payroll ClosingAvailable 7 CLP",
    ]


@pytest.mark.usefixtures("published")
def test_the_newest_balances(valkey_server: ValkeyServer, tmp_path: Path) -> None:
    first, *polls = output(start(python("reader.latest("), valkey_server.url, tmp_path))
    assert first.endswith("[Decimal('12345678901234567.89')]")
    assert [line.split()[0] for line in polls] == ["acme-operating", "acme-payroll"]


def test_redis_py_alone_takes_over_and_reads_on(
    published: list[str], store: redis.Redis, valkey_server: ValkeyServer, tmp_path: Path
) -> None:
    store.xgroup_create(STREAM, "reports", id="0")
    store.xreadgroup("reports", "dead", {STREAM: ">"}, count=2)
    store.xclaim(STREAM, "reports", "dead", 0, published[:1], idle=60_001, justid=True)
    said = output(start(python("xautoclaim"), valkey_server.url, tmp_path))
    types = ["balance.observed.v1", "account.suspended.v1", "balance.observed.v1"]
    assert [line.split()[0] for line in said] == types
    assert store.xpending(STREAM, "reports")["pending"] == 1, "what the other was given is not yet idle for a minute"
    said = output(start(python("xautoclaim"), valkey_server.url, tmp_path))
    assert said == []


def test_a_coming_gap(published: list[str], store: redis.Redis, valkey_server: ValkeyServer, tmp_path: Path) -> None:
    store.xgroup_create(STREAM, "slow", id="0")
    store.xreadgroup("slow", "one", {STREAM: ">"}, count=1)
    code = python("group_lag")
    assert output(start(code, valkey_server.url, tmp_path)) == ["slow 1 3 0% of the retention 0 lost"]
    store.xtrim(STREAM, minid=published[2], approximate=False)
    said = output(start(code, valkey_server.url, tmp_path))
    assert said == ["slow 1 2 0% of the retention 1 lost", "ALERT slow"]


def test_every_example_in_python_is_run_here() -> None:
    assert len(blocks("python")) == len({python(word) for word in ("reader.run", "latest(", "xautoclaim", "group_lag")})


# ----------------------------------------------------------------------------------------------------------- redis-cli


class Terminal:
    """Sends what `redis-cli` would, and reads the answer as RESP has it."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), timeout=10)
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def type(self, line: str) -> Any:
        program, *arguments = shlex.split(line)
        assert program == "redis-cli"
        parts = [argument.encode() for argument in arguments]
        self._socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        return self._reply()

    def _reply(self) -> Any:
        kind, rest = (line := self._file.readline().decode().removesuffix("\r\n"))[:1], line[1:]
        match kind:
            case ":":
                return int(rest)
            case "$":
                return None if rest == "-1" else self._file.read(int(rest) + 2)[:-2].decode()
            case "*":
                return [self._reply() for _ in range(int(rest))]
            case "+":
                return rest
        raise AssertionError(rest)


@pytest.fixture
def terminal(valkey_server: ValkeyServer) -> Iterator[Terminal]:
    terminal = Terminal(valkey_server.port)
    yield terminal
    terminal.close()


def test_redis_cli(published: list[str], store: redis.Redis, terminal: Terminal) -> None:
    earliest = int(published[0].partition("-")[0])
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    told = {}
    for line in lines:
        told[line] = terminal.type(line.replace(ID, published[0]).replace(MOMENT, str(earliest)))
        if "XREADGROUP" in line:  # the next command of the page is for an entry that it has shown
            assert told[line][0][1][0][0] == published[0]
        if "XPENDING" in line:
            store.xclaim(STREAM, "ledger", "host-1", 0, published[1:2], idle=60_001, justid=True)

    def answer(words: str) -> Any:
        [line] = [line for line in lines if words in line]
        return told[line]

    assert answer("XGROUP CREATE") == "OK"
    assert answer("XACK") == 1
    assert [(entry, consumer) for entry, consumer, *_ in answer("XPENDING")] == [(published[1], "host-1")]
    assert [entry for entry, _ in answer("XAUTOCLAIM")[1]] == published[1:2]
    assert [entry for entry, _ in answer(f"XRANGE balances {MOMENT}")] == published
    assert [entry for entry, _ in answer("XRANGE balances '(")] == published[1:]
    assert answer("SETID") == "OK"
    assert '"account":"acme-operating"' in answer("HGET latest")
    assert answer("HGETALL latest")[::2] == ["acme-operating", "acme-payroll"]
    assert answer("balances.dead") == []
    assert answer("XINFO GROUPS")[0][:2] == ["name", "ledger"]
    assert "entries-added" in answer("XINFO STREAM")


# ---------------------------------------------------------------------------------------------------------------- Node


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.usefixtures("published")
def test_node_finishes_what_it_had_and_reads_on(store: redis.Redis, valkey_server: ValkeyServer) -> None:
    store.xgroup_create(STREAM, "dashboard", id="0")
    store.xreadgroup("dashboard", "node-1", {STREAM: ">"}, count=1)
    command = tethered(["node", str(NODE), LOOPBACK, str(valkey_server.port)])
    run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "acme-operating ClosingAvailable Credit 10000 CLP",
        "acme-operating ClosingAvailable Credit 12345678901234567.89 CLP",
        "acme-operating account.suspended.v1",
        "acme-payroll ClosingAvailable Credit 7 CLP",
    ]
    assert store.xpending(STREAM, "dashboard")["pending"] == 0
    run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (run.returncode, run.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_node_gives_a_password_and_says_when_it_is_wrong(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path, requirepass="right") as server:
        for password, status in (("right", 0), ("wrong", 1)):
            command = tethered(["node", str(NODE), LOOPBACK, str(server.port), password])
            run = subprocess.run(command, capture_output=True, text=True, timeout=20)
            assert run.returncode == status, run.stderr
        assert "WRONGPASS" in run.stderr


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("type_", TYPES)
def test_the_table_of_types_names_every_field(type_: str) -> None:
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{type_}` |")]
    named = set(re.findall(r"`([a-z_]+)`", row.partition("` |")[2]))
    common = {"account", "institution", "poll"}
    assert schema(type_)["properties"].keys() - common <= named
    assert all(f"`{name}`" in PAGE for name in common)


def test_the_elements_of_balances_are_named() -> None:
    [paragraph] = [part for part in PAGE.split("\n\n") if part.startswith("An element of `balances`")]
    fields = schema("balance.observed.v1")["$defs"]["ObservedBalance"]["properties"]
    assert set(fields) <= set(re.findall(r"`(\w+)`", paragraph))


def test_the_table_of_attributes_is_that_of_an_entry(published: list[str], store: redis.Redis) -> None:
    [table] = [part for part in PAGE.split("\n\n") if part.startswith("| field | value |")]
    [(_, fields)] = store.xrange(STREAM, published[0], published[0])
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(fields)


def test_the_readers_numbers_are_those_of_the_page() -> None:
    defaults = BalanceReader.__init__.__kwdefaults__
    assert f"`deliveries={defaults['deliveries']}`" in PAGE
    assert f"`idle_s={defaults['idle_s']:g}`" in PAGE
    assert (defaults["start"], defaults["pause_s"]) == ("0", 1.0)
