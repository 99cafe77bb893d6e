"""Slots: a stable grid, and wall-clock slots that each happen once across both changes of the clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.accounts import Definition
from worker.schedule import interval_ms, next_slot_ms, phase_ms

SANTIAGO = "America/Santiago"
#: 2026 in Chile: back from 24:00 to 23:00 on 4 April, forward from 0:00 to 1:00 on 6 September.
BACK, FORWARD = "2026-04-05T03:00Z", "2026-09-06T04:00Z"
MINUTE, HOUR = 60_000, 3_600_000


def account(
    cron: str | None = None, timezone: str = SANTIAGO, every_ms: int | None = None, alias: str = "acme"
) -> Definition:
    return Definition(
        alias=alias,
        country="cl",
        segment="business",
        institution="bank.cl",
        number="1",
        login="acme",
        cron=cron,
        timezone=timezone if cron else None,
        every_ms=every_ms,
    )


def ms(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)


def slots(definition: Definition, after: str, count: int) -> list[str]:
    found, after_ms = [], ms(after)
    for _ in range(count):
        after_ms = next_slot_ms(definition, after_ms)
        found.append(datetime.fromtimestamp(after_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%MZ"))
    return found


def test_the_zone_changes_when_these_tests_think() -> None:
    zone = ZoneInfo(SANTIAGO)
    for change, before, after in ((BACK, -3, -4), (FORWARD, -4, -3)):
        instant = datetime.fromisoformat(change)
        assert (instant - timedelta(seconds=1)).astimezone(zone).utcoffset() == timedelta(hours=before)
        assert instant.astimezone(zone).utcoffset() == timedelta(hours=after)


@pytest.mark.parametrize(
    ("cron", "timezone", "after", "expected"),
    [
        pytest.param("0 9 * * *", SANTIAGO, "2026-01-01T12:00Z", ["2026-01-02T12:00Z"], id="strictly after"),
        pytest.param("0 9 * * *", SANTIAGO, "2026-01-01T11:59:59.999Z", ["2026-01-01T12:00Z"], id="a ms before"),
        pytest.param(
            "0 9 * * *", SANTIAGO, "2026-04-04T00:00Z", ["2026-04-04T12:00Z", "2026-04-05T13:00Z"], id="9:00 after back"
        ),
        pytest.param(
            "0 9 * * *", SANTIAGO, "2026-09-05T00:00Z", ["2026-09-05T13:00Z", "2026-09-06T12:00Z"], id="after forward"
        ),
        pytest.param(
            "30 0 * * *",
            SANTIAGO,
            "2026-09-05T00:00Z",
            ["2026-09-05T04:30Z", FORWARD, "2026-09-07T03:30Z"],
            id="skipped: at the jump",
        ),
        pytest.param(
            "0 0,1 * * *",
            SANTIAGO,
            "2026-09-06T00:00Z",
            [FORWARD, "2026-09-07T03:00Z"],
            id="skipped and the next one coincide: once",
        ),
        pytest.param(
            "*/15 * * * *",
            SANTIAGO,
            "2026-09-06T03:40Z",
            ["2026-09-06T03:45Z", FORWARD, "2026-09-06T04:15Z"],
            id="four skipped: once",
        ),
        pytest.param(
            "30 23 * * *",
            SANTIAGO,
            "2026-04-04T12:00Z",
            ["2026-04-05T02:30Z", "2026-04-06T03:30Z"],
            id="repeated: once",
        ),
        pytest.param(
            "*/15 * * * *",
            SANTIAGO,
            "2026-04-05T02:20Z",
            ["2026-04-05T02:30Z", "2026-04-05T02:45Z", "2026-04-05T04:00Z", "2026-04-05T04:15Z"],
            id="every 15 minutes: the first pass only",
        ),
        pytest.param("*/15 * * * *", SANTIAGO, "2026-04-05T03:20Z", ["2026-04-05T04:00Z"], id="from the second pass"),
        pytest.param("* * * * *", SANTIAGO, BACK, ["2026-04-05T04:00Z"], id="every minute, from the change itself"),
        pytest.param(
            "0 0 29 2 *", SANTIAGO, "2026-01-01T00:00Z", ["2028-02-29T03:00Z", "2032-02-29T03:00Z"], id="leap"
        ),
        pytest.param(
            "0 12 31 * *", "UTC", "2026-01-31T12:00Z", ["2026-03-31T12:00Z", "2026-05-31T12:00Z"], id="31st skips"
        ),
        pytest.param(
            "0 12 L * *", "UTC", "2026-01-31T12:00Z", ["2026-02-28T12:00Z", "2026-03-31T12:00Z"], id="last of month"
        ),
        pytest.param("59 23 31 12 *", "UTC", "2026-12-31T23:58Z", ["2026-12-31T23:59Z"], id="end of year"),
        pytest.param(
            "0 9-18 * * 1-5", SANTIAGO, "2026-07-03T22:00Z", ["2026-07-06T13:00Z", "2026-07-06T14:00Z"], id="weekend"
        ),
        pytest.param("0 0 1,15 * 1", "UTC", "2026-06-01T00:00Z", ["2026-06-08T00:00Z", "2026-06-15T00:00Z"], id="or"),
        pytest.param(
            "15 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00Z", ["2026-10-03T15:30Z"], id="half an hour skipped"
        ),
        pytest.param(
            "0 12 * * *", "Pacific/Apia", "2011-12-29T22:00Z", ["2011-12-30T10:00Z", "2011-12-30T22:00Z"], id="lost day"
        ),
        pytest.param("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["2026-03-29T01:00Z"], id="Berlin"),
    ],
)
def test_cron_slots(cron: str, timezone: str, after: str, expected: list[str]) -> None:
    assert slots(account(cron, timezone), after, len(expected)) == expected


@pytest.mark.parametrize("cron", ["*/15 * * * *", "* * * * *", "0 * * * *", "30 23 * * *", "0,30 0,23 * * *"])
@pytest.mark.parametrize("change", [BACK, FORWARD])
def test_no_wall_clock_time_comes_twice_round_a_change(cron: str, change: str) -> None:
    definition, zone = account(cron), ZoneInfo(SANTIAGO)
    after_ms, end_ms, seen = ms(change) - 6 * HOUR, ms(change) + 6 * HOUR, []
    while (after_ms := next_slot_ms(definition, after_ms)) < end_ms:
        seen.append(datetime.fromtimestamp(after_ms / 1000, zone).replace(tzinfo=None))
    assert seen == sorted(set(seen))


@given(st.integers(0, 4_000_000_000_000), st.sampled_from(["*/7 * * * *", "30 0,23 * * *", "0 12 29 2 *"]))
def test_a_slot_is_after_and_nothing_lies_between(after_ms: int, cron: str) -> None:
    definition = account(cron)
    slot_ms = next_slot_ms(definition, after_ms)
    assert slot_ms > after_ms
    assert next_slot_ms(definition, slot_ms - 1) == slot_ms
    assert next_slot_ms(definition, (after_ms + slot_ms) // 2) in (slot_ms, next_slot_ms(definition, slot_ms))


@given(
    st.integers(0, 4_000_000_000_000),
    st.integers(1000, 366 * 86_400_000),
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
)
def test_the_grid_is_regular_and_strictly_after(after_ms: int, every_ms: int, alias: str) -> None:
    definition = account(every_ms=every_ms, alias=alias)
    slot_ms = next_slot_ms(definition, after_ms)
    assert after_ms < slot_ms <= after_ms + every_ms
    assert slot_ms % every_ms == phase_ms(alias, every_ms)
    assert next_slot_ms(definition, slot_ms) == slot_ms + every_ms


def test_the_phase_never_changes_between_versions() -> None:
    assert phase_ms("acme-operating", 15 * MINUTE) == 832_609


def test_accounts_are_spread_over_the_interval() -> None:
    phases = sorted(phase_ms(f"account-{number}", 15 * MINUTE) for number in range(1000))
    assert max(later - earlier for earlier, later in pairwise(phases)) < 15 * MINUTE / 50


@pytest.mark.parametrize(
    ("definition", "after", "interval"),
    [
        (account(every_ms=15 * MINUTE), BACK, 15 * MINUTE),
        (account("0 9-18 * * 1-5"), "2026-07-06T13:30Z", HOUR),
        (account("0 9-18 * * 1-5"), "2026-07-03T21:30Z", 63 * HOUR),
        (account("*/15 * * * *"), "2026-04-05T02:40Z", 75 * MINUTE),
        (account("0 9 * * *"), "2026-09-05T00:00Z", 23 * HOUR),
    ],
)
def test_the_interval_is_the_distance_of_the_next_two_slots(definition: Definition, after: str, interval: int) -> None:
    assert interval_ms(definition, ms(after)) == interval


def test_a_definition_without_a_schedule_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="acme has neither"):
        next_slot_ms(account(), 0)
