"""The sandbox's journal is bounded, and its counts stay true."""

from __future__ import annotations

from worker.sandbox.journal import ABORTED, ACKNOWLEDGED, ANSWERED, Journal


def _request(journal: Journal) -> None:
    record = journal.open()
    record.number = "10000001"
    journal.begin(record)
    journal.end(record, ANSWERED, 200)


def test_only_the_last_records_are_kept() -> None:
    journal = Journal(history=3)
    for _ in range(10):
        _request(journal)
    assert [record.seq for record in journal.requests.since(0)] == [8, 9, 10]
    assert [record.seq for record in journal.requests.since(9)] == [10]
    assert len(journal.requests) == 3
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


def test_a_held_session_outlives_its_request() -> None:
    journal = Journal()
    record = journal.open()
    record.number, record.log_on, record.held = "10000001", "user", True
    journal.begin(record)
    journal.end(record, ANSWERED, 202)
    assert (journal.total.in_flight, journal.log_ons["user"].in_flight) == (0, 1)
    journal.log_off(record)
    journal.log_off(record)
    assert (journal.log_ons["user"].in_flight, journal.log_ons["user"].answered) == (0, 1)


def test_a_callback_that_ends_after_it_was_forgotten_is_not_counted() -> None:
    journal = Journal(history=2)
    record = journal.open()
    for _ in range(3):
        callback = journal.open_callback(record, "operation", "ok", "digest")
    assert [entry.seq for entry in journal.callbacks.since(0)] == [2, 3]
    journal.clear()
    journal.end_callback(callback, ACKNOWLEDGED)
    assert (list(journal.callbacks.since(0)), journal.called_back) == ([], {})
