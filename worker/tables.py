"""Lay out what operators see in a terminal of 80 columns: tables, moments, and how far away they are."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from worker.ops import AccountRow, Finding, LetterRow

#: Trouble first: the order in which accounts are listed, and the colour of each state.
COLOURS = {
    "blocked": "bold red",
    "suspended": "red",
    "parked": "magenta",
    "waiting": "yellow",
    "awaiting": "cyan",
    "polling": "cyan",
    "dispatched": "cyan",
    "paused": "dim",
    "scheduled": "green",
}


def accounts_table(rows: Iterable[AccountRow], now: datetime) -> Table:
    """One line per account, trouble first."""
    table = _table("account", "login", "state", "last outcome", "last balance", "next due")
    order = list(COLOURS)
    for row in sorted(rows, key=lambda row: (not row.overdue, order.index(row.state), row.alias)):
        state = Text(row.state, COLOURS[row.state])
        if row.overdue:
            state.append(" overdue", "bold red")
        table.add_row(
            row.alias,
            row.login,
            state,
            row.last_outcome or "-",
            distance(row.last_ok, now),
            distance(row.next_due, now),
        )
    return table


def letters_table(rows: Iterable[LetterRow], now: datetime) -> Table:
    """One line per dead letter."""
    table = _table("account", "queue", "code", "what Khipu said", "since")
    for row in rows:
        name = row.alias or f"(login {row.login})"
        queue = row.queue.removeprefix("balances.dead.")
        table.add_row(name, queue, row.code, row.description or row.type, distance(row.last_at, now))
    return table


def findings_table(findings: Iterable[Finding]) -> Table:
    """One line per thing looked at."""
    table = _table("", "what", "found")
    for finding in findings:
        mark = Text("ok", "green") if finding.is_right else Text("wrong", "bold red")
        table.add_row(mark, finding.name, finding.detail)
    return table


def observed_table(observations: Iterable[dict[str, Any]], now: datetime) -> Table:
    """One line per balance; an account without data has one line that says so."""
    table = _table("account", "type", "amount", "currency", "as of", "fetched")
    for data in observations:
        fetched = distance(data["fetched_at"], now)
        if not data["balances"]:
            table.add_row(data["account"], "-", Text("no data", "dim"), "", "", fetched)
        for balance in data["balances"]:
            table.add_row(
                data["account"],
                balance["type"],
                Text(amount(balance), justify="right"),
                balance["currency"],
                balance["as_of"],
                fetched,
            )
    return table


def event_line(attributes: dict[str, str], data: dict[str, Any]) -> str:
    """One entry of the stream as one line."""
    if attributes["type"] != "balance.observed.v1":
        about = " ".join(str(data[key]) for key in ("state", "code", "by") if key in data)
        return f"{attributes['time']}  {attributes['subject']:<24} {attributes['type'].split('.')[1]} {about}"
    balances = "  ".join(f"{amount(each)} {each['currency']} {each['type']}" for each in data["balances"])
    marks = "".join(f" ({mark})" for mark in ("late", "changed") if data[mark])
    return f"{attributes['time']}  {attributes['subject']:<24} {balances or 'no data'}{marks}"


def amount(balance: dict[str, str]) -> str:
    """The amount with the sign that debit gives it."""
    return ("-" if balance["indicator"] == "Debit" else "") + balance["amount"]


def distance(moment: str | None, now: datetime) -> str:
    """How far an ISO 8601 moment is from now: "in 3 h 52 min", "12 s ago", "-" for none."""
    if moment is None:
        return "-"
    seconds = round((datetime.fromisoformat(moment) - now).total_seconds())
    return f"in {duration(seconds)}" if seconds >= 0 else f"{duration(-seconds)} ago"


def duration(seconds: int) -> str:
    """The two largest units of a duration: "3 h 52 min"."""
    parts = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"


def utc(ms: int) -> datetime:
    """The aware moment of `ms` since the epoch."""
    return datetime.fromtimestamp(ms / 1000, UTC)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
