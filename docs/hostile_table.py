"""Write the table of hostile answers into SECURITY.md, from the rows that the tests try.

Run `.venv/bin/python docs/hostile_table.py` when a row has changed.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "integration"), str(ROOT / "tests")]

from hostile_answers import ROWS, Row  # noqa: E402 - it lies beside the tests

from worker.accounts import Retry as Ladders  # noqa: E402
from worker.errors import Kind, Outcome  # noqa: E402
from worker.policy import Block, Counters, DeadLetter, Decision, Publish, Retry, decide  # noqa: E402
from worker.settings import format_duration  # noqa: E402

PAGE = ROOT / "SECURITY.md"
BEGIN, END = "<!-- hostile answers: begin -->", "<!-- hostile answers: end -->"
HEAD = "| what is sent | outcome | what it names | what follows | when it comes again after the long wait |"


def table() -> str:
    """The section between the two markers."""
    lines = []
    for group, rows in groupby(ROWS, lambda row: row.group):
        lines += [f"**{group}**", "", HEAD, "|---|---|---|---|---|", *map(line, rows), ""]
    return "\n".join(lines)


def line(row: Row) -> str:
    """One row of the table."""
    named = f"`{row.named if len(row.named) < 60 else row.named[:57] + '…'}`" if row.named else ""
    cells = [row.sent, f"`{row.expected_code}`", named, follows(row, Counters()), ""]
    again = follows(row, Counters(waits=1, last=row.expected_code))
    if row.kind is not Kind.OK:
        cells[4] = "the same" if again == cells[3] else again
    return f"| {' | '.join(cells)} |"


def follows(row: Row, counters: Counters) -> str:
    """The policy's decision in words."""
    if row.kind is Kind.OK and not row.published:
        return "known already: nothing new"
    return words(decide(Outcome(row.kind, row.expected_code, row.type), counters, 0.0, Ladders()))


def words(decision: Decision) -> str:
    match decision:
        case Publish():
            return "published"
        case Retry(countdown):
            return f"asked again in {format_duration(countdown)}"
        case DeadLetter(queue):
            return f"dead letter in `{queue.value.removeprefix('balances.dead.')}`"
        case Block(credential):
            return f"login blocked ({credential.value})"


def filled(page: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
