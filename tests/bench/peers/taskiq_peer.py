"""taskiq with its Redis list broker, which is its leanest, and aiohttp."""

import asyncio
import os

from aiopoll import poll
from taskiq_redis import ListQueueBroker

# redis-py's time-out of 5 s would end a worker that waits longer than that for a message, polls in flight included.
broker = ListQueueBroker(os.environ["BENCH_REDIS_URL"], socket_timeout=None)


@broker.task
async def fetch(number: str) -> None:
    await poll(number)


async def give(count: int) -> None:
    await broker.startup()
    for number in range(count):
        await fetch.kiq(f"account-{number}")
    await broker.shutdown()


def main(count: int) -> None:
    asyncio.run(give(count))
