"""The sandbox's journal is bounded, and its counts stay true."""

from __future__ import annotations

from worker.sandbox.journal import ABORTED, ANSWERED, Journal


def _request(journal: Journal) -> None:
    record = journal.open()
    record.number = "10000001"
    journal.begin(record)
    journal.end(record, ANSWERED, 200)


def test_only_the_last_records_are_kept() -> None:
    journal = Journal(history=3)
    for _ in range(10):
        _request(journal)
    assert [record.seq for record in journal.records(0)] == [8, 9, 10]
    assert [record.seq for record in journal.records(9)] == [10]
    assert len(journal._records) == 3
    assert journal.total.requests == 10


def test_what_ends_after_it_was_forgotten_is_not_counted() -> None:
    journal = Journal()
    record = journal.open()
    record.number = "10000001"
    journal.begin(record)
    journal.clear()
    journal.end(record, ABORTED)
    assert (journal.total.in_flight, journal.total.aborted, journal.accounts) == (0, 0, {})
    _request(journal)
    assert (journal.total.requests, journal.accounts["10000001"].overlaps) == (1, 0)
