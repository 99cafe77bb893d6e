"""Every hostile or broken answer that is tried, and what becomes of it, as data.

`test_hostile_answers` sends each from a real server; `docs/hostile_table.py` makes the table in SECURITY.md of them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus

from hostile import Peer, head

from worker.errors import Kind
from worker.transport import BODY_LIMIT

Script = Callable[[Peer], None]

#: What Khipu answers when all is well; the rows change one thing in it.
ENVELOPE = {
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
    "AdditionalInformation": None,
    "Error": None,
    "LifeSpan": None,
}
OK = json.dumps(ENVELOPE).encode()
AMOUNT, ELEMENT = "Data.Balance[0].Amount.Amount", "Data.Balance[0]"
#: Digits of the long amounts.
FORTY = "1234567890123456789012345678901234567890"


@dataclass(frozen=True)
class Row:
    """`sent`: in words. `named`: stands in the outcome's description, '' for an answer that is published.

    `before`: the answers to earlier polls: of the same account, or of `other`, another login's. `url`: instead of the
    server's, with `{port}`; `tls`: the server speaks it. `drift`: fields that are told as unknown. `is_slow`: it ends
    with the deadline, which is a second then. `published`: entries that it adds to the stream.
    """

    group: str
    sent: str
    script: Script
    kind: Kind = Kind.UNREADABLE
    code: str = ""
    named: str = ""
    before: tuple[bytes, ...] = ()
    other: tuple[bytes, ...] = ()
    url: str = "http://127.0.0.1:{port}"
    tls: bool = False
    drift: tuple[str, ...] = ()
    is_slow: bool = False
    type: str | None = None
    published: int = 0
    amounts: tuple[str, ...] = ()

    @property
    def expected_code(self) -> str:
        return self.code or self.kind.value


def answering(body: bytes, status: int = 200, **headers: str) -> Script:
    """One proper HTTP answer, after which the server closes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def script(peer: Peer) -> None:
        peer.request()
        peer.reply(status, body, {"Connection": "close", **named})

    return script


def sending(*parts: bytes) -> Script:
    """These bytes after the request, and the end of the connection."""

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(b"".join(parts))

    return script


def dripping(start: bytes, rest: bytes) -> Script:
    """A byte now and then, for longer than anybody waits."""

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(start)
        peer.drip(rest)

    return script


def flooding(start: bytes, again: bytes) -> Script:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send(start)
        peer.flood(again)

    return script


def silent(peer: Peer) -> None:
    peer.request()
    peer.gone()


def silent_before_tls(peer: Peer) -> None:
    peer.gone()


def dripping_handshake(peer: Peer) -> None:
    peer.drip(b"\x16\x03\x03\x40\x00" + b"\x02" * 16384)


def plain_http(peer: Peer) -> None:
    peer.connection.recv(5)
    peer.send(head(400, {"Content-Length": "0"}))
    peer.gone()


def cut_request(peer: Peer) -> None:
    peer.request()


def redirecting(status: int) -> Script:
    """To another host, with a body that never ends."""

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(head(status, {"Location": f"{peer.server.elsewhere}/there", "Content-Length": str(10**12)}))
        peer.flood(b"x" * 65536)

    return script


def redirecting_home(peer: Peer) -> None:
    peer.request()
    peer.reply(308, b"", {"Location": "/elsewhere", "Connection": "close"})


@cache
def bomb() -> bytes:
    """200 MiB of blanks as gzip."""
    compressor = zlib.compressobj(9, wbits=31)
    blanks = b" " * BODY_LIMIT
    return b"".join([*(compressor.compress(blanks) for _ in range(200)), compressor.flush()])


def bombing(layers: int) -> Script:
    def script(peer: Peer) -> None:
        body = bomb() if layers == 1 else gzip.compress(bomb())
        answering(body, Content_Encoding=", ".join(["gzip"] * layers))(peer)

    return script


def changed(old: str, new: str) -> bytes:
    """The envelope with one piece of its text replaced."""
    text = OK.decode()
    assert text.count(old) == 1, old
    return text.replace(old, new).encode()


def without(*path: str) -> bytes:
    """The envelope without the field at this path; the one balance stands for its list."""
    envelope = json.loads(OK)
    part = envelope
    for step in path[:-1]:
        part = part[step][0] if step == "Balance" else part[step]
    del part[path[-1]]
    return json.dumps(envelope).encode()


def amount(text: str) -> bytes:
    return changed("10000", text)


def error(code: object, type_: object, description: object = "said") -> bytes:
    said = {"Code": code, "Type": type_, "Description": description}
    return json.dumps({**ENVELOPE, "Status": "ERROR", "Data": None, "Error": said}).encode()


