"""The sandbox's bank keeps balances exactly, and locks users out as banks do."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from worker.sandbox.bank import Account, Bank, LogOn, fingerprint, user_of
from worker.sandbox.notation import parse_plan


@pytest.mark.parametrize(
    ("currency", "shape"), [("CLP", r"\d+"), ("USD", r"\d+\.\d\d"), ("CLF", r"\d+\.\d{4}"), ("XYZ", r"\d+\.\d\d")]
)
def test_amounts_have_their_currencys_decimals(currency: str, shape: str) -> None:
    account = Account("10000001")
    assert all(re.fullmatch(shape, account.amount(currency)) for _ in range(50))


def test_balances_drift_now_and_then_and_are_the_same_in_every_run() -> None:
    first, again = Account("10000001"), Account("10000001")
    amounts = [first.amount("CLP") for _ in range(50)]
    assert amounts == [again.amount("CLP") for _ in range(50)]
    changes = sum(one != other for one, other in pairwise(amounts))
    assert 10 < changes < 40


def test_three_wrong_credentials_in_a_row_lock_even_the_right_one_out() -> None:
    log_on = LogOn({"password": "right"})
    right, wrong = {"username": "u", "password": "right"}, {"username": "u", "password": "wrong"}
    assert [_code(log_on, sent) for sent in (wrong, wrong, right, wrong, wrong, wrong, right)] == [
        "E101", "E101", None, "E101", "E101", "E101", "E102",
    ]  # fmt: skip
    assert log_on.wrong == 5


def _code(log_on: LogOn, credential: object) -> str | None:
    step = log_on.try_(credential)
    return step.code if step else None


def test_a_refused_log_on_does_not_use_up_the_script() -> None:
    bank = Bank({"1": parse_plan({"script": ["empty", "ok"], "latency": "1s"})}, {"u": {"password": "right"}})
    account = bank.account("1")
    assert bank.log_on(account, {"username": "u", "password": "wrong"}) is not None
    assert bank.log_on(account, {"username": "u", "password": "right"}) is None
    step, delay_s = bank.next_step(account)
    assert (step.label, delay_s) == ("empty", 1)


def test_new_defaults_start_at_their_first_step_for_every_account_without_a_plan() -> None:
    bank = Bank({}, {})
    account = bank.account("1")
    bank.next_step(account)
    bank.define_default(parse_plan({"script": ["empty", "ok"]}))
    assert [bank.next_step(account)[0].label for _ in range(3)] == ["empty", "ok", "ok"]


@pytest.mark.parametrize(
    ("credential", "user"),
    [
        ({"username": "a", "password": "b"}, "a"),
        ({"rut": "1-9"}, "1-9"),
        ({"user": ""}, None),
        ({}, None),
        ("text", None),
        ([1], None),
    ],
)
def test_the_user_is_found_where_the_credential_names_one(credential: object, user: str | None) -> None:
    assert user_of(credential) == user


def test_a_fingerprint_does_not_depend_on_the_order_of_fields() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})
