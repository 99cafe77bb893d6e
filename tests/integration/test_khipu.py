"""The client against servers that answer, refuse, stall, drip, flood and lie; nothing of a request ever comes out."""

from __future__ import annotations

import gc
import gzip
import json
import os
import queue
import resource
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from traceback import format_exception
from typing import Any

import hostile
import pytest
from hostile import Hostile, Peer, head
from pydantic import SecretStr

import worker
from worker import transport
from worker.accounts import Definition
from worker.balances import Accepted, Answer
from worker.credentials import Credentials
from worker.errors import KhipuFailure, Kind, Outcome
from worker.khipu import KhipuClient
from worker.transport import BODY_LIMIT, Address, resolve

#: Seconds for a request that is expected to run into its deadline.
SHORT_S = 0.3
#: Seconds for one that is not.
LONG_S = 15.0
#: Seconds within which everything is over here that would take minutes or for ever.
AT_ONCE_S = 8.0

NUMBER = "11887755"
KEY = "canary-key-5a1"
PASSWORD = "canary-password-77c"
CALLBACK = "https://hooks.example/callbacks/canary-token-e0d"
CANARIES = (NUMBER, KEY, PASSWORD, CALLBACK, "canary")

DEFINITION = Definition(
    alias="acme-operating",
    country="cl",
    segment="business",
    institution="bancosecurity.cl",
    number=NUMBER,
    currency="CLP",
    login="acme",
)
API_KEY = Credentials("api-key", SecretStr(KEY), {"Username": "1-9", "Password": PASSWORD, "More": [None, True, 55551]})
BEARER = Credentials("bearer", SecretStr(KEY))

OK = json.dumps(
    {
        "OperationId": "6baf6c19",
        "Status": "OK",
        "Data": {
            "Balance": [
                {
                    "AccountId": "873458",
                    "CreditDebitIndicator": "Credit",
                    "DateTime": "2017-07-21T17:32:28-0400",
                    "Type": "ClosingAvailable",
                    "Amount": {"Amount": 10000, "Currency": "CLP"},
                }
            ]
        },
    }
).encode()
ACCEPTED = b'{"OperationId": "6baf6c19", "Status": "OK", "LifeSpan": "2017-07-22T00:00:00-0400"}'

Script = Callable[[Peer], None]


def error(code: str | None = "E201", type: str | None = "RETRY_IMMEDIATELY", description: str = "") -> bytes:  # noqa: A002
    return json.dumps(
        {"OperationId": "x", "Status": "ERROR", "Error": {"Code": code, "Type": type, "Description": description}}
    ).encode()


def fetch(url: str, *, deadline_s: float = LONG_S, **options: Any) -> Answer | Accepted:
    credentials = options.pop("credentials", API_KEY)
    definition = options.pop("definition", DEFINITION)
    callback_url = options.pop("callback_url", None)
    client = KhipuClient(url, **options)
    return client.fetch(definition, credentials, deadline_s=deadline_s, callback_url=callback_url)


@contextmanager
def failing() -> Iterator[list[KhipuFailure]]:
    """What happens inside fails, soon, and its exception shows nothing of the request."""
    failures: list[KhipuFailure] = []
    started = time.monotonic()
    with pytest.raises(KhipuFailure) as caught:
        yield failures
    assert time.monotonic() - started < AT_ONCE_S
    failures.append(caught.value)
    shown = "".join(format_exception(caught.value)) + repr(caught.value) + repr(caught.value.outcome)
    assert not [canary for canary in CANARIES if canary in shown]
    assert caught.value.__context__ is None


def outcome_of(script: Script, **options: Any) -> tuple[Outcome, bool]:
    """How a fetch from a server with this script fails, and whether it says that the request was sent."""
    with Hostile(script) as server, failing() as failures:
        fetch(server.url, **options)
    assert len(server.requests) <= 1
    return failures[0].outcome, failures[0].sent


def answering(status: int, body: bytes = b"", **headers: str) -> Script:
    return lambda peer: peer.answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def whole(reply: bytes) -> Script:
    """Sends this, and waits for the client to close."""
    return lambda peer: (peer.request(), peer.send(reply), peer.gone())  # type: ignore[func-returns-value]


# --- the request


def sent(**options: Any) -> tuple[str, dict[str, str], Any]:
    """What reaches the server."""
    with Hostile(answering(200, OK)) as server:
        fetch(server.url + options.pop("path", ""), **options)
    [request] = server.requests
    return request.line, request.headers, json.loads(request.body)


