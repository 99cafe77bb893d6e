"""Speed and scale, side by side with what people would use instead: `make bench`.

    python tests/bench/bench.py [--only NAME,…] [--long | --tiny] [--page docs/performance.md]

Each section measures one thing, prints its table and puts it on the page, with date, machine and command. `--tiny`
proves that it runs, and its figures mean nothing.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import section_callbacks  # noqa: E402
import section_dispatch  # noqa: E402
import section_growth  # noqa: E402
import section_in_flight  # noqa: E402
import section_poll  # noqa: E402
import section_waiting  # noqa: E402
from report import Section, write  # noqa: E402


def sections(size: str) -> dict[str, Callable[[], Section]]:
    """The sections by name, in their order: tiny, normal or long."""
    sizes = {"tiny": 0, "normal": 1, "long": 2}[size]

    def pick(*values: int) -> int:
        return values[sizes]

    return {
        "dispatch": lambda: section_dispatch.run(
            [(40,), (1000, 10_000, 100_000), (1000, 10_000, 100_000)][sizes],
            pick(1, 3, 5),
            pick(40, 100_000, 100_000),
            pick(1, 10, 60),
        ),
        "poll": lambda: section_poll.run(pick(20, 1000, 10_000), pick(1, 3, 5)),
        "flight": lambda: section_in_flight.run(pick(10, 1000, 1000), pick(2, 5, 5), (0.5, 10, 10)[sizes]),
        "callbacks": lambda: section_callbacks.run(
            pick(20, 100_000, 100_000), timedelta(seconds=pick(5, 900, 900)), pick(3, 300, 1800), pick(1, 10, 10)
        ),
        "waiting": lambda: section_waiting.run(pick(40, 100_000, 100_000), pick(40, 3000, 10_000), pick(1, 2, 3)),
        "growth": lambda: section_growth.run(
            pick(20, 1000, 10_000),
            [(10, 20), (100, 1000, 10_000, 100_000), (100, 1000, 10_000, 100_000)][sizes],
            pick(20, 50_000, 100_000),
            [(1, 10), (1, 10, 1000), (1, 10, 100, 1000)][sizes],
            [(2,), (2, 4, 8), (2, 3, 4, 8)][sizes],
            pick(20, 100_000, 310_000),
        ),
    }


def main(options: Namespace) -> int:
    everything = sections(options.size)
    names = options.only.split(",") if options.only else list(everything)
    if unknown := set(names) - everything.keys():
        print(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(everything)}", file=sys.stderr)
        return 2
    for name in names:
        print(f"{name}:", flush=True)
        began_s = time.monotonic()
        section = everything[name]()
        print(f"\n{section.text}\n({time.monotonic() - began_s:.0f} s)\n", flush=True)
        if options.page:
            write(options.page, [section], about(name, options.size))
    return 0


def about(name: str, size: str) -> str:
    """Date, machine and command."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[1]
    command = f"make bench ONLY={name}" + (" LONG=1" if size == "long" else "")
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {memory_gb:.0f} GB, "
        f"Python {platform.python_version()}, everything on loopback, load average of the last five minutes "
        f"{load:.1f}: `{command}`"
    )


if __name__ == "__main__":
    parser = ArgumentParser(description="Measures speed and scale.")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--page", type=Path, help="where to put the figures")
    parser.add_argument("--long", dest="size", action="store_const", const="long", default="normal")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny")
    sys.exit(main(parser.parse_args()))
