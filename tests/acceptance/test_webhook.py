"""The webhook as a process: honest callbacks are confirmed, and strangers get the right 4xx and cost nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import ROOT, ValkeyServer, alive, wait_until
from test_callbacks import BODY, CallbackWorld

from worker.store import free_port, tethered
from worker.timetable import Begun

#: As `secrets.token_urlsafe(32)` makes them.
SECRET = "s" * 43
NOTIFICATION_TOKEN = "canary-notification-token"
JSON = {"Content-Type": "application/json"}


@dataclass
class Webhook:
    """A running webhook, and the world behind it."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, body: bytes = BODY, **headers: str) -> requests.Response:
        return requests.post(self.url + path, data=body, headers={**JSON, **headers}, timeout=20)

    def raw(self, *parts: bytes, wait: bool = True) -> bytes:
        """Send bytes as they are; what came back until the other side closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            for part in parts:
                connection.sendall(part)
            if not wait:
                return b""
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
            return answer


@contextmanager
def running_webhook(server: ValkeyServer, directory: Path, **env: str) -> Iterator[Webhook]:
    port = free_port()
    log = directory / f"webhook-{port}.log"
    environment = {
        **os.environ,
        "BALANCES_REDIS_URL": server.url,
        "BALANCES_WEBHOOK_PORT": str(port),
        "BALANCES_NOTIFICATION_TOKEN": NOTIFICATION_TOKEN,
        "PYTHONPATH": str(ROOT),
        **env,
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            tethered([sys.executable, "-m", "worker.webhook"]), cwd=ROOT, env=environment, stdout=out, stderr=out
        )
    webhook = Webhook(f"http://127.0.0.1:{port}", port, process, log)
    try:
        wait_until(lambda: answers(webhook), timeout=20, what=f"a webhook; see {log}")
        yield webhook
    finally:
        process.kill()
        process.wait()


def answers(webhook: Webhook) -> bool:
    try:
        return requests.get(f"{webhook.url}/healthz", timeout=5).ok
    except requests.ConnectionError:
        assert webhook.process.poll() is None, webhook.log.read_text()
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path_factory.mktemp("valkey"), appendonly="yes") as server:
        yield server


@pytest.fixture(scope="module")
def webhook(server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    with running_webhook(server, tmp_path_factory.mktemp("webhook")) as webhook:
        yield webhook
        assert webhook.process.poll() is None, "nothing that a stranger sends ends the process"
        webhook.process.terminate()
        assert webhook.process.wait(timeout=20) == 0


@pytest.fixture
def world(server: ValkeyServer) -> Iterator[CallbackWorld]:
    with server.client() as client:
        client.flushall()
        yield CallbackWorld(client, "a", "b")


def expect(world: CallbackWorld, alias: str = "a", secret: str = SECRET) -> Begun:
    """Begin a poll that awaits its callback under this secret."""
    world.due_now(alias)
    world.claim()
    begun = world.timetable.begin(
        world.token(alias), caller="caller", scheme="api-key", bank="b", key="k", callback=digest(secret)
    )
    assert isinstance(begun, Begun)
    world.accept(begun)
    return begun


def digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def test_a_callback_is_stored_and_confirmed(webhook: Webhook, world: CallbackWorld) -> None:
    begun = expect(world)
    answer = webhook.post(f"/callbacks/{SECRET}")
    assert (answer.status_code, answer.json()) == (200, {"result": "stored"})
    assert world.settle_answer(begun.token) == "published"
    again = webhook.post(f"/callbacks/{SECRET}")
    assert (again.status_code, again.json()) == (200, {"result": "repeated"})


def test_the_same_callback_on_two_webhooks_at_once_is_taken_once(
    webhook: Webhook, server: ValkeyServer, world: CallbackWorld, tmp_path: Path
) -> None:
    begun = expect(world)
    with running_webhook(server, tmp_path) as other, ThreadPoolExecutor(8) as pool:
        answered = list(pool.map(lambda n: [webhook, other][n % 2].post(f"/callbacks/{SECRET}"), range(8)))
    assert {answer.status_code for answer in answered} == {200}
    assert sorted(answer.json()["result"] for answer in answered) == ["repeated"] * 7 + ["stored"]
    assert world.settle_answer(begun.token) == "published"
    assert world.timetable.unsettled(begun.token) is None


def test_what_was_acknowledged_survives_the_webhook_and_the_server(
    server: ValkeyServer, world: CallbackWorld, tmp_path: Path
) -> None:
    begun = expect(world)
    with running_webhook(server, tmp_path) as webhook:
        assert webhook.post(f"/callbacks/{SECRET}").status_code == 200
    server.kill()
    server.start()
    assert world.settle_answer(begun.token) == "published"


def test_a_server_that_is_away_means_come_again(tmp_path: Path) -> None:
    with (
        ValkeyServer(tmp_path, appendonly="yes") as own,
        own.client() as client,
        running_webhook(own, tmp_path) as webhook,
    ):
        expect(CallbackWorld(client, "a"))
        assert status(webhook, "/readyz") == 200
        own.kill()
        answer = webhook.post(f"/callbacks/{SECRET}")
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert status(webhook, "/readyz") == 503
        assert status(webhook, "/healthz") == 200, "a restart would bring no server back"
        own.start()
        wait_until(lambda: webhook.post(f"/callbacks/{SECRET}").status_code == 200, timeout=20)


def status(webhook: Webhook, path: str) -> int:
    return requests.get(webhook.url + path, timeout=20).status_code


@pytest.mark.parametrize(
    ("breaking", "mending"),
    [
        (ValkeyServer.fill_disk, ValkeyServer.free_disk),
        (ValkeyServer.fill_memory, ValkeyServer.free_memory),
        (lambda server: configure(server, "no"), lambda server: configure(server, "yes")),
    ],
    ids=["disk", "memory", "append-only file turned off"],
)
def test_what_the_server_cannot_keep_means_come_again(
    tmp_path: Path, breaking: Callable[[ValkeyServer], None], mending: Callable[[ValkeyServer], None]
) -> None:
    with (
        ValkeyServer(tmp_path, appendonly="yes") as own,
        own.client() as client,
        running_webhook(own, tmp_path) as webhook,
    ):
        world = CallbackWorld(client, "a")
        begun = expect(world)
        breaking(own)
        assert [webhook.post(f"/callbacks/{SECRET}").status_code for _ in range(3)] == [503, 503, 503]
        mending(own)
        wait_until(lambda: webhook.post(f"/callbacks/{SECRET}").status_code == 200, timeout=20)
        own.kill()
        own.start()
        assert world.settle_answer(begun.token) == "published"


def configure(server: ValkeyServer, appendonly: str) -> None:
    with server.client() as client:
        client.config_set("appendonly", appendonly)


BIG = b'{"a": "' + b"x" * (1024 * 1024) + b'"}'
STRANGERS = [
    ("unknown token", "/callbacks/" + "u" * 43, BODY, {}, 404),
    ("no token", "/callbacks/", BODY, {}, 404),
    ("short token", "/callbacks/abc", BODY, {}, 404),
    ("no such path", "/admin", BODY, {}, 404),
    ("too large", f"/callbacks/{SECRET}", BIG, {}, 413),
    ("not JSON", f"/callbacks/{SECRET}", b"hello", {}, 400),
    ("binary", f"/callbacks/{SECRET}", b"\xff\xfe\x00\x01", {}, 400),
    ("empty", f"/callbacks/{SECRET}", b"", {}, 400),
    ("a list", f"/callbacks/{SECRET}", b"[1]", {}, 400),
    ("deeply nested", f"/callbacks/{SECRET}", b"[" * 100_000, {}, 400),
    ("a text type", f"/callbacks/{SECRET}", BODY, {"Content-Type": "text/html"}, 415),
    ("compressed", f"/callbacks/{SECRET}", BODY, {"Content-Encoding": "gzip"}, 415),
    ("notification without token", "/notifications", b"{}", {}, 401),
    ("notification, wrong token", "/notifications", b"{}", {"Authorization": "Bearer wrong"}, 401),
]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"), [row[1:] for row in STRANGERS], ids=[r[0] for r in STRANGERS]
)
def test_strangers_get_the_right_4xx(
    webhook: Webhook, world: CallbackWorld, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    begun = expect(world)
    assert webhook.post(path, body, **headers).status_code == status
    assert world.timetable.unsettled(begun.token) is None


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(webhook: Webhook, method: str) -> None:
    assert requests.request(method, f"{webhook.url}/callbacks/{SECRET}", timeout=10).status_code == 405


def test_a_chunked_body_within_the_limit_is_taken(webhook: Webhook, world: CallbackWorld) -> None:
    begun = expect(world)
    head = f"POST /callbacks/{SECRET} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", webhook.port), timeout=20) as connection:
        connection.sendall(head.encode() + chunk)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert world.settle_answer(begun.token) == "published"


def test_an_endless_chunked_body_is_cut_off(webhook: Webhook, world: CallbackWorld) -> None:
    expect(world)
    head = f"POST /callbacks/{SECRET} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", webhook.port), timeout=20) as connection:
        connection.sendall(head)
        sent = 0
        try:
            while sent < 64 * 1024 * 1024:
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
        except OSError:
            pass
        assert sent < 64 * 1024 * 1024


def test_five_hundred_slow_strangers_do_not_delay_an_honest_callback(webhook: Webhook, world: CallbackWorld) -> None:
    begun = expect(world)
    slow = [socket.create_connection(("127.0.0.1", webhook.port), timeout=20) for _ in range(500)]
    try:
        for connection in slow:
            connection.sendall(b"POST /callbacks/")
        started = time.monotonic()
        assert webhook.post(f"/callbacks/{SECRET}").status_code == 200
        assert time.monotonic() - started < 8, "their deadline is 10 s"
        assert slow[0].recv(10) == b"", "the webhook closes a connection whose head does not come"
    finally:
        for connection in slow:
            connection.close()
    assert world.settle_answer(begun.token) == "published"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(head=st.binary(max_size=300), body=st.binary(max_size=300), is_post=st.booleans())
def test_generated_bytes_never_bring_a_5xx(webhook: Webhook, head: bytes, body: bytes, is_post: bool) -> None:
    start = b"POST /callbacks/" + SECRET.encode() + b" HTTP/1.1\r\nHost: x\r\n" if is_post else b""
    try:
        answer = webhook.raw(start, head, b"\r\n\r\n", body)
    except OSError:  # it was closed before all of it was sent
        return
    assert not answer.startswith(b"HTTP/1.1 5"), answer[:200]


def notify(webhook: Webhook, body: bytes) -> requests.Response:
    return webhook.post("/notifications", body, Authorization=f"Bearer {NOTIFICATION_TOKEN}")


@pytest.mark.parametrize(
    "body", [b"{}", b'{"alias": ""}', b'{"other": "a"}', b'{"alias": 1}', b'{"login": null}'], ids=bytes.decode
)
def test_a_notification_that_names_nothing_is_422(webhook: Webhook, body: bytes) -> None:
    assert notify(webhook, body).status_code == 422


def test_a_notification_releases_what_was_parked_and_says_how_many(webhook: Webhook, world: CallbackWorld) -> None:
    for alias in ("a", "b"):
        begun = world.start(alias)
        world.park(begun.token)
    answer = notify(webhook, b'{"institution": "bancosecurity.cl", "login": "acme"}')
    assert (answer.status_code, answer.json()) == (200, {"released": 2, "accounts": ["a", "b"]})
    first, second = (int(world.account(alias)["due"]) for alias in ("a", "b"))
    assert first <= world.timetable.now_ms() + 100
    assert second > first, "the others are spread over time"
    assert notify(webhook, b'{"login": "another"}').json()["released"] == 0


def test_no_token_and_no_body_reaches_the_log(webhook: Webhook) -> None:
    log = webhook.log.read_text()
    assert "callback" in log
    for canary in (SECRET, NOTIFICATION_TOKEN, "OperationId"):
        assert canary not in log


def test_a_busy_port_stops_the_start_and_is_named(server: ValkeyServer, webhook: Webhook) -> None:
    env = {**os.environ, "BALANCES_REDIS_URL": server.url, "BALANCES_WEBHOOK_PORT": str(webhook.port)}
    done = subprocess.run(
        [sys.executable, "-m", "worker.webhook"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert "BALANCES_WEBHOOK_PORT" in done.stderr


def test_memory_stays_bounded(webhook: Webhook) -> None:
    """The last test of this file: after everything above."""
    assert alive(webhook.process.pid)
    status = Path(f"/proc/{webhook.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    assert int(line.split()[1]) < 200_000, line
