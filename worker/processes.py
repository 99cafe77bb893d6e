"""Run the Procfile's processes on one machine until told to stop: their ports, output, restarts and order of stopping.

    start: sandbox → (answers) → beat, worker, flower …        stop: the same, backwards, and the store last of all

Knows nothing of what they do, and starts no store: that is around it.
"""

from __future__ import annotations

import math
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from worker.errors import ConfigurationError, Problem
from worker.store import described, port_problem, tethered

TICK_S = 0.1  #: how often due restarts and readiness are looked at; output, signals and deaths wake at once
LONGEST_PAUSE_S = 30.0
SETTLED_S = 60.0  #: alive for so long, a process has proved that it can start
PATIENCE_S = 15.0  #: between two remarks about what is waited for
LONGEST_LINE = 65_536
WRONG_CONFIGURATION = 2
COLOURS = (36, 33, 32, 35, 34, 31)


@dataclass(frozen=True, slots=True)
class Command:
    """One process to keep running. A higher `stage` is started earlier, and stopped later (the sandbox: 1).

    `env` is all of its environment. `ready` says whether what has a lower stage may start.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path | None = None
    stage: int = 0
    ready: Callable[[], bool] = lambda: True


def read_procfile(path: Path, env: Mapping[str, str]) -> list[Command]:
    """Return the commands of a Procfile, to run in its directory. Raises `ConfigurationError` naming the line."""
    try:
        text = path.read_text()
    except OSError as error:
        problem = Problem(str(path), f"cannot be read ({error.strerror})", "run it from a checkout")
        raise ConfigurationError([problem]) from error
    commands = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not (match := re.fullmatch(r"([\w-]+):\s*(\S.*)", line)):
            raise ConfigurationError([Problem(f"{path}, line {number}", "not a process", "write `name: command`")])
        commands.append(Command(match[1], shlex.split(match[2]), env, path.parent))
    return commands


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Raise `ConfigurationError` unless all ports, by the variable that sets them, can be listened on."""
    problems = []
    for variable, port in ports.items():
        twins = [name for name in ports if name != variable and ports[name] == port]
        if wrong := f"the same as {twins[0]}" if twins else port_problem(host, port):
            problems.append(
                Problem(variable, f"port {port} on {host}: {wrong}", f"free it, or set {variable} to another")
            )
    if problems:
        raise ConfigurationError(problems)


def listening(host: str, port: int) -> bool:
    """Return whether something accepts connections there."""
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def printer(names: Sequence[str], out: TextIO) -> Callable[[str, str], None]:
    """Return a function that writes a process's line as `name | line`, in colour on a terminal."""
    width = max(map(len, names))
    coloured = out.isatty() and "NO_COLOR" not in os.environ

    def show(name: str, line: str) -> None:
        prefix = f"{name:{width}} |"
        if coloured:
            prefix = f"\x1b[{COLOURS[names.index(name) % len(COLOURS)]}m{prefix}\x1b[0m"
        with suppress(OSError, ValueError):  # a lost terminal or a full disk must not stop the polling
            print(prefix, line, file=out, flush=True)

    return show


class _Child:
    """One command's process, its output, and when it is to be started next."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.due = -math.inf  #: monotonic; infinite while it runs
        self.settled = False
        self.output = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._failures = 0
        self._rest = b""

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def status(self) -> str:
        """For people: "running", "starts again in 4 s", "waits for others", "stopped"."""
        if self.running:
            return "running"
        if math.isinf(self.due):
            return "waits for others" if self.due < 0 else "stopped"
        return f"starts again in {max(0.0, self.due - time.monotonic()):.0f} s"

    def start(self) -> None:
        own = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), self.command.env.get("PATH", os.defpath)])}
        self.output, write = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - commands are the operator's own
                tethered(self.command.argv),
                cwd=self.command.cwd,
                env={"PYTHONUNBUFFERED": "1", **self.command.env, **own},
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for the runner, which knows the order
            )
        finally:
            os.close(write)
        os.set_blocking(self.output, False)
        self._started = time.monotonic()
        self.due = math.inf

    def lines(self, chunk: bytes) -> Iterator[str]:
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > LONGEST_LINE or not chunk:
            whole, self._rest = [*whole, self._rest], b""
        for line in whole:
            if line or chunk:
                yield line.decode(errors="replace").rstrip("\r")

    def signal(self, number: signal.Signals) -> None:
        """Tell the leader alone: a Celery worker that is told twice stops at once."""
        if self._process:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End the whole group. Before reaping only: until then nobody else can bear its number."""
        if self._process:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self, *, wait: bool = False) -> int | None:
        """Return how the process ended, after clearing away what it left; None where it runs."""
        if not self._process:
            return None
        options = os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)
        if os.waitid(os.P_PID, self._process.pid, options) is None:
            return None
        self.kill()
        status, self._process = self._process.wait(), None
        return status

    def postpone(self) -> float:
        """Put the next start off, longer each time unless it had settled; return for how long, in seconds."""
        alive = time.monotonic() - self._started >= SETTLED_S
        self.settled = self.settled or alive
        self._failures = 0 if alive else self._failures
        pause: float = min(2.0**self._failures, LONGEST_PAUSE_S)
        self._failures += 1
        self.due = time.monotonic() + pause
        return pause


