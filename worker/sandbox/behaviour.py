"""Say how an account behaves, in a language small enough for a test's one line.

A *step* is one answer, written as a string, or as a JSON object where a string is too narrow:

    step      what["@"latency]            "ok", "ok@2s", "http:504@0.2s-3s"
    latency   duration["-"duration]       fixed, or drawn anew for each answer; 150ms, 2s, 3m
    what      ok[:AMOUNT[:CURRENCY[:ACCOUNT_ID[:TYPE]]]]     ok:12345678901234567.89, ok::USD; the amount is sent as it
                                                             is written; without one the balance drifts by itself
              no-data                                        Status OK, Data null
              empty                                          Status OK, Data.Balance []
              error:CODE:TYPE[:DESCRIPTION]                  error:E201:RETRY_IMMEDIATELY; any type; TYPE may be null
              error:null                                     Status ERROR, Error null
              http:STATUS[:BODY]                             http:401, http:504, http:200:{"Amount":NaN}
              malformed                                      a 200 that is not JSON
              schema                                         a 200 that is JSON, but not the envelope
              too-large[:BYTES]                              a good answer of 8 MiB, of unannounced length
              foreign[:ACCOUNT_ID]                           another account's balance
              hang                                           no answer until someone leaves (or /answer is called)
              drop                                           the connection is closed
              drip[:DURATION]                                a good answer, one byte each 100ms

An empty argument is the default. A last argument may hold colons; a string with an `@` in its text needs the object:
`{"behaviour": "ok", "amount": "10.50", "latency": "2s", ...}`, with the names above in lower case, and besides
`indicator`, `date_time`, `balances` (a list of objects with the balance fields) for `ok` and `foreign`,
`operation_id` and `additional_information` for every envelope, `content_type` and `headers` for `http`.

A *plan* is a list of steps, one per request, of which the last repeats (or all do, with `cycle`), or weighted chance
with a seed: `{"script": [...], "cycle": true, "latency": "1s"}`, `{"random": {"weights": {"ok": 9, "hang": 1},
"seed": 7}}`. Everything is read strictly: what is not understood raises NotationError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random


class NotationError(ValueError):
    """A step, a plan or a latency that cannot be read; the message says what was read and what would be right."""


class Behaviour(StrEnum):
    """What a step does; the drawing is in the module's docstring."""

    OK = "ok"
    NO_DATA = "no-data"
    EMPTY = "empty"
    ERROR = "error"
    HTTP = "http"
    MALFORMED = "malformed"
    SCHEMA = "schema"
    TOO_LARGE = "too-large"
    FOREIGN = "foreign"
    HANG = "hang"
    DROP = "drop"
    DRIP = "drip"


#: The arguments of the string form, by position.
POSITIONS: Mapping[Behaviour, tuple[str, ...]] = {
    Behaviour.OK: ("amount", "currency", "account_id", "type"),
    Behaviour.ERROR: ("code", "type", "description"),
    Behaviour.HTTP: ("status", "body"),
    Behaviour.TOO_LARGE: ("size",),
    Behaviour.FOREIGN: ("account_id",),
    Behaviour.DRIP: ("interval",),
}
BALANCE_FIELDS = ("amount", "currency", "account_id", "type", "indicator", "date_time")
ENVELOPE_FIELDS = ("operation_id", "additional_information")
#: The fields of the object form, besides `behaviour` and `latency`.
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
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)")
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0}
TOO_LARGE_BYTES = 8 * 1024 * 1024
DRIP_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Latency:
    """How long an answer takes, in seconds: anything from `low_s` to `high_s`."""

    low_s: float
    high_s: float

    def draw(self, random: Random) -> float:
        """One answer's latency in seconds."""
        return self.low_s if self.low_s == self.high_s else random.uniform(self.low_s, self.high_s)


