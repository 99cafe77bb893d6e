"""Run everything on one machine: the server and the sandbox where none is configured, and the Procfile's processes.

settings, accounts, secrets, ports ─▶ store ─▶ sandbox ─▶ beat, worker … ─▶ (a signal, or --for) ─▶ backwards
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from worker import tables
from worker.accounts import Accounts, load_accounts
from worker.credentials import CredentialStore
from worker.errors import ConfigurationError, Problem, StoreUnavailable, collected
from worker.processes import Command, Runner, check_ports, listening, read_procfile
from worker.sandbox import sandbox_secrets
from worker.server import REFUSED, Finding, check_server, problems_of
from worker.settings import Settings, is_loopback
from worker.store import EmbeddedStore
from worker.timetable import Timetable, connect

ROOT = Path(__file__).resolve().parent.parent
#: A worker leaves by itself at the end of its grace period; only what is left some seconds later is killed.
MARGIN_S = 5.0
#: Tests may move the clock; anything else that finds it moved must not start.
TEST_CLOCK = "BALANCES_TEST_CLOCK"


class View(Protocol):
    """How a person, or a program, sees what runs."""

    def line(self, name: str, line: str) -> None:
        """Shows a line of the process `name`; `up` is the runner itself."""

    def showing(self, timetable: Timetable, statuses: Callable[[], dict[str, str]]) -> AbstractContextManager[None]:
        """Shows more while the processes run: `statuses` is each process's name and how it is."""

    def summary(self, timetable: Timetable) -> None:
        """Shows how the accounts stand, when the processes have ended and the server has not."""


class Machine:
    """What `up` runs, checked before anything starts. Raises `ConfigurationError` with every mistake found."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.env = _environment(settings, environ)
        self._procfile = read_procfile(ROOT / "Procfile", self.env)
        problems: list[Problem] = []
        with collected(problems):
            self.accounts: Accounts = load_accounts(
                settings.accounts_path, callback_configured=settings.callback_url is not None
            )
            self._check_secrets()
        with collected(problems):
            self._check_flower()
        with collected(problems):
            check_ports(settings.host, self._ports())
        if problems:
            raise ConfigurationError(problems)

    @property
    def names(self) -> list[str]:
        """The names of the processes, the runner's own first."""
        return ["up", *(["sandbox"] if self.settings.is_sandbox else []), *(each.name for each in self._procfile)]

    @property
    def flower_url(self) -> str:
        """Where Flower is found."""
        return f"http://{self.settings.host}:{self.settings.flower_port}"

    @property
    def status_url(self) -> str:
        """Where the exporter shows how it goes."""
        return f"http://{self.settings.host}:{self.settings.exporter_port}"

    def run(self, for_s: float | None, view: View) -> int:
        """Runs until a signal or `for_s` is over. Returns the exit status; on the main thread only."""
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self._run(for_s, view)
        except KeyboardInterrupt:  # before the runner listens to signals, or after
            return 0
        finally:
            signal.signal(signal.SIGTERM, before)

    def _run(self, for_s: float | None, view: View) -> int:
        with self._store() as (url, heal):
            client = connect(url)
            self._check_server(check_server(client))
            env = {**self.env, "BALANCES_REDIS_URL": url}
            grace_s = self.settings.grace.total_seconds() + MARGIN_S
            runner = Runner(self._commands(env), grace_s=grace_s, on_line=view.line, heal=heal)
            timetable = Timetable(client, stream=self.settings.stream)
            with view.showing(timetable, runner.statuses):
                status = runner.run(for_s)
            try:
                view.summary(timetable)
            except StoreUnavailable as error:
                view.line("up", f"no summary: {error}")
            except OSError:  # nobody reads any more
                pass
            return status

    @contextmanager
    def _store(self) -> Iterator[tuple[str, Callable[[], str | None]]]:
        if self.settings.redis_url is not None:
            yield self.settings.redis_url.get_secret_value(), lambda: None
            return
        with EmbeddedStore(self.settings.data_dir) as store:
            yield store.url, store.heal

    def _commands(self, env: Mapping[str, str]) -> list[Command]:
        commands = [replace(command, env=env) for command in self._procfile]
        if self.settings.is_sandbox:
            port = self.settings.sandbox_port
            argv = [sys.executable, "-m", "worker.sandbox", "--port", str(port), "--quiet"]
            ready = partial(listening, "127.0.0.1", port)
            commands.append(Command("sandbox", argv, env, ROOT, stage=1, ready=ready))
        return commands

    def _ports(self) -> dict[str, int]:
        ports = {
            "BALANCES_FLOWER_PORT": self.settings.flower_port,
            "BALANCES_WEBHOOK_PORT": self.settings.webhook_port,
            "BALANCES_EXPORTER_PORT": self.settings.exporter_port,
        }
        if self.settings.is_sandbox:
            ports["BALANCES_SANDBOX_PORT"] = self.settings.sandbox_port
        return ports

    def _check_secrets(self) -> None:
        problems = CredentialStore(self.env, self.settings.secrets_dir).problems(self.accounts.schemes)
        if problems:
            raise ConfigurationError(problems)

    def _check_flower(self) -> None:
        if self.settings.flower_auth is None and not is_loopback(self.settings.host):
            wrong = f"is not set, and Flower on {self.settings.host} needs it"
            raise ConfigurationError([Problem("BALANCES_FLOWER_AUTH", wrong, "write user:password")])

    def _check_server(self, findings: Iterable[Finding]) -> None:
        """What the processes refuse, and a moved clock; of the rest they warn."""
        refused = REFUSED if TEST_CLOCK in self.env else REFUSED | {"clock"}
        if wrong := problems_of(finding for finding in findings if finding.name in refused):
            raise ConfigurationError(wrong)


