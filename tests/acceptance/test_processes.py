"""The runner with small real processes: what it shows, starts again, stops in which order, and never leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from servers import ROOT, alive, wait_until

from worker.errors import ConfigurationError
from worker.processes import Command, check_ports, listening, printer, read_procfile
from worker.store import LOOPBACK, free_port

RUNNER = """
import json, os, sys
from functools import partial
from pathlib import Path
from worker.processes import Command, Runner
from worker.store import EmbeddedStore

spec = json.loads(sys.argv[1])
commands = [
    Command(name, (sys.executable, "-c", code) if " " in code or chr(10) in code else (code,), dict(os.environ),
            stage=stage, ready=Path(spec["ready"]).exists if stage else (lambda: True))
    for name, code, stage in spec["commands"]
]
def run(**more):
    return Runner(commands, grace_s=spec["grace_s"], **more).run(spec["for_s"])
if spec["data_dir"]:
    with EmbeddedStore(Path(spec["data_dir"])) as store:
        print("store", store.pid, flush=True)
        sys.exit(run(heal=store.heal))
sys.exit(run())
"""

#: Says what it is, then each SIGTERM that it gets, and ends after the first one.
OBEDIENT = """
import os, signal, sys
def told(*_):
    print("told", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, told)
print("pid", os.getpid(), flush=True)
while True: signal.pause()
"""

STUBBORN = OBEDIENT.replace("sys.exit()", "pass")


class Up:
    """A runner in a process of its own, and all that it printed."""

    def __init__(self, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.log = log
        self.process = process

    def text(self) -> str:
        return self.log.read_text()

    def until(self, pattern: str, timeout: float = 15.0) -> re.Match[str]:
        wait_until(lambda: re.search(pattern, self.text()), timeout, f"{pattern!r} in the output")
        found = re.search(pattern, self.text())
        assert found
        return found

    def pid(self, name: str) -> int:
        return int(self.until(rf"(?m)^{name} +\| pid (\d+)$")[1])

    def ends(self, timeout: float = 15.0) -> int:
        return self.process.wait(timeout)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*commands: tuple[str, str] | tuple[str, str, int], grace_s: float = 10.0, **more: Any) -> Up:
        spec = {"grace_s": grace_s, "for_s": None, "data_dir": None, "ready": "/", **more}
        spec["commands"] = [(name, code, *(stage or [0])) for name, code, *stage in commands]
        log = tmp_path / "up.log"
        with log.open("wb") as out:
            arguments = [sys.executable, "-c", RUNNER, json.dumps(spec)]
            started.append(subprocess.Popen(arguments, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
        return Up(log, started[-1])

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything_and_the_exit_is_clean(up: Callable[..., Up], number: signal.Signals) -> None:
    running = up(("beat", OBEDIENT), ("worker", OBEDIENT))
    pids = [running.pid("beat"), running.pid("worker")]
    running.process.send_signal(number)
    assert running.ends() == 0
    assert [pid for pid in pids if alive(pid)] == []
    assert "Traceback" not in running.text()


def test_after_the_time_it_stops_by_itself(up: Callable[..., Up]) -> None:
    running = up(("beat", OBEDIENT), for_s=0.5)
    assert running.ends() == 0
    assert "the time is over" in running.text()


def test_the_sandbox_starts_first_and_ends_after_all_others_have_ended(up: Callable[..., Up], tmp_path: Path) -> None:
    slow = OBEDIENT.replace("sys.exit()", "import time; time.sleep(0.3); print('ends', flush=True); sys.exit()")
    ready = tmp_path / "ready"
    slow = f"print('was it ready?', __import__('os').path.exists({str(ready)!r}))\n{slow}"
    running = up(("beat", slow), ("worker", slow), ("sandbox", OBEDIENT, 1), ready=str(ready))
    running.pid("sandbox")
    ready.touch()
    running.pid("beat"), running.pid("worker")
    assert re.findall(r"was it ready\? (\w+)", running.text()) == ["True", "True"]
    running.process.terminate()
    assert running.ends() == 0
    said = re.findall(r"(?m)^(\w+) +\| (told|ends)$", running.text())
    assert sorted(said[:4]) == [("beat", "ends"), ("beat", "told"), ("worker", "ends"), ("worker", "told")]
    assert {word for _, word in said[:2]} == {"told"}, "one waited for the other"
    assert said[4:] == [("sandbox", "told")]


def test_only_the_leader_is_told_and_only_once_yet_the_whole_group_ends(up: Callable[..., Up]) -> None:
    child = STUBBORN.replace('"told"', '"the child was told"').replace('"pid"', '"child"')
    leader = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n{OBEDIENT}"
    running = up(("worker", leader))
    grandchild = int(running.until(r"child (\d+)")[1])
    running.pid("worker")
    running.process.terminate()
    assert running.ends() == 0
    assert running.text().count("| told") == 1
    assert "the child was told" not in running.text()
    wait_until(lambda: not alive(grandchild))


def test_what_does_not_stop_within_the_grace_period_is_named_and_killed(up: Callable[..., Up]) -> None:
    running = up(("beat", OBEDIENT), ("worker", STUBBORN), grace_s=0.3)
    pids = [running.pid("beat"), running.pid("worker")]
    running.process.terminate()
    assert running.ends() == 1
    assert "still running after 0.3 s, killed: worker\n" in running.text()
    assert [pid for pid in pids if alive(pid)] == []


def test_a_second_signal_does_not_wait(up: Callable[..., Up]) -> None:
    running = up(("worker", STUBBORN), ("sandbox", STUBBORN, 1), grace_s=3600.0)
    pids = [running.pid("worker"), running.pid("sandbox")]
    running.process.send_signal(signal.SIGINT)
    running.until(r"worker +\| told")
    running.process.send_signal(signal.SIGINT)
    assert running.ends() == 1
    assert [pid for pid in pids if alive(pid)] == []


def test_a_process_that_ends_by_itself_is_started_again_after_a_growing_pause(up: Callable[..., Up]) -> None:
    running = up(("beat", "import time; print('at', time.monotonic()); raise SystemExit(7)"), ("worker", OBEDIENT))
    running.until(r"(?s)(\| at .*){3}")
    first, second, third = map(float, re.findall(r"\| at (\S+)", running.text())[:3])
    assert second - first >= 1
    assert third - second >= 2
    assert "up     | beat ended with status 7, starts again in 1 s\n" in running.text()
    assert "up     | beat ended with status 7, starts again in 2 s\n" in running.text()
    assert alive(running.pid("worker"))


def test_a_killed_process_is_started_again_and_leaves_none_of_its_group(up: Callable[..., Up]) -> None:
    child = OBEDIENT.replace('"pid"', '"child"')
    running = up(("beat", f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n{OBEDIENT}"))
    grandchild = int(running.until(r"child (\d+)")[1])
    os.kill(running.pid("beat"), signal.SIGKILL)
    running.until("beat was killed by SIGKILL, starts again in 1 s")
    wait_until(lambda: not alive(grandchild))
    running.until(r"(?s)\| pid .*\| pid ")


@pytest.mark.parametrize("wrong", ["import sys; sys.exit(2)", "no-such-command"])
def test_a_wrong_configuration_stops_everything(up: Callable[..., Up], wrong: str) -> None:
    running = up(("worker", OBEDIENT), ("beat", wrong))
    assert running.ends() == 2
    assert "beat ended with status 2, which is a wrong configuration: stopping" in running.text()


def test_a_killed_runner_leaves_no_process_and_no_store(up: Callable[..., Up], tmp_path: Path) -> None:
    running = up(("beat", OBEDIENT), ("worker", STUBBORN), ("sandbox", OBEDIENT, 1), data_dir=str(tmp_path / "data"))
    pids = [running.pid("beat"), running.pid("worker"), running.pid("sandbox")]
    pids.append(int(running.until(r"(?m)^store (\d+)$")[1]))
    running.process.kill()
    wait_until(lambda: not any(map(alive, pids)), what=f"the end of {pids}")


def test_the_store_is_healed_and_stops_last(up: Callable[..., Up], tmp_path: Path) -> None:
    url = tmp_path / "data" / "redis.url"
    wish = f"import redis; print('store', redis.Redis.from_url(open({str(url)!r}).read().strip()).ping()); sys.exit()"
    running = up(("beat", OBEDIENT.replace("sys.exit()", wish)), data_dir=str(tmp_path / "data"))
    running.pid("beat")
    os.kill(int(running.until(r"(?m)^store (\d+)$")[1]), signal.SIGKILL)
    running.until("up   | the server was killed by SIGKILL and was started again")
    running.process.terminate()
    assert running.ends() == 0
    assert "beat | store True" in running.text()


def test_every_line_bears_its_process_even_odd_ones(up: Callable[..., Up]) -> None:
    write = "import os; os.write(1, b'caf\\xe9\\n\\n' + b'x' * 200_000 + b'\\nno end'); import signal; signal.pause()"
    running = up(
        ("beat", write), ("flower", "import time; print('to stderr', file=__import__('sys').stderr); " + write)
    )
    wait_until(lambda: running.text().count("x") >= 400_000)
    running.process.terminate()
    assert running.ends() == 0
    lines = running.text().splitlines()
    assert all(re.match(r"(beat  |flower|up    ) \|", line) for line in lines)
    assert "flower | to stderr" in lines
    of_beat = [line for line in lines if line.startswith("beat")]
    assert of_beat[:2] == ["beat   | caf\N{REPLACEMENT CHARACTER}", "beat   | "]
    assert of_beat[-1] == "beat   | no end"


def test_children_find_the_commands_of_this_environment(up: Callable[..., Up]) -> None:
    running = up(("beat", "import os; print('first', os.environ['PATH'].split(':')[0])"))
    assert running.until(r"first (\S+)")[1] == str(Path(sys.executable).parent)


def test_a_terminal_cannot_reach_the_processes_themselves(up: Callable[..., Up]) -> None:
    worker = up(("worker", OBEDIENT)).pid("worker")
    assert os.getsid(worker) == worker


def test_a_busy_port_is_named_with_its_variable() -> None:
    port, twin = free_port(), free_port()
    wanted = {"BALANCES_FLOWER_PORT": port, "BALANCES_EXPORTER_PORT": twin, "BALANCES_WEBHOOK_PORT": twin}
    with socket.create_server((LOOPBACK, port)), pytest.raises(ConfigurationError) as refused:
        check_ports(LOOPBACK, wanted)
    flower, exporter, webhook = map(str, refused.value.problems)
    assert flower == (
        f"BALANCES_FLOWER_PORT: port {port} on 127.0.0.1: Address already in use; "
        "free it, or set BALANCES_FLOWER_PORT to another"
    )
    assert "the same as BALANCES_WEBHOOK_PORT" in exporter
    assert "the same as BALANCES_EXPORTER_PORT" in webhook
    check_ports(LOOPBACK, {"BALANCES_FLOWER_PORT": port})


def test_listening_tells_whether_somebody_answers() -> None:
    port = free_port()
    assert not listening(LOOPBACK, port)
    with socket.create_server((LOOPBACK, port)):
        assert listening(LOOPBACK, port)


def test_the_procfile_is_read_without_a_shell_and_runs_where_it_stands() -> None:
    commands = read_procfile(ROOT / "Procfile", {"A": "b"})
    assert commands[0] == Command(
        "beat", ["celery", "-A", "worker", "-q", "beat", "--loglevel", "INFO"], {"A": "b"}, ROOT
    )
    assert [command.name for command in commands] == ["beat", "worker", "settler", "webhook", "flower", "exporter"]


def test_a_line_that_is_no_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text("# fine\n\nbeat: celery beat\nworker celery\n")
    with pytest.raises(ConfigurationError, match="Procfile, line 4"):
        read_procfile(tmp_path / "Procfile", {})


def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, terminal = StringIO(), StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    for out in (plain, terminal):
        printer(["up", "beat"], out)("up", "hello")
    assert plain.getvalue() == "up   | hello\n"
    assert terminal.getvalue() == "\x1b[36mup   |\x1b[0m hello\n"
