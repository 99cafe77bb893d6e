"""Read how a step is delivered in callback mode: `ok | early | twice`, or the `callback` of a step's object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from worker.sandbox.behaviour import LIFE_SPAN_OFFSET, Callback, Latency, LifeSpan, Step, Timing
from worker.sandbox.reading import NotationError, allow, flag, seconds

#: Between a step and its modifiers, and between these.
SEPARATOR = " | "
FLAGS = ("early", "never", "twice", "other_operation", "wrong_token")
NAMES = (*FLAGS, "late", "then", "and", "accept", "but", "life_span")
AT_ONCE = "at once"
OFFSET = re.compile(r"Z|[+-]\d{4}")
NAIVE = "naive"
#: `LifeSpan` that is no moment: the word for it, and what is sent.
LITERALS = {"null": "null", "absent": "", "unreadable": '"soon"'}


def fields_of(modifiers: list[str]) -> dict[str, object]:
    """The object form of a string's modifiers. Raises NotationError."""
    fields: dict[str, object] = {}
    for modifier in modifiers:
        written, _, argument = modifier.partition(" ")
        name = written.replace("-", "_")
        if name not in NAMES or "_" in written:
            raise NotationError(f"unknown modifier {written!r}, not one of {', '.join(NAMES).replace('_', '-')}")
        if name in fields:
            raise NotationError(f"modifier {written!r} stands there twice")
        if name in FLAGS and name != "twice" and argument:
            raise NotationError(f"modifier {written!r} takes no argument")
        fields[name] = True if name in FLAGS and not argument else argument
    return fields


def parse_callback(fields: object, parse_step: Callable[[object], Step]) -> Callback:
    """How a step is delivered. Raises NotationError."""
    if not isinstance(fields, dict):
        raise NotationError(f"callback is an object such as {{'twice': true}}, not {fields!r}")
    allow(fields, NAMES, "callback")
    _exclusive(fields, ("early", "late", "never"))
    _exclusive(fields, ("twice", "then", "and"))
    callback = Callback(
        timing=_timing(fields),
        late_s=seconds(fields["late"]) if "late" in fields else 0.0,
        other_operation=flag(fields, "other_operation"),
        wrong_token=flag(fields, "wrong_token"),
        accept_s=seconds(fields["accept"]) if "accept" in fields else 0.0,
        but=_plain(fields["but"], parse_step) if "but" in fields else None,
        life_span=parse_life_span(fields["life_span"]) if "life_span" in fields else LifeSpan(),
    )
    return _with_second(callback, fields, parse_step)


def parse_life_span(value: object) -> LifeSpan:
    """`10s`, `-10s +0900`, `10s naive`, a word of LITERALS, or `{"literal": JSON}`. Raises NotationError."""
    if isinstance(value, dict) and set(value) == {"literal"}:
        return LifeSpan(literal=json.dumps(value["literal"]))
    if not isinstance(value, str):
        raise NotationError(f"life_span {value!r} is no string such as '10s', nor {{'literal': JSON}}")
    if value in LITERALS:
        return LifeSpan(literal=LITERALS[value])
    when, space, offset = value.partition(" ")
    if space and offset != NAIVE and not OFFSET.fullmatch(offset):
        raise NotationError(f"offset {offset!r} is none such as '-0400', 'Z' or 'naive'")
    in_s = -seconds(when[1:]) if when.startswith("-") else seconds(when)
    return LifeSpan(in_s, "" if offset == NAIVE else offset or LIFE_SPAN_OFFSET)


def _exclusive(fields: Mapping[str, object], names: tuple[str, ...]) -> None:
    if len(given := [name for name in names if fields.get(name, False) is not False]) > 1:
        raise NotationError(f"{given[0]} and {given[1]} exclude each other")


def _timing(fields: Mapping[str, object]) -> Timing:
    if "late" in fields:
        return Timing.LATE
    if flag(fields, "early"):
        return Timing.EARLY
    return Timing.NEVER if flag(fields, "never") else Timing.ON_TIME


def _with_second(callback: Callback, fields: Mapping[str, object], parse_step: Callable[[object], Step]) -> Callback:
    if "then" in fields:
        step = parse_step(fields["then"])
        return replace(callback, second=_plain(replace(step, latency=None), _same), pause_s=_pause(step.latency))
    if "and" in fields:
        return replace(callback, second=_plain(fields["and"], parse_step), at_once=True)
    match fields.get("twice", False):
        case bool(twice):
            return replace(callback, twice=twice)
        case str(text) if text == AT_ONCE:
            return replace(callback, twice=True, at_once=True)
        case pause:
            return replace(callback, twice=True, pause_s=seconds(pause))


def _plain(value: object, parse_step: Callable[[object], Step]) -> Step:
    """A step within a modifier: it has neither a latency nor modifiers."""
    step = parse_step(value)
    if step.latency is not None or step.callback != Callback():
        raise NotationError(
            "a step within a modifier takes neither a latency (accept is that of the 202) nor modifiers"
        )
    return step


def _same(step: object) -> Step:
    assert isinstance(step, Step)  # noqa: S101 - for mypy
    return step


def _pause(latency: Latency | None) -> float:
    if latency is None:
        return 0.0
    if latency.low_s != latency.high_s:
        raise NotationError("the pause before a second callback is no range")
    return latency.low_s