def _environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """What the processes get: everything that was found out here, so that they cannot find another answer."""
    env = {
        **environ,
        "BALANCES_ACCOUNTS": str(settings.accounts_path.absolute()),
        "BALANCES_DATA_DIR": str(settings.data_dir.absolute()),
        "BALANCES_KHIPU_URL": settings.khipu_url,
        **({"BALANCES_CALLBACK_URL": settings.callback_url} if settings.callback_url else {}),
    }
    env.pop("BALANCES_REDIS_URL_FILE", None)
    if settings.secrets_dir is not None:
        env["BALANCES_SECRETS_DIR"] = str(settings.secrets_dir.absolute())
    return {**env, **sandbox_secrets()} if settings.is_sandbox else env


#: What Tornado and Celery put in front of a message.
_PREFIX = re.compile(r"\[[A-Z] \d{6} [\d:]{8} \w+:\d+\] ")
#: Fields of a log line that a person does not need, or sees elsewhere in the line.
_SILENT = {"timestamp", "level", "logger", "operation", "attempt", "decision", "applied", "queue", "credential"}


def readable(line: str) -> str:
    """A line of a process as a person reads it, "" for one that says nothing: JSON becomes words, an account first."""
    try:
        entry = json.loads(line)
        event = str(entry.pop("event"))
    except (ValueError, AttributeError, KeyError, TypeError):
        return _PREFIX.sub("", line).rstrip()
    if event == "warning":
        return f"{entry.get('category')}: {entry.get('text')}"
    alias = str(entry.pop("task", "")).partition(".")[0]
    if not alias:
        return "" if _is_routine(event, entry) else f"{event}{_pairs(entry)}"
    for name in ("account", "login"):
        entry.pop(name, None)
    words = _TOLD.get(event, _any_words)(event, entry)
    return f"{alias:<18}  {words}"


def _is_routine(event: str, entry: Mapping[str, Any]) -> bool:
    """Every second or so beat sends polls out; how each ends is the line that counts."""
    return event == "claimed" and not entry.get("resent")


def _settled_words(_: str, entry: dict[str, Any]) -> str:
    result, is_changed, duration = (entry.pop(name, None) for name in ("result", "changed", "duration_s"))
    said = ["ok", *(["changed"] if is_changed else []), *([str(result)] if result in {"late", "repeated"} else [])]
    return f"settled    {', '.join(said)}{_seconds(duration)}{_pairs(entry)}"


def _failed_words(_: str, entry: dict[str, Any]) -> str:
    code, kind, said = (entry.pop(name, None) for name in ("code", "type", "description"))
    duration, applied = entry.pop("duration_s", None), str(entry.get("applied", ""))
    step = {"Postponed": "waits", "NoneType": "too late"}.get(applied, applied)
    reason = " ".join(str(part) for part in (code, kind) if part) + (f": {said}" if said else "")
    countdown = entry.pop("countdown_s", None)
    again = f"; again in {tables.duration(round(countdown))}" if isinstance(countdown, int | float) else ""
    return f"{step:<9}  {reason.removesuffix('.')}{again}{_seconds(duration)}{_pairs(entry)}"


def _any_words(event: str, entry: dict[str, Any]) -> str:
    return f"{event}{_pairs(entry)}"


_TOLD = {"settled": _settled_words, "failed": _failed_words, "lapsed": _failed_words}


def _seconds(duration: object) -> str:
    return f"  {duration:.2f} s" if isinstance(duration, int | float) else ""


def _pairs(entry: Mapping[str, Any]) -> str:
    told = [
        f"{name}={value}"
        for name, value in entry.items()
        if name not in _SILENT and value is not False and value not in (None, "", [])
    ]
    return "  " + " ".join(told) if told else ""


def is_terminal() -> bool:
    """Whether a person watches."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
