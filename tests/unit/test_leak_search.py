"""The search for leaks finds what is planted, in every form: a search that finds nothing proves nothing."""

from __future__ import annotations

import html
import json
from base64 import b64encode, urlsafe_b64encode
from urllib.parse import quote

import pytest
from leaks import Place, find_leaks, leaks_in

SECRET = 'canary "é/+%<é'
CANARIES = {"a password": SECRET, "an amount": "271828182845904"}


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"before {SECRET} after",
        json.dumps({"event": SECRET}),
        json.dumps({"event": SECRET}, ensure_ascii=False),
        json.dumps({"body": json.dumps({"kwargs": SECRET})}),
        html.escape(f"<td>{SECRET}</td>"),
        f"http://127.0.0.1/?q={quote(SECRET)}",
        repr({"kwargs": SECRET}),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
        *(b64encode(f"{before}{SECRET}{after}".encode()).decode() for before in ("", "1", "22") for after in ("", "1")),
        urlsafe_b64encode(f"?{SECRET}".encode()).decode(),
    ],
)
def test_a_planted_secret_is_found_in_every_form(text: str) -> None:
    assert {found.partition(",")[0] for found in find_leaks(f"x={text};", CANARIES)} == {"a password"}
    assert find_leaks(f"x={text};".encode(), CANARIES)


@pytest.mark.parametrize("text", ["271828182845904", "271,828,182,845,904", "271.828.182.845.904 CLP"])
def test_an_amount_is_found_however_it_is_grouped(text: str) -> None:
    assert find_leaks(text, CANARIES)


def test_nothing_is_found_where_nothing_is() -> None:
    assert find_leaks('{"event": "settled", "duration_s": 0.27182}', CANARIES) == []


@pytest.mark.parametrize(
    "place",
    [
        Place("log of worker", json.dumps({"event": f"using {SECRET}"})),
        Place(f"key session:{SECRET}", "1"),
        Place("metrics", f'balances_polls_total{{login="{SECRET}"}} 1'),
        Place("queue", json.dumps({"body": b64encode(json.dumps([[], {"key": SECRET}]).encode()).decode()})),
    ],
)
def test_a_planted_line_key_label_or_message_is_told_with_its_place(place: Place) -> None:
    found = leaks_in([Place("log of beat", '{"event": "claimed"}'), place], CANARIES)
    assert list(found) == [place.name]


def test_what_may_stand_somewhere_is_no_leak_there_and_one_elsewhere() -> None:
    amount = CANARIES["an amount"]
    allowed = Place("the stream", amount, frozenset({"an amount"}))
    assert leaks_in([allowed], CANARIES) == {}
    assert leaks_in([allowed, Place("log", amount)], CANARIES) == {"log": ["an amount, plain"]}