def test_an_api_key_goes_with_the_bank_log_on() -> None:
    line, headers, body = sent()
    assert line == "POST /v1/cl/banking/business/bancosecurity.cl/current/balances HTTP/1.1"
    assert headers["x-api-key"] == KEY
    assert "authorization" not in headers
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "gzip"
    assert headers["user-agent"] == f"balance-poller/{worker.__version__}"
    assert body == {"RequestData": {"AccountNumber": NUMBER, "AccountCredential": API_KEY.account_credential}}


@pytest.mark.parametrize("scheme", ["bearer", "client-credentials"])
def test_a_token_goes_without_it(scheme: Any) -> None:
    _, headers, body = sent(credentials=Credentials(scheme, SecretStr(KEY), {"Password": PASSWORD}))
    assert headers["authorization"] == f"Bearer {KEY}"
    assert "x-api-key" not in headers
    assert body == {"RequestData": {"AccountNumber": NUMBER}}


def test_currency_and_callback_are_sent_only_when_asked_for() -> None:
    definition = DEFINITION.model_copy(update={"send_currency": True})
    _, _, body = sent(definition=definition, callback_url=CALLBACK, credentials=BEARER)
    assert body == {"RequestData": {"AccountNumber": NUMBER, "Currency": "CLP"}, "CallbackUrl": CALLBACK}
    _, _, body = sent(definition=definition.model_copy(update={"currency": None}), credentials=BEARER)
    assert body == {"RequestData": {"AccountNumber": NUMBER}}


def test_a_part_of_the_path_stays_one_part() -> None:
    definition = DEFINITION.model_copy(update={"institution": "../a b?c#d%2e/é"})
    line, _, _ = sent(path="/prefix/", definition=definition)
    assert line.split()[1] == "/prefix/v1/cl/banking/business/..%2Fa%20b%3Fc%23d%252e%2F%C3%A9/current/balances"


@pytest.mark.parametrize("institution", ["", ".", ".."])
def test_a_part_that_is_no_name_is_not_sent(institution: str) -> None:
    outcome, was_sent = outcome_of(
        answering(200, OK), definition=DEFINITION.model_copy(update={"institution": institution})
    )
    assert (outcome.kind, was_sent) == (Kind.BAD_REQUEST, False)


@pytest.mark.parametrize("key", [f"{KEY}\r\nX: y", f"{KEY} ", f"{KEY}é", ""])
@pytest.mark.parametrize("scheme", ["api-key", "bearer"])
def test_a_key_that_fits_no_header_is_not_sent(scheme: Any, key: str) -> None:
    outcome, was_sent = outcome_of(answering(200, OK), credentials=Credentials(scheme, SecretStr(key)))
    assert (outcome.kind, was_sent) == (Kind.UNAUTHORIZED, False)


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a proxy nor a .netrc, which would take the place of the token."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login canary password canary\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Hostile(answering(200, OK)) as proxy, Hostile(answering(200, OK)) as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("no_proxy", "")
        fetch(server.url, credentials=BEARER)
        assert (len(server.requests), proxy.connections) == (1, 0)
    assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {KEY}"]


# --- answers


def test_an_answer() -> None:
    with Hostile(answering(200, OK)) as server:
        answer = fetch(server.url)
    assert isinstance(answer, Answer)
    assert answer.payload()[0]["amount"] == "10000"


UPGRADE = head(101, {"Connection": "Upgrade", "Upgrade": "websocket"})
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(OK), OK)


@pytest.mark.parametrize(
    "script",
    [
        answering(200, gzip.compress(OK), Content_Encoding="gzip"),
        lambda peer: (peer.request(), peer.send(head(200) + OK)),
        whole(head(200, {"Transfer-Encoding": "chunked"}) + CHUNKED),
        lambda peer: (peer.request(), peer.send(head(100) * 2 + head(200) + OK)),
        lambda peer: (peer.request(), peer.send(head(103, {"Content-Length": "1"}) + head(200) + OK)),
        whole(head(200, {"Transfer-Encoding": "chunked", "Content-Length": "1"}) + CHUNKED),
        whole(head(200, {"Transfer-Encoding": "chunked"}) + CHUNKED[:-2] + b"Content-Encoding: gzip\r\n\r\n"),
        whole(head(200, {"Content-Length": str(len(OK))}).replace(b"\r\n", b"\n") + OK),
        whole(head(200, {"Content-Length": str(len(OK)), "Connection": "close"}) + OK + head(500)),
        whole(head(200, {"Content-Length": str(len(OK))}) + OK + b"HTTP/1.1 nonsense"),
        whole(head(200, {"Content-Length": str(len(OK))}) + OK + UPGRADE),
        lambda peer: (peer.request(), peer.send(head(200, {"Transfer-Encoding": "identity"}) + OK)),
        whole(b"HTTP/1.0 200\r\nX-Empty:\r\nContent-Length:%d\r\n\r\n%b" % (len(OK), OK)),
    ],
    ids=[
        "gzip",
        "until the end",
        "chunked",
        "after 100",
        "after 103",
        "chunked, with a length",
        "a header after the chunks",
        "lines that end as on Unix",
        "another answer after the last one",
        "nonsense after the answer",
        "another protocol after the answer",
        "until the end, and said so",
        "an old server",
    ],
)
def test_an_answer_in_other_forms(script: Script) -> None:
    with Hostile(script) as server:
        assert isinstance(fetch(server.url), Answer)


