"""Our own processes as the Procfile starts them, and a timetable full of accounts without a file of them.

The accounts use bearer tokens: one fingerprint for all of them. With bank log-ons a worker computes one for each login
that it sees for the first time, 40 ms each, which is no part of a poll.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rig import Rig, Running, until
from servers import ROOT, wait_until

from worker.accounts import Accounts, Definition, Limits, Login, Mode, Retry, file_digest
from worker.celery import letter_template, poll_template, settling_template
from worker.scripts import script_text
from worker.timetable import CLAIM_BATCH, POLLS, SETTLE_AGAIN_MS, Timetable, Token

STREAM = "balances"
EVERY = timedelta(days=300)
#: A queue that is filled beforehand must not be sent again while it is worked off.
MARGIN = timedelta(hours=1)


def alias_of(number: int) -> str:
    return f"account-{number:06}"


def login_of(number: int, per_login: int) -> str:
    return f"login-{number // per_login:06}"


def accounts_of(
    count: int, *, per_login: int = 1, every: timedelta = EVERY, margin: timedelta = MARGIN, mode: Mode = "sync"
) -> Accounts:
    """So many accounts as `accounts.toml` would define them."""
    definitions = {
        alias_of(number): Definition(
            alias=alias_of(number),
            country="cl",
            segment="business",
            institution="bancosecurity.cl",
            number=f"{number:08}",
            login=login_of(number, per_login),
            scheme="bearer",
            mode=mode,
            every_ms=int(every.total_seconds() * 1000),
        )
        for number in range(count)
    }
    logins = {definition.login: Login(scheme="bearer") for definition in definitions.values()}
    return Accounts(definitions, Retry(), Limits(lease_margin=margin), logins, digest=f"{count} {per_login} {every}")


def accounts_file(count: int, *, every: str = "300d", mode: str = "sync") -> str:
    """The same accounts as people write them, each on a login of its own."""
    head = f'[defaults]\nevery = "{every}"\nmode = "{mode}"\ninstitution = "bancosecurity.cl"\n'
    logins = "".join(f'[logins.{login_of(number, 1)}]\nscheme = "bearer"\n' for number in range(count))
    entries = "".join(
        f'[[accounts]]\nalias = "{alias_of(number)}"\nnumber = "{number:08}"\nlogin = "{login_of(number, 1)}"\n'
        for number in range(count)
    )
    return head + logins + entries


class Ours:
    """A deployment on the rig's server."""

    def __init__(self, rig: Rig, bank_url: str, **env: str) -> None:
        self.rig = rig
        self.is_callback = "BALANCES_CALLBACK_URL" in env
        message, settling = poll_template(), settling_template()
        self.timetable = Timetable(
            rig.store, stream=STREAM, message=message, letter=letter_template(), settling=settling
        )
        #: For who wants to run a claim in a transaction of his own; its first argument is how many logins.
        self.claim_script = rig.store.register_script(script_text("claim"))
        self.claim_arguments = (message, settling, SETTLE_AGAIN_MS, "", 0)
        self.env = {
            "PYTHONPATH": str(ROOT),
            "BALANCES_REDIS_URL": rig.server.url,
            "BALANCES_KHIPU_URL": bank_url,
            "BALANCES_ACCOUNTS": str(rig.directory / "accounts.toml"),
            "BALANCES_DATA_DIR": str(rig.directory),
            "BALANCES_SECRET_DEFAULT_TOKEN": "token",
            **env,
        }

    def fill(self, count: int, *, per_login: int = 1, every: timedelta = EVERY, mode: Mode = "sync") -> None:
        """Makes the timetable hold so many accounts, none due."""
        self.timetable.apply(accounts_of(count, per_login=per_login, every=every, mode=mode), force=True)

    def make_due(self, *aliases: str) -> None:
        for alias in aliases:
            refusal = self.timetable.poll(alias)
            assert refusal is None, (alias, refusal)

    def make_all_due(self) -> None:
        """Moves the one clock on by an account's whole interval."""
        self.rig.store.incrby("clock:offset", int(EVERY.total_seconds() * 1000))

    def take(self) -> list[Token]:
        """What is in the queue, taken out of it."""
        messages = self.rig.store.lpop(POLLS, self.rig.store.llen(POLLS) or 1) or []
        return [Token(**json.loads(json.loads(message)["body"])[1]) for message in messages]

    def claim(self, count: int) -> None:
        """Dispatches so many, whatever the threads of the workers."""
        with self.room():
            while count > 0:
                dispatched = self.timetable.claim(min(count, CLAIM_BATCH)).dispatched
                assert dispatched, "nothing is due"
                count -= dispatched

    @contextmanager
    def room(self) -> Iterator[None]:
        """Room in the queue for whatever is claimed."""
        until_ms = int(time.time() * 1000) + 3_600_000
        self.rig.store.zadd("workers", {"bench 1000000": until_ms})
        yield
        self.rig.store.zrem("workers", "bench 1000000")

    def settled(self) -> int:
        return int(self.rig.store.xlen(STREAM))

    def worker(self, concurrency: int, name: str = "worker", **env: str) -> Running:
        """A worker that takes polls."""
        worker = self.start("worker", name, {"BALANCES_CONCURRENCY": str(concurrency), **env}, "-n", f"{name}@%h")
        wait_until(lambda: self._is_present(worker), 30, f"a worker that takes polls, see {worker.log}")
        return worker

    def beat(self) -> Running:
        """A beat that has claimed, and whose accounts file is in force whatever it holds."""
        path = self.rig.directory / "accounts.toml"
        if not path.exists():
            path.write_text(accounts_file(1))
        content = self.timetable.current_content()
        if content is not None:
            self.timetable.remember_file(file_digest(path.read_bytes(), callback_configured=self.is_callback), content)
        self.rig.store.hdel("config", "claimed_at")
        beat = self.start("beat", "beat")
        until(lambda: beat.must_live() or self.rig.store.hexists("config", "claimed_at"), 600, "a beat that claims")
        return beat

    def start(self, line: str, name: str, env: dict[str, str] | None = None, *more: str) -> Running:
        """A process of the Procfile, by its name there."""
        procfile = (ROOT / "Procfile").read_text().splitlines()
        program, *arguments = shlex.split(next(each for each in procfile if each.startswith(f"{line}: ")))[1:]
        python = [sys.executable, "-m", "celery"] if program == "celery" else [sys.executable]
        return self.rig.start(name, [*python, *arguments, *more], {**self.env, **(env or {})}, cwd=self.rig.directory)

    def _is_present(self, worker: Running) -> bool:
        worker.must_live()
        return any(f":{worker.popen.pid} " in member for member in self.rig.store.zrange("workers", 0, -1))
