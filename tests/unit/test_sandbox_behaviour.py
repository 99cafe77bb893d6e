"""The notation of the sandbox's behaviours is read strictly."""

from __future__ import annotations

import pytest

from worker.sandbox.behaviour import Behaviour, Latency, Money
from worker.sandbox.notation import parse_plan, parse_step
from worker.sandbox.reading import NotationError, parse_latency


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("ok", "ok"),
        ("no-data", "no-data"),
        ("empty", "empty"),
        ("error:E201:RETRY_IMMEDIATELY", "error:E201:RETRY_IMMEDIATELY"),
        ("error:E201:SOMETHING_NEW:a text: with colons", "error:E201:SOMETHING_NEW"),
        ("error:E201:null", "error:E201:null"),
        ("error:null", "error:null"),
        ("http:504", "http:504"),
        ('http:200:{"Amount": NaN}', "http:200"),
        ("malformed", "malformed"),
        ("schema", "schema"),
        ("too-large", "too-large"),
        ("too-large:100", "too-large"),
        ("foreign", "foreign"),
        ("hang", "hang"),
        ("drop@1s", "drop"),
        ("drip:10ms", "drip"),
    ],
)
def test_every_behaviour_has_a_string(text: str, label: str) -> None:
    assert parse_step(text).label == label


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "unknown behaviour"),
        ("OK", "unknown behaviour"),
        ("ok:", "ok takes"),
        ("ok:1,5", "no JSON number"),
        ("ok:NaN", "no JSON number"),
        ("ok:01", "no JSON number"),
        ("ok@2", "duration '2'"),
        ("ok@", "duration ''"),
        ("ok@3s-1s", "ends before it begins"),
        ("hang:3", "takes no argument"),
        ("error:E201", "error takes"),
        ("error", "error takes"),
        ("http", "status"),
        ("http:99", "status"),
        ("http:abc", "status"),
        ("too-large:-1", "size"),
    ],
)
def test_a_wrong_string_is_named_with_what_would_be_right(text: str, wrong: str) -> None:
    with pytest.raises(NotationError, match=wrong) as caught:
        parse_step(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        7,
        None,
        {},
        {"behaviour": "ok", "colour": "red"},
        {"behaviour": "hang", "operation_id": "x", "amount": "1"},
        {"behaviour": "ok", "amount": "1", "balances": []},
        {"behaviour": "ok", "balances": [{"sum": "1"}]},
        {"behaviour": "ok", "amount": True},
        {"behaviour": "error", "code": None, "type": "DO_NOT_RETRY"},
        {"behaviour": "http", "status": 200, "headers": ["a"]},
    ],
)
def test_a_wrong_object_is_refused(value: object) -> None:
    with pytest.raises(NotationError):
        parse_step(value)


def test_an_empty_argument_is_the_default() -> None:
    assert parse_step("ok::USD").balances == (Money(currency="USD"),)
    assert parse_step("ok:1:CLP:id:ClosingBooked").balances == (
        Money(amount="1", currency="CLP", account_id="id", type="ClosingBooked"),
    )


def test_a_string_and_its_object_are_the_same_step() -> None:
    written = {"behaviour": "error", "code": "E401", "type": "DO_NOT_RETRY", "description": "no", "latency": "1s-2s"}
    assert parse_step(written) == parse_step("error:E401:DO_NOT_RETRY:no@1s-2s")


@pytest.mark.parametrize(
    ("text", "low_s", "high_s"), [("2s", 2, 2), ("150ms", 0.15, 0.15), ("0.2s-3s", 0.2, 3), ("3m", 180, 180)]
)
def test_latency_is_fixed_or_a_range(text: str, low_s: float, high_s: float) -> None:
    assert parse_latency(text) == Latency(low_s, high_s)


def test_the_last_step_repeats_unless_the_script_cycles() -> None:
    script = ["ok", "hang", "drop"]
    once, cycling = parse_plan({"script": script}), parse_plan({"script": script, "cycle": True})
    assert [once.step("1", position).label for position in range(5)] == ["ok", "hang", "drop", "drop", "drop"]
    assert [cycling.step("1", position).label for position in range(5)] == ["ok", "hang", "drop", "ok", "hang"]


def test_a_latency_on_the_step_wins_over_the_plans() -> None:
    plan = parse_plan({"script": ["ok@3s", "ok"], "latency": "1s"})
    assert [plan.delay_s(plan.step("1", position), "1", position) for position in (0, 1)] == [3, 1]


def test_chance_is_the_same_in_every_run_and_follows_its_weights() -> None:
    written = {"random": {"weights": {"ok": 9, "hang": 1, "drop": 0}, "seed": 7}, "latency": "1s-2s"}
    drawn = [
        [(step := plan.step("1", position)).behaviour, plan.delay_s(step, "1", position)]
        for plan in (parse_plan(written), parse_plan(written))
        for position in range(500)
    ]
    assert drawn[:500] == drawn[500:]
    behaviours = [behaviour for behaviour, _ in drawn[:500]]
    assert set(behaviours) == {Behaviour.OK, Behaviour.HANG}
    assert 20 < behaviours.count(Behaviour.HANG) < 90
    assert all(1 <= delay <= 2 for _, delay in drawn)


@pytest.mark.parametrize(
    "value",
    [
        ["ok"],
        {"script": []},
        {"script": "ok"},
        {"scripts": ["ok"]},
        {"script": ["ok"], "cycle": "yes"},
        {"script": ["ok"], "random": {"weights": {"ok": 1}}},
        {"random": {"weights": {}}},
        {"random": {"weights": {"ok": 0}}},
        {"random": {"weights": {"ok": "nan"}}},
        {"random": {"weights": {"ok": 1}, "seeds": 1}},
        {"latency": 2},
    ],
)
def test_a_wrong_plan_is_refused(value: object) -> None:
    with pytest.raises(NotationError):
        parse_plan(value)
