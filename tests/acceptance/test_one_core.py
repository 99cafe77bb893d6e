"""A worker of threads keeps to one core; one of processes, which have a lock each, is left alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Account, Machine, Process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process choose its core")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core only")
    with Machine(tmp_path, [Account("acme")]) as machine:
        yield machine


def places(process: Process) -> set[tuple[frozenset[int], int]]:
    """Where each of its threads may run, and how it is scheduled."""
    threads = map(int, os.listdir(f"/proc/{process.pid}/task"))
    return {(frozenset(os.sched_getaffinity(thread)), os.sched_getscheduler(thread)) for thread in threads}


def test_every_thread_of_a_worker_is_on_one_core_and_interrupts_no_other(machine: Machine) -> None:
    worker = machine.worker()
    machine.beat()
    machine.kick("acme")
    machine.until_entries("acme", 1)
    [(core, policy)] = places(worker)
    assert (len(core), policy) == (1, os.SCHED_BATCH)


def test_a_pool_of_processes_may_use_every_core(machine: Machine) -> None:
    worker = machine.worker("worker", "-P", "processes", "-c", "2")
    assert places(worker) == {(frozenset(os.sched_getaffinity(0)), os.SCHED_OTHER)}
