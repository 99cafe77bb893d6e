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


def cores(process: Process) -> set[frozenset[int]]:
    """Where each of its threads may run."""
    return {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir(f"/proc/{process.pid}/task")}


def test_every_thread_of_a_worker_is_on_one_core_those_that_poll_too(machine: Machine) -> None:
    worker = machine.worker()
    machine.beat()
    machine.kick("acme")
    machine.until_entries("acme", 1)
    (core,) = cores(worker)
    assert len(core) == 1


def test_a_pool_of_processes_may_use_every_core(machine: Machine) -> None:
    assert cores(machine.worker("worker", "-P", "processes", "-c", "2")) == {frozenset(os.sched_getaffinity(0))}
