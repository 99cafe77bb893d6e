"""Tokens that end: told in time, to the log, to `check` and to the exporter; never sent once they have ended."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from poller import Poller
from sandbox_client import SandboxClient, running_sandbox
from structlog.testing import capture_logs
from world import START_MS

from worker import ops
from worker.accounts import parse_accounts
from worker.credentials import CredentialStore
from worker.lifecycle import Consumption, Presence, TokenWatch, check_secrets, unblock_with_new_secrets
from worker.settings import load_settings

VARIABLE = "BALANCES_SECRET_ACME_TOKEN"
DAY_S = 86_400
START_S = START_MS // 1000
FILE = """
[logins.acme]
scheme = "bearer"
token_days = 10

[[accounts]]
alias = "a"
institution = "bancosecurity.cl"
number = "9000001"
login = "acme"
"""


def token(end_s: int | None, name: str = "canary") -> str:
    claims = {"sub": name} if end_s is None else {"sub": name, "exp": end_s}
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.x"


@pytest.fixture(scope="module")
def shared() -> Iterator[SandboxClient]:
    with running_sandbox() as client:
        yield client


@pytest.fixture
def poller(store: redis.Redis, shared: SandboxClient) -> Poller:
    shared.reset()
    return Poller(store, FILE, shared.url, {VARIABLE: token(START_S + 30 * DAY_S)})


def look(poller: Poller, watch: TokenWatch) -> list[tuple[str, object]]:
    """What the watch has to say: event and days."""
    with capture_logs() as logs:
        watch.look(poller.world.timetable.logins())
    assert "canary" not in repr(logs)
    return [(entry["event"], entry.get("days")) for entry in logs]


def test_a_token_is_warned_of_once_a_day_and_told_when_it_has_ended(poller: Poller) -> None:
    watch = TokenWatch(poller.wiring)
    assert look(poller, watch) == []
    poller.world.pass_time(timedelta(days=21))
    assert look(poller, watch) == [("token ends soon", 8)]
    assert look(poller, watch) == []
    poller.world.pass_time(timedelta(hours=23))
    assert look(poller, watch) == []
    poller.world.pass_time(timedelta(hours=1))
    assert look(poller, watch) == [("token ends soon", 7)]
    poller.world.pass_time(timedelta(days=9))
    assert look(poller, watch) == [("token has ended", None)]
    assert look(poller, watch) == []


def test_token_days_of_the_accounts_file_count_from_the_next_look_on(poller: Poller) -> None:
    watch = TokenWatch(poller.wiring)
    assert look(poller, watch) == []
    poller.apply(FILE.replace("token_days = 10", "token_days = 40"))
    assert look(poller, watch) == [("token ends soon", 29)]


def test_a_worker_does_not_look_at_the_token_of_a_removed_login(poller: Poller) -> None:
    presence = Presence(poller.wiring, "worker", 1, Consumption(poller.world.timetable, set(), 1))
    presence._next_tokens_s = 0.0
    TokenWatch(poller.wiring).look(poller.world.timetable.logins())
    poller.apply(FILE.replace("acme", "beta"))
    presence._round()
    assert "token_expires" not in poller.world.login("acme")


def test_the_end_stands_at_the_login_as_long_as_it_has_one(poller: Poller) -> None:
    def noted() -> str | None:
        TokenWatch(poller.wiring).look(poller.world.timetable.logins())
        return poller.world.login().get("token_expires")

    assert noted() == str(START_S + 30 * DAY_S)
    poller.hold({VARIABLE: token(START_S + 60 * DAY_S)})
    assert noted() == str(START_S + 60 * DAY_S)
    poller.hold({})  # another host has it
    assert noted() == str(START_S + 60 * DAY_S)
    poller.hold({VARIABLE: token(None)})
    assert noted() is None
    poller.hold({VARIABLE: token(START_S + DAY_S)})
    assert noted() is not None
    poller.apply(FILE.replace("bearer", "api-key"))
    assert noted() is None


def test_a_token_that_has_ended_is_never_sent_and_only_another_one_unblocks(
    poller: Poller, shared: SandboxClient
) -> None:
    assert poller.poll("a") is None
    poller.world.pass_time(timedelta(days=30))
    world, logins = poller.world, poller.world.timetable.logins
    poller.poll("a")
    for _ in range(3):
        world.pass_time(timedelta(minutes=2))
        poller.poll("a")
    assert logins()["acme"]["blocked"] == "key"
    assert logins()["acme"]["description"] == "login acme: its token has ended; replace it"
    assert len(shared.requests()) == 1

    unblock_with_new_secrets(poller.wiring, logins())
    assert "blocked" in logins()["acme"]
    poller.hold({VARIABLE: token(START_S + 90 * DAY_S)})
    unblock_with_new_secrets(poller.wiring, logins())
    assert "blocked" not in logins()["acme"]
    assert poller.poll("a") is None
    assert len(shared.requests()) == 2


@pytest.mark.parametrize(
    ("days", "wanted"),
    [
        (30, None),
        (9, "login acme: its token ends at 2027-01-24T08:03:20.000Z, in 9 days; "),
        (-1, "its token ended at"),
    ],
)
def test_check_tells_of_a_token_that_ends(poller: Poller, days: int, wanted: str | None) -> None:
    accounts = parse_accounts(FILE, "accounts.toml", callback_configured=False)
    settings = load_settings({"BALANCES_REDIS_URL": "redis://127.0.0.1", "BALANCES_ACCOUNTS": "-"})
    credentials = CredentialStore({VARIABLE: token(START_S + days * DAY_S)}, None)
    found = [each for each in ops.check(settings, accounts, credentials, poller.world.client) if each.name == "token"]
    assert [each.is_right for each in found] == ([False] if wanted else [])
    assert wanted is None or wanted in found[0].detail


def test_a_start_warns_of_secrets_that_others_can_read(poller: Poller, tmp_path: Path) -> None:
    for name, mode in (("acme.token", 0o644), ("other.token", 0o644)):
        (tmp_path / name).write_text(token(None))
        (tmp_path / name).chmod(mode)
    poller.hold({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    with capture_logs() as logs:
        check_secrets(poller.wiring)
    assert [entry["event"] for entry in logs] == ["secret open to others"]
    assert str(tmp_path / "acme.token") in logs[0]["where"]
