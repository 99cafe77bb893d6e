"""The poll that users of threads would write: POST, parse, XADD; with a session and connections that are kept.

BENCH_BANK_URL, BENCH_REDIS_URL: where to.
"""

import os
import threading

import redis
import requests

URL = os.environ["BENCH_BANK_URL"] + "/v1/cl/banking/business/bancosecurity.cl/current/balances"
HEADERS = {"Authorization": "Bearer token"}
STREAM = "bench"

store = redis.Redis.from_url(os.environ["BENCH_REDIS_URL"])
_thread = threading.local()


def poll(number: str) -> None:
    if not hasattr(_thread, "session"):
        _thread.session = requests.Session()
    response = _thread.session.post(URL, json={"RequestData": {"AccountNumber": number}}, headers=HEADERS, timeout=190)
    response.raise_for_status()
    answer = response.json()
    for balance in answer["Data"]["Balance"]:
        store.xadd(STREAM, {"account": number, "id": answer["OperationId"], "amount": balance["Amount"]["Amount"]})
