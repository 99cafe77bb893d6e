"""What failures have in common, what a row of generic ones costs, and which loads are impossible: pure functions."""

from __future__ import annotations

from datetime import timedelta

import pytest

from worker import capacity
from worker.accounts import Accounts, parse_accounts
from worker.accounts import Retry as Ladders
from worker.errors import ConfigurationError, Kind, Outcome
from worker.policy import Cause, Counters, DeadLetter, DeadLetterQueue, Retry, cause_of, decide, probe_pauses

WAIT = timedelta(hours=4)
GENERIC = ("E000", "E999", "T000")


def answered(code: str, error_type: str | None = "RETRY_IMMEDIATELY") -> Outcome:
    return Outcome(Kind.ANSWERED, code, error_type)


# ---------------------------------------------------------------------------------------------------- generic failures


@pytest.mark.parametrize("code", GENERIC)
@pytest.mark.parametrize(("before", "countdown"), [(0, 5), (1, 5), (2, 14_400), (3, 14_400), (30, 14_400)])
def test_the_third_generic_failure_of_a_login_waits(code: str, before: int, countdown: int) -> None:
    decision = decide(answered(code), Counters(generic=before), 0.0, Ladders())
    assert isinstance(decision, Retry)
    assert decision.countdown == timedelta(seconds=countdown)
    assert decision.counters.waits == (before >= 2)
    assert decision.rest == (WAIT if before >= 2 else None), "and with it the whole login"


def test_other_failures_climb_whatever_the_login_has_spent() -> None:
    for outcome in (answered("E201"), answered("D000"), Outcome(Kind.TIMEOUT, "TIMEOUT")):
        decision = decide(outcome, Counters(generic=9), 0.0, Ladders())
        assert isinstance(decision, Retry)
        assert decision.countdown < timedelta(minutes=1)


def test_a_type_that_is_stricter_stays_so() -> None:
    counters = Counters(generic=9)
    assert decide(answered("E999", "DO_NOT_RETRY"), counters, 0.0, Ladders()) == DeadLetter(
        DeadLetterQueue.DO_NOT_RETRY, WAIT
    )


def test_even_so_waits_come_to_an_end() -> None:
    decision = decide(answered("E999"), Counters(waits=6, generic=9), 0.0, Ladders())
    assert decision == DeadLetter(DeadLetterQueue.RETRIES_EXHAUSTED, WAIT)


@pytest.mark.parametrize("error_type", ["RETRY_IMMEDIATELY", "WAIT_4_HOURS_BEFORE_RETRY", "RETRY_AFTER_NOTIFICATION"])
def test_the_login_rests_whatever_becomes_of_the_account_and_never_for_less_than_a_wait(error_type: str) -> None:
    for before, rest in ((1, None), (2, WAIT * 1.05)):
        decision = decide(answered("E999", error_type), Counters(generic=before), 1.0, Ladders())
        assert isinstance(decision, Retry | DeadLetter)
        assert decision.rest == rest


def test_no_other_failure_lets_the_login_rest() -> None:
    for outcome in (answered("E201"), answered("E401", "DO_NOT_RETRY"), answered("W", "WAIT_4_HOURS_BEFORE_RETRY")):
        decision = decide(outcome, Counters(generic=9), 0.0, Ladders())
        assert isinstance(decision, Retry | DeadLetter)
        assert decision.rest is None


# --------------------------------------------------------------------------------------------------- what is in common


@pytest.mark.parametrize(
    ("outcome", "cause"),
    [
        *((answered(code), Cause.GENERIC) for code in GENERIC),
        (answered("E201"), Cause.UNAVAILABLE),
        (answered("E299", "DO_NOT_RETRY"), Cause.UNAVAILABLE),
        (Outcome(Kind.SERVER_ERROR, "HTTP_504"), Cause.GATEWAY),
        (Outcome(Kind.UNREADABLE, "UNREADABLE"), Cause.UNREADABLE),
        (answered("E101"), None),
        (answered("E301"), None),
        (answered("E2011"), None),
        (answered("A000"), None),
        *(
            (Outcome(kind, "E201"), None)
            for kind in Kind
            if kind not in {Kind.ANSWERED, Kind.SERVER_ERROR, Kind.UNREADABLE}
        ),
    ],
)
def test_the_cause_that_a_failure_may_have_in_common_with_others(outcome: Outcome, cause: Cause | None) -> None:
    assert cause_of(outcome) is cause


