"""What processes cost: CPU and memory of a process and all its children, from /proc (Linux)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def tree(pid: int) -> list[int]:
    """The process and everything that descends from it; what ends meanwhile is left out."""
    found = [pid]
    for parent in found:
        for thread in _threads(parent):
            with suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def _threads(pid: int) -> list[Path]:
    with suppress(OSError):
        return list((_PROC / str(pid) / "task").iterdir())
    return []


def cpu_s(pid: int) -> float:
    """Seconds of CPU that the tree has used, children that ended included."""
    return sum(_own_cpu_s(each) for each in tree(pid))


def _own_cpu_s(pid: int) -> float:
    with suppress(OSError):
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS
    return 0.0


def memory_mb(pid: int) -> float:
    """MB that the tree holds now; what its processes share is counted once (PSS)."""
    return sum(_own_memory_kb(each) for each in tree(pid)) / 1024


def _own_memory_kb(pid: int) -> int:
    with suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0
