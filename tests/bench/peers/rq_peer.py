"""rq with its default worker, which forks for every job."""

import os

from poll import poll
from redis import Redis
from rq import Queue


def main(count: int) -> None:
    queue = Queue(connection=Redis.from_url(os.environ["BENCH_REDIS_URL"]))
    for number in range(count):
        queue.enqueue(poll, f"account-{number}", result_ttl=0)