def test_a_callback_is_accepted_or_answered_at_once() -> None:
    with Hostile(answering(202, ACCEPTED)) as server:
        accepted = fetch(server.url, callback_url=CALLBACK)
    assert isinstance(accepted, Accepted)
    assert accepted.life_span == datetime(2017, 7, 22, 4, tzinfo=UTC)
    with Hostile(answering(200, OK)) as server:
        assert isinstance(fetch(server.url, callback_url=CALLBACK), Answer)


def test_a_202_that_nobody_asked_for_is_unreadable() -> None:
    outcome, was_sent = outcome_of(answering(202, ACCEPTED))
    assert (outcome.kind, was_sent) == (Kind.UNREADABLE, True)
    assert outcome.description == "HTTP 202 to a request without a callback"


@pytest.mark.parametrize("status", [200, 202])
def test_a_failure_arrives_as_success(status: int) -> None:
    outcome, was_sent = outcome_of(answering(status, error("E101", "DO_NOT_RETRY", "no")), callback_url=CALLBACK)
    assert (outcome, was_sent) == (Outcome(Kind.ANSWERED, "E101", "DO_NOT_RETRY", "no"), True)


def test_a_description_that_echoes_the_request_shows_nothing_of_it() -> None:
    echo = f"{KEY} {PASSWORD} {NUMBER} {CALLBACK} token canary-token-e0d pin 55551 user 1-9 key [{KEY}]"
    outcome, _ = outcome_of(answering(200, error(description=echo)), callback_url=CALLBACK)
    assert outcome.description == "# # # # token # pin # user # key [#]"
    outcome, _ = outcome_of(answering(200, error(code=KEY.upper(), type=PASSWORD)))
    assert outcome.type is None


@pytest.mark.parametrize(
    ("body", "description"),
    [
        (b"<html>", "body: not JSON"),
        (b"", "body: not JSON"),
        (OK[:-1], "body: not JSON"),
        (OK.replace(b"10000", b"1e400"), "Data.Balance[0].Amount.Amount: an exponent or a length that no amount has"),
        (b" " * (BODY_LIMIT + 1), "body: larger than 1 MiB"),
    ],
)
def test_an_unreadable_answer(body: bytes, description: str) -> None:
    outcome, was_sent = outcome_of(answering(200, body))
    assert outcome == Outcome(Kind.UNREADABLE, "UNREADABLE", description=description)
    assert was_sent


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", OK),
        ("gzip", gzip.compress(OK)[:-4]),
        ("gzip", gzip.compress(OK) + b"x"),
        ("gzip, gzip", gzip.compress(gzip.compress(OK))),
        ("deflate", zlib.compress(OK)),
        ("br", OK),
    ],
)
def test_an_answer_in_an_unreadable_compression(encoding: str, body: bytes) -> None:
    outcome, _ = outcome_of(answering(200, body, Content_Encoding=encoding))
    assert outcome.kind is Kind.UNREADABLE


# --- HTTP's own codes


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (204, Kind.UNREADABLE),
        (302, Kind.BAD_REQUEST),
        (304, Kind.BAD_REQUEST),
        (400, Kind.BAD_REQUEST),
        (401, Kind.UNAUTHORIZED),
        (403, Kind.UNAUTHORIZED),
        (404, Kind.NOT_FOUND),
        (405, Kind.BAD_REQUEST),
        (408, Kind.THROTTLED),
        (418, Kind.BAD_REQUEST),
        (425, Kind.THROTTLED),
        (429, Kind.THROTTLED),
        (499, Kind.BAD_REQUEST),
        (500, Kind.SERVER_ERROR),
        (502, Kind.SERVER_ERROR),
        (503, Kind.SERVER_ERROR),
        (504, Kind.SERVER_ERROR),
        (599, Kind.SERVER_ERROR),
        (777, Kind.UNREADABLE),
    ],
)
def test_every_http_code(status: int, kind: Kind) -> None:
    body = b"" if status in {204, 304} else b'"Authorization failed"'
    outcome, was_sent = outcome_of(answering(status, body, Content_Type="text/plain"))
    assert (outcome.kind, outcome.code, outcome.type, was_sent) == (kind, f"HTTP_{status}", None, True)
    assert "Authorization" not in outcome.description


