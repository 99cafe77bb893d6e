"""A network that fails on request: a TCP proxy on loopback, in a thread of its own.

    processes ──▶ Proxy ──▶ server(s)      cut: every connection is reset · hold: nothing passes until let go
                                           delay: every piece of data waits for up to so long

With several targets it is a load balancer: each connection goes to the next one that takes it.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Self

LOOPBACK = "127.0.0.1"
PIECE = 64 * 1024
#: How long its thread may take to come and to go.
PATIENCE_S = 10.0


class Proxy:
    """Listens on `port` (a free one) and passes everything on; `with` ends it. Its methods may be called anywhere."""

    def __init__(self, *targets: int, seed: int = 0) -> None:
        self.targets = list(targets)
        self.port = 0
        self.delay_s = 0.0
        self._random = random.Random(seed)  # noqa: S311 - behaviour, not secrecy
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._started = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(PATIENCE_S), "the proxy does not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._loop.stop)
        self._thread.join(PATIENCE_S)

    def cut(self) -> None:
        """Every connection ends now, in the middle of whatever it says."""
        self._call(self._cut)

    def hold(self) -> None:
        """From now on nothing passes, and nobody is told: a black hole. New connections are taken, and wait."""
        self._call(self._open.clear)

    def let_go(self) -> None:
        """What was held passes again, late."""
        self._call(self._open.set)

    def delay(self, seconds: float) -> None:
        """From now on every piece of data waits for up to so long; 0 for none."""
        self.delay_s = seconds

    # ------------------------------------------------------------------------------------------------ its own thread

    def _call(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._loop.run_forever()
        self._server.close()
        self._cut()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    async def _listen(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._server = await asyncio.start_server(self._accept, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._started.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._go(self._serve(reader, writer))

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        there = await self._connected()
        if there is None:
            self._end(writer)
            return
        there_reader, there_writer = there
        self._writers.add(there_writer)
        await asyncio.gather(self._pump(reader, there_writer), self._pump(there_reader, writer))
        self._end(writer)
        self._end(there_writer)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to the next target that takes one."""
        for _ in self.targets:
            self.targets.append(port := self.targets.pop(0))
            with suppress(OSError):
                return await asyncio.open_connection(LOOPBACK, port)
        return None

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(PIECE):
                if self.delay_s:
                    await asyncio.sleep(self._random.uniform(0, self.delay_s))
                await self._open.wait()
                writer.write(piece)
                await writer.drain()
        writer.close()

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()
