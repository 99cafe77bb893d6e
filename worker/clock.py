"""Tell a jump of the server's clock by a clock that cannot jump: pure arithmetic on readings of both.

    sent_s ──▶ the server reads its clock ──▶ received_s        between two readings both must have gone on alike

What counts is the server's clock less its jumps that are known already. A slow or late reply is no jump: the server may
have read its clock at any moment in between. Nor is what another beat took for one, and only its own clock had stood
still: the server's went on, and what is known now is believed, or two beats would contradict each other for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: By how much the server's clock may go wrong between two looks at it, one second apart, and be believed.
TOLERANCE_MS = 30_000


@dataclass(frozen=True, slots=True)
class Reading:
    """What the server's clock said, and its jumps known then (ms), to a question sent and answered at these moments of
    one's own (s)."""

    server_ms: int
    known_ms: int
    sent_s: float
    received_s: float

    @property
    def steady_ms(self) -> int:
        """The server's clock as if it had not jumped."""
        return self.server_ms - self.known_ms


@dataclass(frozen=True, slots=True)
class Jump:
    """By how far the server's clock jumped (ms), and how long ago that may have been (ms).

    Rather too far forward than not far enough, by as long as the calls took.
    """

    by_ms: int
    within_ms: int


class ClockWatch:
    """Compares each reading with the last one that was right; a clock that drifts is none that jumps."""

    def __init__(self) -> None:
        self._last: Reading | None = None

    def expected_ms(self, at_s: float) -> int | None:
        """What the server's clock has to say from this moment on; None before the first reading."""
        if self._last is None:
            return None
        return self._last.steady_ms + _ms(at_s - self._last.received_s)

    def look(self, reading: Reading) -> Jump | None:
        """The jump since the last reading, which then stays the one to compare with; None for none."""
        jump = _jump(self._last, reading) if self._last else None
        if jump is None:
            self._last = reading
        return jump

    def note(self, jump: Jump, reading: Reading) -> None:
        """The jump that this reading showed is known from here on, by this beat's own doing."""
        self._last = replace(reading, known_ms=reading.known_ms + jump.by_ms)


def _jump(last: Reading, reading: Reading) -> Jump | None:
    earliest_ms, latest_ms = _ms(reading.sent_s - last.received_s), _ms(reading.received_s - last.sent_s)

    def is_right(passed_ms: int) -> bool:
        return earliest_ms - TOLERANCE_MS <= passed_ms <= latest_ms + TOLERANCE_MS

    if is_right(reading.steady_ms - last.steady_ms) or is_right(reading.server_ms - last.server_ms):
        return None
    return Jump(reading.steady_ms - last.steady_ms - earliest_ms, latest_ms)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
