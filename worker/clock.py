"""Tell a jump of the server's clock by a clock that cannot jump: pure arithmetic on readings of both.

    sent_s ──▶ the server reads its clock ──▶ received_s        between two readings both must have gone on alike

What the server says is less its jumps that are known already. A slow or late reply is no jump: the server may have read
its clock at any moment in between.
"""

from __future__ import annotations

from dataclasses import dataclass

#: By how much the server's clock may go wrong between two looks at it, one second apart, and be believed.
TOLERANCE_MS = 30_000


@dataclass(frozen=True, slots=True)
class Reading:
    """What the server's clock said (ms), to a question sent and answered at these moments of one's own (s)."""

    server_ms: int
    sent_s: float
    received_s: float


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
        return self._last.server_ms + _ms(at_s - self._last.received_s)

    def look(self, reading: Reading) -> Jump | None:
        """The jump since the last reading, which then stays the one to compare with; None for none."""
        jump = self._jump(self._last, reading) if self._last else None
        if jump is None:
            self._last = reading
        return jump

    @staticmethod
    def _jump(last: Reading, reading: Reading) -> Jump | None:
        earliest_ms = last.server_ms + _ms(reading.sent_s - last.received_s)
        latest_ms = last.server_ms + _ms(reading.received_s - last.sent_s)
        if earliest_ms - TOLERANCE_MS <= reading.server_ms <= latest_ms + TOLERANCE_MS:
            return None
        return Jump(reading.server_ms - earliest_ms, _ms(reading.received_s - last.sent_s))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
