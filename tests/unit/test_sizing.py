"""The table of docs/sizing.md is what its formulas give."""

from __future__ import annotations

import re
from math import ceil

import pytest
from servers import ROOT

PAGE = (ROOT / "docs" / "sizing.md").read_text()
INTERVAL_S, REQUEST_S, CALLBACK_REQUEST_S = 900, 40, 1
IDLE_MIB, THREAD_MIB, POLL_S, ACCOUNT_BYTES, ANSWER_BYTES = 80, 0.08, 0.0019, 2656, 720
SPARE, LARGEST_WORKER, SMALLEST_WORKER = 1.5, 500, 16
GIB = 2**30


def computed(accounts: int) -> dict[str, float]:
    rate = accounts / INTERVAL_S
    threads = ceil(rate * REQUEST_S * SPARE)
    workers = max(2, ceil(threads / LARGEST_WORKER))
    each = max(SMALLEST_WORKER, ceil(threads / workers))
    memory = IDLE_MIB + THREAD_MIB * each
    stream = rate * 86_400 * ANSWER_BYTES / GIB
    return {
        "polls a second": rate,
        "threads": threads,
        "workers": workers,
        "threads of each": each,
        "memory of each, MiB": memory,
        "memory of all workers, GiB": workers * memory / 1024,
        "cores for the workers": rate * POLL_S,
        "store, accounts, GiB": accounts * ACCOUNT_BYTES / GIB,
        "store, stream of 30 days, GiB": 30 * stream,
        "store, stream of 2 days, GiB": 2 * stream,
        "threads in callback mode": ceil(rate * CALLBACK_REQUEST_S * SPARE),
    }


def shown() -> dict[int, dict[str, str]]:
    """Accounts → the rows of their column."""
    table = PAGE[PAGE.index("## Three sizes") :]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*", table, re.M)
    ]
    sizes = [int(cell.removesuffix(" accounts").replace(",", "")) for cell in head[1:]]
    return {size: {row[0]: row[column] for row in rows} for column, size in enumerate(sizes, start=1)}


@pytest.mark.parametrize("accounts", [100, 10_000, 1_000_000])
def test_the_table_is_what_the_formulas_give(accounts: int) -> None:
    column = shown()[accounts]
    figures = computed(accounts)
    assert column.keys() == figures.keys()
    for name, cell in column.items():
        digits = len(cell.partition(".")[2])
        assert f"{figures[name]:,.{digits}f}" == cell, name
