"""The accounts file of the sandbox, its scenarios and its secrets belong together."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from worker.sandbox import scenarios
from worker.sandbox.bank import LogOn
from worker.sandbox.notation import parse_plan

ACCOUNTS = Path(__file__).parents[2] / "config" / "sandbox.toml"


@pytest.fixture(scope="module")
def file() -> dict[str, Any]:
    return tomllib.loads(ACCOUNTS.read_text())


def test_every_account_has_a_scenario_and_every_scenario_an_account(file: dict[str, Any]) -> None:
    numbers = [account["number"] for account in file["accounts"]]
    assert sorted(numbers) == sorted(set(scenarios.plans()) - {scenarios.EXAMPLE_NUMBER})


def test_every_scenario_can_be_read() -> None:
    for plan in scenarios.plans().values():
        parse_plan(plan)


def test_every_login_has_its_secrets_and_no_secret_is_left_over(file: dict[str, Any]) -> None:
    expected = {"BALANCES_SECRET_DEFAULT_API_KEY"}
    for login, table in file["logins"].items():
        field = "TOKEN" if table["scheme"] == "bearer" else "ACCOUNT_CREDENTIAL"
        expected.add(f"BALANCES_SECRET_{login.upper()}_{field}")
    assert set(scenarios.sandbox_secrets()) == expected
    assert {account["login"] for account in file["accounts"]} == set(file["logins"])


def test_the_bank_lets_every_login_in_but_the_wrong_one() -> None:
    log_ons, refused = scenarios.log_ons(), []
    for name, value in scenarios.sandbox_secrets().items():
        if name.endswith("_ACCOUNT_CREDENTIAL"):
            credential = json.loads(value)
            if LogOn(log_ons[credential["username"]]).try_(credential) is not None:
                refused.append(name)
    assert refused == ["BALANCES_SECRET_HOOLI_ACCOUNT_CREDENTIAL"]


def test_each_ending_is_shown_by_exactly_as_many_accounts_as_the_readme_says(file: dict[str, Any]) -> None:
    def first(number: str) -> str:
        return parse_plan(scenarios.plans()[number]).step(number, 0).label

    firsts = [first(account["number"]) for account in file["accounts"]]
    for type_ in ("RETRY_IMMEDIATELY", "WAIT_4_HOURS_BEFORE_RETRY", "DO_NOT_RETRY", "RETRY_AFTER_NOTIFICATION"):
        assert sum(label.endswith(type_) for label in firsts) == 1
    assert (firsts.count("no-data"), firsts.count("http:504")) == (1, 1)
    assert sum(account["login"] == scenarios.WRONG_LOGIN for account in file["accounts"]) == 2


def test_everything_is_seen_within_forty_seconds(file: dict[str, Any]) -> None:
    """The first poll comes within `every`; then the longest climb is two transient countdowns."""
    assert file["retry"]["wait"] == "4h"
    every = [account.get("every", file["defaults"]["every"]) for account in file["accounts"]]
    assert max(float(text.removesuffix("s")) for text in every) <= 15
