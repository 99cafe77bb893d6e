"""Run everything on one machine: the server and the sandbox where none is configured, and the Procfile's processes.

settings, accounts, secrets, ports ─▶ store ─▶ sandbox ─▶ beat, worker, flower ─▶ (a signal, or --for) ─▶ backwards
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from worker import ops
from worker.accounts import Accounts, load_accounts
from worker.credentials import CredentialStore
from worker.errors import ConfigurationError, Problem
from worker.processes import Command, Runner, check_ports, listening, read_procfile
from worker.sandbox import sandbox_secrets
from worker.settings import Settings
from worker.store import EmbeddedStore
from worker.timetable import Timetable, connect

ROOT = Path(__file__).resolve().parent.parent
#: A worker leaves by itself at the end of its grace period; only what is left some seconds later is killed.
MARGIN_S = 5.0
#: Tests may move the clock; anything else that finds it moved must not start.
TEST_CLOCK = "BALANCES_TEST_CLOCK"


class Machine:
    """What `up` runs, checked before anything starts. Raises `ConfigurationError` with every mistake found."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.env = _environment(settings, environ)
        self.accounts: Accounts = load_accounts(
            settings.accounts_path, callback_configured=settings.callback_url is not None
        )
        self._check_secrets()
        check_ports(settings.host, self._ports())

    def run(
        self, for_s: float | None, on_line: Callable[[str, str], None], summary: Callable[[Timetable], None]
    ) -> int:
        """Runs until a signal or `for_s` is over; `summary` sees the timetable before the server stops."""
        with self._store() as (url, heal):
            client = connect(url)
            self._check_server(list(ops.check_server(client)))
            env = {**self.env, "BALANCES_REDIS_URL": url}
            grace_s = self.settings.grace.total_seconds() + MARGIN_S
            status = Runner(self._commands(env), grace_s=grace_s, on_line=on_line, heal=heal).run(for_s)
            summary(Timetable(client, stream=self.settings.stream))
            return status

    @contextmanager
    def _store(self) -> Iterator[tuple[str, Callable[[], str | None]]]:
        if self.settings.redis_url is not None:
            yield self.settings.redis_url.get_secret_value(), lambda: None
            return
        with EmbeddedStore(self.settings.data_dir) as store:
            yield store.url, store.heal

    def _commands(self, env: Mapping[str, str]) -> list[Command]:
        commands = read_procfile(ROOT / "Procfile", env)
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
        }
        if self.settings.is_sandbox:
            ports["BALANCES_SANDBOX_PORT"] = self.settings.sandbox_port
        return ports

    def _check_secrets(self) -> None:
        used = {definition.login for definition in self.accounts.definitions.values()}
        schemes = {login: self.accounts.logins[login].scheme for login in used}
        problems = CredentialStore(self.env, self.settings.secrets_dir).problems(schemes)
        if problems:
            raise ConfigurationError(problems)

    def _check_server(self, findings: list[ops.Finding]) -> None:
        """An append-only file that is off is warned about by `check`; the rest is no base to start on."""
        is_test = TEST_CLOCK in self.env
        wrong = [
            Problem(f"BALANCES_REDIS_URL: {finding.name}", finding.detail, "see: balances check")
            for finding in findings
            if not finding.is_right and finding.name != "persistence" and not (finding.name == "clock" and is_test)
        ]
        if wrong:
            raise ConfigurationError(wrong)


def _environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """What the processes get: everything that was found out here, so that they cannot find another answer."""
    env = {
        **environ,
        "BALANCES_ACCOUNTS": str(settings.accounts_path.absolute()),
        "BALANCES_DATA_DIR": str(settings.data_dir.absolute()),
        "BALANCES_KHIPU_URL": settings.khipu_url,
    }
    env.pop("BALANCES_REDIS_URL_FILE", None)
    if settings.secrets_dir is not None:
        env["BALANCES_SECRETS_DIR"] = str(settings.secrets_dir.absolute())
    return {**env, **sandbox_secrets()} if settings.is_sandbox else env


def readable(line: str) -> str:
    """A process's JSON log line as a person reads it; any other line as it is."""
    try:
        entry = json.loads(line)
        event = entry.pop("event")
    except (ValueError, AttributeError, KeyError):
        return line
    for name in ("timestamp", "level", "login", "account", "operation"):
        entry.pop(name, None)
    told = " ".join(f"{name}={value}" for name, value in entry.items() if value not in (None, "", []))
    return f"{event} {told}".rstrip()


def is_terminal() -> bool:
    """Whether a person watches."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
