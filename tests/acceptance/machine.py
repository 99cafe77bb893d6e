"""A whole deployment in processes of its own, to be killed, frozen and looked into; only Khipu is an imitation.

    Machine ──▶ Valkey with an append-only file, sandbox          start ──▶ beat, workers, each with a log of its own
       └─ kick, arm, move_clock, balances (the command line)      what happened ──▶ requests, entries, state, written

Every secret, account number and amount of a machine has a word in it that occurs nowhere else (`CANARIES`), so that a
leak can be searched for. Everything started here dies with the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from sandbox_client import JsonObject, SandboxClient, Step, log_on_of, running_sandbox
from servers import ROOT, ValkeyServer, wait_until

from worker.policy import DeadLetterQueue
from worker.store import tethered
from worker.timetable import Timetable

#: Seconds until a test gives up: for a machine with two cores that has other things to do as well.
PATIENCE_S = 30.0
STREAM = "balances"
INSTITUTION = "bancosecurity.cl"
WITH_TRAPS = Path(__file__).parent / "dying_worker.py"

#: Digits alone, because an amount must be a number; longer than a time in milliseconds.
AMOUNT = "271828182845904"
CANARIES = {
    "an account number": "NUMBER-CANARY",
    "an api key": "key-canary",
    "a user": "user-canary",
    "a password": "password-canary",
    "a token": "token-canary",
    "an amount": AMOUNT,
}
API_KEY = "key-canary-1"
RIGHT, WRONG = "password-canary-right", "password-canary-wrong"
OK = f"ok:{AMOUNT}"

#: Ladders and leases in seconds; the request's deadline leaves room for a machine that is busy with something else.
RETRY: Mapping[str, Any] = {"immediately": ["300ms", "600ms"], "transient": ["300ms", "600ms"], "wait": "6s"}
LIMITS: Mapping[str, Any] = {"request_deadline": "10s", "lease_margin": "3s"}
#: What the server has said, it has written: a SIGKILL of it excuses nothing. With `everysec` it keeps what it writes to
#: itself for up to two seconds while the disk is busy with the flush before.
DURABLE: Mapping[str, Any] = {"appendonly": "yes", "appendfsync": "always"}


@dataclass(frozen=True, slots=True)
class Account:
    """One account of the machine, with what the bank answers, step by step; on a login of its own unless told.

    Its own schedule polls it in some hundred days: no test may depend on the time of day.
    """

    alias: str
    steps: Sequence[Step] = (OK,)
    every: str = "300d"
    login: str = ""
    currency: str = "CLP"
    number: str = ""
    mode: str = ""
    institution: str = INSTITUTION

    def placed(self, index: int) -> Account:
        return replace(self, login=self.login or self.alias, number=self.number or f"NUMBER-CANARY-{index:04}")


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a machine, and all that it wrote."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_alive(self) -> bool:
        return self.popen.poll() is None

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def said(self, event: str, **fields: Any) -> list[JsonObject]:
        """The log's entries of this event that have these fields."""
        entries = []
        for line in self.text().splitlines():
            entry = _parsed(line)
            if entry.get("event") == event and fields.items() <= entry.items():
                entries.append(entry)
        return entries

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, as by the kernel when memory is short."""
        self.send(signal.SIGKILL)
        self.popen.wait()

    def stop(self) -> int:
        """SIGTERM, as at every deploy; returns the exit status."""
        self.send(signal.SIGTERM)
        return self.ended()

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def ended(self, timeout: float = PATIENCE_S) -> int:
        """Waits for the end; returns the exit status, negative for a signal."""
        return self.popen.wait(timeout)


@contextmanager
def frozen(process: Process) -> Iterator[None]:
    """Stands still meanwhile, as a process of a host that is too busy does."""
    process.freeze()
    try:
        yield
    finally:
        process.thaw()


def _parsed(line: str) -> JsonObject:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


class Machine:
    """Accounts on a server, a sandbox and real processes, started one by one; `with` ends them all."""

    def __init__(
        self,
        directory: Path,
        accounts: Iterable[Account],
        *,
        retry: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        bearer: Iterable[str] = (),
        clients: Iterable[str] = (),
        own_keys: Iterable[str] = (),
        latency: str | None = None,
        server: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.accounts = {a.alias: a.placed(index) for index, a in enumerate(accounts, start=1)}
        self.logins = sorted({account.login for account in self.accounts.values()})
        self.bearer, self.clients, self.own_keys = frozenset(bearer), frozenset(clients), frozenset(own_keys)
        self.processes: list[Process] = []
        self._tables = {"retry": {**RETRY, **(retry or {})}, "limits": {**LIMITS, **(limits or {})}}
        self._more_env = dict(env or {})
        self._latency = latency
        self._server_options = {**DURABLE, **(server or {})}
        self._stack = ExitStack()
        self._shown: dict[Path, int] = {}

    # ------------------------------------------------------------------------------------------- coming and going

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.server = stack.enter_context(ValkeyServer(self.directory, **self._server_options))
            self.sandbox: SandboxClient = stack.enter_context(running_sandbox())
            self.store: redis.Redis = stack.enter_context(self.server.client())
            self.timetable = Timetable(self.store, stream=STREAM)
            stack.callback(self._end)
            plans = {account.number: account.steps for account in self.accounts.values()}
            self.sandbox.set_scripts(plans, latency=self._latency)
            self.write_accounts()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is not None:
                self.show_logs()
        finally:
            self._stack.__exit__(kind, error, at)

    def _end(self) -> None:
        for process in self.processes:
            process.popen.kill()
            process.popen.wait()

    def show_logs(self) -> None:
        """Print what the processes wrote since the last time: pytest shows it where a test fails."""
        for process in self.processes:
            start = self._shown.get(process.log, 0)
            text = process.text()
            self._shown[process.log] = len(text)
            print(f"--- {process.name} ({process.pid}), {process.log}\n{text[start:][-6000:]}")

    def start(self, name: str, *command: str, **env: str) -> Process:
        """A process of the machine; another one of the same name goes on writing the same log."""
        log = self.directory / f"{name}.log"
        with log.open("ab") as out:
            popen = subprocess.Popen(
                tethered([sys.executable, *command]),
                cwd=self.directory,
                env={**self.env(), **env},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(Process(name, popen, log))
        return self.processes[-1]

    def beat(self, name: str = "beat", *, traps: bool = False, **env: str) -> Process:
        """A beat that has applied the accounts file."""
        own = ("--schedule", str(self.directory / f"{name}.schedule"))
        beat = self.start(name, *_celery(traps), "beat", "--loglevel", "INFO", *own, **env)
        wait_until(lambda: self._applied(beat), PATIENCE_S, "a beat that has applied the accounts")
        return beat

    def worker(self, name: str = "worker", *options: str, traps: bool = False, **env: str) -> Process:
        """A worker that takes polls; with the Procfile's options unless others are given."""
        worker = self.begin_worker(name, *options, traps=traps, **env)
        self.until_present(worker)
        return worker

    def begin_worker(self, name: str = "worker", *options: str, traps: bool = False, **env: str) -> Process:
        """A worker that is still on its way."""
        chosen = options or ("-E", "--without-gossip", "--without-mingle", "--loglevel", "INFO")
        return self.start(name, *_celery(traps), "worker", "-n", f"{name}@%h", *chosen, **env)

    def until_present(self, worker: Process) -> None:
        wait_until(lambda: self._is_present(worker), PATIENCE_S, f"a worker that takes polls: {worker.name}")

    def _is_present(self, worker: Process) -> bool:
        assert worker.is_alive, worker.text()
        return any(f":{worker.pid} " in member for member in self.store.zrange("workers", 0, -1))

    def _applied(self, beat: Process) -> bool:
        assert beat.is_alive, beat.text()
        return self.store.hlen("revisions") == len(self.accounts) and bool(self.timetable.current_content())

    # ------------------------------------------------------------------------------------------------ surroundings

    @property
    def accounts_path(self) -> Path:
        return self.directory / "accounts.toml"

    @property
    def trap_path(self) -> Path:
        return self.directory / "trap.json"

    def write_accounts(self) -> None:
        parts = [_table(f"[{name}]", values) for name, values in self._tables.items()]
        parts += [_table(f"[logins.{login}]", self._login(login)) for login in self.logins]
        parts += [_table("[[accounts]]", _entry(account)) for account in self.accounts.values()]
        self.accounts_path.write_text("\n".join(parts))

    def _login(self, login: str) -> dict[str, object]:
        if login in self.clients:
            return {"scheme": "client-credentials", "token_url": self.sandbox.token_url}
        return {"scheme": "bearer" if login in self.bearer else "api-key"}

    def env(self) -> dict[str, str]:
        """What every process gets: nothing of the tests' own environment that means something to us."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCES_")}
        return {
            **inherited,
            "PYTHONPATH": str(ROOT),
            "BALANCES_REDIS_URL": self.server.url,
            "BALANCES_KHIPU_URL": self.sandbox.url,
            "BALANCES_ACCOUNTS": str(self.accounts_path),
            "BALANCES_DATA_DIR": str(self.directory),
            "BALANCES_TEST_TRAP": str(self.trap_path),
            **self.secrets(),
            **self._more_env,
        }

    def secrets(self) -> dict[str, str]:
        """The secrets of all logins, in variables, but for log-ons that some worker has in a file."""
        found = {"BALANCES_SECRET_DEFAULT_API_KEY": API_KEY}
        in_files = {path.stem for path in self.directory.glob("*/*.account_credential")}
        for login in self.logins:
            if login in self.bearer:
                found[secret_variable(login, "TOKEN")] = f"token-canary.{login}.signature"
            elif login in self.clients:
                found[secret_variable(login, "CLIENT_ID")] = f"user-canary-{login}"
            elif login not in in_files:
                found[secret_variable(login, "ACCOUNT_CREDENTIAL")] = json.dumps(credential(login))
            if login in self.own_keys:
                found[secret_variable(login, "API_KEY")] = f"key-canary-{login}"
        return found

    def log_on(self, login: str) -> str:
        """The name of the login's session at the bank."""
        return log_on_of(INSTITUTION, credential(login)["username"])

    def move_clock(self, seconds: float) -> None:
        """Move the one clock on."""
        self.store.incrby("clock:offset", int(seconds * 1000))

    def arm(self, at: str, account: str, *, number: signal.Signals = signal.SIGKILL, pid: int = 0) -> None:
        """The process with traps that next comes to this point with this account sends `number` to `pid` (itself)."""
        draft = self.trap_path.with_suffix(".draft")
        draft.write_text(json.dumps({"at": at, "account": account, "signal": int(number), "pid": pid}))
        draft.replace(self.trap_path)

    def until_sprung(self) -> None:
        wait_until(lambda: not self.trap_path.exists(), PATIENCE_S, "a process that comes to the armed point")

    def balances(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line, as an operator types it."""
        command = [sys.executable, "-c", "from worker.cli import main; main()", *arguments]
        return subprocess.run(
            tethered(command), cwd=self.directory, env=self.env(), capture_output=True, text=True, timeout=PATIENCE_S
        )

    def celery(self, *arguments: str, without: Iterable[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
        """`celery -A worker …` until its end, `without` some variables of the environment."""
        whole = {**self.env(), **env}
        return subprocess.run(
            tethered([sys.executable, *_celery(False), *arguments]),
            cwd=self.directory,
            env={name: value for name, value in whole.items() if name not in without},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    # ------------------------------------------------------------------------------------------------ what happened

    def kick(self, *aliases: str) -> None:
        """Make scheduled accounts due now."""
        for alias in aliases:
            assert self.timetable.poll(alias) is None, (alias, self.state(alias))

    def number(self, alias: str) -> str:
        return self.accounts[alias].number

    def requests(self, alias: str, count: int = 0, *, ended: bool = True, wait: float = PATIENCE_S) -> list[JsonObject]:
        """What the bank was asked about the account, as soon as it was asked `count` times."""
        return self.sandbox.wait_for(count, number=self.number(alias), ended=ended, wait=wait)

    def entries(self, alias: str | None = None, type_: str = "balance.observed.v1") -> list[JsonObject]:
        """The data of this type's events on the stream, in order."""
        found: Any = self.store.xrange(STREAM)
        return [
            json.loads(fields["data"])
            for _, fields in found
            if fields["type"] == type_ and alias in {None, fields["subject"]}
        ]

    def until_entries(self, alias: str, count: int) -> list[JsonObject]:
        wait_until(lambda: len(self.entries(alias)) >= count, PATIENCE_S, f"{count} entries of {alias}")
        return self.entries(alias)

    def account(self, alias: str) -> dict[str, str]:
        return dict(self.timetable.accounts([alias]))[alias]

    def login(self, name: str) -> dict[str, str]:
        return self.timetable.logins()[name]

    def state(self, alias: str) -> str:
        """The state with what lies over it, in the words of docs/states.md."""
        account = self.account(alias)
        login = self.login(account["login"])
        overlays = ("paused",) * ("paused" in account) + ("blocked",) * ("blocked" in login)
        return " ".join((*overlays, account["state"]))

    def until_state(self, alias: str, *states: str) -> dict[str, str]:
        wait_until(lambda: self.state(alias) in states, PATIENCE_S, f"{alias}: {' or '.join(states)}")
        return self.account(alias)

    def outcomes(self, alias: str) -> list[str]:
        """How the account's last attempts ended, oldest first: "attempt outcome"."""
        ends = [line.split() for line in reversed(self.timetable.history(alias))]
        return [f"{attempt} {outcome}" for _, _, attempt, _, outcome in ends]

    def letter(self, alias: str) -> tuple[DeadLetterQueue, JsonObject]:
        """The dead letter of the account, or of its login if that is blocked: its queue and its reason."""
        for queue, message in self.timetable.letters():
            reason = message["headers"]["reason"]
            if alias in (reason.get("accounts") or [json.loads(message["body"])[1]["account"]]):
                return queue, reason
        raise AssertionError(f"{alias} has no dead letter")

    def settle_down(self, alias: str) -> None:
        """Pause the account and wait for what is in flight: from here on nothing about it changes."""
        assert self.timetable.pause(alias) is None
        self.until_state(alias, *(f"paused {state}" for state in ("scheduled", "waiting", "suspended", "parked")))

    def written(self) -> Iterator[list[bytes]]:
        """Every command that ever changed a key, as the append-only file has it; none is ever rewritten here."""
        for path in sorted((self.directory / "appendonlydir").glob("*.incr.aof")):
            yield from _commands(path.read_bytes())


def credential(login: str, password: str = RIGHT) -> dict[str, str]:
    """The AccountCredential of a login."""
    return {"username": f"user-canary-{login}", "password": password}


def secret_variable(login: str, field: str) -> str:
    return f"BALANCES_SECRET_{login}_{field}".upper().replace("-", "_")


def write_secret(directory: Path, login: str, value: object) -> None:
    """Replace a login's log-on at once, as a careful operator does."""
    directory.mkdir(exist_ok=True)
    draft = directory / "draft"
    draft.write_text(json.dumps(value))
    draft.chmod(0o600)
    draft.replace(directory / f"{login}.account_credential")


def started_at(request: JsonObject) -> float:
    return float(request["started_at"])


def canaries_in(text: str | bytes, but: Iterable[str] = ()) -> list[str]:
    """Which kinds of secrets stand in the text, other than those that may."""
    readable = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return [kind for kind, word in CANARIES.items() if word in readable and kind not in but]


def each_once(entries: Sequence[JsonObject]) -> bool:
    """Whether each operation is there once."""
    operations = [entry["operation_id"] for entry in entries]
    return len(operations) == len(set(operations))


def _celery(traps: bool) -> tuple[str, ...]:
    return (str(WITH_TRAPS),) if traps else ("-m", "celery", "-A", "worker")


def _table(header: str, values: Mapping[str, object]) -> str:
    """JSON's strings, numbers and arrays of them are TOML's too."""
    return "\n".join([header, *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])


def _entry(account: Account) -> dict[str, object]:
    return {
        "alias": account.alias,
        "institution": account.institution,
        "number": account.number,
        "currency": account.currency,
        "login": account.login,
        "every": account.every,
        **({"mode": account.mode} if account.mode else {}),
    }


def _commands(file: bytes) -> Iterator[list[bytes]]:
    """The commands of an append-only file, in the server's protocol: `*2 $3 DEL $1 k`, each part on a line."""
    at = 0

    def number(mark: bytes) -> int:
        nonlocal at
        assert file[at : at + 1] == mark, file[at : at + 20]
        end = file.index(b"\r\n", at)
        value, at = int(file[at + 1 : end]), end + 2
        return value

    while at < len(file):
        command = []
        for _ in range(number(b"*")):
            length = number(b"$")
            command.append(file[at : at + length])
            at += length + 2
        yield command
