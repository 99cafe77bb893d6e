"""arq with aiohttp."""

import asyncio
import os
from typing import Any

from aiopoll import poll
from arq import create_pool
from arq.connections import RedisSettings

SETTINGS = RedisSettings.from_dsn(os.environ["BENCH_REDIS_URL"])


async def fetch(_: dict[str, Any], number: str) -> None:
    await poll(number)


class WorkerSettings:
    functions = (fetch,)
    redis_settings = SETTINGS
    max_jobs = int(os.environ["BENCH_CONCURRENCY"])
    keep_result = 0
    poll_delay = 0.1


async def give(count: int) -> None:
    pool = await create_pool(SETTINGS)
    for number in range(count):
        await pool.enqueue_job("fetch", f"account-{number}")


def main(count: int) -> None:
    asyncio.run(give(count))