NO_LATENCY = Latency(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Money:
    """One element of `Data.Balance`; None means what the account gives by itself."""

    amount: str | None = None
    currency: str | None = None
    account_id: str | None = None
    type: str | None = None
    indicator: str | None = None
    date_time: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One answer. Fields of other behaviours keep their defaults; `null_error` is `error:null`."""

    behaviour: Behaviour
    latency: Latency | None = None
    balances: tuple[Money, ...] = (Money(),)
    operation_id: str | None = None
    additional_information: str | None = None
    code: str = ""
    type: str | None = None
    description: str | None = None
    null_error: bool = False
    status: int = 0
    body: str | None = None
    content_type: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    size: int = TOO_LARGE_BYTES
    interval_s: float = DRIP_INTERVAL_S

    @property
    def label(self) -> str:
        """The step's name in records and logs: no amount, no text."""
        match self.behaviour:
            case Behaviour.ERROR:
                return "error:null" if self.null_error else f"error:{self.code}:{self.type or 'null'}"
            case Behaviour.HTTP:
                return f"http:{self.status}"
            case _:
                return self.behaviour.value


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


def parse_latency(value: object) -> Latency:
    """`2s`, `150ms`, or a range `0.2s-3s`. Raises NotationError."""
    if not isinstance(value, str):
        raise NotationError(f"latency {value!r} is no string such as '2s', '150ms' or '0.2s-3s'")
    low, dash, high = value.partition("-")
    low_s = _seconds(low)
    high_s = _seconds(high) if dash else low_s
    if high_s < low_s:
        raise NotationError(f"latency {value!r} ends before it begins")
    return Latency(low_s, high_s)


def _seconds(text: str) -> float:
    if not (found := DURATION.fullmatch(text)):
        raise NotationError(f"duration {text!r} is none such as '2s', '150ms' or '3m'")
    return float(found[1]) * SECONDS[found[2]]


def _fields_of(text: str) -> dict[str, object]:
    """The object form of a string."""
    what, at, latency = text.rpartition("@") if "@" in text else (text, "", "")
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
    _allow(fields, ("behaviour", "latency", *FIELDS.get(behaviour, ())), behaviour)
    step = Step(
        behaviour=behaviour,
        latency=parse_latency(fields["latency"]) if "latency" in fields else None,
        operation_id=_text(fields, "operation_id"),
        additional_information=_text(fields, "additional_information"),
    )
    match behaviour:
        case Behaviour.OK | Behaviour.FOREIGN:
            return replace(step, balances=_balances(fields))
        case Behaviour.ERROR:
            return _error(step, fields)
        case Behaviour.HTTP:
            return _http(step, fields)
        case Behaviour.TOO_LARGE if "size" in fields:
            return replace(step, size=_integer(fields, "size", 1, 1 << 30))
        case Behaviour.DRIP if "interval" in fields:
            return replace(step, interval_s=_seconds(_text(fields, "interval") or ""))
        case _:
            return step


def _error(step: Step, fields: Mapping[str, object]) -> Step:
    if "code" in fields and fields["code"] is None:
        _allow(fields, ("behaviour", "latency", "code", *ENVELOPE_FIELDS), "error:null")
        return replace(step, null_error=True)
    code = _text(fields, "code")
    if not code or "type" not in fields:
        raise NotationError("error takes CODE:TYPE[:DESCRIPTION], or null")
    return replace(step, code=code, type=_text(fields, "type"), description=_text(fields, "description"))


def _http(step: Step, fields: Mapping[str, object]) -> Step:
    return replace(
        step,
        status=_integer(fields, "status", 200, 599),
        body=_text(fields, "body"),
        content_type=_text(fields, "content_type"),
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
    _allow(fields, BALANCE_FIELDS, "a balance")
    amount = _text(fields, "amount")
    if amount is not None and not JSON_NUMBER.fullmatch(amount):
        raise NotationError(f"amount {amount!r} is no JSON number (http:200:BODY sends anything)")
    return Money(**{name: _text(fields, name) for name in BALANCE_FIELDS})


def _allow(fields: Mapping[str, object], names: tuple[str, ...], what: str) -> None:
    if unknown := [name for name in fields if name not in names]:
        raise NotationError(f"{what} has no {unknown[0]!r}, only {', '.join(names) or 'nothing'}")


def _text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise NotationError(f"{name} {value!r} is no string")
    return value


def _integer(fields: Mapping[str, object], name: str, low: int, high: int) -> int:
    text = _text(fields, name) or ""
    if not (text.isascii() and text.isdecimal()) or not low <= int(text) <= high:
        raise NotationError(f"{name} {text!r} is no number from {low} to {high}")
    return int(text)


def _headers(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise NotationError("headers is an object of strings")
    return tuple(value.items())


@dataclass(frozen=True, slots=True)
class Plan:
    """What an account answers, request by request. With `weights` (one per step) chance chooses, seeded by `seed`."""

    steps: tuple[Step, ...]
    cycle: bool = False
    weights: tuple[float, ...] = ()
    seed: int = 0
    latency: Latency | None = None

    def step(self, number: str, position: int) -> Step:
        """The step for the account's request `position` (from 0): the same one in every run."""
        if self.weights:
            return self.random(number, position).choices(self.steps, self.weights)[0]
        if self.cycle:
            return self.steps[position % len(self.steps)]
        return self.steps[min(position, len(self.steps) - 1)]

    def delay_s(self, step: Step, number: str, position: int) -> float:
        """How long that step takes."""
        latency = step.latency or self.latency or NO_LATENCY
        return latency.draw(self.random(f"{number}:latency", position))

    def random(self, salt: str, position: int) -> Random:
        """Chance that depends on nothing but its arguments, so that interleaved accounts do not disturb each other."""
        return Random(f"{self.seed}:{salt}:{position}")  # noqa: S311 - behaviour, not secrecy


def parse_plan(value: object, latency: Latency | None = None) -> Plan:
    """A plan from its JSON; `latency` where it names none. Raises NotationError."""
    if not isinstance(value, dict):
        raise NotationError(f"a plan is an object such as {{'script': ['ok']}}, not {value!r}")
    _allow(value, ("script", "cycle", "random", "latency"), "a plan")
    if "latency" in value:
        latency = parse_latency(value["latency"])
    if "random" not in value:
        return Plan(_script(value.get("script", ["ok"])), cycle=_flag(value.get("cycle", False)), latency=latency)
    if "script" in value or "cycle" in value:
        raise NotationError("script and random exclude each other")
    return _chance(value["random"], latency)


def _script(value: object) -> tuple[Step, ...]:
    if not isinstance(value, list) or not value:
        raise NotationError("script is a list of steps, at least one")
    return tuple(map(parse_step, value))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise NotationError(f"cycle is true or false, not {value!r}")
    return value


def _chance(value: object, latency: Latency | None) -> Plan:
    if not isinstance(value, dict):
        raise NotationError('random is an object such as {"weights": {"ok": 9, "hang": 1}, "seed": 7}')
    _allow(value, ("weights", "seed"), "random")
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
