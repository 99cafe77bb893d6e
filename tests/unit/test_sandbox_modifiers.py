"""How a step is delivered in callback mode is read strictly, from a string or an object."""

from __future__ import annotations

import pytest

from worker.sandbox.behaviour import AS_USUAL, Callback, LifeSpan, Timing
from worker.sandbox.notation import parse_plan, parse_step
from worker.sandbox.reading import NotationError


@pytest.mark.parametrize(
    ("text", "callback"),
    [
        ("ok", AS_USUAL),
        ("ok | early", Callback(timing=Timing.EARLY)),
        ("ok | late 5s", Callback(timing=Timing.LATE, late_s=5)),
        ("ok | never", Callback(timing=Timing.NEVER)),
        ("ok | twice", Callback(twice=True)),
        ("ok | twice 150ms", Callback(twice=True, pause_s=0.15)),
        ("ok | twice at once", Callback(twice=True, at_once=True)),
        ("ok | then error:E201:DO_NOT_RETRY", Callback(second=parse_step("error:E201:DO_NOT_RETRY"))),
        ("ok | then ok:7@2s", Callback(second=parse_step("ok:7"), pause_s=2)),
        ("ok | and ok:7", Callback(second=parse_step("ok:7"), at_once=True)),
        ("ok | other-operation | wrong-token", Callback(other_operation=True, wrong_token=True)),
        ("ok | accept 1s | but http:504", Callback(accept_s=1, but=parse_step("http:504"))),
        ("ok | life-span 48h", Callback(life_span=LifeSpan(172_800))),
        ("ok | life-span -5s +0900", Callback(life_span=LifeSpan(-5, "+0900"))),
        ("ok | life-span 5s Z", Callback(life_span=LifeSpan(5, "Z"))),
        ("ok | life-span 5s naive", Callback(life_span=LifeSpan(5, ""))),
        ("ok | life-span null", Callback(life_span=LifeSpan(literal="null"))),
        ("ok | life-span absent", Callback(life_span=LifeSpan(literal=""))),
        ("ok | life-span unreadable", Callback(life_span=LifeSpan(literal='"soon"'))),
    ],
)
def test_every_modifier_has_a_string(text: str, callback: Callback) -> None:
    assert parse_step(text).callback == callback


@pytest.mark.parametrize("step", ["no-data", "error:E201:RETRY_IMMEDIATELY:a: text", "malformed", "too-large:9@1s-2s"])
def test_a_modifier_goes_with_any_step(step: str) -> None:
    plain, modified = parse_step(step), parse_step(f"{step} | twice")
    assert (modified.label, modified.latency, modified.size) == (plain.label, plain.latency, plain.size)
    assert modified.callback.twice


def test_a_string_and_its_object_are_the_same() -> None:
    written = {
        "behaviour": "ok",
        "amount": "5",
        "latency": "2s",
        "callback": {"early": True, "twice": "at once", "wrong_token": True, "but": "drop", "life_span": "10s Z"},
    }
    text = "ok:5@2s | early | twice at once | wrong-token | but drop | life-span 10s Z"
    assert parse_step(text) == parse_step(written)


def test_a_life_span_may_be_any_json() -> None:
    step = parse_step({"behaviour": "ok", "callback": {"life_span": {"literal": {"a": [1, None]}}}})
    assert step.callback.life_span.literal == '{"a": [1, null]}'


def test_modifiers_are_named_for_records() -> None:
    text = "ok | late 5s | and error:E201:DO_NOT_RETRY:secret | other-operation | wrong-token | but http:504"
    assert parse_step(text).callback.modifiers == (
        "late", "and error:E201:DO_NOT_RETRY", "other-operation", "wrong-token", "but http:504",
    )  # fmt: skip


def test_chance_takes_modifiers_too() -> None:
    plan = parse_plan({"random": {"weights": {"ok | twice": 1, "ok | never": 0}}})
    assert plan.step("1", 0).callback.twice


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("ok | ", "unknown modifier ''"),
        ("ok | sometimes", "unknown modifier 'sometimes'"),
        ("ok | wrong_token", "unknown modifier 'wrong_token'"),
        ("ok|twice", "unknown behaviour"),
        ("ok | early 5s", "takes no argument"),
        ("ok | twice | twice", "stands there twice"),
        ("ok | early | never", "exclude each other"),
        ("ok | twice | then ok", "exclude each other"),
        ("ok | late", "duration ''"),
        ("ok | twice never", "duration 'never'"),
        ("ok | but", "unknown behaviour ''"),
        ("ok | but http:504@1s", "takes neither"),
        ("ok | and ok@1s", "takes neither"),
        ("ok | then ok@1s-2s", "no range"),
        ("ok | life-span soon", "duration 'soon'"),
        ("ok | life-span 5s CET", "offset 'CET'"),
        ("ok | accept 1s-2s", "duration '1s-2s'"),
    ],
)
def test_a_wrong_string_is_named_with_what_would_be_right(text: str, wrong: str) -> None:
    with pytest.raises(NotationError, match=wrong) as caught:
        parse_step(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "callback",
    [
        7,
        None,
        {"colour": "red"},
        {"early": "yes"},
        {"twice": 2},
        {"then": {"behaviour": "ok", "callback": {"twice": True}}},
        {"life_span": 7},
        {"life_span": {"literal": 1, "more": 2}},
        {"early": True, "late": "1s"},
    ],
)
def test_a_wrong_object_is_refused(callback: object) -> None:
    with pytest.raises(NotationError):
        parse_step({"behaviour": "ok", "callback": callback})


@pytest.mark.parametrize(
    ("step", "has_body"),
    [
        *((step, True) for step in ("ok", "malformed", "http:200:x", "drip")),
        *((step, False) for step in ("http:302", "http:504", "hang", "drop")),
    ],
)
def test_only_what_has_a_body_can_be_called_back(step: str, has_body: bool) -> None:
    assert parse_step(step).has_body is has_body
