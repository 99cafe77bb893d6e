"""Every process under a user of its own (deploy/redis/users.acl): all of them work, and none does what is not its own.

A server with these users refuses what they may not do inside a script, too: there as outside, by command and key.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
import redis
import requests
from machine import OK, PATIENCE_S, STREAM, Account, Machine
from servers import ROOT, ValkeyServer, wait_until

from worker.reader import BalanceReader
from worker.store import LOOPBACK, free_port
from worker.timetable import ANSWERS, POLLS

SHIPPED = ROOT / "deploy" / "redis" / "users.acl"
ROLES = ("beat", "worker", "webhook", "exporter", "flower", "consumer", "operator")
FLOWER = ("-m", "celery", "-A", "worker", "flower", f"--conf={ROOT}/config/flowerconfig.py")
ACCOUNTS = [
    Account("fine", mode="sync"),
    Account("called-back", (f"{OK}@100ms",)),
    Account("dead", ("error:E401:DO_NOT_RETRY", OK), mode="sync"),
    Account("parked", ("error:E203:RETRY_AFTER_NOTIFICATION", OK), mode="sync"),
    Account("notified", ("error:E203:RETRY_AFTER_NOTIFICATION", OK), mode="sync"),
    Account("blocked", ("error:E101:DO_NOT_RETRY", OK), mode="sync"),
    Account("climbs", ("error:E201:RETRY_IMMEDIATELY", OK), mode="sync"),
    Account("lost", ("ok@1h", OK), mode="sync"),
    Account("never", ("ok | never | life-span 1s Z", OK)),
]


def filled(text: str) -> str:
    """The shipped file as an operator fills it: each user's password is its own name here."""
    for role in ("admin", *ROLES):
        text = text.replace(f"SHA256_OF_{role.upper()}", digest(role))
    return text


def digest(role: str) -> str:
    return hashlib.sha256(f"{role}-secret".encode()).hexdigest()


def login(role: str) -> str:
    return f"{role}:{role}-secret"


class Guarded(Machine):
    """A machine in which nobody has another's rights; the tests themselves look with the administrator's."""

    def __init__(self, directory: Path) -> None:
        users = directory / "users.acl"
        users.write_text(filled(SHIPPED.read_text()))
        self.port, self.flower_port = free_port(), free_port()
        limits: dict[str, str | int] = {"callback_grace": "1s", "login_hold": "2s", "request_deadline": "4s"}
        limits |= {"rate": 60_000, "daily_requests": 60_000}  # never reached, but counted
        server = {"aclfile": str(users), "login": login("admin")}
        super().__init__(directory, ACCOUNTS, limits=limits, server=server)

    def env(self) -> dict[str, str]:
        """An operator's, unless a process gets another role's address."""
        return {
            **super().env(),
            "BALANCES_REDIS_URL": self.url("operator"),
            "BALANCES_CALLBACK_URL": f"http://{LOOPBACK}:{self.port}",
            "BALANCES_WEBHOOK_PORT": str(self.port),
            "BALANCES_FLOWER_PORT": str(self.flower_port),
            "BALANCES_NOTIFICATION_TOKEN": "notify",
        }

    def url(self, role: str) -> str:
        return self.server.url_of(login(role))

    def __enter__(self) -> Self:
        super().__enter__()
        self.beat(BALANCES_REDIS_URL=self.url("beat"))
        self.flower = self.start("flower", *FLOWER, BALANCES_REDIS_URL=self.url("flower"))
        wait_until(lambda: self.store.execute_command("PUBSUB", "NUMPAT"), PATIENCE_S, "Flower hears events")
        options = ("-E", "--without-gossip", "--without-mingle", "--loglevel", "INFO")
        as_worker = {"BALANCES_REDIS_URL": self.url("worker")}
        self.worker("worker", *options, "-Q", POLLS, **as_worker)
        self.begin_worker("settler", *options, "-Q", ANSWERS, "-c", "2", **as_worker)
        self.start("webhook", "-m", "worker.webhook", BALANCES_REDIS_URL=self.url("webhook"))
        wait_until(lambda: self.answers(f"http://{LOOPBACK}:{self.port}/healthz"), PATIENCE_S, "a webhook")
        return self

    def answers(self, url: str) -> bool:
        with suppress(requests.ConnectionError):
            return requests.get(url, timeout=PATIENCE_S).ok
        return False

    def notify(self, alias: str) -> None:
        answer = requests.post(
            f"http://{LOOPBACK}:{self.port}/notifications",
            json={"alias": alias},
            headers={"Authorization": "Bearer notify"},
            timeout=PATIENCE_S,
        )
        assert answer.json() == {"released": 1, "accounts": [alias]}

    def done(self, *command: str) -> str:
        result = self.balances(*command)
        assert result.returncode == 0, result
        return result.stdout

    def retire(self, alias: str) -> None:
        """Take it out of the accounts file, as an operator does."""
        del self.accounts[alias]
        self.write_accounts()
        self.done("sync", "--force")

    def refusals(self) -> list[str]:
        """What the server refused to whom, since it was last asked."""
        entries: Any = self.store.acl_log()
        return [f"{e['username']}: {e['reason']} {e['object']} ({e['context']}) x{e['count']}" for e in entries]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with Guarded(tmp_path_factory.mktemp("acl")) as machine:
        yield machine