def test_probes_follow_the_transient_ladder_but_never_less_often_than_every_ten_minutes() -> None:
    minutes = [pause / timedelta(minutes=1) for pause in probe_pauses(Ladders())]
    assert minutes == [0.5, 2, 10, 10]


# ------------------------------------------------------------------------------------------------------ impossible load


def accounts(number: int, timing: str = 'every = "15m"', head: str = "", login: str = "") -> Accounts:
    """So many accounts of login acme."""
    tables = "".join(
        f'[[accounts]]\nalias = "a{index}"\ninstitution = "bank.cl"\nnumber = "{index}"\nlogin = "acme"\n{timing}\n'
        for index in range(number)
    )
    return parse_accounts(f"{head}\n[logins.acme]\n{login}\n{tables}", "accounts.toml", callback_configured=False)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (accounts(22), []),
        (
            accounts(100),
            [
                "login acme: 100 accounts × 40 s every 15m = 4,000 s of requests in 900 s: 4.4 times what one log-on "
                "can do; at most 22 accounts, or every ≥ 67m"
            ],
        ),
        (
            accounts(1, 'every = "10s"'),
            [
                "login acme: 1 account × 40 s every 10s = 40 s of requests in 10 s: 4.0 times what one log-on can do; "
                "every ≥ 1m"
            ],
        ),
        (accounts(1, 'every = "10s"\nmin_gap = "1m"'), []),
        (
            accounts(2, 'cron = "0,1 9 * * *"'),
            [
                "login acme: 2 accounts × 40 s every 1m = 80 s of requests in 60 s: 1.3 times what one log-on can do; "
                "at most 1 account, or every ≥ 2m"
            ],
        ),
        (accounts(20, 'cron = "0 9 29 2 *"'), []),
        (
            accounts(20, head="[limits]\nrate = 1"),
            ["institution cl/business/bank.cl: 20 accounts ask 1.3 times a minute, limits.rate allows 1"],
        ),
        (accounts(15, head="[limits]\nrate = 1"), []),
        (
            accounts(2, head="[limits]\ndaily_requests = 191"),
            ["all logins: 2 accounts ask 192 times a day, limits.daily_requests allows 191"],
        ),
        (accounts(2, head="[limits]\ndaily_requests = 192"), []),
        (
            accounts(2, login="daily_requests = 100"),
            ["login acme: 2 accounts ask 192 times a day, logins.acme.daily_requests allows 100"],
        ),
        (accounts(1, 'cron = "*/10 8-9 * * *"', head="[limits]\ndaily_requests = 12"), []),
        (
            accounts(1, 'cron = "*/10 8-9 * * *"', head="[limits]\ndaily_requests = 11"),
            ["all logins: 1 account asks 12 times a day, limits.daily_requests allows 11"],
        ),
    ],
)
def test_an_impossible_load_is_told_with_its_arithmetic(asked: Accounts, told: list[str]) -> None:
    assert list(capacity.impossible(asked)) == told


def test_intervals_that_differ_are_added_up_over_an_hour() -> None:
    mixed = parse_accounts(
        "[logins.acme]\n"
        + "".join(
            f'[[accounts]]\nalias = "a{every}"\ninstitution = "bank.cl"\nnumber = "{every}"\nlogin = "acme"\n'
            f'every = "{every}m"\n'
            for every in (1, 2)
        ),
        "accounts.toml",
        callback_configured=False,
    )
    assert list(capacity.impossible(mixed)) == []
    crowded = parse_accounts(
        "[logins.acme]\n"
        + "".join(
            f'[[accounts]]\nalias = "a{index}"\ninstitution = "bank.cl"\nnumber = "{index}"\nlogin = "acme"\n'
            f'every = "{1 + index % 2}m"\n'
            for index in range(3)
        ),
        "accounts.toml",
        callback_configured=False,
    )
    told = "login acme: 3 accounts × 40 s = 6,000 s of requests in an hour: 1.7 times what one log-on can do"
    assert list(capacity.impossible(crowded)) == [told]


@pytest.mark.parametrize("wrong", ["0", '"5"', "-1", "1.5", "true"])
def test_a_logins_budget_is_read_strictly(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=r"logins\.acme\.daily_requests"):
        accounts(1, login=f"daily_requests = {wrong}")
