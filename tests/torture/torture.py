"""Break everything that can be broken, by number, and then reconcile the stream with the bank's own journal.

    python tests/torture/torture.py --seed 1 --seconds 180 --report report.md

    beat ×2 · worker ×2 · settler · webhook ×2 ──▶ Proxy ──▶ Valkey (append-only, every write confirmed)
         └──▶ sandbox: answers by chance, from the seed ──▶ Proxy ──▶ webhooks

For `--seconds`, processes and the server are killed and frozen, connections cut, held and delayed, messages stolen and
doubled: what and when follows from the seed (how the machine's load falls in between does not). Then quiet: nobody
attacks and nobody helps; accounts must be polled again, everything drain, and all of it add up (`reconcile`).
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

if __name__ == "__main__":
    _TESTS = Path(__file__).resolve().parent.parent
    sys.path[:1] = [str(_TESTS.parent), *(str(_TESTS / name) for name in (".", "acceptance", "integration"))]

import redis
from machine import Account, Machine, Process, _entry, _table
from sandbox_client import fingerprint
from servers import wait_until
from torture.proxy import Proxy
from torture.reconcile import Evidence, Life, Window, read_attempts, read_requests
from world import Everything

from worker.store import free_port
from worker.timetable import ANSWERS, POLLS, SETTLE_AGAIN_MS

DEADLINE_S, MARGIN_S, HOLD_S = 3, 2, 2
LEASE_S = DEADLINE_S + MARGIN_S
LIMITS = {
    "request_deadline": f"{DEADLINE_S}s",
    "lease_margin": f"{MARGIN_S}s",
    "login_hold": f"{HOLD_S}s",
    "life_span": "8s",
    "callback_grace": "1s",
}
#: Losses are what a torture is made of: an account may have many before it is a dead letter.
RETRY = {"immediately": ["300ms", "1s"], "transient": ["500ms", "1s"], "wait": "5s", "max_waits": 20, "max_losses": 20}

SOON = "life-span 8s Z"
SYNC = {
    "ok@20ms-400ms": 80.0,
    "ok@1s-2s": 5.0,
    "no-data@100ms": 3.0,
    "error:E201:RETRY_IMMEDIATELY": 3.0,
    "error:E202:WAIT_4_HOURS_BEFORE_RETRY": 1.0,
    "http:504": 2.0,
    "malformed": 1.5,
    "hang": 1.5,
    "drop": 1.5,
}
CALLBACK = {
    f"ok@50ms-800ms | {SOON}": 75.0,
    f"no-data@100ms | {SOON}": 2.0,
    f"ok@200ms | early | {SOON}": 4.0,
    f"ok@200ms | twice | {SOON}": 3.0,
    f"ok@200ms | twice at once | {SOON}": 3.0,
    "ok | late 2s | life-span 2s Z": 3.0,
    "ok | never | life-span 2s Z": 2.0,
    f"ok@500ms | but drop | {SOON}": 2.0,
    f"ok@500ms | but http:504 | {SOON}": 2.0,
    f"error:E201:RETRY_IMMEDIATELY@200ms | {SOON}": 3.0,
    f"malformed@200ms | {SOON}": 1.0,
    "http:504": 1.0,
    "hang": 0.5,
    "drop": 1.0,
}
#: What ends an account for good: for one account in ten. And a log-on, for the first login.
MORTAL = {"error:E401:DO_NOT_RETRY": 0.5, "error:E203:RETRY_AFTER_NOTIFICATION": 0.5}
LOCKED = {"error:E101:DO_NOT_RETRY": 0.5}

#: Attack → how often among the others, and for how long: from and to, in seconds.
ATTACKS = {
    "kill worker": (3, 0.2, 2.0),
    "kill beat": (2, 0.2, 3.0),
    "kill settler": (2, 0.2, 3.0),
    "kill webhook": (2, 0.2, 3.0),
    "kill server": (2, 0.1, 4.0),
    "freeze worker": (2, LEASE_S + 1, LEASE_S + 4),
    "freeze beat": (1, LEASE_S + 1, LEASE_S + 4),
    "freeze settler": (1, LEASE_S + 1, LEASE_S + 4),
    "freeze webhook": (1, 2.0, 6.0),
    "freeze server": (1, 0.5, 4.0),
    "cut": (3, 0, 0),
    "hold": (2, 0.5, 8.0),
    "delay": (2, 2.0, 8.0),
    "steal": (4, 0, 0),
    "double": (4, 0, 0),
    "replay": (2, 0, 0),
}
PAUSE_S = (0.5, 3.5)
#: The accounts' intervals: 200 accounts make some 26 polls a second, which a machine with other things to do can hold.
EVERY_S = (6, 8, 10)
SPARE_S = 3.0
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Attack:
    """What is done `at_s` seconds after the beginning. `pick` chooses among several that it could be done to."""

    at_s: float
    kind: str
    for_s: float
    pick: int


def planned(seed: int, seconds: float) -> list[Attack]:
    """The attacks of this number: the same ones every time. A longer run begins like a shorter one."""
    chance = random.Random(seed)  # noqa: S311 - behaviour, not secrecy
    attacks, at_s = [], SPARE_S
    while at_s < seconds:
        (kind,) = chance.choices(list(ATTACKS), [weight for weight, _, _ in ATTACKS.values()])
        _, least_s, most_s = ATTACKS[kind]
        attacks.append(Attack(at_s, kind, chance.uniform(least_s, most_s), chance.randrange(1000)))
        at_s += chance.uniform(*PAUSE_S)
    return attacks


def make_accounts(seed: int, accounts: int, logins: int, every_s: Sequence[int]) -> list[Account]:
    chance = random.Random(f"accounts {seed}")  # noqa: S311 - behaviour, not secrecy
    return [
        Account(f"a{number:03}", every=f"{chance.choice(every_s)}s", login=f"login-{number % logins:02}")
        for number in range(accounts)
    ]


class Victims(Machine):
    """The machine, with two ways of polling, and everybody's way to the server and to the webhooks through proxies."""

    def __init__(
        self, directory: Path, seed: int, accounts: int, logins: int, webhooks: int, every_s: Sequence[int] = EVERY_S
    ) -> None:
        # The file is read afterwards, so none of it may be written anew.
        server = {"auto-aof-rewrite-percentage": 0}
        crowd = make_accounts(seed, accounts, logins, every_s)
        super().__init__(directory, crowd, retry=RETRY, limits=LIMITS, server=server)
        self.seed = seed
        self.webhook_ports = [free_port() for _ in range(webhooks)]
        self.callback_logins = set(self.logins[::2])
        self.lives: dict[str, Life] = {}
        self.names = ["beat-1", "beat-2", "worker-1", "worker-2", "settler"]
        self.names += [f"webhook-{number}" for number in range(1, webhooks + 1)]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            super().__enter__()
            stack.callback(self._stack.close)
            self.network = stack.enter_context(Proxy(self.server.port, seed=self.seed))
            self.way_in = stack.enter_context(Proxy(*self.webhook_ports, seed=self.seed))
            for index, account in enumerate(self.accounts.values()):
                self.sandbox.set_random(account.number, self._weights(index, account), seed=self.seed)
            self.sandbox.set_callback_rules(timeout="3s")
            self._stack = stack.pop_all()
        return self

    def _weights(self, index: int, account: Account) -> dict[str, float]:
        weights = CALLBACK if account.login in self.callback_logins else SYNC
        mortal = MORTAL if index % 10 == 3 else {}
        return {**weights, **mortal, **(LOCKED if account.login == self.logins[0] else {})}

    def write_accounts(self) -> None:
        parts = [_table(f"[{name}]", values) for name, values in self._tables.items()]
        parts += [_table(f"[logins.{login}]", {"scheme": "api-key"}) for login in self.logins]
        for account in self.accounts.values():
            mode = "callback" if account.login in self.callback_logins else "sync"
            parts.append(_table("[[accounts]]", {**_entry(account), "mode": mode}))
        self.accounts_path.write_text("\n".join(parts))

    def env(self) -> dict[str, str]:
        direct = super().env()
        return {
            **direct,
            "BALANCES_REDIS_URL": self.server.url.replace(str(self.server.port), str(self.network.port)),
            "BALANCES_CALLBACK_URL": f"http://127.0.0.1:{self.way_in.port}",
        }

    def bring(self, name: str) -> Process:
        """Start it, without waiting for it."""
        kind, _, number = name.partition("-")
        if kind == "beat":
            own = ("--schedule", str(self.directory / f"{name}.schedule"))
            return self.start(name, "-m", "celery", "-A", "worker", "beat", "--loglevel", "INFO", *own)
        if kind == "webhook":
            port = str(self.webhook_ports[int(number) - 1])
            return self.start(name, "-m", "worker.webhook", BALANCES_WEBHOOK_PORT=port)
        options = ("-E", "--without-gossip", "--without-mingle", "--loglevel", "INFO", "-Q")
        if kind == "settler":
            return self.begin_worker(name, *options, ANSWERS, "-c", "4")
        key = f"key-canary-{name}-{len(self.processes)}"
        process = self.begin_worker(name, *options, POLLS, BALANCES_SECRET_DEFAULT_API_KEY=key)
        self.lives[fingerprint(key)] = Life(f"{name} ({process.pid})")
        return process

    def life(self, process: Process) -> Life:
        """The worker's; of any other process, one that is not looked at."""
        name = f"{process.name} ({process.pid})"
        return next((life for life in self.lives.values() if life.name == name), Life(name))


