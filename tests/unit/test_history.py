"""How an account's last balances are drawn, as plain text in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from worker.history import BAR_CELLS, SPARKS, bar, draw, series_of, sparks
from worker.stream import Entry

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def balance(amount: str, type_: str = "ClosingAvailable", *, indicator: str = "Credit") -> dict[str, str]:
    return {"account_id": "873458", "type": type_, "indicator": indicator, "amount": amount, "currency": "CLP"}


def entries(*answers: list[dict[str, str]], late: tuple[int, ...] = ()) -> list[Entry]:
    """An answer every quarter of an hour, those of these numbers late."""
    return [
        Entry(
            f"{number}-0",
            {},
            {
                "account": "acme-operating",
                "balances": answer,
                "fetched_at": (NOW + timedelta(minutes=15 * number)).isoformat(),
                "late": number in late,
            },
        )
        for number, answer in enumerate(answers)
    ]


def drawn(found: list[Entry], width: int = 80) -> list[str]:
    console = Console(width=width, file=StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(draw(found, NOW))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_each_answer_is_a_bar_and_a_change() -> None:
    lines = drawn(entries([balance("10000")], [balance("10000")], [balance("40000.50")], [balance("0")]))
    assert lines == [
        "acme-operating  ClosingAvailable  CLP  ▂▂█▁",
        "fetched (UTC)    amount                               change",
        "22 Nov 12:00      10000  █████▉",
        "22 Nov 12:15      10000  █████▉",
        "22 Nov 12:30   40000.50  ████████████████████████  +30000.50",
        "22 Nov 12:45          0                            -40000.50",
    ]


def test_what_is_owed_is_negative_and_drawn_as_long_as_it_is() -> None:
    lines = drawn(entries([balance("100")], [balance("50", indicator="Debit")]))
    assert lines[2:] == [
        "22 Nov 12:00      100  ████████████████████████",
        "22 Nov 12:15      -50  ████████████                -150",
    ]


def test_a_late_answer_is_marked_and_changes_nothing() -> None:
    lines = drawn(entries([balance("100")], [balance("1")], [balance("101")], late=(1,)))
    assert [line.split()[-1] for line in lines[2:]] == ["████████████████████████"[:23] + "▊", "late", "+1"]


def test_no_data_is_no_zero() -> None:
    lines = drawn(entries([balance("100")], [], [balance("90")]))
    assert lines[0].endswith("█▁")
    assert lines[3].split() == ["22", "Nov", "12:15", "-", "no", "data"]
    assert lines[4].endswith("-10")


def test_every_type_of_balance_has_a_block_of_its_own() -> None:
    both = [balance("100"), balance("90", "ClosingBooked")]
    lines = drawn(entries(both, [balance("100")]))
    assert [line for line in lines if "CLP" in line] == [
        "acme-operating  ClosingAvailable  CLP  ▄▄",
        "acme-operating  ClosingBooked  CLP  ▄",
    ]
    assert lines[-1].endswith("no data")


@pytest.mark.parametrize("found", [entries(), entries([]), entries([], [])])
def test_nothing_is_told_as_nothing(found: list[Entry]) -> None:
    assert drawn(found) == ["no balance yet"]


def test_the_last_digit_of_a_long_amount_counts() -> None:
    first, second = "1" + "0" * 60, "1" + "0" * 59 + "1.01"
    assert drawn(entries([balance(first)], [balance(second)]), width=200)[-1].endswith(" +1.01")
    [points] = series_of(entries([balance(first)], [balance(second)])).values()
    assert [point.amount for point in points] == [Decimal(first), Decimal(second)]


amounts = st.builds(Decimal.scaleb, st.integers(-(10**20), 10**20).map(Decimal), st.integers(-20, 4).map(Decimal))


@settings(deadline=None)
@given(st.lists(amounts, min_size=1, max_size=12))
def test_sparks_are_as_many_as_amounts_and_higher_for_more(found: list[Decimal]) -> None:
    line = sparks(found)
    assert len(line) == len(found)
    heights = [SPARKS.index(spark) for _, spark in sorted(zip(found, line, strict=True))]
    assert heights == sorted(heights)
    assert len(set(found)) == 1 or {0, 7} <= set(heights)


@settings(deadline=None)
@given(st.lists(amounts.map(abs), min_size=1, max_size=12))
def test_a_bar_is_never_longer_than_its_room_and_never_nothing_for_something(found: list[Decimal]) -> None:
    furthest = max(found)
    for amount in found:
        assert len(bar(amount, furthest)) <= BAR_CELLS
        assert bool(bar(amount, furthest)) == bool(amount)
    assert bar(furthest, furthest) == "█" * BAR_CELLS * bool(furthest)
