"""When a worker leaves its core: where others crowd it, and another one is idler by more than what is noise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from worker.affinity import CROWDED, OneCore, Usage, better_core, busy_s

TICKS = os.sysconf("SC_CLK_TCK")
STAT = f"""cpu  1 2 3 4 5 6 7 8 9 10
cpu0 {TICKS} 0 {TICKS} {9 * TICKS} {9 * TICKS} 0 0 0 0 0
cpu11 0 {TICKS} 0 0 0 {TICKS} {TICKS} {TICKS} 5 5
intr 1 2 3
"""


def test_a_core_is_busy_with_everything_but_idling_and_waiting_for_disks() -> None:
    assert busy_s(STAT) == {0: 2.0, 11: 4.0}


@pytest.mark.parametrize(
    ("own_s", "busy_s", "better"),
    [
        (0.0, {0: 0.0, 1: 0.0}, None),
        (9.0, {0: 9.0, 1: 0.0}, None),  # our own work is no reason to leave
        (5.0, {0: 10.0, 1: 0.0}, 1),
        (5.0, {0: 10.0, 1: 4.0}, None),  # little would be won
        (5.0, {0: 10.0, 1: 9.0, 2: 1.0}, 2),
        (5.0, {0: 10.0, 1: 9.0, 3: 0.0}, None),  # not allowed there
        (5.0, {1: 0.0}, None),  # a system that does not show this core
    ],
)
def test_a_worker_leaves_where_others_take_what_another_core_has(
    own_s: float, busy_s: dict[int, float], better: int | None
) -> None:
    assert better_core(0, frozenset({0, 1, 2}), Usage(10.0, own_s, busy_s)) == better


def test_what_is_won_must_be_worth_it() -> None:
    for others_s, better in ((10 * CROWDED - 0.1, None), (10 * CROWDED + 0.1, 1)):
        assert better_core(0, frozenset({0, 1}), Usage(10.0, 0.0, {0: others_s, 1: 0.0})) == better


def test_a_look_right_after_another_one_sees_nothing() -> None:
    assert better_core(0, frozenset({0, 1}), Usage(0.5, 0.0, {0: 0.5, 1: 0.0})) is None


def test_the_system_shows_the_cores_that_this_process_may_use() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux shows them in /proc/stat")
    assert Usage.now().busy_s.keys() >= os.sched_getaffinity(0)


#: A process that keeps to one core, and is told that others take all of it; prints where its threads may run.
CROWDED_PROCESS = """
import os, threading
from worker.affinity import OneCore, Usage

def places():
    threads = map(int, os.listdir("/proc/self/task"))
    return {(frozenset(os.sched_getaffinity(thread)), os.sched_getscheduler(thread)) for thread in threads}

(before,) = places()
stopped = threading.Event()
threading.Thread(target=stopped.wait).start()
Usage.now = lambda: Usage(0.0, 0.0, dict.fromkeys(os.sched_getaffinity(0), 0.0))
place = OneCore(chance=lambda: 0.0)
place.settle()
(first,) = places()
threading.Thread(target=stopped.wait).start()
assert places() == {first} and len(first[0]) == 1, places()
(core,) = first[0]
Usage.now = lambda: Usage(10.0, 1.0, {**dict.fromkeys(before[0], 0.0), core: 10.0})
place.look()
(second,) = places()
print("moved" if second[0] != first[0] and second[1] == first[1] else "stayed")
place.leave()
print("left" if places() == {before} else "kept")
stopped.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process choose its core")
def test_all_threads_move_away_from_who_never_rests() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core only")
    run = subprocess.run([sys.executable, "-c", CROWDED_PROCESS], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("moved\nleft\n", "")


def on_many_cores(monkeypatch: pytest.MonkeyPatch, refuse: Exception) -> list[set[int]]:
    """A system with three cores that puts nobody anywhere; where it was asked to."""
    asked: list[set[int]] = []

    def move(_: int, cores: set[int]) -> None:
        asked.append(set(cores))
        if len(cores) == 1:
            raise refuse

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", move, raising=False)
    return asked


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process choose its core")
def test_where_the_system_refuses_the_place_is_given_up_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a cpuset has shrunk (EINVAL), or a filter of system calls forbids it (EPERM)."""
    asked = on_many_cores(monkeypatch, OSError(22, "Invalid argument"))
    place = OneCore()
    place.settle()
    assert asked[-1] == {0, 1, 2}
    before = len(asked)
    place.look()
    place.leave()
    assert len(asked) == before, "there is no place any more"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process choose its core")
def test_every_thread_is_let_go_of_where_the_system_refuses_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core is given, and how it is scheduled may not be changed, not even back."""

    def refuse(*_: object) -> None:
        raise PermissionError

    asked = on_many_cores(monkeypatch, ProcessLookupError())
    monkeypatch.setattr(os, "sched_setscheduler", refuse, raising=False)
    monkeypatch.setattr(os, "listdir", lambda _: ["1", "2", "3"])
    place = OneCore()
    place._core = 0
    place.leave()
    assert asked == [{0, 1, 2}] * 3
