"""The poll that users of asyncio would write: POST, parse, XADD, with a session and connections that are kept.

BENCH_BANK_URL, BENCH_REDIS_URL: where to.
"""

import os

import aiohttp
import redis.asyncio

URL = os.environ["BENCH_BANK_URL"] + "/v1/cl/banking/business/bancosecurity.cl/current/balances"
HEADERS = {"Authorization": "Bearer token"}
STREAM = "bench"

store = redis.asyncio.Redis.from_url(os.environ["BENCH_REDIS_URL"])
_sessions: list[aiohttp.ClientSession] = []


async def poll(number: str) -> None:
    if not _sessions:
        connector = aiohttp.TCPConnector(limit=0)
        _sessions.append(aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(190)))
    body = {"RequestData": {"AccountNumber": number}}
    async with _sessions[0].post(URL, json=body, headers=HEADERS) as response:
        response.raise_for_status()
        answer = await response.json()
    for balance in answer["Data"]["Balance"]:
        entry = {"account": number, "id": answer["OperationId"], "amount": balance["Amount"]["Amount"]}
        await store.xadd(STREAM, entry)
