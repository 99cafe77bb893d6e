"""Read steps and plans, strictly, from the strings and the JSON that `behaviour` explains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from worker.sandbox.behaviour import AS_USUAL, Behaviour, Latency, Money, Plan, Step
from worker.sandbox.modifiers import SEPARATOR, fields_of, parse_callback
from worker.sandbox.reading import NotationError, allow, flag, integer, parse_latency, seconds, text

#: The arguments of the string form, by position.
POSITIONS: Mapping[Behaviour, tuple[str, ...]] = {
    Behaviour.OK: ("amount", "currency", "account_id", "type"),
    Behaviour.ERROR: ("code", "type", "description"),
    Behaviour.HTTP: ("status", "body"),
    Behaviour.TOO_LARGE: ("size",),
    Behaviour.FOREIGN: ("account_id",),
    Behaviour.DRIP: ("interval",),
}
COMMON_FIELDS = ("behaviour", "latency", "callback")
BALANCE_FIELDS = ("amount", "currency", "account_id", "type", "indicator", "date_time")
ENVELOPE_FIELDS = ("operation_id", "additional_information")
#: The fields of the object form, besides COMMON_FIELDS.
FIELDS: Mapping[Behaviour, tuple[str, ...]] = {
    Behaviour.OK: (*BALANCE_FIELDS, "balances", *ENVELOPE_FIELDS),
    Behaviour.FOREIGN: (*BALANCE_FIELDS, "balances", *ENVELOPE_FIELDS),
    Behaviour.NO_DATA: ENVELOPE_FIELDS,
    Behaviour.EMPTY: ENVELOPE_FIELDS,
    Behaviour.ERROR: ("code", "type", "description", *ENVELOPE_FIELDS),
    Behaviour.HTTP: ("status", "body", "content_type", "headers"),
    Behaviour.TOO_LARGE: ("size",),
    Behaviour.DRIP: ("interval",),
}
#: The grammar of a JSON number: what is sent is what was written.
JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


def parse_step(value: object) -> Step:
    """A step from its string or its object. Raises NotationError."""
    if isinstance(value, str):
        try:
            return _from_object(_fields_of(value))
        except NotationError as error:
            raise NotationError(f"step {value!r}: {error}") from None
    if isinstance(value, dict):
        return _from_object(value)
    raise NotationError(f"a step is a string or an object, not {value!r}")


def _fields_of(written: str) -> dict[str, object]:
    """The object form of a string."""
    answer, *modifiers = written.split(SEPARATOR)
    what, at, latency = answer.rpartition("@") if "@" in answer else (answer, "", "")
    name, *rest = what.split(":", 1)
    behaviour = _behaviour(name)
    names = POSITIONS.get(behaviour, ())
    arguments = rest[0].split(":", len(names) - 1) if rest and names else rest
    if len(arguments) > len(names) or (arguments and not arguments[-1]):
        raise NotationError(f"{name} takes {':'.join(names) or 'no argument'}")
    fields: dict[str, object] = {"behaviour": name}
    fields |= {key: value for key, value in zip(names, arguments, strict=False) if value}
    if at:
        fields["latency"] = latency
    if modifiers:
        fields["callback"] = fields_of(modifiers)
    return _read_nulls(fields)


def _read_nulls(fields: dict[str, object]) -> dict[str, object]:
    """`error:null` and `error:CODE:null` mean JSON's null, in a string that has no other way to say so."""
    if fields["behaviour"] == Behaviour.ERROR:
        fields |= {key: None for key in ("code", "type") if fields.get(key) == "null"}
    return fields


def _behaviour(name: object) -> Behaviour:
    try:
        return Behaviour(str(name))
    except ValueError:
        raise NotationError(f"unknown behaviour {name!r}, not one of {', '.join(Behaviour)}") from None


