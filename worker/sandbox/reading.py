"""Read the smallest parts of the notation strictly: durations, texts, numbers, and which fields may stand where."""

from __future__ import annotations

import re
from collections.abc import Mapping

from worker.sandbox.behaviour import Latency

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class NotationError(ValueError):
    """A step, a plan or a latency that cannot be read; the message says what was read and what would be right."""


def parse_latency(value: object) -> Latency:
    """`2s`, `150ms`, or a range `0.2s-3s`. Raises NotationError."""
    if not isinstance(value, str):
        raise NotationError(f"latency {value!r} is no string such as '2s', '150ms' or '0.2s-3s'")
    low, dash, high = value.partition("-")
    low_s = seconds(low)
    high_s = seconds(high) if dash else low_s
    if high_s < low_s:
        raise NotationError(f"latency {value!r} ends before it begins")
    return Latency(low_s, high_s)


def seconds(value: object) -> float:
    """A duration such as `2s` in seconds. Raises NotationError."""
    if not isinstance(value, str) or not (found := DURATION.fullmatch(value)):
        raise NotationError(f"duration {value!r} is none such as '2s', '150ms', '3m' or '48h'")
    return float(found[1]) * SECONDS[found[2]]


def allow(fields: Mapping[str, object], names: tuple[str, ...], what: str) -> None:
    """Raises NotationError for a field that is none of `names`."""
    if unknown := [name for name in fields if name not in names]:
        raise NotationError(f"{what} has no {unknown[0]!r}, only {', '.join(names) or 'nothing'}")


def text(fields: Mapping[str, object], name: str) -> str | None:
    """A string, or a number as it was written; None where there is none. Raises NotationError."""
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise NotationError(f"{name} {value!r} is no string")
    return value


def integer(fields: Mapping[str, object], name: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`. Raises NotationError."""
    written = text(fields, name) or ""
    if not (written.isascii() and written.isdecimal()) or not low <= int(written) <= high:
        raise NotationError(f"{name} {written!r} is no number from {low} to {high}")
    return int(written)


def flag(fields: Mapping[str, object], name: str) -> bool:
    """True or false; false where there is none. Raises NotationError."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise NotationError(f"{name} is true or false, not {value!r}")
    return value