def test_each_process_does_its_work_with_its_own_rights_alone(machine: Guarded) -> None:
    for account in ACCOUNTS:
        machine.done("poll", account.alias)
    for alias in ("fine", "called-back", "climbs", "never"):
        machine.until_entries(alias, 1)
    machine.until_state("dead", "suspended")
    for alias in ("parked", "notified"):
        machine.until_state(alias, "parked")
    machine.until_state("blocked", "blocked scheduled")
    for command in ("dead redrive dead", "release parked", "unblock blocked", "pause fine", "resume fine", "sync"):
        machine.done(*command.split())
    for command in ("pause --all", "resume --all"):
        machine.done(*command.split())
    machine.store.sadd("breakers", "cl/business/forgotten.cl")
    wait_until(lambda: not machine.store.exists("breakers"), PATIENCE_S, "beat to close a breaker that is forgotten")
    machine.notify("notified")
    for alias in ("dead", "parked", "notified", "blocked"):
        machine.until_entries(alias, 1)
    wait_until(lambda: "1 TIMEOUT" in machine.outcomes("lost"), PATIENCE_S, "a time-out")
    machine.retire("fine")
    for command in (
        "purge fine",
        "accounts",
        "dead list",
        "latest",
        "history dead",
        "audit",
        "tail --from 0 --no-follow",
    ):
        machine.done(*command.split())
    machine.done("check")
    for process in ("beat", "worker", "settler"):
        url = machine.url("beat" if process == "beat" else "worker")
        health = machine.start("health", "-m", "worker.health", process, BALANCES_REDIS_URL=url)
        assert health.ended() == 0, health.text()
    assert machine.answers(f"http://{LOOPBACK}:{machine.port}/readyz")
    assert_flower_saw_it(machine)
    assert_consumer_reads(machine)
    assert_exporter_answers(machine)
    assert machine.refusals() == []


def assert_flower_saw_it(machine: Guarded) -> None:
    url = f"http://{LOOPBACK}:{machine.flower_port}"
    assert "balances.dead.do-not-retry" in requests.get(f"{url}/broker", timeout=PATIENCE_S).text

    def succeeded() -> bool:
        return "task-succeeded" in requests.get(f"{url}/metrics", timeout=PATIENCE_S).text

    wait_until(succeeded, PATIENCE_S, "events in Flower")


def assert_consumer_reads(machine: Guarded) -> None:
    """It sets aside what it cannot read, too."""
    machine.store.xadd(STREAM, {"data": "no event"})
    seen: list[str] = []
    with BalanceReader(machine.url("consumer"), group="ledger", pause_s=0.01) as reader:
        reader.run(lambda event: seen.append(event.type), follow=False)
        assert len(reader.latest()) >= 6
    assert len(seen) == machine.store.xlen(STREAM) - 1
    assert machine.store.xlen(f"{STREAM}.dead") == 1
    machine.store.xtrim(STREAM, maxlen=0, approximate=False)


def assert_exporter_answers(machine: Guarded) -> None:
    if importlib.util.find_spec("worker.exporter") is not None:
        port = free_port()
        url = machine.url("exporter")
        machine.start("exporter", "-m", "worker.exporter", BALANCES_REDIS_URL=url, BALANCES_EXPORTER_PORT=str(port))
        wait_until(lambda: machine.answers(f"http://{LOOPBACK}:{port}/metrics"), PATIENCE_S, "an exporter")
        assert machine.answers(f"http://{LOOPBACK}:{port}/"), "its status page"


# --------------------------------------------------------------------------------------------- what nobody may do

