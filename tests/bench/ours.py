"""Our own processes as the Procfile starts them, and a timetable full of accounts without a file of them.

The accounts use bearer tokens: one fingerprint for all of them. With bank log-ons a worker computes one for each login
that it sees for the first time, 40 ms each, which is no part of a poll.
"""

from __future__ import annotations

import shlex
import sys
import time
from datetime import timedelta

from rig import Rig, Running
from servers import ROOT, wait_until

from worker.accounts import Accounts, Definition, Limits, Login, Retry
from worker.celery import letter_template, poll_template, settling_template
from worker.timetable import CLAIM_BATCH, POLLS, Timetable

STREAM = "balances"
EVERY = timedelta(days=300)
#: A queue that is filled beforehand must not be sent again while it is worked off.
MARGIN = timedelta(hours=1)


def alias_of(number: int) -> str:
    return f"account-{number:06}"


def login_of(number: int, per_login: int) -> str:
    return f"login-{number // per_login:06}"


def accounts_of(
    count: int, *, per_login: int = 1, every: timedelta = EVERY, margin: timedelta = MARGIN, mode: str = "sync"
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
            mode="callback" if mode == "callback" else "sync",
            every_ms=int(every.total_seconds() * 1000),
        )
        for number in range(count)
    }
    logins = {definition.login: Login(scheme="bearer") for definition in definitions.values()}
    return Accounts(definitions, Retry(), Limits(lease_margin=margin), logins, digest=f"{count} {per_login} {every}")


class Ours:
    """A deployment on the rig's server."""

    def __init__(self, rig: Rig, bank_url: str) -> None:
        self.rig = rig
        self.timetable = Timetable(
            rig.store,
            stream=STREAM,
            message=poll_template(),
            letter=letter_template(),
            settling=settling_template(),
        )
        self.env = {
            "PYTHONPATH": str(ROOT),
            "BALANCES_REDIS_URL": rig.server.url,
            "BALANCES_KHIPU_URL": bank_url,
            "BALANCES_ACCOUNTS": str(rig.directory / "accounts.toml"),
            "BALANCES_DATA_DIR": str(rig.directory),
            "BALANCES_SECRET_DEFAULT_TOKEN": "token",
        }

    def fill(self, count: int, *, per_login: int = 1) -> None:
        """Makes the timetable hold so many accounts, none due."""
        self.timetable.apply(accounts_of(count, per_login=per_login), force=True)

    def make_due(self, *aliases: str) -> None:
        for alias in aliases:
            refusal = self.timetable.poll(alias)
            assert refusal is None, (alias, refusal)

    def claim(self, count: int) -> None:
        """Dispatches so many, whatever the threads of the workers."""
        room = f"bench {count + self.rig.store.llen(POLLS) + 1000}"
        self.rig.store.zadd("workers", {room: int(time.time() * 1000) + 3_600_000})
        left = count
        while left > 0:
            dispatched = self.timetable.claim(min(left, CLAIM_BATCH)).dispatched
            assert dispatched, "nothing is due"
            left -= dispatched
        self.rig.store.zrem("workers", room)

    def settled(self) -> int:
        return int(self.rig.store.xlen(STREAM))

    def worker(self, concurrency: int, name: str = "worker", **env: str) -> Running:
        """A worker that takes polls."""
        worker = self.start("worker", name, {"BALANCES_CONCURRENCY": str(concurrency), **env}, "-n", f"{name}@%h")
        wait_until(lambda: self._is_present(worker), 30, f"a worker that takes polls, see {worker.log}")
        return worker

    def start(self, line: str, name: str, env: dict[str, str] | None = None, *more: str) -> Running:
        """A process of the Procfile, by its name there."""
        procfile = (ROOT / "Procfile").read_text().splitlines()
        program, *arguments = shlex.split(next(each for each in procfile if each.startswith(f"{line}: ")))[1:]
        python = [sys.executable, "-m", "celery"] if program == "celery" else [sys.executable]
        return self.rig.start(name, [*python, *arguments, *more], {**self.env, **(env or {})}, cwd=self.rig.directory)

    def _is_present(self, worker: Running) -> bool:
        worker.must_live()
        return any(f":{worker.popen.pid} " in member for member in self.rig.store.zrange("workers", 0, -1))
