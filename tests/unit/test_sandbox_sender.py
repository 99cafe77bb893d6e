"""The sandbox finds its way to this machine only, and takes any URL apart."""

from __future__ import annotations

import pytest

from worker.sandbox.sender import NotHere, Target, last_part, target_of, with_wrong_token


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8080/callbacks/t", Target("127.0.0.1", 8080, "127.0.0.1:8080", "/callbacks/t")),
        ("http://127.9.9.9", Target("127.9.9.9", 80, "127.9.9.9", "/")),
        ("http://localhost:1/a?b=c#d", Target("127.0.0.1", 1, "localhost:1", "/a?b=c")),
        ("http://[::1]:1/", Target("::1", 1, "[::1]:1", "/")),
    ],
)
def test_plain_http_to_loopback_is_a_target(url: str, target: Target) -> None:
    assert target_of(url) == target


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "http://localhost.example/",
        "http://LOCALHOST.:1/",
        "http://192.168.0.1/",
        "http://169.254.1.1/",
        "http://0.0.0.0/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::ffff:127.0.0.1.]/",
        "http://[fe80::1%25lo]/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1\\@example.com/",
        "//127.0.0.1/",
        "",
    ],
)
def test_nothing_else_is(url: str) -> None:
    with pytest.raises(NotHere):
        target_of(url)


@pytest.mark.parametrize(
    ("url", "token", "wrong"),
    [
        ("http://h/callbacks/abc", "abc", "http://h/callbacks/Abc"),
        ("http://h/callbacks/A", "A", "http://h/callbacks/B"),
        ("http://h/a/b?c=/d#/e", "b", "http://h/a/A?c=/d#/e"),
        ("http://h/", "", "http://h/A"),
        ("http://h", "", "http://h/A"),
        ("http://[:.]/t", "t", "http://[:.]/A"),
    ],
)
def test_the_token_is_the_last_part_of_the_path(url: str, token: str, wrong: str) -> None:
    assert (last_part(url), with_wrong_token(url)) == (token, wrong)
