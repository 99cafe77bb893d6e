"""A jump of the server's clock, told from everything that only looks like one."""

from __future__ import annotations

import pytest

from worker.clock import TOLERANCE_MS, ClockWatch, Jump, Reading

START_MS = 1_800_000_000_000
HOUR_S = 3600.0


def reading(
    at_s: float, *, ahead_ms: int = 0, known_ms: int = 0, took_s: float = 0.0, read_after_s: float = 0.0
) -> Reading:
    """A call sent at `at_s`; the server, whose clock is `ahead_ms`, read it so long afterwards."""
    return Reading(START_MS + round((at_s + read_after_s) * 1000) + ahead_ms, known_ms, at_s, at_s + took_s)


@pytest.fixture
def watch() -> ClockWatch:
    watch = ClockWatch()
    assert watch.look(reading(0)) is None
    return watch


def test_before_the_first_reading_nothing_is_expected() -> None:
    assert ClockWatch().expected_ms(5) is None


def test_both_clocks_go_on_alike(watch: ClockWatch) -> None:
    assert watch.expected_ms(2.5) == START_MS + 2500


@pytest.mark.parametrize("ahead_ms", [TOLERANCE_MS + 1, -TOLERANCE_MS - 1, 3_600_000, -3_600_000])
def test_more_than_the_tolerance_is_a_jump(watch: ClockWatch, ahead_ms: int) -> None:
    assert watch.look(reading(1, ahead_ms=ahead_ms)) == Jump(ahead_ms, 1000)


@pytest.mark.parametrize("ahead_ms", [TOLERANCE_MS, -TOLERANCE_MS])
def test_the_tolerance_is_no_jump(watch: ClockWatch, ahead_ms: int) -> None:
    assert watch.look(reading(1, ahead_ms=ahead_ms)) is None


def test_an_outage_is_no_jump(watch: ClockWatch) -> None:
    assert watch.look(reading(10 * HOUR_S)) is None


def test_a_clock_that_drifts_is_none_that_jumps(watch: ClockWatch) -> None:
    """A hundred seconds a day, over a week of one call a minute."""
    for minute in range(1, 7 * 24 * 60):
        assert watch.look(reading(minute * 60, ahead_ms=minute * 69)) is None


@pytest.mark.parametrize("read_after_s", [0.0, 30.0, 60.0])
def test_a_server_that_stood_still_for_a_minute_before_or_after_it_read_its_clock_did_not_jump(
    watch: ClockWatch, read_after_s: float
) -> None:
    assert watch.look(reading(1, took_s=60, read_after_s=read_after_s)) is None
    assert watch.look(reading(62)) is None


def test_a_jump_is_measured_too_far_forward_rather_than_too_short(watch: ClockWatch) -> None:
    for read_after_s in (0.0, 2.0):
        jump = watch.look(reading(1, ahead_ms=-60_000, took_s=2, read_after_s=read_after_s))
        assert jump is not None
        assert -60_000 <= jump.by_ms <= -58_000
        assert jump.within_ms == 3000


def test_a_jump_stays_one_until_it_is_taken_into_account(watch: ClockWatch) -> None:
    """The call that takes note of it may fail."""
    assert watch.look(reading(1, ahead_ms=60_000)) == Jump(60_000, 1000)
    assert watch.look(reading(2, ahead_ms=60_000)) == Jump(60_000, 2000)
    assert watch.look(reading(3, ahead_ms=60_000, known_ms=60_000)) is None
    assert watch.expected_ms(4) == START_MS + 4000


def test_what_another_beat_took_for_a_jump_is_none_and_is_believed(watch: ClockWatch) -> None:
    """Its machine was paused for a minute, and its own clock with it."""
    assert watch.look(reading(1, known_ms=60_000)) is None
    assert watch.expected_ms(2) == START_MS + 2000 - 60_000
    assert watch.look(reading(2, known_ms=60_000)) is None


def test_a_jump_that_was_taken_note_of_and_its_way_back_are_two(watch: ClockWatch) -> None:
    there = reading(1, ahead_ms=60_000)
    jump = watch.look(there)
    assert jump is not None
    watch.note(jump, there)
    assert watch.expected_ms(1) == START_MS + 1000
    assert watch.look(reading(2, known_ms=60_000)) == Jump(-60_000, 1000)


def test_a_jump_is_found_whatever_others_took_for_one(watch: ClockWatch) -> None:
    assert watch.look(reading(1, ahead_ms=3_600_000, known_ms=60_000)) == Jump(3_540_000, 1000)
