"""The embedded server: who may use it, what it keeps, and what is left when things die."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from jsonschema_rs import ValidationError
from servers import ROOT, ValkeyServer, alive, wait_until

from worker import store as store_module
from worker.errors import ConfigurationError, StoreUnavailable
from worker.store import LOOPBACK, EmbeddedStore, free_port, port_problem, server_binary, tethered

PARENT = """
import sys
from collections.abc import Sequence
from pathlib import Path
from worker.store import EmbeddedStore
store = EmbeddedStore(Path(sys.argv[1]))
store.start()
print(store.pid, flush=True)
sys.stdin.read()
"""


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, decode_responses=True)


def port_of(server: EmbeddedStore) -> int:
    return urlsplit(server.url).port or 0


def killed(server: EmbeddedStore) -> int:
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def test_it_answers_with_the_password_of_the_url_and_to_nobody_else(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "data") as server:
        with client(server.url) as owner:
            assert owner.ping()
        with client(f"redis://{server.url.split('@')[1]}") as stranger, pytest.raises(redis.AuthenticationError):
            stranger.get("anything")


def test_the_url_and_all_it_keeps_are_for_the_owner_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with EmbeddedStore(data) as server, client(server.url) as owner:
        owner.set("key", "value")
        assert (data / "redis.url").read_text() == server.url + "\n"
        paths = [data, *data.rglob("*")]
        assert {path.name for path in paths} >= {"redis.url", "store.lock", "appendonlydir"}
        assert [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077 and path.name != "store.log"] == []


def test_the_password_stands_in_no_command_line_and_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def seen(argv: Sequence[str]) -> list[str]:
        commands.extend(argv)
        return tethered(argv)

    monkeypatch.setattr(store_module, "tethered", seen)
    with EmbeddedStore(tmp_path) as server:
        password = urlsplit(server.url).password
        assert password
        assert commands
        assert password not in " ".join(commands)
        assert password not in Path(f"/proc/{server.pid}/environ").read_text()
        assert password not in (tmp_path / "store.log").read_text()


def test_it_runs_with_our_configuration(tmp_path: Path) -> None:
    wanted = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "bind": LOOPBACK, "protected-mode": "yes"}
    with EmbeddedStore(tmp_path) as server, client(server.url) as owner:
        found = owner.config_get(*wanted, "maxmemory-policy")
    assert found == {**wanted, "maxmemory-policy": "noeviction"}


def test_what_was_written_survives_a_sigkill_and_a_new_start_at_the_same_address(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as first, client(first.url) as owner:
        owner.set("poll", "17")
        killed(first)
    with EmbeddedStore(tmp_path) as second, client(second.url) as owner:
        assert second.url == first.url
        assert owner.get("poll") == "17"


def test_a_busy_port_is_exchanged_for_another_under_the_same_password(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as first:
        pass
    with socket.create_server((LOOPBACK, port_of(first))), EmbeddedStore(tmp_path) as second:
        assert port_of(second) != port_of(first)
        assert second.url.split("@")[0] == first.url.split("@")[0]


def test_a_damaged_address_file_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "redis.url").write_text('redis://:"\nport 1"@127.0.0.1:20000/0')
    with EmbeddedStore(tmp_path) as server, client(server.url) as owner:
        assert owner.ping()


def test_a_second_start_on_the_same_directory_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOCK_WITHIN_S", 0.05)
    with EmbeddedStore(tmp_path) as first:
        with pytest.raises(StoreUnavailable, match="in use by another"):
            EmbeddedStore(tmp_path).start()
        with client(first.url) as owner:
            assert owner.ping()


def test_the_directory_stays_locked_as_long_as_its_server_lives(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as server:
        assert tmp_path / "store.lock" in [fd.readlink() for fd in Path(f"/proc/{server.pid}/fd").iterdir()]


def test_a_directory_that_cannot_be_used_is_a_wrong_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="BALANCES_DATA_DIR"):
        EmbeddedStore(tmp_path / "file").start()


def test_a_server_that_does_not_start_shows_its_last_lines_and_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "valkey.conf"
    wrong.write_text("no-such-directive yes\n")
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "CONFIG", wrong)
        with pytest.raises(StoreUnavailable, match=r"(?s)ended with status 1.*no-such-directive"):
            EmbeddedStore(tmp_path / "data").start()
    with EmbeddedStore(tmp_path / "data") as server:
        assert server.url


def test_a_server_that_died_is_healed_at_the_same_address(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as server, client(server.url) as owner:
        assert server.heal() is None
        owner.set("poll", "17")
        before = killed(server)
        assert "killed by SIGKILL and was started again" in str(server.heal())
        assert server.pid != before
        assert owner.get("poll") == "17"


def test_a_server_that_cannot_be_healed_says_so_and_waits_before_it_tries_again(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as server:
        killed(server)
        with socket.create_server((LOOPBACK, port_of(server))):
            assert "does not start" in str(server.heal())
            assert server.heal() is None


def test_stopping_ends_the_server_and_may_be_repeated(tmp_path: Path) -> None:
    server = EmbeddedStore(tmp_path)
    server.start()
    pid = server.pid
    assert pid is not None
    server.stop()
    server.stop()
    assert not alive(pid)


def test_a_killed_parent_leaves_no_server_and_its_directory_can_be_used_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    with EmbeddedStore(tmp_path) as successor, client(successor.url) as owner:
        assert owner.ping()
    wait_until(lambda: not alive(pid))


def test_without_a_binary_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(StoreUnavailable, match=r"pdp11.*BALANCES_REDIS_URL"):
        server_binary()


def test_a_port_is_free_until_somebody_listens() -> None:
    port = free_port()
    assert port_problem(LOOPBACK, port) is None
    with socket.create_server((LOOPBACK, port)):
        assert port_problem(LOOPBACK, port) == "Address already in use"


def test_a_tethered_process_ignores_no_signal_that_it_would_not_ignore_otherwise() -> None:
    status = subprocess.run(tethered(["cat", "/proc/self/status"]), capture_output=True, text=True, check=True).stdout
    ignored = int(status.split("SigIgn:")[1].split()[0], 16)
    assert not ignored & 1 << signal.SIGPIPE - 1


def test_the_server_for_tests_keeps_its_address_over_a_kill(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path, appendonly="yes") as server, server.client() as owner:
        owner.set("poll", "17")
        server.kill()
        server.start()
        assert owner.get("poll") == "17"


@pytest.mark.parametrize("is_killed", [False, True])
def test_an_entry_that_breaks_its_schema_fails_whatever_test_published_it(tmp_path: Path, is_killed: bool) -> None:
    with pytest.raises(ValidationError):
        publish_nonsense(tmp_path, is_killed)


def publish_nonsense(directory: Path, is_killed: bool) -> None:
    with ValkeyServer(directory) as server, server.client() as owner:
        owner.xadd("balances", {"type": "balance.observed.v1", "data": "{}"})
        if is_killed:
            server.kill()


@pytest.mark.parametrize("turn", [1, 2])
def test_the_store_fixture_starts_empty(store: redis.Redis, turn: int) -> None:
    assert store.dbsize() == 0
    store.set("left", turn)