class Runner:
    """Keeps commands running. `heal` is called at every turn, to mend what is around, and returns what to tell.

    `on_line` gets a process's name and a line of its output; the runner's own lines are those of `up`.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        *,
        grace_s: float,
        on_line: Callable[[str, str], None] | None = None,
        heal: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._children = [_Child(command) for command in sorted(commands, key=lambda command: -command.stage)]
        self._grace_s = grace_s
        self._on_line = on_line or printer(["up", *(command.name for command in commands)], sys.stdout)
        self._heal = heal
        self._selector = selectors.DefaultSelector()
        self._remark_at = math.inf

    def statuses(self) -> dict[str, str]:
        """Each process's name and how it is, for people; from any thread."""
        return {child.command.name: child.status for child in self._children}

    def run(self, for_s: float | None = None) -> int:
        """Run until a signal comes or the time is over; only on the main thread.

        Returns 0 when all stopped by themselves, 1 when something had to be killed, 2 when a process found its
        configuration wrong.
        """
        until = time.monotonic() + (math.inf if for_s is None else for_s)
        self._remark_at = time.monotonic() + PATIENCE_S
        with _signals() as wake, self._selector:
            self._selector.register(wake, selectors.EVENT_READ)
            try:
                return self._keep_running(until) or self._stop()
            finally:
                self._end_at_once(self._children)

    def _keep_running(self, until: float) -> int:
        while time.monotonic() < until:
            self._start_due()
            if told := self._heal():
                self._say(told)
            if name := self._watch(min(TICK_S, max(0.0, until - time.monotonic()))):
                self._say(f"{name}: stopping")
                return 0
            for child in self._children:
                if (status := self._reap(child)) is not None and not self._bear(child, status):
                    self._stop()
                    return WRONG_CONFIGURATION
        self._say("the time is over: stopping")
        return 0

    def _start_due(self) -> None:
        for child in self._children:
            if child.due > time.monotonic():
                continue
            above = [other for other in self._children if other.command.stage > child.command.stage]
            if late := [other.command.name for other in above if not (other.running and other.command.ready())]:
                self._remark(late)
                return
            child.start()
            self._selector.register(child.output, selectors.EVENT_READ, child)

    def _remark(self, late: Sequence[str]) -> None:
        if time.monotonic() > self._remark_at:
            self._remark_at = time.monotonic() + PATIENCE_S
            self._say(f"waiting for {', '.join(late)} to be ready")

    def _watch(self, timeout_s: float) -> str | None:
        """Pass output on until something happens; return the name of a signal that asks to stop."""
        asked = None
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Child):
                self._read(key.data)
            elif isinstance(key.fileobj, socket.socket):
                numbers = set(key.fileobj.recv(64)) - {signal.SIGCHLD}
                asked = signal.Signals(min(numbers)).name if numbers else asked
        return asked

    def _read(self, child: _Child) -> bool:
        try:
            chunk = os.read(child.output, LONGEST_LINE)
        except BlockingIOError:
            return False
        for line in child.lines(chunk):
            self._on_line(child.command.name, line)
        if not chunk:
            self._close(child)
        return bool(chunk)

    def _close(self, child: _Child) -> None:
        if child.output >= 0:
            self._selector.unregister(child.output)
            os.close(child.output)
            child.output = -1

    def _reap(self, child: _Child, *, wait: bool = False) -> int | None:
        status = child.reap(wait=wait)
        if status is not None:
            while child.output >= 0 and self._read(child):
                pass
            self._close(child)  # where something in another session holds on to it
        return status

    def _bear(self, child: _Child, status: int) -> bool:
        """Put the next start of a process that ended by itself off; return False where that has no use."""
        name, end, pause = child.command.name, described(status), child.postpone()
        if status == WRONG_CONFIGURATION and not child.settled:
            self._say(f"{name} {end}, which is a wrong configuration: stopping")
            return False
        self._say(f"{name} {end}, starts again in {pause:g} s")
        return True

    def _stop(self) -> int:
        """Stop stage by stage; return 1 where something had to be killed."""
        killed = False
        for stage in sorted({child.command.stage for child in self._children}):
            killed |= self._stop_stage([child for child in self._children if child.command.stage == stage])
        return int(killed)

    def _stop_stage(self, children: Sequence[_Child]) -> bool:
        for child in reversed(children):
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        while any(child.running for child in children) and time.monotonic() < deadline:
            if name := self._watch(min(TICK_S, max(0.0, deadline - time.monotonic()))):
                self._say(f"{name} again: killing")
                self._grace_s = deadline = 0.0
            for child in children:
                self._reap(child)
        left = [child for child in children if child.running]
        if left and self._grace_s:
            self._say(f"still running after {self._grace_s:g} s, killed: {', '.join(c.command.name for c in left)}")
        self._end_at_once(left)
        return bool(left)

    def _end_at_once(self, children: Sequence[_Child]) -> None:
        for child in children:
            child.kill()
        for child in children:
            self._reap(child, wait=True)

    def _say(self, text: str) -> None:
        for line in text.splitlines():
            self._on_line("up", line)


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """Yield a socket that receives the number of every signal; a hang-up only where it is not ignored (`nohup`)."""
    wake, write = socket.socketpair()
    write.setblocking(False)
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.add(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    try:
        with wake, write:
            yield wake
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