@pytest.mark.parametrize(
    ("status", "code", "kind", "shown"),
    [
        (400, "E401", Kind.ANSWERED, "E401"),
        (400, None, Kind.BAD_REQUEST, "HTTP_400"),
        (500, "I001", Kind.ANSWERED, "I001"),
        (401, "A000", Kind.UNAUTHORIZED, "A000"),
        (401, "E201", Kind.UNAUTHORIZED, "E201"),
        (401, "E101", Kind.ANSWERED, "E101"),
        (403, "E199", Kind.ANSWERED, "E199"),
        (403, None, Kind.UNAUTHORIZED, "HTTP_403"),
    ],
)
def test_an_envelope_in_an_http_error_knows_better(status: int, code: str | None, kind: Kind, shown: str) -> None:
    outcome, _ = outcome_of(answering(status, error(code, "DO_NOT_RETRY", "said")))
    assert (outcome.kind, outcome.code) == (kind, shown)
    assert (outcome.type, outcome.description == "said") == (("DO_NOT_RETRY", True) if code else (None, False))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120),
        ("120 \t", 120),
        ("0", 0),
        ("-5", None),
        ("soon", None),
        ("9" * 30, None),
        ("1.5", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("body", [b"", error()])
def test_retry_after_in_seconds(value: str, seconds: int | None, body: bytes) -> None:
    outcome, _ = outcome_of(answering(429, body, Retry_After=value))
    assert outcome.retry_after == (None if seconds is None else timedelta(seconds=seconds))


def test_retry_after_as_a_date() -> None:
    now = datetime.now(UTC)
    outcome, _ = outcome_of(answering(503, Retry_After=format_datetime(now + timedelta(hours=1), usegmt=True)))
    assert outcome.retry_after is not None
    assert timedelta(minutes=59) < outcome.retry_after <= timedelta(hours=1)
    outcome, _ = outcome_of(answering(503, Retry_After=format_datetime(now - timedelta(hours=1), usegmt=True)))
    assert outcome.retry_after is None


@pytest.mark.parametrize("value", [f"Mon, 20 Nov {'9' * 20} 19:12:08 GMT", f"Mon, 20 Nov 1995 19:12:08 +{'9' * 20}"])
def test_a_retry_after_that_no_calendar_holds_asks_for_nothing(value: str) -> None:
    outcome, was_sent = outcome_of(answering(429, Retry_After=value))
    assert (outcome.kind, outcome.retry_after, was_sent) == (Kind.THROTTLED, None, True)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_its_body_not_read_to_the_end(status: int) -> None:
    def redirect(peer: Peer) -> None:
        peer.request()
        peer.send(head(status, {"Location": f"{elsewhere.url}/there", "Content-Length": str(10**12)}))
        peer.flood(b"x" * 65536)

    with Hostile(answering(200, OK)) as elsewhere:
        outcome, _ = outcome_of(redirect)
    assert (outcome.kind, outcome.code) == (Kind.BAD_REQUEST, f"HTTP_{status}")
    assert elsewhere.connections == 0


def test_a_refused_key_is_no_time_out_however_long_its_body_takes() -> None:
    def refuse(peer: Peer) -> None:
        peer.request()
        peer.send(head(401, {"Content-Length": "100"}))
        peer.drip(b"x" * 100)

    outcome, _ = outcome_of(refuse, deadline_s=SHORT_S)
    assert (outcome.kind, outcome.code) == (Kind.UNAUTHORIZED, "HTTP_401")


@pytest.mark.parametrize(
    "odd", [b"Content-Length: 0\r\nContent-Length: 0", b": y", b"no colon", b"X[a]: y", b"X: a\rb"]
)
@pytest.mark.parametrize(("status", "kind"), [(401, Kind.UNAUTHORIZED), (429, Kind.THROTTLED)])
def test_a_refusal_counts_whatever_else_its_head_holds(odd: bytes, status: int, kind: Kind) -> None:
    outcome, _ = outcome_of(whole(b"HTTP/1.1 %d X\r\nRetry-After: 60\r\nX: y\r\n%b\r\n\r\n" % (status, odd)))
    assert (outcome.kind, outcome.code) == (kind, f"HTTP_{status}")
    assert outcome.retry_after == timedelta(seconds=60)


# --- the total deadline


def drip_body(peer: Peer) -> None:
    peer.request()
    peer.send(head(200, {"Content-Length": str(len(OK) * 10)}))
    peer.drip(OK * 10)


def drip_unframed_body(peer: Peer) -> None:
    peer.request()
    peer.send(head(200))
    peer.drip(OK * 10)


def drip_chunks(peer: Peer) -> None:
    peer.request()
    peer.send(head(200, {"Transfer-Encoding": "chunked"}))
    peer.drip(b"1\r\n \r\n" * 1000)


def drip_head(peer: Peer) -> None:
    peer.request()
    peer.drip(head(200, {"X-Long": "x" * 1000}))


def drip_status(peer: Peer) -> None:
    peer.request()
    peer.drip(b"HTTP/1.1 200 " + b"x" * 1000)


def drip_provisional_answers(peer: Peer) -> None:
    peer.request()
    peer.drip(head(100) * 100)


def never_answer(peer: Peer) -> None:
    peer.request()
    peer.gone()


@pytest.mark.parametrize(
    "script",
    [drip_body, drip_unframed_body, drip_chunks, drip_head, drip_status, drip_provisional_answers, never_answer],
    ids=lambda script: script.__name__,
)
def test_the_deadline_is_a_total_and_closes_the_connection(script: Script) -> None:
    def watched(peer: Peer) -> None:
        try:
            script(peer)
        except ConnectionError:
            peer.server.closed.put(True)

    with Hostile(watched) as server:
        with failing() as failures:
            fetch(server.url, deadline_s=SHORT_S)
        assert server.closed.get(timeout=AT_ONCE_S)
    assert (failures[0].outcome.kind, failures[0].outcome.code) == (Kind.TIMEOUT, "TIMEOUT")
    assert failures[0].sent


def test_the_deadline_holds_for_a_connection_that_was_kept_alive() -> None:
    def first_well_then_never(peer: Peer) -> None:
        peer.answer(200, OK, keep=True)
        drip_body(peer)

    with Hostile(first_well_then_never) as server:
        client = KhipuClient(server.url)
        client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
        with failing() as failures:
            client.fetch(DEFINITION, API_KEY, deadline_s=SHORT_S)
    assert (failures[0].outcome.kind, failures[0].sent) == (Kind.TIMEOUT, True)
    assert (server.connections, len(server.requests)) == (1, 2)


def test_a_deadline_that_passes_while_another_attempt_has_longer() -> None:
    """The watchdog, asleep until a late deadline, wakes for an earlier one."""
    arrived, enough = threading.Event(), threading.Event()

    def hold(peer: Peer) -> None:
        peer.request()
        arrived.set()
        enough.wait(LONG_S)

    with Hostile(hold) as server:
        client = KhipuClient(server.url)
        failures: list[KhipuFailure] = []

        def ask(deadline_s: float) -> None:
            with failing() as inside:
                client.fetch(DEFINITION, API_KEY, deadline_s=deadline_s)
            failures.extend(inside)

        long = threading.Thread(target=ask, args=(60.0,))
        long.start()
        assert arrived.wait(AT_ONCE_S)
        ask(SHORT_S)
        enough.set()
        long.join()
    assert [failure.outcome.kind for failure in failures] == [Kind.TIMEOUT, Kind.CONNECTION]


@pytest.mark.parametrize("deadline_s", [0, -1])
def test_no_time_left_means_no_request(deadline_s: float) -> None:
    with Hostile(answering(200, OK)) as server, failing() as failures:
        fetch(server.url, deadline_s=deadline_s)
    assert (failures[0].outcome.kind, failures[0].sent, server.connections) == (Kind.TIMEOUT, False, 0)


def test_slow_name_resolution() -> None:
    released = threading.Event()

    def slow(host: str, port: int) -> Sequence[Address]:
        released.wait(60)
        return resolve(host, port)

    with Hostile(answering(200, OK)) as server, failing() as failures:
        fetch(server.url, deadline_s=SHORT_S, resolver=slow)
    released.set()
    assert (failures[0].outcome.kind, failures[0].sent, server.connections) == (Kind.TIMEOUT, False, 0)


def test_an_address_that_drops_packets() -> None:
    """A listener with a full backlog: connecting to it neither succeeds nor fails."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for connection in (first, second):
            connection.setblocking(False)
            connection.connect_ex(listener.getsockname())
        with failing() as failures:
            fetch(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline_s=SHORT_S)
    assert (failures[0].outcome.kind, failures[0].sent) == (Kind.TIMEOUT, False)


@pytest.mark.parametrize("pace", [Peer.gone, lambda peer: peer.drip(b"\x16\x03\x03\x40\x00" + b"\x02" * 16384)])
def test_a_tls_handshake_that_never_ends(pace: Script) -> None:
    def stall(peer: Peer) -> None:
        with suppress(ConnectionError):
            pace(peer)
        peer.gone()

    with Hostile(stall) as server:
        with failing() as failures:
            fetch(server.url.replace("http", "https"), deadline_s=SHORT_S)
        assert server.closed.get(timeout=AT_ONCE_S)
    assert (failures[0].outcome.kind, failures[0].sent) == (Kind.TIMEOUT, False)


# --- connections that fail


def refused(host: str, port: int) -> Sequence[Address]:
    raise socket.gaierror(socket.EAI_NONAME, f"{host} {port} {KEY}")


def test_a_name_that_does_not_exist() -> None:
    with failing() as failures:
        fetch("http://khipu.invalid", resolver=refused)
    assert failures[0].outcome == Outcome(Kind.CONNECTION, "CONNECTION", description="name resolution")
    assert not failures[0].sent


def test_a_name_that_cannot_be_one() -> None:
    with failing() as failures:
        fetch(f"http://{'x' * 64}.example")
    assert (failures[0].outcome.kind, failures[0].sent) == (Kind.CONNECTION, False)


def test_a_port_that_nobody_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with failing() as failures:
        fetch(f"http://127.0.0.1:{port}")
    assert failures[0].outcome == Outcome(Kind.CONNECTION, "CONNECTION", description="connect")
    assert not failures[0].sent


def test_the_next_address_is_tried_when_one_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    with Hostile(answering(200, OK)) as server:
        assert fetch(server.url, resolver=lambda host, port: [*resolve(host, closed), *resolve(host, port)])


@pytest.mark.parametrize(
    "script",
    [
        lambda peer: peer.connection.shutdown(socket.SHUT_RDWR),
        lambda peer: peer.request(),
        lambda peer: (peer.request(), peer.send(b"HTTP/1.1 2")),
        lambda peer: (peer.request(), peer.send(b"HTTP/1.1 200 OK\r\nContent-")),
        lambda peer: (peer.request(), peer.send(head(200, {"Content-Length": str(len(OK) + 1)}) + OK)),
        lambda peer: (peer.request(), peer.send(head(200, {"Transfer-Encoding": "chunked"}) + b"fff\r\nabc")),
        lambda peer: (peer.request(), peer.send(b"SSH-2.0-OpenSSH_9.2\r\n")),
        whole(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n"),
        whole(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"),
        whole(UPGRADE + OK),
        whole(head(200, {"Transfer-Encoding": "chunked"}) + b"x\r\n\r\n"),
    ],
    ids=[
        "at once",
        "unanswered",
        "in the status",
        "in the headers",
        "in the body",
        "in a chunk",
        "no HTTP",
        "no header",
        "two lengths",
        "another protocol",
        "no chunk",
    ],
)
def test_a_connection_that_ends_too_early_or_speaks_no_http(script: Script) -> None:
    outcome, was_sent = outcome_of(script)
    assert (outcome.kind, outcome.code, outcome.description) == (Kind.CONNECTION, "CONNECTION", "the connection broke")
    assert was_sent


# --- bodies that never end, or grow


@pytest.mark.parametrize("framing", [{}, {"Content-Length": str(10**12)}, {"Transfer-Encoding": "chunked"}])
def test_an_endless_body_is_given_up_early(framing: dict[str, str]) -> None:
    def flood(peer: Peer) -> None:
        peer.request()
        peer.send(head(200, framing))
        peer.flood(b"10000\r\n" + b" " * 0x10000 + b"\r\n" if "Transfer-Encoding" in framing else b" " * 65536)

    with Hostile(flood) as server, failing() as failures:
        fetch(server.url)
    assert failures[0].outcome.description == "body: larger than 1 MiB"
    assert server.sent < 32 * BODY_LIMIT


@pytest.mark.parametrize(
    ("start", "again"),
    [(b"5;", b"x" * 65536), (b"", b"0" * 65536), (b"0\r\nX: ", b"x" * 65536), (b"0\r\n", b"X: y\r\n" * 9000)],
    ids=["a chunk's extension", "a chunk's length", "a trailer", "trailers"],
)
def test_what_is_endless_around_a_body_is_given_up_too(start: bytes, again: bytes) -> None:
    def flood(peer: Peer) -> None:
        peer.request()
        peer.send(head(200, {"Transfer-Encoding": "chunked"}) + start)
        peer.flood(again)

    with Hostile(flood) as server, failing() as failures:
        fetch(server.url)
    assert failures[0].outcome.kind is Kind.CONNECTION
    assert server.sent < 64 * BODY_LIMIT


def test_a_reply_is_forgotten_at_once() -> None:
    def serve(peer: Peer) -> None:
        while True:
            peer.answer(200, OK, keep=True)

    with Hostile(serve) as server:
        client = KhipuClient(server.url)
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
            assert not [found for found in gc.get_objects() if type(found).__name__ == "_Incoming"]
        finally:
            gc.enable()


def test_endless_headers_are_given_up_early() -> None:
    def flood(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n")
        peer.flood(b"X-Filler: " + b"x" * 60000 + b"\r\n")

    with Hostile(flood) as server, failing() as failures:
        fetch(server.url)
    assert failures[0].outcome.kind is Kind.CONNECTION
    assert server.sent < 64 * BODY_LIMIT


def test_a_bomb_is_not_inflated() -> None:
    bomb = gzip.compress(gzip.compress(b" " * 200 * BODY_LIMIT))
    assert len(bomb) < 100_000
    for body, encoding in ((gzip.decompress(bomb), "gzip"), (bomb, "gzip, gzip")):
        with Hostile(answering(200, body, Content_Encoding=encoding)) as server, failing() as failures:
            tracemalloc.start()
            fetch(server.url)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert failures[0].outcome.kind is Kind.UNREADABLE
        assert peak < 8 * BODY_LIMIT


# --- connections kept alive


def test_a_thread_keeps_its_connection_and_shares_it_with_none() -> None:
    def serve(peer: Peer) -> None:
        while True:
            peer.answer(200, OK, {"Set-Cookie": "canary=1"}, keep=True)

    with Hostile(serve) as server:
        client = KhipuClient(server.url)

        def twice() -> None:
            for _ in range(2):
                client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)

        twice()
        thread = threading.Thread(target=twice)
        thread.start()
        thread.join()
    assert (server.connections, len(server.requests)) == (2, 4)
    assert not any("cookie" in request.headers for request in server.requests)


def test_a_connection_that_nobody_used_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway in between may have forgotten it: the request would be lost on it."""

    def serve(peer: Peer) -> None:
        while True:
            peer.answer(200, OK, keep=True)

    with Hostile(serve) as server:
        client = KhipuClient(server.url)
        for limit_s in (LONG_S, LONG_S, 0):
            monkeypatch.setattr(transport, "IDLE_LIMIT_S", limit_s)
            client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
    assert (server.connections, len(server.requests)) == (2, 3)


def test_an_error_envelope_keeps_the_connection_and_a_broken_answer_does_not() -> None:
    bodies = iter([error(), b"<html>", OK])

    def serve(peer: Peer) -> None:
        while peer.request():
            peer.reply(200, next(bodies))

    with Hostile(serve) as server:
        client = KhipuClient(server.url)
        for _ in range(2):
            with failing():
                client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
        client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
    assert server.connections == 2


def test_a_connection_closed_between_two_requests_is_replaced() -> None:
    closed = threading.Event()

    def once(peer: Peer) -> None:
        peer.answer(200, OK, keep=True)
        peer.connection.shutdown(socket.SHUT_RDWR)
        closed.set()

    with Hostile(once) as server:
        client = KhipuClient(server.url)
        for _ in range(2):
            client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
            assert closed.wait(AT_ONCE_S)
            closed.clear()
    assert (server.connections, len(server.requests)) == (2, 2)


def test_a_connection_closed_while_the_second_request_is_written_is_not_replaced() -> None:
    def once(peer: Peer) -> None:
        peer.answer(200, OK, keep=True)
        peer.request()

    with Hostile(once) as server:
        client = KhipuClient(server.url)
        client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
        with failing() as failures:
            client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
    assert (failures[0].outcome.kind, failures[0].sent) == (Kind.CONNECTION, True)
    assert (server.connections, len(server.requests)) == (1, 2)


def test_what_is_no_address_breaks_an_attempt_and_nothing_else() -> None:
    with Hostile(answering(200, OK)) as server:
        strange = (socket.AF_UNIX, socket.SOCK_STREAM, 0, "", "/nowhere")
        assert fetch(server.url, resolver=lambda host, port: [strange, *resolve(host, port)])
    for url in ("http://127.0.0.1:99999", "http://[::1"):
        with pytest.raises(KhipuFailure) as caught:
            KhipuClient(server.url).reach(url, deadline_s=LONG_S)
        assert caught.value.outcome.kind is Kind.CONNECTION


def test_without_a_free_descriptor_nothing_is_sent() -> None:
    with Hostile(answering(200, OK)) as server:
        client = KhipuClient(server.url)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with failing() as failures:
                client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
            assert (failures[0].outcome.kind, failures[0].sent) == (Kind.CONNECTION, False)
            with pytest.raises(KhipuFailure):
                client.reach(server.url, deadline_s=LONG_S)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
    assert len(server.requests) == 1


def test_an_attempt_leaves_no_open_file_behind() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    with Hostile(answering(200, b"<html>")) as server:
        client = KhipuClient(server.url)
        closed: queue.Queue[bool] = server.closed
        for attempt in range(6):
            with failing():
                client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S)
            closed.get(timeout=AT_ONCE_S)
            if attempt == 0:
                before = count()
        assert count() <= before + 1  # the server may not have closed its own end yet


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


def test_a_certificate_that_is_trusted(tls: ssl.SSLContext, certificate: Path) -> None:
    def serve(peer: Peer) -> None:
        while True:
            peer.answer(200, OK, keep=True)

    with Hostile(serve, tls) as server:
        client = KhipuClient(server.url, verify=str(certificate))
        for _ in range(2):
            assert isinstance(client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S), Answer)
    assert (server.connections, len(server.requests)) == (1, 2)


def test_a_certificate_that_nobody_trusts(tls: ssl.SSLContext) -> None:
    with Hostile(answering(200, OK), tls) as server, failing() as failures:
        fetch(server.url)
    assert failures[0].outcome == Outcome(Kind.CONNECTION, "CONNECTION", description="certificate")
    assert (failures[0].sent, server.requests) == (False, [])


def test_a_certificate_of_another_host(tls: ssl.SSLContext, certificate: Path) -> None:
    with Hostile(answering(200, OK), tls) as server, failing() as failures:
        fetch(f"https://localhost:{server.port}", verify=str(certificate))
    assert failures[0].outcome == Outcome(Kind.CONNECTION, "CONNECTION", description="certificate")
    assert (failures[0].sent, server.requests) == (False, [])


def test_plain_http_where_tls_was_meant() -> None:
    def refuse(peer: Peer) -> None:
        peer.connection.recv(5)
        peer.send(head(400, {"Content-Length": "0"}))
        peer.gone()

    with Hostile(refuse) as server, failing() as failures:
        fetch(server.url.replace("http", "https"))
    assert failures[0].outcome == Outcome(Kind.CONNECTION, "CONNECTION", description="TLS")
    assert not failures[0].sent


def test_an_old_tls_is_refused(tls: ssl.SSLContext, certificate: Path) -> None:
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
    tls.set_ciphers("ALL:@SECLEVEL=0")
    with Hostile(answering(200, OK), tls) as server, failing() as failures:
        fetch(server.url, verify=str(certificate))
    assert failures[0].outcome == Outcome(Kind.CONNECTION, "CONNECTION", description="TLS")
    assert server.requests == []


def test_the_deadline_holds_inside_tls(tls: ssl.SSLContext, certificate: Path) -> None:
    with Hostile(drip_body, tls) as server, failing() as failures:
        fetch(server.url, verify=str(certificate), deadline_s=SHORT_S)
    assert (failures[0].outcome.kind, failures[0].sent) == (Kind.TIMEOUT, True)


@pytest.mark.parametrize("size", [8192, 8000, 4000, 16384], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
def test_what_is_left_over_of_one_answer_is_never_the_next(
    tls: ssl.SSLContext, certificate: Path, secured: bool, size: int
) -> None:
    """With 8192 bytes the left-over is what the first read leaves: in the socket, or inside TLS where none shows it."""
    forged = OK.replace(b"6baf6c19", b"forged00")
    smuggled = head(200, {"Content-Length": str(len(forged))}) + forged

    def whole(length: int) -> bytes:
        return head(200, {"Content-Length": str(length)}) + OK.ljust(length)

    def serve(peer: Peer) -> None:
        answer = next(whole(length) for length in range(size, 0, -1) if len(whole(length)) == size)
        while peer.request():
            peer.send(answer + smuggled)

    with Hostile(serve, tls if secured else None) as server:
        client = KhipuClient(server.url, verify=str(certificate))
        for _ in range(3):
            assert client.fetch(DEFINITION, API_KEY, deadline_s=LONG_S).operation_id == "6baf6c19"
