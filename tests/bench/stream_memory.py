"""Measures what the stream costs the server per entry.

    PYTHONPATH=.:tests:tests/integration .venv/bin/python tests/bench/stream_memory.py

100,000 answers of one balance each go through settle.lua into a server of their own; the figures are then multiplied.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from servers import ValkeyServer
from world import STREAM, World, read

ANSWERS = 100_000
MILLION = 1_000_000


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, ValkeyServer(Path(directory)) as server, server.client() as client:
        world = World(client)
        world.apply(read("acme-operating"))
        begun = world.start("acme-operating")
        before = client.info("memory")["used_memory"]
        for number in range(ANSWERS):
            world.settle(begun, amount=str(10_000 + number))
        used = client.info("memory")["used_memory"] - before
        stream = client.memory_usage(STREAM, samples=0)
        print(f"{ANSWERS} answers; per million of them, extrapolated:")
        for name, size in (("stream", stream), ("dedupe keys", used - stream), ("both", used)):
            print(f"  {name:<12} {size / ANSWERS:6.0f} bytes each  {size / ANSWERS * MILLION / 2**20:6.0f} MiB")


if __name__ == "__main__":
    main()
