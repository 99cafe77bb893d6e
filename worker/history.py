"""Draw an account's last balances in a terminal: a line of sparks, and a bar per answer. Looks nothing up.

acme-operating  ClosingAvailable  CLP                    ▁▁▅█
22 Nov 10:27      10000  █████▋
22 Nov 10:42      38000  █████████████████████▎   +28000
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from worker.balances import DIGITS_LIMIT
from worker.stream import Entry
from worker.tables import zone

SPARKS = "▁▂▃▄▅▆▇█"
#: Eighths of a cell, for the end of a bar.
EIGHTHS = " ▏▎▍▌▋▊▉"
#: Cells of the longest bar: with a date, an amount and a difference it fits into 80 columns.
BAR_CELLS = 24
#: Twice the digits that an amount may have, so that a difference is exact.
EXACT = Context(prec=2 * DIGITS_LIMIT)


class Series(NamedTuple):
    """What one line of balances is about; an account may have several: one per type, and per id at the bank."""

    account_id: str
    type: str
    currency: str


@dataclass(frozen=True, slots=True)
class Point:
    """One balance: when it was fetched, how much with its sign (None: the bank gave no such balance), whether late."""

    at: datetime
    amount: Decimal | None
    is_late: bool


def draw(entries: Sequence[Entry], now: datetime) -> RenderableType:
    """The balances in these entries (of one account, oldest first), a block per series."""
    series = series_of(entries)
    if not series:
        return Text("no balance yet")
    parts: list[RenderableType] = []
    for which, points in series.items():
        parts += [_heading(entries[-1].data["account"], which, points), _bars(points, now), ""]
    return Group(*parts[:-1])


def series_of(entries: Iterable[Entry]) -> dict[Series, list[Point]]:
    """Every series with a point per entry, in the order of their first balance."""
    told = [(_point(entry, None), _amounts(entry.data)) for entry in entries]
    names = dict.fromkeys(name for _, amounts in told for name in amounts)
    return {name: [Point(empty.at, amounts.get(name), empty.is_late) for empty, amounts in told] for name in names}


def _point(entry: Entry, amount: Decimal | None) -> Point:
    return Point(datetime.fromisoformat(entry.data["fetched_at"]), amount, entry.data["late"])


def _amounts(data: Mapping[str, Any]) -> dict[Series, Decimal]:
    return {Series(each["account_id"], each["type"], each["currency"]): _signed(each) for each in data["balances"]}


def _signed(balance: Mapping[str, str]) -> Decimal:
    amount = Decimal(balance["amount"])
    return amount.copy_negate() if balance["indicator"] == "Debit" else amount


def _heading(alias: str, which: Series, points: Sequence[Point]) -> Text:
    amounts = [point.amount for point in points if point.amount is not None]
    return Text.assemble((f"{alias}  {which.type}  {which.currency}  ", "bold"), (sparks(amounts), "cyan"))


def sparks(amounts: Sequence[Decimal]) -> str:
    """One character per amount, the lowest at the bottom and the highest at the top; all alike: in the middle."""
    lowest, highest = min(amounts), max(amounts)
    span = highest - lowest
    if not span:
        return SPARKS[3] * len(amounts)
    return "".join(SPARKS[int((amount - lowest) / span * (len(SPARKS) - 1))] for amount in amounts)


def _bars(points: Sequence[Point], now: datetime) -> Table:
    """A line per answer; the longest bar is the amount furthest from zero, and what is owed is red."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in (f"fetched ({zone(now)})", "amount", "", "change"):
        table.add_column(column, no_wrap=True, justify="right" if column in {"amount", "change"} else "left")
    furthest = max(abs(point.amount) for point in points if point.amount is not None)
    before: Decimal | None = None
    for point in points:
        table.add_row(*_cells(point, furthest, before), style="dim" if point.is_late else "")
        before = before if point.amount is None or point.is_late else point.amount
    return table


def _cells(point: Point, furthest: Decimal, before: Decimal | None) -> tuple[str, str, Text, str]:
    at = f"{point.at.astimezone():%d %b %H:%M}"
    if point.amount is None:
        return at, "-", Text("no data", "dim"), ""
    drawn = Text(bar(abs(point.amount), furthest), "red" if point.amount < 0 else "green")
    return at, format(point.amount, "f"), drawn, "late" if point.is_late else _change(point.amount, before)


def bar(amount: Decimal, furthest: Decimal) -> str:
    """A bar of `BAR_CELLS` cells for `furthest`, to an eighth of a cell; what is not zero is never drawn as nothing."""
    if not amount:
        return ""
    eighths = max(1, int(amount / furthest * BAR_CELLS * 8))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _change(amount: Decimal, before: Decimal | None) -> str:
    return "" if before is None or amount == before else format(EXACT.subtract(amount, before), "+f")
