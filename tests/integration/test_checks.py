"""`balances check` on a deployment where all is well, and with each thing broken on purpose: that one is red, no other.

Khipu, token URL and webhook are servers with real TLS; the server is a real one. Processes of their own are killed and
frozen in tests/acceptance/test_check.py.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from hostile import Hostile, Peer, certificate
from servers import ValkeyServer

from worker import checks, server
from worker.accounts import load_accounts
from worker.clock import Jump
from worker.credentials import CredentialStore
from worker.health import WEBHOOK_IS_WELL
from worker.khipu import KhipuClient
from worker.sandbox import sandbox_secrets
from worker.server import Finding
from worker.settings import Settings, load_settings
from worker.store import LOOPBACK, free_port
from worker.timetable import Timetable
from worker.transport import resolve

STREAM = "balances"
CANARY = "canary-password"
#: Names that lead to this machine: of the one there are certificates, of the other none. Any other leads nowhere.
NAME, OTHER_NAME = "balances.test", "other.test"
DAY_S = 86_400

FILE = """
[logins.acme]
[logins.umbrella]
scheme = "bearer"
[logins.globex]
scheme = "client-credentials"
token_url = "{token_url}"
[logins.initech]
scheme = "client-credentials"
token_url = "{token_url}/initech"

[defaults]
institution = "bancosecurity.cl"
every = "30d"
mode = "{mode}"
"""
ACCOUNT = """
[[accounts]]
alias = "{login}"
login = "{login}"
number = "{number}"
"""
LOGINS = ("acme", "umbrella", "globex", "initech")


def token(days: float) -> str:
    """A bearer token that ends so many days from now."""
    payload = json.dumps({"exp": int(time.time() + days * DAY_S)}).encode()
    return f"x.{base64.urlsafe_b64encode(payload).decode().rstrip('=')}.x"


def secrets() -> dict[str, str]:
    return {
        "BALANCES_SECRET_DEFAULT_API_KEY": "key",
        "BALANCES_SECRET_ACME_ACCOUNT_CREDENTIAL": json.dumps({"username": "u", "password": "p"}),
        "BALANCES_SECRET_UMBRELLA_TOKEN": token(90),
        "BALANCES_SECRET_DEFAULT_CLIENT_ID": "id",
        "BALANCES_SECRET_DEFAULT_CLIENT_SECRET": "secret",
    }


@dataclass
class Certificates:
    """What servers present, and the bundle of those that are trusted."""

    good: ssl.SSLContext
    ending: ssl.SSLContext
    untrusted: ssl.SSLContext
    bundle: Path


@dataclass
class Deployment:
    """All is well, until a test changes something."""

    directory: Path
    certificates: Certificates
    store: redis.Redis
    timetable: Timetable
    env: dict[str, str]
    secrets: dict[str, str] = field(default_factory=secrets)
    mode: str = "callback"
    token_url: str = ""

    def settings(self) -> Settings:
        path = self.directory / "accounts.toml"
        accounts = "".join(ACCOUNT.format(login=login, number=number) for number, login in enumerate(LOGINS, 1000))
        path.write_text(FILE.format(token_url=self.token_url, mode=self.mode) + accounts)
        return load_settings({"BALANCES_ACCOUNTS": str(path), **self.env})

    def started(self) -> None:
        """As a beat, a worker and a settler leave it."""
        accounts = load_accounts(self.settings().accounts_path, callback_configured=True)
        self.timetable.apply(accounts)
        self.timetable.claim()
        self.timetable.register_worker("worker@host:1", 16, ttl_s=60)
        self.timetable.register_worker("settler@host:2", 0, ttl_s=60)

    def findings(self, settings: Settings | None = None) -> list[Finding]:
        settings = settings or self.settings()
        accounts = load_accounts(settings.accounts_path, callback_configured=settings.callback_url is not None)
        khipu = KhipuClient(settings.khipu_url, verify=str(self.certificates.bundle), resolver=to_this_machine)
        return checks.check(settings, accounts, CredentialStore(self.secrets, None), khipu)

    def wrong(self) -> dict[str, str]:
        return {finding.name: finding.detail for finding in self.findings() if not finding.is_right}

    def found(self, name: str) -> list[Finding]:
        return [finding for finding in self.findings() if finding.name == name]


def to_this_machine(host: str, port: int) -> object:
    if host not in {NAME, OTHER_NAME, LOOPBACK}:
        raise socket.gaierror
    return resolve(LOOPBACK, port)


def at(port: int, name: str = NAME) -> str:
    return f"https://{name}:{port}"


def context(pem: Path) -> ssl.SSLContext:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pem)
    return tls


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    def made(name: str, days: int) -> Path:
        return certificate(tmp_path_factory.mktemp(name), days=days, names=f"IP:{LOOPBACK},DNS:{NAME}")

    good, ending, untrusted = made("good", 90), made("ending", 9), made("untrusted", 90)
    bundle = good.with_name("bundle.pem")
    bundle.write_bytes(good.read_bytes() + ending.read_bytes())
    return Certificates(context(good), context(ending), context(untrusted), bundle)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path_factory.mktemp("kept"), appendonly="yes", requirepass=CANARY) as server:
        yield server


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def heard() -> list[bytes]:
    """What Khipu and the token URL were sent."""
    return []


@pytest.fixture
def fresh(
    tmp_path: Path, kept: ValkeyServer, certificates: Certificates, stack: ExitStack, heard: list[bytes]
) -> Iterator[Deployment]:
    """Everything stands, and nothing was ever started."""

    def listen(peer: Peer) -> None:
        heard.append(peer.connection.recv(1))

    khipu, tokens = (stack.enter_context(Hostile(listen, certificates.good)) for _ in range(2))
    webhook = stack.enter_context(Hostile(our_webhook, certificates.good))
    client = stack.enter_context(kept.client())
    client.flushall()
    env = {
        "BALANCES_REDIS_URL": kept.url,
        "BALANCES_KHIPU_URL": at(khipu.port),
        "BALANCES_CALLBACK_URL": at(webhook.port),
        "BALANCES_DATA_DIR": str(tmp_path),
    }
    timetable = Timetable(client, stream=STREAM)
    yield Deployment(tmp_path, certificates, client, timetable, env, token_url=f"{at(tokens.port)}/token")
    client.flushall()


@pytest.fixture
def deployment(fresh: Deployment) -> Deployment:
    fresh.started()
    return fresh


def our_webhook(peer: Peer) -> None:
    peer.answer(200, json.dumps(WEBHOOK_IS_WELL).encode())


def closed() -> str:
    return at(free_port())


@pytest.fixture
def black_hole(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> str:
    """It accepts, and never answers the handshake."""
    monkeypatch.setattr(checks, "REACH_S", 0.5)
    listener = stack.enter_context(socket.create_server((LOOPBACK, 0)))
    return at(listener.getsockname()[1])


# --------------------------------------------------------------------------------------------------------- all is well


def test_where_all_is_well_everything_was_looked_at_and_nothing_billed(
    deployment: Deployment, heard: list[bytes]
) -> None:
    findings = deployment.findings()
    assert [finding for finding in findings if not finding.is_right] == []
    assert [finding.name for finding in findings] == [
        *("configuration", "secrets", "server", "eviction", "persistence", "clock", "clock"),
        *("beat", "workers", "settlers", "khipu", "token_url", "webhook"),
    ]
    assert set(heard) <= {b""}


def test_before_the_first_start_processes_are_no_mistake_and_everything_else_is_looked_at(fresh: Deployment) -> None:
    fresh.env["BALANCES_CALLBACK_URL"] = url = closed()
    assert fresh.wrong() == {}
    details = {finding.name: finding.detail for finding in fresh.findings()}
    assert (details["beat"], details["workers"], details["settlers"]) == (checks.NOT_STARTED,) * 3
    assert details["webhook"].startswith(f"{checks.NOT_STARTED}: {url}: nothing accepts a connection there")
    fresh.env["BALANCES_KHIPU_URL"] = closed()
    assert fresh.wrong().keys() == {"khipu"}


def test_the_sandbox_is_no_mistake_before_the_first_start(fresh: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fresh.directory)
    ports = {"BALANCES_SANDBOX_PORT": str(free_port()), "BALANCES_WEBHOOK_PORT": str(free_port())}
    settings = load_settings({"BALANCES_REDIS_URL": fresh.env["BALANCES_REDIS_URL"], **ports})
    fresh.secrets = sandbox_secrets()
    assert [finding for finding in fresh.findings(settings) if not finding.is_right] == []
    fresh.timetable.register_worker("worker@host:1", 16, ttl_s=60)
    wrong = [finding.name for finding in fresh.findings(settings) if not finding.is_right]
    assert wrong == ["beat", "settlers", "khipu", "webhook"]


def test_without_callbacks_neither_webhook_nor_settler_is_asked_for(deployment: Deployment) -> None:
    deployment.mode = "sync"
    deployment.env["BALANCES_CALLBACK_URL"] = closed()
    deployment.timetable.forget_worker("settler@host:2", 0)
    assert deployment.wrong() == {}
    assert deployment.found("webhook")[0].detail == "not needed: no account is in callback mode"


# ------------------------------------------------------------------------------------------------ broken, one at a time

Break = Callable[[Deployment], None]


def an_absent_secret(deployment: Deployment) -> None:
    del deployment.secrets["BALANCES_SECRET_DEFAULT_API_KEY"]


def a_token_that_ends(deployment: Deployment) -> None:
    deployment.secrets["BALANCES_SECRET_UMBRELLA_TOKEN"] = token(9.5)


def a_token_that_ended(deployment: Deployment) -> None:
    deployment.secrets["BALANCES_SECRET_UMBRELLA_TOKEN"] = token(-1)


def a_moved_clock(deployment: Deployment) -> None:
    deployment.store.set("clock:offset", 1)


def a_jump(deployment: Deployment) -> None:
    claim = deployment.timetable.claim()
    assert deployment.timetable.hold(Jump(60_000, 0), claim)


def a_group_that_lags(deployment: Deployment) -> None:
    deployment.store.xadd(STREAM, {"any": "thing"}, id="1-1")
    deployment.store.xgroup_create(STREAM, "ledger", "0")


def a_beat_that_never_was(deployment: Deployment) -> None:
    deployment.store.hdel("config", "claimed_at")


def no_worker(deployment: Deployment) -> None:
    deployment.timetable.forget_worker("worker@host:1", 16)
    deployment.store.lpush("balances.polls", "a poll")


def no_settler(deployment: Deployment) -> None:
    deployment.timetable.forget_worker("settler@host:2", 0)


@pytest.mark.parametrize(
    ("break_it", "red", "words"),
    [
        (an_absent_secret, "secrets", "set BALANCES_SECRET_ACME_API_KEY"),
        (a_token_that_ends, "token", "login umbrella: its token ends at "),
        (a_token_that_ended, "token", "login umbrella: its token ended at "),
        (a_moved_clock, "clock", "clock:offset moves it"),
        (a_jump, "hold", "the server's clock jumped: nothing is claimed for 2"),
        (a_group_that_lags, "consumer group", "ledger has used "),
        (a_beat_that_never_was, "beat", "no beat has claimed yet"),
        (no_worker, "workers", "none is present: gone, frozen, or taking nothing although messages wait; 1 polls wait"),
        (no_settler, "settlers", "none is present: "),
    ],
)
def test_a_broken_thing_is_red_and_no_other(deployment: Deployment, break_it: Break, red: str, words: str) -> None:
    break_it(deployment)
    wrong = deployment.wrong()
    assert wrong.keys() == {red}
    assert words in wrong[red]


@pytest.mark.parametrize(
    ("option", "bad", "good", "red"),
    [
        ("maxmemory-policy", "volatile-ttl", "noeviction", "eviction"),
        ("appendonly", "no", "yes", "persistence"),
    ],
)
def test_a_server_that_loses_things_is_red(deployment: Deployment, option: str, bad: str, good: str, red: str) -> None:
    deployment.store.config_set(option, bad)
    try:
        assert deployment.wrong().keys() == {red}
    finally:
        deployment.store.config_set(option, good)


@pytest.mark.parametrize(("seconds", "words"), [(45, "45 s behind this host's"), (-45, "45 s ahead of this host's")])
def test_a_host_whose_clock_is_another_is_red(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, seconds: int, words: str
) -> None:
    monkeypatch.setattr(server, "time", SimpleNamespace(time=lambda: time.time() + seconds))
    assert deployment.wrong() == {"clock": f"{words}; let NTP set both"}


def test_a_server_that_is_away_is_red_and_its_password_not_told(deployment: Deployment) -> None:
    deployment.env["BALANCES_REDIS_URL"] = f"redis://:{CANARY}@{LOOPBACK}:{free_port()}/0"
    assert deployment.wrong().keys() == {"server"}
    assert CANARY not in repr(deployment.findings())


def test_a_mute_server_holds_nothing_up(deployment: Deployment, black_hole: str) -> None:
    deployment.env["BALANCES_REDIS_URL"] = black_hole.replace("https", "redis").replace(NAME, LOOPBACK)
    begun_s = time.monotonic()
    findings = deployment.findings()
    assert [finding.name for finding in findings if not finding.is_right] == ["server"]
    assert {"configuration", "secrets", "khipu", "webhook"} <= {finding.name for finding in findings}
    assert time.monotonic() - begun_s < checks.DEADLINE_S


# -------------------------------------------------------------------------------------------------------------- outside

OUTSIDE = {"khipu": "BALANCES_KHIPU_URL", "webhook": "BALANCES_CALLBACK_URL", "token_url": ""}


@pytest.fixture(params=OUTSIDE)
def moved(request: pytest.FixtureRequest, deployment: Deployment) -> tuple[str, Callable[[str], None]]:
    """One thing outside, and what puts it to another address."""
    name = request.param

    def move(url: str) -> None:
        if OUTSIDE[name]:
            deployment.env[OUTSIDE[name]] = url
        else:
            deployment.token_url = url

    return name, move


Moved = tuple[str, Callable[[str], None]]


def red_alone(deployment: Deployment, name: str) -> str:
    wrong = deployment.wrong()
    assert wrong.keys() == {name}
    return wrong[name]


def test_a_closed_port_is_red(deployment: Deployment, moved: Moved) -> None:
    name, move = moved
    move(url := closed())
    assert red_alone(deployment, name).startswith(f"{url}: nothing accepts a connection there; ")


def test_a_name_that_leads_nowhere_is_red(deployment: Deployment, moved: Moved) -> None:
    name, move = moved
    move("https://nowhere.test")
    assert "its name leads to no address" in red_alone(deployment, name)


def test_a_certificate_that_nobody_trusts_is_red(deployment: Deployment, moved: Moved, stack: ExitStack) -> None:
    name, move = moved
    move(at(stack.enter_context(Hostile(our_webhook, deployment.certificates.untrusted)).port))
    assert "its certificate is not trusted, or not for that name" in red_alone(deployment, name)


def test_a_certificate_of_another_name_is_red(deployment: Deployment, moved: Moved, stack: ExitStack) -> None:
    name, move = moved
    move(at(stack.enter_context(Hostile(our_webhook, deployment.certificates.good)).port, OTHER_NAME))
    assert "its certificate is not trusted, or not for that name" in red_alone(deployment, name)


def test_plain_http_where_tls_was_meant_is_red(deployment: Deployment, moved: Moved, stack: ExitStack) -> None:
    def refuse(peer: Peer) -> None:
        peer.connection.recv(5)
        peer.reply(400)
        peer.gone()

    name, move = moved
    move(at(stack.enter_context(Hostile(refuse)).port))
    assert "it does not speak TLS" in red_alone(deployment, name)


def test_a_black_hole_is_red_and_holds_nothing_up(deployment: Deployment, moved: Moved, black_hole: str) -> None:
    name, move = moved
    move(black_hole)
    assert red_alone(deployment, name).startswith(f"{black_hole}: no answer in 0.5 s; ")


def test_whatever_hangs_it_is_over_in_time(
    deployment: Deployment, moved: Moved, black_hole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "REACH_S", 60.0)
    monkeypatch.setattr(checks, "DEADLINE_S", 1.0)
    name, move = moved
    move(black_hole)
    assert red_alone(deployment, name) == "no answer in 1 s"


def elsewhere(peer: Peer) -> None:
    peer.answer(302, headers={"Location": f"{peer.server.elsewhere}/healthz"})


def another_service(peer: Peer) -> None:
    peer.answer(200, b'{"status": "ok"}')


def no_json(peer: Peer) -> None:
    peer.answer(200, b"<html>")


@pytest.mark.parametrize(
    ("script", "status"),
    [(another_service, 200), (no_json, 200), (elsewhere, 302)],
    ids=["another", "HTML", "redirect"],
)
def test_a_service_that_is_not_our_webhook_is_red(
    deployment: Deployment, stack: ExitStack, script: Callable[[Peer], None], status: int
) -> None:
    other = stack.enter_context(Hostile(script, deployment.certificates.good))
    other.elsewhere = deployment.env["BALANCES_CALLBACK_URL"]
    deployment.env["BALANCES_CALLBACK_URL"] = at(other.port)
    assert red_alone(deployment, "webhook").startswith(
        f"{at(other.port)}/healthz is not our webhook's (HTTP {status}); "
    )


def test_a_webhook_whose_certificate_ends_soon_is_red(deployment: Deployment, stack: ExitStack) -> None:
    ending = stack.enter_context(Hostile(our_webhook, deployment.certificates.ending))
    deployment.env["BALANCES_CALLBACK_URL"] = at(ending.port)
    assert red_alone(deployment, "webhook").startswith(f"{at(ending.port)}: its certificate ends at 20")


def test_a_webhook_on_this_machine_is_none_for_a_khipu_that_is_elsewhere(deployment: Deployment) -> None:
    deployment.env["BALANCES_CALLBACK_URL"] = deployment.env["BALANCES_CALLBACK_URL"].replace(NAME, LOOPBACK)
    assert red_alone(deployment, "webhook").startswith("Khipu cannot call https://127.0.0.1:")
