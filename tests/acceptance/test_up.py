"""`balances up` as a newcomer runs it: real processes, signals, deaths; what it refuses; what it shows, and leaves.

Every process of a run has the run's data directory in its environment: that is how orphans are found.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from termios import TIOCSWINSZ

import pytest
import redis
from rich.console import Console
from servers import ROOT, ValkeyServer, wait_until
from world import World, accounts_file, read

from worker import live
from worker.live import Screen, Watch
from worker.store import LOOPBACK, free_port
from worker.up import readable

BALANCES = str(Path(sys.executable).parent / "balances")
COUNT = (ROOT / "config" / "sandbox.toml").read_text().count("[[accounts]]")


def environment(directory: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BALANCES_", "NO_COLOR"))}
    ports = {f"BALANCES_{name}_PORT": str(free_port()) for name in ("FLOWER", "SANDBOX", "WEBHOOK", "EXPORTER")}
    mine = {"BALANCES_DATA_DIR": str(directory / "data"), "COLUMNS": "80", "TERM": "xterm", "TZ": "UTC"}
    return {**inherited, **ports, **mine, **more}


def processes_of(env: dict[str, str]) -> dict[int, str]:
    """Every process of this run: pid → command. The server writes its title over its environment."""
    directory = env["BALANCES_DATA_DIR"]
    mark = f"BALANCES_DATA_DIR={directory}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                is_server = str((entry / "cwd").readlink()) == directory
                if is_server or mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def process_of(env: dict[str, str], words: str) -> int:
    """The oldest process with these words in its command, no shim before its `exec`."""
    return min(pid for pid, command in processes_of(env).items() if words in command and "-c " not in command)


class Up:
    """A running `balances up` whose output goes to a file."""

    def __init__(self, directory: Path, *arguments: str, **more: str) -> None:
        self.env = environment(directory, **more)
        self.out = directory / "out.txt"
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [BALANCES, "up", *arguments], cwd=ROOT, env=self.env, stdout=out, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def until(self, pattern: str, timeout: float = 30.0) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            assert self.process.poll() is None or re.search(pattern, self.text()), self.text()
            return re.search(pattern, self.text())

        wait_until(found, timeout, f"{pattern!r} in\n{self.text()}")
        match = found()
        assert match
        return match

    def ends(self, status: int = 0, timeout: float = 20.0) -> str:
        """Waits for the end; checks the status, that nothing is left running, and that there is no traceback."""
        assert self.process.wait(timeout) == status, self.text()
        wait_until(lambda: not processes_of(self.env), 5, f"no orphan: {processes_of(self.env)}")
        assert "Traceback" not in self.text()
        return self.text()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str, **more: str) -> Up:
        started.append(Up(tmp_path, *arguments, **more))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        wait_until(lambda each=each: not processes_of(each.env))  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------ a whole life


def test_a_run_in_the_sandbox_heals_is_looked_at_and_leaves_nothing(up: Callable[..., Up]) -> None:
    running = up()
    running.until(r"This is the sandbox: a bank of our own making.*\nTo go live: copy config/accounts\.example\.toml")
    running.until(rf"Flower: http://127\.0\.0\.1:{running.env['BALANCES_FLOWER_PORT']}")
    running.until(rf"(?m)^beat +\| accounts applied  accounts={COUNT}")
    running.until(r"(?m)^worker +\| umbrella-savings    suspended  E401 DO_NOT_RETRY: The account does not exist  \d")
    rows = json.loads(balances(running, "accounts", "--json"))
    assert len(rows) == COUNT
    os.kill(process_of(running.env, "celery -A worker -q beat"), signal.SIGKILL)
    running.until(r"(?m)^up +\| beat was killed by SIGKILL, starts again in 1 s$")
    os.kill(process_of(running.env, "valkey-server"), signal.SIGKILL)
    running.until(r"(?m)^up +\| the server was killed by SIGKILL and was started again$")
    running.until(r"(?m)^worker +\| acme-payroll +settled    ok")
    running.process.terminate()
    text = running.ends()
    assert re.search(r"(?m)^up +\| SIGTERM: stopping$", text)
    assert re.search(r"(?m)^umbrella-savings    suspended  E401 +- +on redrive$", text)
    assert re.search(rf"(?m)^{COUNT} accounts: .*1 suspended", text)
    assert max(len(line) for line in text.splitlines() if line.startswith(("acme", "globex", "hooli"))) <= 80


def test_a_reader_that_leaves_stops_nothing(tmp_path: Path) -> None:
    env = environment(tmp_path)
    with subprocess.Popen(
        [BALANCES, "up"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert b"This is the sandbox" in running.stdout.readline()
        running.stdout.close()
        wait_until(lambda: any("-q worker" in command for command in processes_of(env).values()), 20)
        running.terminate()
        assert (running.stderr.read(), running.wait(20)) == (b"", 0)
    wait_until(lambda: not processes_of(env), 5)


def balances(running: Up, *arguments: str) -> str:
    command = [BALANCES, *arguments]
    return subprocess.run(command, cwd=ROOT, env=running.env, capture_output=True, text=True, check=True).stdout


def test_json_is_one_object_a_line_and_the_rows_at_the_end(up: Callable[..., Up]) -> None:
    running = up("--json")
    running.until("accounts applied")
    running.process.terminate()
    text = running.ends()
    head, bracket, tail = text.partition("\n[\n")
    assert all(set(json.loads(line)) == {"process", "line"} for line in head.splitlines())
    assert len(json.loads(bracket + tail)) == COUNT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_right_at_the_start_ends_it_quietly(up: Callable[..., Up], number: signal.Signals) -> None:
    running = up()
    running.until("This is the sandbox")
    running.process.send_signal(number)
    running.ends()


def test_a_second_signal_stops_at_once(up: Callable[..., Up]) -> None:
    running = up(BALANCES_GRACE="1h")
    running.until(r"worker +\| .* ready\.")
    worker = process_of(running.env, "-q worker")
    os.kill(worker, signal.SIGSTOP)
    running.process.send_signal(signal.SIGINT)
    running.until(r"up +\| SIGINT: stopping")
    running.process.send_signal(signal.SIGINT)
    assert re.search(r"up +\| SIGINT again: killing", running.ends(1))


# ------------------------------------------------------------------------------------------------- what it does not do


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """Accounts of one's own, with their secrets."""
    path = tmp_path / "accounts.toml"
    path.write_bytes(accounts_file("acme-operating"))
    return {
        "BALANCES_ACCOUNTS": str(path),
        "BALANCES_KHIPU_URL": f"http://{LOOPBACK}:1",
        "BALANCES_SECRET_ACME_API_KEY": "key",
        "BALANCES_SECRET_ACME_ACCOUNT_CREDENTIAL": '{"username": "u", "password": "p"}',
    }


