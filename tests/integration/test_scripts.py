"""Scripts on connections of their own: whose reply is whose, whatever breaks."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest
import redis
from redis.sentinel import Sentinel
from servers import ValkeyServer

from worker import scripts
from worker.scripts import LANES, Scripts
from worker.store import LOOPBACK
from worker.timetable import connect

TEXTS = {
    "echo": "return ARGV[1]",
    "write": "return redis.call('SET', 'written', ARGV[1]).ok",
    "fail": "return redis.error_reply('ERR wanted')",
    "slow": """
        local function now() local t = redis.call('TIME') return t[1] * 1000 + t[2] / 1000 end
        local ends = now() + 400
        while now() < ends do end
        return 'slow'""",
}


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "script_text", TEXTS.__getitem__)


@pytest.fixture
def client(valkey_server: ValkeyServer) -> Iterator[redis.Redis]:
    client = connect(valkey_server.url)
    yield client
    client.connection_pool.disconnect()


def lanes(client: redis.Redis) -> set[str]:
    """Connections on which a script was run last."""
    return {each["id"] for each in client.client_list() if each["cmd"].startswith("eval")}


def use_all(runs: Scripts) -> None:
    assert [runs.run("echo", lane) for lane in range(LANES)] == [str(lane) for lane in range(LANES)]


def test_a_script_that_the_server_does_not_know_is_brought_along(client: redis.Redis) -> None:
    runs = Scripts(client)
    for _ in range(2):
        client.script_flush()
        assert [runs.run("echo", "a"), runs.run("echo", "b")] == ["a", "b"]


def test_more_threads_than_lanes_get_their_own_replies(client: redis.Redis) -> None:
    runs, numbers = Scripts(client), [str(number) for number in range(40 * LANES)]
    with ThreadPoolExecutor(3 * LANES) as threads:
        assert list(threads.map(lambda number: runs.run("echo", number), numbers)) == numbers


def test_no_more_connections_are_made_than_there_are_lanes(client: redis.Redis) -> None:
    runs = Scripts(client)
    with ThreadPoolExecutor(3 * LANES) as threads:
        list(threads.map(lambda number: runs.run("echo", number), range(40 * LANES)))
    assert len(lanes(client)) == LANES


def test_a_connection_that_broke_meanwhile_is_made_anew(client: redis.Redis) -> None:
    runs = Scripts(client)
    use_all(runs)
    before = lanes(client)
    for connection in before:
        client.client_kill_filter(_id=connection)
    use_all(runs)
    assert len(lanes(client) - before) == LANES


def test_an_error_leaves_the_connection_as_it_is(client: redis.Redis) -> None:
    runs = Scripts(client)
    use_all(runs)
    before = lanes(client)
    for _ in range(LANES):
        with pytest.raises(redis.ResponseError, match="wanted"):
            runs.run("fail")
    assert lanes(client) == before


class Interrupted(BaseException):
    """As a signal's handler may raise anywhere."""


def test_a_reply_that_nobody_waited_for_is_nobodys(client: redis.Redis) -> None:
    runs = Scripts(client)

    def interrupt(_: int, __: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(3):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupted):
                runs.run("slow")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    use_all(runs)
    use_all(runs)


FORK = """
import os, sys
from worker import scripts
from worker.timetable import connect

def use_all():
    for lane in range(scripts.LANES):
        assert runs.run("echo", lane) == str(lane)

def lanes():
    return {each["id"] for each in connect(sys.argv[1]).client_list() if each["cmd"].startswith("eval")}

scripts.script_text = lambda name: "return ARGV[1]"
runs = scripts.Scripts(connect(sys.argv[1]))
use_all()
parents = lanes()
child = os.fork()
if not child:
    use_all()
    os._exit(len(lanes() - parents))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == scripts.LANES
use_all()
assert lanes() == parents
"""


def test_a_child_makes_connections_of_its_own(valkey_server: ValkeyServer) -> None:
    run = subprocess.run([sys.executable, "-c", FORK, valkey_server.url], capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stderr) == (0, "")


def test_lanes_leave_half_of_a_small_pool_to_others(valkey_server: ValkeyServer) -> None:
    client = connect(f"{valkey_server.url}?max_connections=4")
    runs = Scripts(client)
    for number in range(3 * LANES):
        assert runs.run("echo", number) == str(number)
    assert len(lanes(client)) == 2
    client.connection_pool.disconnect()


def test_lanes_go_with_their_pool(valkey_server: ValkeyServer) -> None:
    runs = Scripts(connect(valkey_server.url))
    use_all(runs)
    pool = weakref.ref(runs._pool)
    runs._pool.disconnect()
    del runs
    gc.collect()
    assert pool() is None


def test_what_is_no_text_is_sent_as_its_bytes(client: redis.Redis) -> None:
    assert (
        Scripts(client).run("echo", b"acme\xff".decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
        == b"acme\xff"
    )


def test_after_a_failover_scripts_follow_the_sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Sentinel says is told here; the servers are real."""
    with ValkeyServer(made(tmp_path / "one")) as one, ValkeyServer(made(tmp_path / "two")) as two:
        master = [one]
        monkeypatch.setattr(Sentinel, "discover_master", lambda *_: (LOOPBACK, master[0].port))
        client = connect(f"sentinel://{LOOPBACK}:1/mymaster")
        runs = Scripts(client)
        use_all(runs)
        master[0] = two
        with one.client() as demoted:
            demoted.replicaof(LOOPBACK, two.port)
        assert [runs.run("write", number) for number in range(2 * LANES)] == ["OK"] * 2 * LANES
        master[0] = one
        with one.client() as promoted:
            promoted.replicaof("NO", "ONE")
        two.kill()
        assert [runs.run("write", number) for number in range(2 * LANES)] == ["OK"] * 2 * LANES
        client.connection_pool.disconnect()


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory
