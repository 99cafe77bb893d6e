"""Limits on real processes: what is held back is not sent, everybody says why, and it goes on by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from machine import PATIENCE_S, Account, Machine, Process
from servers import wait_until

#: Each with a login of its own, and due more often than a log-on can answer.
ALIASES = ("one", "two", "three")
DAY_S = 86_400


class Office(Machine):
    """A deployment with a budget of two requests a day, in which three accounts were due at once."""

    first: Process
    clerk: Process


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    accounts = [Account(alias, every="20s") for alias in ALIASES]
    with Office(tmp_path_factory.mktemp("limits"), accounts, limits={"daily_requests": 2}) as office:
        noon = datetime.now(UTC).replace(hour=12, minute=0) + timedelta(days=1)
        office.move_clock((noon - datetime.now(UTC)).total_seconds())
        office.first = office.beat()
        office.kick(*ALIASES)
        office.clerk = office.worker()
        wait_until(lambda: office.clerk.said("held back"), PATIENCE_S, "the third")
        yield office


def asked(office: Office) -> int:
    return sum(len(office.requests(alias)) for alias in ALIASES)


def test_a_budget_is_a_limit_at_the_bank_and_everybody_says_why(office: Office) -> None:
    wait_until(lambda: office.first.said("daily budget spent"), PATIENCE_S, "word of it")
    assert asked(office) == 2
    assert [line["login"] for line in office.first.said("daily budget spent")] == [None]
    assert {line["why"] for line in office.clerk.said("held back")} == {"total budget"}
    [held] = {line["account"] for line in office.clerk.said("held back")}
    done = office.balances("check")
    assert done.returncode == 1
    assert "daily budget of all logins spent until" in " ".join(done.stdout.split())
    story = office.balances("accounts", held).stdout
    assert "Daily budget of all logins spent until" in story
    assert "Next poll: as soon as that allows" in story
    for alias in set(ALIASES) - {held}:
        office.until_entries(alias, 1)  # or the lease would end with the day
    office.move_clock(DAY_S)
    wait_until(lambda: asked(office) == 4, PATIENCE_S, "the next day's budget")


def test_an_impossible_load_is_warned_of_at_the_start_and_found_by_check(office: Office) -> None:
    told = [line["detail"] for line in office.first.said("impossible load")]
    over = "1 account × 40 s every 20s = 40 s of requests in 20 s: 2.0 times what one log-on can do; every ≥ 1m"
    assert f"login one: {over}" in told
    found = json.loads(office.balances("check", "--json").stdout)
    assert [each["detail"] for each in found if each["name"] == "load"] == told


def test_one_switch_pauses_everything_and_takes_it_off(office: Office) -> None:
    assert office.balances("pause", "--all").stdout == "every account: paused; go on with: balances resume --all\n"
    assert {row["state"] for row in json.loads(office.balances("accounts", "--json").stdout)} == {"paused"}
    refused = office.balances("resume", "one")
    assert refused.returncode == 1
    assert refused.stdout == "one: refused: everything is paused; go on with: balances resume --all\n"
    before = asked(office)
    office.move_clock(DAY_S)
    claimed_at = office.store.hget("config", "claimed_at")
    wait_until(lambda: office.store.hget("config", "claimed_at") != claimed_at, PATIENCE_S, "beat")
    wait_until(lambda: office.store.hget("login:one", "held_by") == "pause", PATIENCE_S, "one to be held back")
    assert asked(office) == before
    assert office.balances("resume", "--all").stdout == "every account: resumed\n"
    wait_until(lambda: asked(office) == before + 2, PATIENCE_S, "polls")