CONNECTION, TIMEOUT, DEADLINE = Kind.CONNECTION, Kind.TIMEOUT, "the request's total deadline passed"
BROKE, JSON, TWICE = "the connection broke", "body: not JSON", "stands there twice"
NOT_ASKED_FOR, DEEP = "body: a compression that was not asked for", "body: nested too deeply"
CUT = {"Content-Length": str(len(OK) + 1)}


def transport(sent: str, script: Script, kind: Kind, named: str, **more: object) -> Row:
    return Row("The connection", sent, script, kind, named=named, **more)  # type: ignore[arg-type]


def framing(sent: str, script: Script, named: str, **more: object) -> Row:
    return Row("The body's frame", sent, script, named=named, **more)  # type: ignore[arg-type]


def json_row(sent: str, body: bytes, named: str, **more: object) -> Row:
    return Row("JSON", sent, answering(body), named=named, **more)  # type: ignore[arg-type]


def content(sent: str, body: bytes, named: str, **more: object) -> Row:
    return Row("The envelope", sent, answering(body), named=named, **more)  # type: ignore[arg-type]


def taken(sent: str, body: bytes, **more: object) -> Row:
    """What is odd, and an answer all the same."""
    return Row("Odd, and published", sent, answering(body), Kind.OK, "ok", published=1, **more)  # type: ignore[arg-type]


