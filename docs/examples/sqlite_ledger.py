"""Writes every balance into SQLite, exactly once: python sqlite_ledger.py redis://host:6379/0 ledger.db

The stream delivers at least once. The operation id as primary key makes a repeated answer one that is there already;
the position is written in the same transaction, so that the file needs nobody else to know how far it has come.
"""

import signal
import sqlite3
import sys

from worker.events import BalanceObserved, Event
from worker.reader import BalanceReader, TryLater

TABLES = """
CREATE TABLE IF NOT EXISTS answer (operation_id TEXT PRIMARY KEY, account TEXT, fetched_at TEXT, late INTEGER);
CREATE TABLE IF NOT EXISTS balance (operation_id TEXT REFERENCES answer, account_id TEXT, type TEXT, amount TEXT,
                                    currency TEXT, as_of TEXT);
CREATE TABLE IF NOT EXISTS position (one INTEGER PRIMARY KEY CHECK (one = 1), entry TEXT);
"""


def write(ledger: sqlite3.Connection, event: Event) -> None:
    try:
        with ledger:  # one transaction, rolled back where anything fails
            if isinstance(event.data, BalanceObserved):
                write_answer(ledger, event.data)
            ledger.execute("REPLACE INTO position VALUES (1, ?)", (event.entry,))
    except sqlite3.OperationalError as error:  # locked, disk full: not this entry's fault
        raise TryLater from error


def write_answer(ledger: sqlite3.Connection, data: BalanceObserved) -> None:
    answer = (data.operation_id, data.account, data.fetched_at.isoformat(), data.late)
    if ledger.execute("INSERT OR IGNORE INTO answer VALUES (?, ?, ?, ?)", answer).rowcount:
        for b in data.balances:
            row = (data.operation_id, b.account_id, b.type, format(b.signed, "f"), b.currency, b.as_of.isoformat())
            ledger.execute("INSERT INTO balance VALUES (?, ?, ?, ?, ?, ?)", row)


if __name__ == "__main__":
    url, file = sys.argv[1:]
    ledger = sqlite3.connect(file)
    ledger.executescript(TABLES)
    [position] = ledger.execute("SELECT max(entry) FROM position").fetchone()
    with BalanceReader(url, group="sqlite", consumer="ledger", start=position or "0") as reader:
        signal.signal(signal.SIGTERM, lambda *_: reader.stop())
        reader.run(lambda event: write(ledger, event))