@dataclass
class Run:
    """One torture, from the first attack to the last question."""

    victims: Victims
    seconds: float
    is_hurried: bool = False
    running: dict[str, Process] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    outages: list[Window] = field(default_factory=list)
    diary: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    stolen: list[tuple[str, str]] = field(default_factory=list)
    moved_at_s: float = float("inf")
    moved_s: float = 0.0
    quiet_ms: int = 0
    is_server_up: bool = True
    holds: int = 0

    def __post_init__(self) -> None:
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._frozen: set[int] = set()

    def note(self, what: str) -> None:
        self.diary.append(f"{datetime.now(UTC):%H:%M:%S.%f} {what}")

    # ---------------------------------------------------------------------------------------------- attacks

    def attack(self) -> None:
        """Everything that the number says, and what follows from it; ends with all of it undone."""
        started_s = time.monotonic()
        for attack in planned(self.victims.seed, self.seconds):
            self._at(started_s + attack.at_s, lambda attack=attack: self._strike(attack))
        while self._later or time.monotonic() < started_s + self.seconds:
            if self._later and self._later[0][0] <= time.monotonic():
                heapq.heappop(self._later)[2]()
            self._look_after()
            time.sleep(0.02)

    def _at(self, moment_s: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._later, (moment_s, self._order, action))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._at(time.monotonic() + seconds, action)

    def _look_after(self) -> None:
        """A process that ended without being killed is a finding; it is started again."""
        for name, process in list(self.running.items()):
            if not process.is_alive:
                self.findings.append(f"{name} ({process.pid}) ended by itself: {process.popen.returncode}")
                self.running[name] = self.victims.bring(name)

    def _strike(self, attack: Attack) -> None:
        verb, _, kind = attack.kind.partition(" ")
        if kind == "server":
            done = self._strike_server(verb, attack.for_s)
        elif kind:
            done = self._strike_process(verb, kind, attack)
        else:
            done = getattr(self, f"_{verb}")(attack)
        self.counts[attack.kind if done else "skipped"] += 1
        self.note(f"{attack.kind} for {attack.for_s:.1f} s{'' if done else ': not possible now'}")

    def _strike_process(self, verb: str, kind: str, attack: Attack) -> bool:
        names = [name for name in self.running if name.startswith(kind) and self.running[name].pid not in self._frozen]
        if not names:
            return False
        name = names[attack.pick % len(names)]
        process = self.running[name]
        self.note(f"{verb} {name} ({process.pid})")
        if verb == "freeze":
            process.freeze()
            self._frozen.add(process.pid)
            self._after(attack.for_s, lambda: self._thaw(process, time.time() - attack.for_s))
            return True
        del self.running[name]
        process.kill()
        self.victims.life(process).killed_s = time.time()
        self._after(attack.for_s, lambda: self.running.update({name: self.victims.bring(name)}))
        return True

    def _thaw(self, process: Process, since_s: float) -> None:
        process.thaw()
        self._frozen.discard(process.pid)
        # What it does in its first moment may still follow from what it had decided before.
        self.victims.life(process).frozen.append((since_s - 0.5, time.time() + 0.5))

    def _strike_server(self, verb: str, for_s: float) -> bool:
        if not self.is_server_up:
            return False
        self.is_server_up, since_s = False, time.time()
        server = self.victims.server

        def undo() -> None:
            if verb == "kill":
                server.start()
            else:
                os.kill(server.pid, signal.SIGCONT)
            self.outages.append((since_s, time.time()))
            self.is_server_up = True

        if verb == "kill":
            server.kill()
        else:
            os.kill(server.pid, signal.SIGSTOP)
        self._after(for_s, undo)
        return True

    def _cut(self, _: Attack) -> bool:
        self.victims.network.cut()
        return True

    def _hold(self, attack: Attack) -> bool:
        since_s = time.time()
        self.victims.network.hold()
        self.holds += 1

        def undo() -> None:
            self.holds -= 1
            if not self.holds:
                self.victims.network.let_go()
                if attack.pick % 2:
                    self.victims.network.cut()
            self.outages.append((since_s, time.time()))

        self._after(attack.for_s, undo)
        return True

    def _delay(self, attack: Attack) -> bool:
        self.victims.network.delay(0.05 + attack.pick % 150 / 1000)
        self._after(attack.for_s, lambda: self.victims.network.delay(0))
        return True

    def _caught(self, attack: Attack) -> tuple[str, str] | None:
        """A message that nobody else gets."""
        if not self.is_server_up:
            return None
        queues = [POLLS, ANSWERS] if attack.pick % 3 else [ANSWERS, POLLS]
        with suppress(redis.RedisError):
            return self.victims.store.brpop(queues, timeout=0.5)
        return None

    def _steal(self, attack: Attack) -> bool:
        if (message := self._caught(attack)) is None:
            return False
        self.stolen.append(message)
        return True

    def _double(self, attack: Attack) -> bool:
        if (message := self._caught(attack)) is None:
            return False
        return self._push([message, message])

    def _replay(self, attack: Attack) -> bool:
        """A message that was stolen turns up again."""
        return bool(self.stolen) and self._push([self.stolen[attack.pick % len(self.stolen)]])

    def _push(self, messages: list[tuple[str, str]]) -> bool:
        with suppress(redis.RedisError):
            for queue, message in messages:
                self.victims.store.lpush(queue, message)
            return True
        return False

    # ---------------------------------------------------------------------------------------------- quiet

    def quiet(self) -> None:
        """Nobody attacks and nobody helps: all accounts are polled, and then, without beats, all drains."""
        victims, store = self.victims, self.victims.store
        self.note("quiet")
        plans = {
            account.number: [f"ok@20ms | {SOON}" if account.login in victims.callback_logins else "ok@20ms"]
            for account in victims.accounts.values()
        }
        victims.sandbox.set_scripts(plans)
        self.quiet_ms = victims.timetable.now_ms()
        if self.is_hurried:
            self._come_to_rest(but_answered=True)
            if store.zcard("answers"):
                self._skip_a_minute()
        self._come_to_rest()
        self._await("no message is left", lambda: not (store.llen(POLLS) or store.llen(ANSWERS)))
        self._await("no answer is left", lambda: not store.zcard("answers"))
        self._await("the bank has nothing to do", lambda: not victims.sandbox.stats()["in_flight"])

    def _come_to_rest(self, *, but_answered: bool = False) -> None:
        """All accounts polled, the beats stopped, nothing in flight; `but_answered`: whose answer waits may wait on."""
        beats = [name for name in self.running if name.startswith("beat")]
        if beats:
            self._await("every account was polled lately", lambda: not self._overdue(but_answered))
            if not but_answered:
                self._await("no answer is left", lambda: not self.victims.store.zcard("answers"))
        for name in beats:
            self.running.pop(name).stop()
        self._await("nothing is in flight", lambda: not self._in_flight(but_answered))

    def _skip_a_minute(self) -> None:
        """An answer whose message was stolen is announced again after a minute: while nothing else is under way."""
        self.moved_at_s, self.moved_s = time.time(), SETTLE_AGAIN_MS / 1000 + 1
        self.victims.move_clock(self.moved_s)
        self.note("the clock is moved on")
        self.running["beat-1"] = self.victims.bring("beat-1")

    def _await(self, what: str, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline_s:
                left = f"\n  overdue: {self._overdue()[:5]}\n  in flight: {self._in_flight()[:5]}"
                self.findings.append(f"not within {PATIENCE_S:g} s: {what}{left}")
                return
            self._look_after()
            time.sleep(0.1)
        self.note(what)

    def _overdue(self, but_answered: bool = False) -> list[tuple[str, dict[str, str]]]:
        """Accounts that should have been asked, and answered, since it is quiet."""
        victims = self.victims
        logins, now_ms = victims.timetable.logins(), victims.timetable.now_ms()
        return [
            (alias, account)
            for alias, account in victims.timetable.accounts(list(victims.accounts))
            if account["state"] not in {"suspended", "parked"}
            and "blocked" not in logins[account["login"]]
            and not self._is_in_time(alias, account, now_ms)
            and not (but_answered and "answered" in account)
        ]

    def _is_in_time(self, alias: str, account: dict[str, str], now_ms: int) -> bool:
        every_s = int(self.victims.accounts[alias].every[:-1])
        is_recent = now_ms - int(account.get("last_at", 0)) <= (every_s + LEASE_S) * 1000
        return is_recent and int(account.get("last_ok", 0)) >= self.quiet_ms

    def _in_flight(self, but_answered: bool = False) -> list[tuple[str, dict[str, str]]]:
        accounts = self.victims.timetable.accounts(list(self.victims.accounts))
        return [
            (alias, account)
            for alias, account in accounts
            if account["state"] in {"dispatched", "polling", "awaiting"}
            and not (but_answered and "answered" in account)
        ]

    # ---------------------------------------------------------------------------------------------- reconciling

    def reconcile(self) -> dict[str, Any]:
        """All that can be counted; what must not be is added to the findings."""
        self.evidence = evidence = self._evidence()
        classes = Counter()
        for asked in evidence.requests:
            classes[kind := evidence.class_of(asked)] += 1
            if kind == "lost":
                self._tell(f"a request without an end: {asked}\n  {evidence.attempt_of(asked)}", asked.alias)
        for first, second in evidence.overlaps():
            self._tell(f"two requests of one login at once:\n  {first}\n  {second}", first.alias, second.alias)
        for first, second in evidence.sent_twice():
            self._tell(f"sent twice:\n  {first}\n  {second}", first.alias)
        for asked in evidence.unbegun():
            self._tell(f"a request that nobody had begun: {asked}", asked.alias)
        for attempt in evidence.unpublished():
            self._tell(f"an attempt that ended well, and nothing on the stream: {attempt}", attempt.alias)
        doubled, unasked = evidence.doubled(), evidence.unasked()
        self.findings += [f"on the stream twice: {each}" for each in doubled]
        self.findings += [f"on the stream, and the bank never said so: {each}" for each in unasked]
        letters = self._check_store()
        return {
            "polls": len({(each.alias, each.poll) for each in evidence.attempts}),
            "attempts": len(evidence.attempts),
            "requests": len(evidence.requests),
            **{
                name: classes[name]
                for name in (
                    "published",
                    "late",
                    "failed",
                    "overtaken",
                    "abandoned: killed",
                    "abandoned: frozen",
                    "abandoned: cut",
                    "lost",
                )
            },
            "doubled": len(doubled),
            "dead letters": letters,
        }

    def _evidence(self) -> Evidence:
        victims = self.victims
        aliases = {account.number: (account.alias, account.login) for account in victims.accounts.values()}
        limit = 1_000_000
        records, callbacks = victims.sandbox.requests(limit=limit), victims.sandbox.callbacks(limit=limit)
        return Evidence(
            requests=read_requests(records, callbacks, aliases),
            attempts=read_attempts(victims.written(), self._wall_s),
            entries=victims.entries(),
            lives=victims.lives,
            outages=self.outages,
            decided=set(self._decided()),
            lease_s=LEASE_S,
            hold_s=HOLD_S,
        )

    def _wall_s(self, server_s: float) -> float:
        is_moved = server_s >= self.moved_at_s + self.moved_s - 1
        return server_s - self.moved_s if is_moved else min(server_s, self.moved_at_s)

    def _decided(self) -> Iterator[tuple[str, str, str]]:
        for process in {process.name: process for process in self.victims.processes}.values():
            for entry in process.said("failed"):
                alias, _, poll = entry["task"].removesuffix(".answer").rpartition(".")
                yield alias, poll, str(entry["attempt"])

    def _check_store(self) -> int:
        """The invariants of the timetable, one by one; returns how many dead letters there are."""
        everything = Everything.read(self.victims.store)
        checks = [(login, lambda login=login: everything.check_place(login)) for login in everything.logins]
        checks += [(alias, lambda alias=alias: everything.check_account(alias)) for alias in everything.revisions]
        for name, check in [*checks, ("letters", everything.check_letters)]:
            try:
                check()
            except AssertionError as error:
                self._tell(f"an invariant of {name}: {error}", name)
        letters = list(self.victims.timetable.letters())
        for queue, message in letters:
            reason = message["headers"]["reason"]
            if not (reason.get("code") and (reason.get("accounts") or json.loads(message["body"])[1]["account"])):
                self.findings.append(f"a letter without a reason in {queue}: {reason}")
        return len(letters)

    def _tell(self, what: str, *aliases: str) -> None:
        """A finding, with what is known of these accounts."""
        known = []
        for alias in aliases:
            if alias in self.victims.accounts:
                known.append(f"  {alias}: {self.victims.account(alias)}")
                known += [f"    {line}" for line in self.victims.timetable.history(alias)]
                known += self._lines(alias)
        self.findings.append("\n".join([what, *known]))

    def _lines(self, alias: str, most: int = 15) -> list[str]:
        """What the processes said of the account last."""
        lines = [
            f"    {process.name}: {line}"
            for process in {process.name: process for process in self.victims.processes}.values()
            for line in process.text().splitlines()
            if f'"{alias}"' in line
        ]
        return sorted(lines, key=lambda line: line.partition('"timestamp": ')[2])[-most:]


def torture(
    directory: Path,
    *,
    seed: int,
    seconds: float,
    accounts: int = 200,
    logins: int = 60,
    webhooks: int = 2,
    every_s: Sequence[int] = EVERY_S,
    is_hurried: bool = False,
) -> tuple[Run, dict[str, Any]]:
    """The whole run: its findings are in `Run.findings`, none of them good."""
    with Victims(directory, seed, accounts, logins, webhooks, every_s) as victims:
        run = Run(victims, seconds, is_hurried)
        for name in victims.names:
            run.running[name] = victims.bring(name)
        wait_until(lambda: len(victims.entries()) >= accounts // 4, PATIENCE_S, "the first balances")
        started_s = time.monotonic()
        run.attack()
        run.quiet()
        figures = run.reconcile()
        figures["seconds in all"] = round(time.monotonic() - started_s)
    return run, figures


def report(run: Run, figures: dict[str, Any]) -> str:
    """A table of one run."""
    kills = dict(sorted(run.counts.items()))
    outages = f"{len(run.outages)} ({sum(end - start for start, end in run.outages):.0f} s)"
    rows = {"seed": run.victims.seed, "seconds of attack": run.seconds, **kills, "outages": outages, **figures}
    lines = ["| what | figure |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    verdict = [f"seed {run.victims.seed}: {len(run.findings)} findings", *run.findings]
    return "\n".join([*lines, "", *verdict, ""])


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--accounts", type=int, default=200)
    parser.add_argument("--logins", type=int, default=60)
    parser.add_argument("--every", type=int, nargs="+", default=EVERY_S, help="intervals to choose from, in seconds")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--diary", action="store_true", help="print every attack, and when")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whoever ends it early leaves nothing behind either
    with tempfile.TemporaryDirectory(prefix="torture-") as directory:
        run, figures = torture(
            Path(directory),
            seed=given.seed,
            seconds=given.seconds,
            accounts=given.accounts,
            logins=given.logins,
            every_s=given.every,
        )
    text = report(run, figures)
    print("\n".join(run.diary) if given.diary else "", text, sep="\n")
    if given.report:
        given.report.write_text(text)
    sys.exit(1 if run.findings else 0)


if __name__ == "__main__":
    main()