ROWS = [
    *(
        transport(
            f"a redirect to another host ({status})",
            redirecting(status),
            Kind.BAD_REQUEST,
            HTTPStatus(status).phrase,
            code=f"HTTP_{status}",
        )
        for status in (301, 302, 303, 307, 308)
    ),
    transport("a redirect on the same host", redirecting_home, Kind.BAD_REQUEST, "Permanent Redirect", code="HTTP_308"),
    transport(
        "a byte now and then, in the status line",
        dripping(b"HTTP/1.1 200 ", b"x" * 1000),
        TIMEOUT,
        DEADLINE,
        is_slow=True,
    ),
    transport(
        "a byte now and then, in the headers",
        dripping(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 1000),
        TIMEOUT,
        DEADLINE,
        is_slow=True,
    ),
    transport(
        "a byte now and then, in the body",
        dripping(head(200, {"Content-Length": "1000"}), b" " * 1000),
        TIMEOUT,
        DEADLINE,
        is_slow=True,
    ),
    transport(
        "a byte now and then, in chunks",
        dripping(head(200, {"Transfer-Encoding": "chunked"}), b"1\r\n \r\n" * 1000),
        TIMEOUT,
        DEADLINE,
        is_slow=True,
    ),
    transport("provisional answers without end", dripping(b"", head(100) * 100), TIMEOUT, DEADLINE, is_slow=True),
    transport("nothing", silent, TIMEOUT, DEADLINE, is_slow=True),
    transport(
        "a byte now and then, in the TLS handshake",
        dripping_handshake,
        TIMEOUT,
        DEADLINE,
        is_slow=True,
        url="https://127.0.0.1:{port}",
    ),
    transport(
        "nothing in the TLS handshake",
        silent_before_tls,
        TIMEOUT,
        DEADLINE,
        is_slow=True,
        url="https://127.0.0.1:{port}",
    ),
    transport("plain HTTP where TLS was meant", plain_http, CONNECTION, "TLS", url="https://127.0.0.1:{port}"),
    transport(
        "a certificate that nobody trusts",
        answering(OK),
        CONNECTION,
        "certificate",
        url="https://127.0.0.1:{port}",
        tls=True,
    ),
    transport(
        "a certificate of another host",
        answering(OK),
        CONNECTION,
        "certificate",
        url="https://localhost:{port}",
        tls=True,
    ),
    transport("the end of the connection instead of an answer", cut_request, CONNECTION, BROKE),
    transport("the end in the middle of a header", sending(b"HTTP/1.1 200 OK\r\nConte"), CONNECTION, BROKE),
    transport("another protocol", sending(b"SSH-2.0-OpenSSH_9.2\r\n"), CONNECTION, BROKE),
    transport(
        "headers without end", flooding(b"HTTP/1.1 200 OK\r\n", b"X: " + b"x" * 60000 + b"\r\n"), CONNECTION, BROKE
    ),
    framing("a body without end", flooding(head(200), b" " * 65536), "body: larger than 1 MiB"),
    framing(
        "a terabyte that was announced",
        flooding(head(200, {"Content-Length": str(10**12)}), b" " * 65536),
        "body: larger than 1 MiB",
    ),
    framing(
        "chunks without end",
        flooding(head(200, {"Transfer-Encoding": "chunked"}), b"10000\r\n" + b" " * 0x10000 + b"\r\n"),
        "body: larger than 1 MiB",
    ),
    framing("200 MiB in 200 kB of gzip", bombing(1), "body: larger than 1 MiB"),
    framing("the same, compressed twice", bombing(2), NOT_ASKED_FOR),
    framing("gzip cut short", answering(gzip.compress(OK)[:-4], Content_Encoding="gzip"), "body: not gzip"),
    framing("what is not gzip, called so", answering(OK, Content_Encoding="gzip"), "body: not gzip"),
    framing("another compression", answering(OK, Content_Encoding="br"), NOT_ASKED_FOR),
    framing("less than the Content-Length", sending(head(200, CUT), OK), BROKE, kind=CONNECTION),
    framing("more than the Content-Length", sending(head(200, {"Content-Length": "20"}), OK), JSON),
    framing("two Content-Lengths", sending(head(200, {"Content-Length": "20, 30"}), OK), BROKE, kind=CONNECTION),
    framing(
        "an HTTP chunk that is none",
        sending(head(200, {"Transfer-Encoding": "chunked"}), b"xyz"),
        BROKE,
        kind=CONNECTION,
    ),
    json_row("no body", b"", JSON),
    json_row("HTML with 200", b"<html><body>504 Gateway Time-out</body></html>", JSON),
    json_row("a text", b'"Authorization failed"', "body: not a JSON object"),
    json_row("a list", b"[" + OK + b"]", "body: not a JSON object"),
    json_row("half of the answer", OK[: len(OK) // 2], JSON),
    json_row("two answers", OK + OK, JSON),
    json_row("10,000 levels of lists", b'{"Status": "OK", "Data": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", DEEP),
    json_row(
        "10,000 levels in a field that nobody knows",
        changed('"Status"', '"X": ' + '{"X":' * 10_000 + "1" + "}" * 10_000 + ', "Status"'),
        DEEP,
    ),
    json_row("a field twice", changed('"Status": "OK"', '"Status": "OK", "Status": "ERROR"'), f"Status {TWICE}"),
    json_row("an amount twice", amount('1, "Amount": 10000'), f"Amount {TWICE}"),
    json_row("an unknown field twice", changed('"Status"', '"X": 1, "X": 2, "Status"'), f"X {TWICE}"),
    json_row("a NUL byte", changed("873458", "873\x00458"), JSON),
    Row(
        "JSON",
        "UTF-16, said so",
        answering(OK.decode().encode("utf-16"), Content_Type="application/json; charset=utf-16"),
        named="body: not UTF-8",
    ),
    Row(
        "JSON",
        "UTF-8, called Latin-1",
        answering(changed("873458", "ñ"), Content_Type="application/json; charset=iso-8859-1"),
        named="body: not UTF-8",
    ),
    json_row("Latin-1, called nothing", changed("873458", "ñ").decode().encode("latin-1"), "body: not UTF-8"),
    *(
        json_row(f"an amount of {text}", amount(text), "body: a number that is not finite")
        for text in ("NaN", "Infinity", "-Infinity")
    ),
    content("an amount of 1e400", amount("1e400"), f"{AMOUNT}: "),
    content("an amount of 1e-2000", amount("1e-2000"), f"{AMOUNT}: "),
    content("an amount of 2,000 digits", amount("9" * 2000), f"{AMOUNT}: "),
    content("an amount as a text", amount('"10000"'), AMOUNT),
    content("an amount of true", amount("true"), AMOUNT),
    content("an account id as a number", changed('"873458"', "873458"), f"{ELEMENT}.AccountId"),
    content("an account id with a NUL", changed("873458", "873\\u0000458"), f"{ELEMENT}.AccountId"),
    content("an empty account id", changed("873458", ""), f"{ELEMENT}.AccountId"),
    content("an operation id with a line break", changed("6baf6c19", "6b\\nc19"), "OperationId"),
    content("an operation id of 200 characters", changed("6baf6c19", "6" * 200), "OperationId"),
    content("a type that nobody knows", changed("ClosingAvailable", "Opening"), f"{ELEMENT}.Type"),
    content("an indicator that nobody knows", changed('"Credit"', '"CREDIT"'), f"{ELEMENT}.CreditDebitIndicator"),
    content("a status that nobody knows", changed('"OK"', '"ok"'), "Status"),
    content("a currency in small letters", changed("CLP", "clp"), f"{ELEMENT}.Amount.Currency"),
    content("a moment without an offset", changed("-0400", ""), f"{ELEMENT}.DateTime"),
    content("a moment as a number", changed('"2017-07-21T17:32:28-0400"', "1500672748"), f"{ELEMENT}.DateTime"),
    content(
        "balances that are no list",
        changed('"Balance": [', '"Balance": {"x": [').replace(b'"CLP"}}]', b'"CLP"}}]}'),
        "Data.Balance",
    ),
    *(
        content(f"no {path[-1]}", without(*path), ".".join(path).replace("Balance.", "Balance[0]."))
        for path in (
            ("OperationId",),
            ("Status",),
            ("Data", "Balance", "AccountId"),
            ("Data", "Balance", "CreditDebitIndicator"),
            ("Data", "Balance", "DateTime"),
            ("Data", "Balance", "Type"),
            ("Data", "Balance", "Amount"),
        )
    ),
    content("an amount without its number", without("Data", "Balance", "Amount", "Amount"), AMOUNT),
    content(
        "an amount without its currency", without("Data", "Balance", "Amount", "Currency"), f"{ELEMENT}.Amount.Currency"
    ),
    content(
        "another account's AccountId",
        changed("873458", "999999").replace(b"6baf6c19", b"other"),
        "AccountId",
        kind=Kind.FOREIGN,
        before=(OK,),
    ),
    content("another currency", changed("CLP", "USD"), f"{ELEMENT}.Amount.Currency", kind=Kind.FOREIGN),
    content("the envelope of another account's operation", OK, "OperationId", kind=Kind.FOREIGN, other=(OK,)),
    Row(
        "The envelope",
        "a 202 that nobody asked for",
        answering(OK, 202),
        named="HTTP 202 to a request without a callback",
    ),
    *(
        Row("HTTP's own errors", sent, answering(body, status, Content_Type=type_), kind, f"HTTP_{status}", named)
        for sent, status, body, type_, kind, named in (
            ("401 as a text", 401, b'"Authorization failed"', "text/plain", Kind.UNAUTHORIZED, "Unauthorized"),
            ("403 as HTML", 403, b"<html>", "text/html", Kind.UNAUTHORIZED, "Forbidden"),
            ("404", 404, b"", "text/plain", Kind.NOT_FOUND, "Not Found"),
            ("429", 429, b"", "text/plain", Kind.THROTTLED, "Too Many Requests"),
            ("500 as a text", 500, b"upstream", "text/plain", Kind.SERVER_ERROR, "Internal Server Error"),
            ("504 as HTML", 504, b"<html>", "text/html", Kind.SERVER_ERROR, "Gateway Timeout"),
            ("a status of 777", 777, OK, "application/json", Kind.UNREADABLE, "a status that HTTP does not know"),
        )
    ),
    *(
        Row("Errors in the envelope", sent, answering(body), Kind.ANSWERED, code, named, type=type_)
        for sent, body, code, type_, named in (
            ("a Type that nobody knows", error("E201", "RETRY_LATER"), "E201", "RETRY_LATER", "said"),
            ("an Error without a Type", error("E201", None), "E201", None, "said"),
            ("E101 with RETRY_IMMEDIATELY", error("E101", "RETRY_IMMEDIATELY"), "E101", "RETRY_IMMEDIATELY", "said"),
            (
                "Status OK beside an Error",
                changed('"Error": null', '"Error": {"Code": "E101", "Type": "DO_NOT_RETRY", "Description": "no"}'),
                "E101",
                "DO_NOT_RETRY",
                "no",
            ),
            ("Status ERROR without an Error", changed('"OK"', '"ERROR"'), "UNKNOWN", None, ""),
            ("a Code of 100 kB", error("E" * 100_000, "DO_NOT_RETRY"), "UNKNOWN", "DO_NOT_RETRY", "said"),
            (
                "a description that quotes the key and numbers",
                error("E201", "RETRY_IMMEDIATELY", "no canary-token for 11.887.755"),
                "E201",
                "RETRY_IMMEDIATELY",
                "no # for #",
            ),
            (
                "a description of 100 kB",
                error("E201", "RETRY_IMMEDIATELY", "x " * 50_000),
                "E201",
                "RETRY_IMMEDIATELY",
                "x " * 99,
            ),
        )
    ),
    taken("an amount of 40 digits", amount(FORTY), amounts=(FORTY,)),
    taken("a negative amount", amount("-10000.10"), amounts=("-10000.10",)),
    taken("an amount of 1E+3", amount("1E+3"), amounts=("1000",)),
    taken(
        "fields that nobody knows, everywhere",
        changed('"Status"', '"Foo": 1, "Status"')
        .replace(b'"Balance"', b'"Bar": {}, "Balance"')
        .replace(b'"Type"', b'"Baz": [], "Type"')
        .replace(b'"Currency"', b'"Qux": null, "Currency"'),
        drift=("Data.Balance[].Amount.Qux", "Data.Balance[].Baz", "Data.Bar", "Foo"),
        amounts=("10000",),
    ),
    taken(
        "a NUL in AdditionalInformation",
        changed('"AdditionalInformation": null', '"AdditionalInformation": "a\\u0000b"'),
        amounts=("10000",),
    ),
    taken("a LifeSpan that is none", changed('"LifeSpan": null', '"LifeSpan": {"x": 1}'), amounts=("10000",)),
    taken("no Data", without("Data")),
    Row("Odd, and published", "the last answer once more", answering(OK), Kind.OK, "ok", before=(OK,)),
]
