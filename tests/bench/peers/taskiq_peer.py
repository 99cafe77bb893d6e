"""taskiq with its Redis list broker, which is its leanest, and aiohttp."""

import asyncio
import os

from aiopoll import poll
from taskiq_redis import ListQueueBroker

broker = ListQueueBroker(os.environ["BENCH_REDIS_URL"])


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
