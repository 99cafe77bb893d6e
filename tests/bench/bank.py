"""The benchmark's bank: answers every poll with a balance, for as little CPU as a Python server can.

    python tests/bench/bank.py PORT [LATENCY_S [CALLBACK_AFTER_S]]

The first request is answered at once, so that who asks can warm up. One that names a `CallbackUrl` gets a 202 at once
and its callback later. `GET /` tells what came, as JSON: requests, callbacks acknowledged and refused, the most
requests that were open at once, and each arrival (`AccountNumber`, ms since the epoch). It checks nothing: the sandbox
does, and costs more for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio import Transport
from urllib.parse import urlsplit
from uuid import uuid4

BALANCE = {
    "AccountId": "873458",
    "CreditDebitIndicator": "Credit",
    "DateTime": "2017-07-21T17:32:28-0400",
    "Type": "ClosingAvailable",
    "Amount": {"Amount": 10000, "Currency": "CLP"},
}
ANSWER = {"Status": "OK", "Data": {"Balance": [BALANCE]}, "AdditionalInformation": None, "Error": None}
ACCEPTED = {"Status": "OK", "Data": None, "AdditionalInformation": "later", "Error": None, "LifeSpan": None}
#: Callbacks on their way at once: a real sender opens no hundred connections to one webhook either.
SENDERS = 100


class Bank:
    """What came, and what goes out."""

    def __init__(self, latency_s: float, callback_after_s: float) -> None:
        self.latency_s = latency_s
        self.callback_after_s = callback_after_s
        self.arrivals: list[tuple[str, int]] = []
        self.acknowledged = self.refused = 0
        self.open = self.most_open = 0
        self._operations = 0
        self._prefix = uuid4().hex[:16]
        self._answer = json.dumps(ANSWER)[:-1]
        self._accepted = json.dumps(ACCEPTED)[:-1]
        self._senders = asyncio.Semaphore(SENDERS)
        self._tasks: set[asyncio.Task[None]] = set()

    def stats(self) -> str:
        return json.dumps(
            {
                "requests": len(self.arrivals),
                "acknowledged": self.acknowledged,
                "refused": self.refused,
                "most_open": self.most_open,
                "arrivals": self.arrivals,
            }
        )

    def ask(self, body: bytes) -> tuple[int, str]:
        """Takes a request, and says what to answer."""
        envelope = json.loads(body)
        self.arrivals.append((envelope["RequestData"]["AccountNumber"], time.time_ns() // 1_000_000))
        self._operations += 1
        operation = f', "OperationId": "{self._prefix}-{self._operations}"}}'
        if "CallbackUrl" not in envelope:
            return 200, self._answer + operation
        task = asyncio.get_running_loop().create_task(self._call(envelope["CallbackUrl"], self._answer + operation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return 202, self._accepted + operation

    async def _call(self, url: str, answer: str) -> None:
        await asyncio.sleep(self.callback_after_s)
        parts = urlsplit(url)
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        async with self._senders:
            try:
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writer.write(f"{head}Content-Length: {len(answer)}\r\n\r\n{answer}".encode())
                status = await reader.readline()
                writer.close()
            except OSError:
                status = b""
        if b" 20" in status:
            self.acknowledged += 1
        else:
            self.refused += 1


class Client(asyncio.Protocol):
    """One connection, kept alive; a request is answered before the next one comes."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._received = b""
        self._transport: Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, rest = self._received.partition(b"\r\n\r\n")
        length = _content_length(head)
        if not separator or len(rest) < length:
            return
        self._received = rest[length:]
        if head.startswith(b"GET"):
            self._answer(200, self._bank.stats())
            return
        self._bank.open += 1
        self._bank.most_open = max(self._bank.most_open, self._bank.open)
        status, text = self._bank.ask(rest[:length])
        if self._bank.latency_s and status == 200 and len(self._bank.arrivals) > 1:
            asyncio.get_running_loop().call_later(self._bank.latency_s, self._end, status, text)
        else:
            self._end(status, text)

    def _end(self, status: int, text: str) -> None:
        self._bank.open -= 1
        self._answer(status, text)

    def _answer(self, status: int, text: str) -> None:
        head = f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        self._transport.write((head + text).encode())


def _content_length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


async def main(port: int, latency_s: float = 0.0, callback_after_s: float = 2.0) -> None:
    bank = Bank(latency_s, callback_after_s)
    server = await asyncio.get_running_loop().create_server(lambda: Client(bank), "127.0.0.1", port, backlog=8192)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *map(float, sys.argv[2:])))
