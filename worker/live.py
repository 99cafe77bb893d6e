"""Show on a terminal what `up` runs: accounts by trouble, dead letters, rates and processes, about once a second.

    look: some hundred accounts a second, round and round ─▶ what is known of all ─▶ one screen ─▶ the terminal

It never reads everything at once: with many accounts a line is some seconds old, and the screen says how many.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from worker import ops, tables
from worker.errors import StoreUnavailable
from worker.ops import AccountRow
from worker.timetable import Timetable
from worker.up import readable

#: Between two screens.
REFRESH_S = 1.0
#: Accounts read for one screen: 10,000 are seen every 20 s, at 5 ms of the server's time a second.
LOOKED_AT = 500
#: What a rate counts back.
MINUTE_S = 60.0
#: Process messages on the screen.
MESSAGES = 5
#: Bytes of `up.log`; one older file of that size is kept.
LOG_SIZE = 64 * 1024 * 1024

IN_FLIGHT = frozenset({"dispatched", "polling", "awaiting"})


class Watch:
    """What is known of all accounts, from looking at some of them at a time."""

    def __init__(self, timetable: Timetable) -> None:
        self._timetable = timetable
        self._todo: deque[str] = deque()
        self._blocked: set[str] = set()
        self._ended: dict[str, tuple[int, int]] = {}
        self._polls: deque[tuple[float, bool]] = deque()  # when seen (monotonic), and whether it brought a balance
        self.rows: dict[str, AccountRow] = {}
        self.queues: dict[str, str] = {}  # alias → its letter's queue
        self.now = datetime.now(UTC)

    def look(self) -> None:
        """Looks at the next few hundred accounts. Raises `StoreUnavailable`."""
        now_ms = self._timetable.now_ms()
        if not self._todo:
            self._start_round()
        batch = [self._todo.popleft() for _ in range(min(LOOKED_AT, len(self._todo)))]
        for alias, fields in self._timetable.accounts(batch):
            if "definition" in fields:
                self._see(alias, fields, now_ms)
        self.now = tables.utc(now_ms)
        while self._polls and self._polls[0][0] < time.monotonic() - MINUTE_S:
            self._polls.popleft()

    def _start_round(self) -> None:
        self._blocked, self._is_paused = ops.blocked_logins(self._timetable), self._timetable.is_paused()
        self._todo.extend(ops.all_aliases(self._timetable))
        for alias in self.rows.keys() - set(self._todo):
            for known in (self.rows, self.queues, self._ended):
                known.pop(alias, None)

    def _see(self, alias: str, fields: dict[str, str], now_ms: int) -> None:
        is_blocked = fields["login"] in self._blocked
        row = self.rows[alias] = ops.account_row(alias, fields, is_blocked, now_ms, is_paused=self._is_paused)
        self.queues.pop(alias, None)
        if "queue" in fields:
            self.queues[alias] = fields["queue"]
        if fields["state"] not in IN_FLIGHT:
            token = row.poll, row.attempt
            if self._ended.get(alias, token) != token:
                self._polls.append((time.monotonic(), row.last_outcome == "ok"))
            self._ended[alias] = token

    @property
    def round_s(self) -> float:
        """How old the oldest line may be."""
        return len(self.rows) / LOOKED_AT * REFRESH_S

    @property
    def rates(self) -> tuple[int, int]:
        """Polls of the last minute: with a balance, and without."""
        fine = sum(is_fine for _, is_fine in self._polls)
        return fine, len(self._polls) - fine

    @property
    def letters(self) -> Counter[str]:
        """How many dead letters each queue holds; a blocked login has one."""
        counts = Counter(self.queues.values())
        counts["balances.dead.do-not-retry"] += len(self._blocked)
        return +counts


class Screen:
    """The live view of `up`. The processes' lines go to a file, and the newest of them onto the screen.

    `header`: lines to stand on top. A thread draws, so that a slow server or terminal holds nothing up.
    """

    def __init__(self, console: Console, header: Sequence[str], log: Path) -> None:
        self._console = console
        self._header = header
        self._path = log
        self._log: BinaryIO | None = None
        self._messages: deque[tuple[str, str]] = deque(maxlen=MESSAGES)
        self._newest = ""  # of the runner's own messages: a death must not scroll away under a busy worker's lines
        self._ending = threading.Event()
        self._away = ""

    def line(self, name: str, line: str) -> None:
        """Takes a process's line: all of it to the file, what a person reads onto the screen."""
        text = readable(line)
        if self._log is None:
            if text:
                self._console.print(f"{name}: {text}", markup=False, soft_wrap=True)
            return
        if name == "up":
            self._newest = text
        elif text.strip():
            self._messages.append((name, text))
        try:
            self._log.write(f"{name} | {line}\n".encode())
            if self._log.tell() > LOG_SIZE:
                self._log.close()
                self._log = opened(self._path)
        except OSError:  # a full disk must not stop the polling
            self._newest = f"{self._path} cannot be written"

    @contextmanager
    def showing(self, timetable: Timetable, statuses: Callable[[], dict[str, str]]) -> Iterator[None]:
        """Draws from a thread of its own until the block ends, and gives the terminal back as it was."""
        self._log = opened(self._path)
        watch = Watch(timetable)
        drawing = threading.Thread(target=self._draw, args=(watch, statuses), name="screen", daemon=True)
        drawing.start()
        try:
            yield
        finally:
            self._ending.set()
            drawing.join(timeout=10)
            self._log.close()
            self._log = None

    def summary(self, timetable: Timetable) -> None:
        """Shows all accounts as they were left, and where the processes' output is."""
        rows = ops.accounts(timetable)
        self._console.print(tables.accounts_table(rows, tables.utc(timetable.now_ms())), crop=False)
        self._console.print(tables.tally_rows(rows))
        self._console.print(f"What the processes said: {self._path}", soft_wrap=True)

    def _draw(self, watch: Watch, statuses: Callable[[], dict[str, str]]) -> None:
        live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        try:
            with live:
                while not self._ending.is_set():
                    self._look(watch)
                    live.update(self._screen(watch, statuses()), refresh=True)
                    self._ending.wait(REFRESH_S)
        except OSError:  # the terminal is gone; the polling goes on
            return

    def _look(self, watch: Watch) -> None:
        try:
            watch.look()
        except StoreUnavailable as error:
            self._away = f"{error}; trying again"
        else:
            self._away = ""

    def _screen(self, watch: Watch, statuses: dict[str, str]) -> RenderableType:
        head = [*map(Text, self._header), *self._pulse(watch), Text()]
        foot = [
            Text(),
            _processes(statuses),
            Text(self._newest, "yellow"),
            *(_message(name, text) for name, text in tuple(self._messages)),
        ]
        room = max(1, self._console.height - len(head) - len(foot) - 2)  # the table's heading, and "more"
        rows = tables.by_trouble(watch.rows.values())
        table = tables.accounts_table(rows[:room], watch.now)
        more = Text(f"and {len(rows) - room} more: balances accounts" if len(rows) > room else "", "dim")
        return Group(*map(_cut, head), table, more, *map(_cut, foot))

    def _pulse(self, watch: Watch) -> list[Text]:
        """How everything is, in three lines."""
        if self._away:
            return [Text(self._away, "bold red"), Text(), Text()]
        fine, failed = watch.rates
        rates = Text.assemble(f"last minute: {fine} balances, ", (f"{failed} failed", "red" if failed else "none"))
        if watch.round_s > REFRESH_S:
            rates.append(f" · every account is looked at every {watch.round_s:.0f} s", "dim")
        return [tables.tally_rows(watch.rows.values()), rates, _letters(watch)]


def _letters(watch: Watch) -> Text:
    told = [f"{count} {queue.removeprefix('balances.dead.')}" for queue, count in sorted(watch.letters.items())]
    return Text(f"dead letters: {', '.join(told)}", "red") if told else Text("no dead letters", "green")


def _processes(statuses: dict[str, str]) -> Text:
    """Those that do not run first: the line may be cut."""
    running = [name for name, status in statuses.items() if status == "running"]
    troubled = [f"{name} {status}" for name, status in statuses.items() if status != "running"]
    text = Text("".join(f"{each} · " for each in troubled), "yellow")
    return text.append(f"running: {' '.join(running) or 'none'}", "green" if running else "none")


def _message(name: str, text: str) -> Text:
    return Text.assemble((f"{name:<8} ", "dim"), text)


def _cut(text: Text) -> Text:
    """One line of the screen, however long."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def opened(path: Path) -> BinaryIO:
    """A new log for its owner only; the one before is kept as `.1`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(f"{path.name}.1"))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0)
