"""The sandbox's HTTP reads requests whole, one after another, and refuses what it does not understand."""

from __future__ import annotations

import pytest

from worker.sandbox.http import HEAD_LIMIT, BadRequest, Response, head, parse

REQUEST = b"POST /a%20b?x=1&y=%C3%B1 HTTP/1.1\r\nHost: h\r\nX-Api-Key:  secret \r\nContent-Length: 4\r\n\r\nbody"


def test_a_request_is_taken_only_when_it_is_whole() -> None:
    buffer = bytearray()
    for byte in REQUEST[:-1]:
        buffer.append(byte)
        assert parse(buffer) is None
    buffer += REQUEST[-1:] + b"GET"
    request = parse(buffer)
    assert request is not None
    assert (request.method, request.path, request.query) == ("POST", "/a b", {"x": "1", "y": "ñ"})
    assert (request.headers["x-api-key"], request.body, request.keep_alive) == ("secret", b"body", True)
    assert buffer == b"GET"


@pytest.mark.parametrize(
    "wrong",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"x" * (HEAD_LIMIT + 1),
    ],
)
def test_what_is_no_request_is_refused(wrong: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(bytearray(wrong))


@pytest.mark.parametrize("line", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"])
def test_a_connection_is_kept_only_where_the_client_wants_it(line: bytes) -> None:
    request = parse(bytearray(line))
    assert request is not None
    assert not request.keep_alive


def test_a_response_without_a_length_ends_with_its_connection() -> None:
    text = head(Response(200, b"body", sized=False), keep_alive=True).decode()
    assert "Content-Length" not in text
    assert "Connection: close\r\n" in text
