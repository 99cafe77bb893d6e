"""rq's default worker; its `job_timeout` stays as it is."""

import os

from redis import Redis
from rq import Queue, Worker

connection = Redis.from_url(os.environ["BENCH_REDIS_URL"])
Worker([Queue(connection=connection)], connection=connection).work()