def _from_object(fields: Mapping[str, object]) -> Step:
    behaviour = _behaviour(fields.get("behaviour"))
    allow(fields, (*COMMON_FIELDS, *FIELDS.get(behaviour, ())), behaviour)
    step = Step(
        behaviour=behaviour,
        latency=parse_latency(fields["latency"]) if "latency" in fields else None,
        operation_id=text(fields, "operation_id"),
        additional_information=text(fields, "additional_information"),
        callback=parse_callback(fields["callback"], parse_step) if "callback" in fields else AS_USUAL,
    )
    match behaviour:
        case Behaviour.OK | Behaviour.FOREIGN:
            return replace(step, balances=_balances(fields))
        case Behaviour.ERROR:
            return _error(step, fields)
        case Behaviour.HTTP:
            return _http(step, fields)
        case Behaviour.TOO_LARGE if "size" in fields:
            return replace(step, size=integer(fields, "size", 1, 1 << 30))
        case Behaviour.DRIP if "interval" in fields:
            return replace(step, interval_s=seconds(fields["interval"]))
        case _:
            return step


def _error(step: Step, fields: Mapping[str, object]) -> Step:
    if "code" in fields and fields["code"] is None:
        allow(fields, (*COMMON_FIELDS, "code", *ENVELOPE_FIELDS), "error:null")
        return replace(step, null_error=True)
    code = text(fields, "code")
    if not code or "type" not in fields:
        raise NotationError("error takes CODE:TYPE[:DESCRIPTION], or null")
    return replace(step, code=code, type=text(fields, "type"), description=text(fields, "description"))


def _http(step: Step, fields: Mapping[str, object]) -> Step:
    return replace(
        step,
        status=integer(fields, "status", 200, 599),
        body=text(fields, "body"),
        content_type=text(fields, "content_type"),
        headers=_headers(fields.get("headers", {})),
    )


def _balances(fields: Mapping[str, object]) -> tuple[Money, ...]:
    if "balances" not in fields:
        return (_money({name: fields[name] for name in BALANCE_FIELDS if name in fields}),)
    if clash := [name for name in BALANCE_FIELDS if name in fields]:
        raise NotationError(f"balances and {clash[0]} exclude each other")
    elements = fields["balances"]
    if not isinstance(elements, list) or not all(isinstance(element, dict) for element in elements):
        raise NotationError("balances is a list of objects")
    return tuple(_money(element) for element in elements)


def _money(fields: Mapping[str, object]) -> Money:
    allow(fields, BALANCE_FIELDS, "a balance")
    amount = text(fields, "amount")
    if amount is not None and not JSON_NUMBER.fullmatch(amount):
        raise NotationError(f"amount {amount!r} is no JSON number (http:200:BODY sends anything)")
    return Money(**{name: text(fields, name) for name in BALANCE_FIELDS})


def _headers(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or not all(isinstance(header, str) for header in value.values()):
        raise NotationError("headers is an object of strings")
    return tuple(value.items())


def parse_plan(value: object, latency: Latency | None = None) -> Plan:
    """A plan from its JSON; `latency` where it names none. Raises NotationError."""
    if not isinstance(value, dict):
        raise NotationError(f"a plan is an object such as {{'script': ['ok']}}, not {value!r}")
    allow(value, ("script", "cycle", "random", "latency"), "a plan")
    if "latency" in value:
        latency = parse_latency(value["latency"])
    if "random" not in value:
        return Plan(_script(value.get("script", ["ok"])), cycle=flag(value, "cycle"), latency=latency)
    if "script" in value or "cycle" in value:
        raise NotationError("script and random exclude each other")
    return _chance(value["random"], latency)


def _script(value: object) -> tuple[Step, ...]:
    if not isinstance(value, list) or not value:
        raise NotationError("script is a list of steps, at least one")
    return tuple(map(parse_step, value))


def _chance(value: object, latency: Latency | None) -> Plan:
    if not isinstance(value, dict):
        raise NotationError('random is an object such as {"weights": {"ok": 9, "hang": 1}, "seed": 7}')
    allow(value, ("weights", "seed"), "random")
    weights, seed = value.get("weights"), value.get("seed", 0)
    if not isinstance(weights, dict) or not weights or not isinstance(seed, int):
        raise NotationError("random takes weights, an object of step and number, and seed, an integer")
    numbers = tuple(map(_weight, weights.values()))
    if not sum(numbers):
        raise NotationError("not all weights can be 0")
    return Plan(tuple(map(parse_step, weights)), weights=numbers, seed=seed, latency=latency)


def _weight(value: object) -> float:
    """Numbers with a fraction arrive as text, because the control API keeps every number as it was written."""
    try:
        weight = float(value) if isinstance(value, int | str) else -1.0
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise NotationError(f"weight {value!r} is no number from 0")
    return weight