def refused(directory: Path, *, mistakes: int = 1, **more: str) -> str:
    """What `up` says when it does not start: a line for each mistake, status 2, and nothing was started."""
    env = environment(directory, **more)
    command = [BALANCES, "up", "--for", "0"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == mistakes, result.stderr
    assert result.stderr.startswith("balances: ")
    assert " | " not in result.stdout
    assert not (Path(env["BALANCES_DATA_DIR"]) / "redis.url").exists()
    assert processes_of(env) == {}
    return result.stderr


@pytest.mark.parametrize("variable", ["BALANCES_FLOWER_PORT", "BALANCES_EXPORTER_PORT", "BALANCES_SANDBOX_PORT"])
def test_a_busy_port_is_named(tmp_path: Path, variable: str) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        said = refused(tmp_path, **{variable: str(port)})
    assert f"{variable}: port {port} on 127.0.0.1: Address already in use" in said


def test_a_missing_accounts_file_is_named(tmp_path: Path) -> None:
    said = refused(tmp_path, BALANCES_ACCOUNTS="/nowhere/accounts.toml")
    assert "/nowhere/accounts.toml: cannot be read (No such file or directory)" in said


def test_a_missing_secret_is_named(tmp_path: Path, own: dict[str, str]) -> None:
    del own["BALANCES_SECRET_ACME_API_KEY"]
    assert "BALANCES_SECRET_ACME_API_KEY" in refused(tmp_path, **own)


def test_a_secret_that_cannot_be_read_is_named_without_its_value(tmp_path: Path, own: dict[str, str]) -> None:
    said = refused(tmp_path, **{**own, "BALANCES_SECRET_ACME_ACCOUNT_CREDENTIAL": "hunter2"})
    assert "BALANCES_SECRET_ACME_ACCOUNT_CREDENTIAL" in said
    assert "hunter2" not in said


def test_flower_without_a_password_is_not_shown_to_others(tmp_path: Path) -> None:
    said = refused(tmp_path, BALANCES_HOST="0.0.0.0")  # noqa: S104 - what is refused
    assert "BALANCES_FLOWER_AUTH: is not set" in said


def test_mistakes_of_every_kind_come_at_once(tmp_path: Path, own: dict[str, str], valkey_server: ValkeyServer) -> None:
    del own["BALANCES_SECRET_ACME_API_KEY"]
    port = str(valkey_server.port)
    said = refused(tmp_path, mistakes=3, **own, BALANCES_HOST="0.0.0.0", BALANCES_EXPORTER_PORT=port)  # noqa: S104
    assert "BALANCES_SECRET_ACME_API_KEY" in said
    assert "BALANCES_FLOWER_AUTH: is not set" in said
    assert f"BALANCES_EXPORTER_PORT: port {port}" in said


def test_a_moved_clock_is_refused(tmp_path: Path, store: redis.Redis, valkey_server: ValkeyServer) -> None:
    store.set("clock:offset", 1)
    assert "clock:offset moves it" in refused(tmp_path, BALANCES_REDIS_URL=valkey_server.url)


def test_a_server_that_evicts_is_refused(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path, maxmemory_policy="allkeys-lru") as server:
        said = refused(tmp_path, BALANCES_REDIS_URL=server.url)
    assert "maxmemory-policy is allkeys-lru; it must be noeviction" in said


OLD = {"server": "redis_version:6.2.0\r\nredis_mode:standalone", "memory": "maxmemory_policy:noeviction"}


def test_a_server_that_is_too_old_is_refused(tmp_path: Path) -> None:
    """Imitated: no such server can be installed here. It answers INFO, and OK to whatever else."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        threading.Thread(target=imitate_old, args=(listener,), daemon=True).start()
        said = refused(tmp_path, BALANCES_REDIS_URL=f"redis://{LOOPBACK}:{listener.getsockname()[1]}/0")
    assert "redis 6.2.0; at least 7.2" in said


def imitate_old(listener: socket.socket) -> None:
    with suppress(OSError):
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            while header := lines.readline():
                words = [lines.read(int(lines.readline()[1:]) + 2).strip() for _ in range(int(header[1:]))]
                section = OLD.get(words[-1].decode().lower(), "aof_enabled:1")
                answers = {
                    b"INFO": f"${len(section)}\r\n{section}\r\n",
                    b"EXISTS": ":0\r\n",
                    b"HELLO": "%1\r\n+proto\r\n:3\r\n",
                }
                connection.sendall(answers.get(words[0].upper(), "+OK\r\n").encode())


def test_a_server_that_is_not_there_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path, BALANCES_REDIS_URL=f"redis://{LOOPBACK}:{free_port()}/0")
    assert "BALANCES_REDIS_URL: server: ConnectionError" in said


def test_a_second_up_on_the_same_data_is_refused_and_the_first_goes_on(up: Callable[..., Up], tmp_path: Path) -> None:
    running = up()
    running.until(r"accounts applied")
    env = environment(tmp_path)
    second = subprocess.run([BALANCES, "up"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert "is in use by another `balances up`" in second.stderr
    assert running.process.poll() is None
    running.process.terminate()
    running.ends()


# ---------------------------------------------------------------------------------------------------- the live view


class Terminal:
    """A process on a terminal of 80 columns and 30 lines."""

    def __init__(self, env: dict[str, str], *arguments: str) -> None:
        self.bytes = b""
        env = {name: value for name, value in env.items() if name != "COLUMNS"}
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(BALANCES, [BALANCES, *arguments], env)  # noqa: S606
        ioctl(self.fd, TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))

    def read(self) -> bool:
        """Whether there may be more."""
        if not select.select([self.fd], [], [], 0.05)[0]:
            return True
        with suppress(OSError):  # Linux's end of a terminal
            chunk = os.read(self.fd, 65536)
            self.bytes += chunk
            return bool(chunk)
        return False

    @property
    def text(self) -> str:
        return self.bytes.decode(errors="replace")

    def until(self, pattern: str, timeout: float = 30.0) -> None:
        wait_until(lambda: not self.read() or re.search(pattern, self.text), timeout, repr(pattern))
        assert re.search(pattern, self.text), self.text

    def ends(self) -> int:
        wait_until(lambda: not self.read(), 30, self.text)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_on_a_terminal_there_is_a_live_view_and_ctrl_c_gives_the_terminal_back(tmp_path: Path) -> None:
    env = environment(tmp_path)
    terminal = Terminal(env, "up")
    try:
        for pattern in (
            r"\x1b\[\?1049h",  # the other screen
            "This is the sandbox",
            r"running: .*beat worker",
            r"umbrella-savings +\x1b\[31msuspended",
            r"dead letters: .*2 do-not-retry",
            r"last minute: [1-9]\d* balances",
        ):
            terminal.until(pattern)
        os.kill(process_of(env, "flower"), signal.SIGKILL)
        terminal.until("flower was killed by SIGKILL, starts again in 1 s")
        os.write(terminal.fd, b"\x03")
        assert terminal.ends() == 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(terminal.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(env), 5, "no orphan")
    _, _, after = terminal.text.rpartition("\x1b[?1049l")
    log = tmp_path / "data" / "up.log"
    assert f"{COUNT} accounts" in after
    assert f"What the processes said: {log}" in after.replace("\r\n", "")
    assert "Traceback" not in terminal.text
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    said = log.read_text()
    assert '"event": "accounts applied"' in said
    assert "up | flower was killed by SIGKILL, starts again in 1 s\n" in said
    assert "Traceback" not in said


@pytest.fixture
def world(store: redis.Redis) -> World:
    return World(store)


def test_a_watch_looks_at_some_accounts_at_a_time_and_counts_what_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOOKED_AT", 2)
    world.apply(read("a", "b", "c"))
    watch = Watch(world.timetable)
    watch.look()
    assert sorted(watch.rows) == ["a", "b"]
    watch.look()
    assert sorted(watch.rows) == ["a", "b", "c"]
    assert watch.round_s == 1.5
    world.settle(world.start("a"))
    world.suspend(world.start("b").token)
    begun = world.start("c")
    for _ in range(2):
        watch.look()
    assert watch.rates == (1, 1)
    assert watch.letters == {"balances.dead.do-not-retry": 1}
    world.block(begun.token)
    for _ in range(2):
        watch.look()
    assert watch.rates == (1, 2)
    world.apply(read("a", "b"))
    for _ in range(2):
        watch.look()
    assert {alias: row.state for alias, row in watch.rows.items()} == {"a": "blocked", "b": "blocked"}
    assert watch.letters == {"balances.dead.do-not-retry": 2}


def test_a_screen_has_room_for_the_worst_and_says_how_many_more_there_are(world: World, tmp_path: Path) -> None:
    world.apply(read(*(f"account-{number:02}" for number in range(50))))
    world.suspend(world.start("account-49").token)
    console = Console(file=StringIO(), width=80, height=24, force_terminal=True)
    screen = Screen(console, ["header"], tmp_path / "up.log")
    watch = Watch(world.timetable)
    screen._look(watch)
    screen._newest = "worker ended with status 1"
    console.print(screen._screen(watch, {"beat": "running", "worker": "starts again in 4 s"}))
    assert isinstance(console.file, StringIO)
    lines = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()
    assert len(lines) <= 24
    assert lines[1] == "50 accounts: 1 suspended, 49 scheduled"
    assert lines[6].startswith("account-49  acme   suspended")
    assert any(re.fullmatch(r"and \d\d more: balances accounts", line.rstrip()) for line in lines)
    assert lines[-1].startswith("worker ended with status 1")
    assert lines[-2].startswith("worker starts again in 4 s · running: beat")


def test_a_screen_says_that_the_server_is_away_and_goes_on(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=80, height=24)
    with ValkeyServer(tmp_path) as server, server.client() as client:
        watch, screen = Watch(World(client).timetable), Screen(console, ["header"], tmp_path / "up.log")
        screen._look(watch)
        server.kill()
        screen._look(watch)
        console.print(screen._screen(watch, {}))
        assert isinstance(console.file, StringIO)
        assert "Redis: ConnectionError; trying again" in console.file.getvalue()
        server.start()
        screen._look(watch)
        assert "no dead letters" in "".join(text.plain for text in screen._pulse(watch))


def test_a_full_log_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOG_SIZE", 100)
    screen = Screen(Console(file=StringIO()), [], tmp_path / "up.log")
    screen._log = live.opened(tmp_path / "up.log")
    for number in range(100):
        screen.line("worker", f"line {number}")
    screen._log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["up.log", "up.log.1"]
    assert all(path.stat().st_size < 200 for path in tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- plain lines


def logged(event: str, **fields: object) -> str:
    return json.dumps({"timestamp": "2026-11-22T10:32:34Z", "level": "info", "event": event, **fields})


TASK = {"task": "acme-operating.1795343565418", "login": "acme", "account": "acme-operating", "attempt": 1}
LINES = [
    (
        logged("settled", operation="op", result="published", changed=True, drift=[], duration_s=0.251, **TASK),
        "acme-operating      settled    ok, changed  0.25 s",
    ),
    (
        logged("settled", operation="op", result="late", changed=False, drift=["Data.New"], duration_s=2, **TASK),
        "acme-operating      settled    ok, late  2.00 s  drift=['Data.New']",
    ),
    (
        logged(
            "failed",
            code="E201",
            type="RETRY_IMMEDIATELY",
            description="The bank did not answer.",
            decision="Retry",
            countdown_s=14600.0,
            drift=False,
            applied="Postponed",
            duration_s=0.5,
            **TASK,
        ),
        "acme-operating      waits      E201 RETRY_IMMEDIATELY: The bank did not answer; again in 4 h 3 min  0.50 s",
    ),
    (
        logged("failed", code="FOREIGN", type=None, description="", decision="DeadLetter", applied="suspended", **TASK),
        "acme-operating      suspended  FOREIGN",
    ),
    (
        logged("failed", code="E401", decision="DeadLetter", applied="NoneType", **TASK),
        "acme-operating      too late   E401",
    ),
    (logged("stale message ignored", **TASK), "acme-operating      stale message ignored"),
    (logged("accounts applied", accounts=14, changed=0), "accounts applied  accounts=14 changed=0"),
    (logged("unblocked with a new credential", login="acme"), "unblocked with a new credential  login=acme"),
    (logged("claimed", dispatched=2, resent=0), ""),
    (logged("warning", category="SecurityWarning", text="root", at=["a.py:1"]), "SecurityWarning: root"),
    (logged("claimed", dispatched=2, resent=1), "claimed  dispatched=2 resent=1"),
    ("[I 261122 10:32:34 command:177] Visit me at http://127.0.0.1:5555", "Visit me at http://127.0.0.1:5555"),
    ("  ", ""),
    ("Traceback (most recent call last):", "Traceback (most recent call last):"),
    ("[1, 2]", "[1, 2]"),
    ('{"no": "event"}', '{"no": "event"}'),
]


@pytest.mark.parametrize(("line", "words"), LINES, ids=[words[:40] for _, words in LINES])
def test_a_line_of_a_process_is_one_for_a_person(line: str, words: str) -> None:
    assert readable(line) == words