#: Role → what it is refused, by command; `eval` goes the long way round, through a script of its own.
REFUSED: Mapping[str, Sequence[str]] = {
    "beat": (
        "GET salt",
        "XRANGE balances - +",
        "HGETALL latest",
        "HGETALL callback:1",
        "DEL balances",
        "XDEL audit 1-1",
        "PUBLISH /0.celery.pidbox x",
        "eval return redis.call('GET', 'salt')",
    ),
    "worker": (
        "XRANGE balances - +",
        "HGET latest fine",
        "HSET config content x",
        "HSET revisions fine x",
        "DEL balances",
        "DEL audit",
        "XRANGE audit - +",
        "eval return redis.call('HSET', 'revisions', 'fine', 'x')",
    ),
    "webhook": (
        "GET salt",
        "XRANGE balances - +",
        "HGET latest fine",
        "HGETALL failed",
        "HGETALL revisions",
        "HSET config content x",
        "RPOP balances.polls",
        "LPUSH balances.polls x",
        "HGET answer:1 body",
        "KEYS *",
        "SCAN 0",
        "eval return redis.call('HGET', 'latest', 'fine')",
    ),
    "exporter": (
        "GET salt",
        "HGETALL failed",
        "HGETALL latest",
        "HGETALL callback:1",
        "HGETALL answer:1",
        "SMEMBERS pins:fine:1",
        "HSET account:fine paused 1",
        "DEL timetable",
        "XADD balances * a b",
        "LPUSH balances.polls x",
        "SCRIPT LOAD return",
    ),
    "flower": (
        "GET salt",
        "XRANGE balances - +",
        "HGETALL latest",
        "HGET account:fine definition",
        "HGETALL login:fine",
        "ZADD timetable 1 fine",
        "LPUSH balances.polls x",
        "LPUSH balances.dead.bad-answer x",
        "BRPOP balances.polls 1",
        "DEL balances.polls",
        "eval return redis.call('HGET', 'account:fine', 'definition')",
    ),
    "consumer": (
        "HGET account:fine definition",
        "HGETALL account:fine",
        "HGETALL login:fine",
        "GET salt",
        "XADD balances * a b",
        "XTRIM balances MAXLEN 0",
        "XDEL balances 1-1",
        "DEL balances",
        "HSET latest fine x",
        "XRANGE audit - +",
        "SCRIPT LOAD return",
    ),
    "operator": (
        "GET salt",
        "SET clock:offset 1",
        "HGETALL answer:1",
        "XDEL audit 1-1",
        "DEL audit",
        "LPUSH balances.polls x",
        "eval return redis.call('GET', 'salt')",
    ),
}
#: Refused to all of them.
NEVER = ("FLUSHALL", "CONFIG GET requirepass", "ACL LIST", "KEYS *", "MONITOR", "SHUTDOWN NOSAVE")


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_refused_what_is_not_its_own(machine: Guarded, role: str) -> None:
    with redis.Redis.from_url(machine.url(role)) as client:
        allowed = [command for command in (*REFUSED[role], *NEVER) if not is_refused(client, command)]
    assert allowed == []
    machine.store.acl_log_reset()


def is_refused(client: redis.Redis, command: str) -> bool:
    words = command.split(maxsplit=1)
    parts = [words[1]] if words[0] == "eval" else command.split()
    try:
        client.register_script(parts[0])() if words[0] == "eval" else client.execute_command(*parts)
    except redis.exceptions.NoPermissionError:
        return True
    except redis.ResponseError as error:
        return "ACL failure in script" in str(error)
    return False


def test_without_a_user_nothing_is_answered(machine: Guarded) -> None:
    with redis.Redis(port=machine.server.port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_the_shipped_file_lets_no_server_start_before_every_password_is_filled_in(tmp_path: Path) -> None:
    users = tmp_path / "users.acl"
    users.write_text(filled(SHIPPED.read_text()).replace(f"#{digest('flower')}", "#SHA256_OF_FLOWER"))
    with (
        pytest.raises(AssertionError, match=r"Error loading ACLs|Invalid|ACL"),
        ValkeyServer(tmp_path, aclfile=str(users)),
    ):
        pass


def test_every_user_but_the_administrator_is_held_to_commands_and_keys() -> None:
    lines = SHIPPED.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["default", "admin", *ROLES]
    for line in lines[2:]:
        words = line.split()
        assert words[2:5] == ["reset", "on", f"#SHA256_OF_{words[1].upper()}"]
        assert not {"nopass", "~*", "allkeys", "&*", "allchannels", "+@all", "allcommands"} & set(words)
