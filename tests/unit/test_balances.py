"""The envelope: what is read from it, what is refused, and that a refusal never shows a value."""

from __future__ import annotations

import json
import traceback
from base64 import b64encode
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.balances import (
    Answer,
    Balance,
    check_currency,
    read_accepted,
    read_answer,
    read_error,
)
from worker.errors import KhipuFailure, Kind, Outcome

#: The example of khipu.md, word for word.
EXAMPLE = """\
{"OperationId": "6baf6c19-e485-463b-ae24-a821b025c8a4", "Status": "OK",
 "Data": {"Balance": [{"AccountId": "873458", "CreditDebitIndicator": "Credit", "DateTime": "2017-07-21T17:32:28-0400",
                       "Type": "ClosingAvailable", "Amount": {"Amount": 10000, "Currency": "CLP"}}]},
 "AdditionalInformation": null, "Error": null, "LifeSpan": null}
"""
ELEMENT: dict[str, Any] = json.loads(EXAMPLE)["Data"]["Balance"][0]
CHILE = timezone(-timedelta(hours=4))
ABSENT = object()
CANARY = "canary-9f31"


def envelope(**fields: object) -> bytes:
    """The example with some fields of the envelope replaced, or absent."""
    changed = {**json.loads(EXAMPLE), **fields}
    return json.dumps({name: value for name, value in changed.items() if value is not ABSENT}).encode()


def element(**fields: object) -> bytes:
    """The example with some fields of its one balance replaced, or absent."""
    changed = {name: value for name, value in {**ELEMENT, **fields}.items() if value is not ABSENT}
    return envelope(Data={"Balance": [changed]})


def amount(literal: str) -> bytes:
    """The example with its amount written as `literal`, which need not be JSON."""
    return EXAMPLE.replace("10000", literal).encode()


def error(**fields: object) -> bytes:
    return envelope(Status="ERROR", Data=None, Error=fields)


def failure(body: bytes, content_type: str | None = None, hide: tuple[str, ...] = ()) -> Outcome:
    """The outcome of a body that must not be read, with nothing of the body left in the exception."""
    with pytest.raises(KhipuFailure) as caught:
        read_answer(body, content_type, hide=hide)
    assert caught.value.__context__ is None
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + repr(caught.value.outcome)
    return caught.value.outcome


# --- what is read


def test_the_documented_example() -> None:
    answer = read_answer(EXAMPLE.encode(), "application/json;charset=UTF-8")
    assert answer == Answer(
        operation_id="6baf6c19-e485-463b-ae24-a821b025c8a4",
        balances=(
            Balance(
                account_id="873458",
                type="ClosingAvailable",
                indicator="Credit",
                amount=Decimal(10000),
                currency="CLP",
                as_of=datetime(2017, 7, 21, 17, 32, 28, tzinfo=CHILE),
            ),
        ),
    )
    assert answer.payload() == [
        {
            "account_id": "873458",
            "type": "ClosingAvailable",
            "indicator": "Credit",
            "amount": "10000",
            "currency": "CLP",
            "as_of": "2017-07-21T17:32:28-04:00",
        }
    ]


@pytest.mark.parametrize(
    ("literal", "plain"),
    [
        ("12345678901234567.89", "12345678901234567.89"),
        ("0.1", "0.1"),
        ("10000.00", "10000.00"),
        ("1E+2", "100"),
        ("1.5e3", "1500"),
        ("1e-7", "0.0000001"),
        ("0", "0"),
        ("-250.5", "-250.5"),
        ("38123.4567", "38123.4567"),
        ("1" * 40, "1" * 40),
        ("1" * 400, "1" * 400),
        ("0." + "1" * 60, "0." + "1" * 60),
    ],
)
def test_money_goes_out_as_it_came_in(literal: str, plain: str) -> None:
    answer = read_answer(amount(literal))
    assert answer.payload()[0]["amount"] == plain
    assert answer.balances[0].amount == Decimal(literal)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4))
def test_no_amount_is_ever_rounded(value: Decimal) -> None:
    assert read_answer(amount(format(value, "f"))).payload()[0]["amount"] == format(value, "f")


@pytest.mark.parametrize(
    ("literal", "moment"),
    [
        ("2017-07-21T17:32:28-0400", datetime(2017, 7, 21, 17, 32, 28, tzinfo=CHILE)),
        ("2017-07-21T17:32:28-04:00", datetime(2017, 7, 21, 17, 32, 28, tzinfo=CHILE)),
        ("2017-07-21T17:32:28.125Z", datetime(2017, 7, 21, 17, 32, 28, 125000, tzinfo=UTC)),
    ],
)
def test_moments_keep_their_offset(literal: str, moment: datetime) -> None:
    as_of = read_answer(element(DateTime=literal)).balances[0].as_of
    assert as_of == moment
    assert as_of.utcoffset() == moment.utcoffset()


@pytest.mark.parametrize("data", [ABSENT, None, {}, {"Balance": None}, {"Balance": []}])
def test_no_data_is_no_balance_and_no_error(data: object) -> None:
    assert read_answer(envelope(Data=data)).balances == ()


@pytest.mark.parametrize("nothing", [ABSENT, None, {}, {"Code": None, "Type": None, "Description": None}])
def test_an_empty_error_is_no_error(nothing: object) -> None:
    assert len(read_answer(envelope(Error=nothing)).balances) == 1


@pytest.mark.parametrize("kind", ["ClosingAvailable", "ClosingBooked", "Withheld"])
@pytest.mark.parametrize("indicator", ["Credit", "Debit"])
def test_every_type_and_indicator(kind: str, indicator: str) -> None:
    [balance] = read_answer(element(Type=kind, CreditDebitIndicator=indicator)).balances
    assert (balance.type, balance.indicator) == (kind, indicator)


def test_additional_information_is_passed_on_but_for_secrets_and_what_no_store_takes() -> None:
    information = f"Faltan dos cuentas\nde {CANARY} \u0000\ud800"
    answer = read_answer(envelope(AdditionalInformation=information), hide=(CANARY,))
    assert answer.additional_information == "Faltan dos cuentas\nde # \ufffd\ufffd"


def test_unknown_fields_are_named_and_ignored() -> None:
    changed = {**ELEMENT, "Owner": CANARY, "Amount": {**ELEMENT["Amount"], "Scale": 2}}
    body = envelope(Data={"Balance": [changed, changed], "Next": None}, Trace={"a": [1]}, **{"11887755": 1, "a b": 1})
    answer = read_answer(body)
    assert answer.drift == ("?", "Data.Balance[].Amount.Scale", "Data.Balance[].Owner", "Data.Next", "Trace")
    assert len(answer.balances) == 2


def test_a_flood_of_unknown_fields_is_cut() -> None:
    assert len(read_answer(envelope(**{f"Extra{index}": 0 for index in range(500)})).drift) == 20


def test_repr_shows_neither_whose_nor_how_much() -> None:
    shown = repr(read_answer(element(AccountId=CANARY, Amount={"Amount": 4711, "Currency": "CLP"})))
    assert CANARY not in shown
    assert "4711" not in shown
    assert "6baf6c19" not in shown
    assert "CLP" in shown


# --- what is refused

UNREADABLE_BODIES = {
    "empty": (b"", "body: not JSON"),
    "text": (b"upstream timed out", "body: not JSON"),
    "html": (b"<html>504</html>", "body: not JSON"),
    "null": (b"null", "body: not a JSON object"),
    "a list": (b"[]", "body: not a JSON object"),
    "a string": (b'"Authorization failed"', "body: not a JSON object"),
    "cut off": (EXAMPLE.encode()[:-10], "body: not JSON"),
    "two documents": (EXAMPLE.encode() * 2, "body: not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + EXAMPLE.encode(), "body: not JSON"),
    "UTF-16": (EXAMPLE.encode("utf-16"), "body: not UTF-8"),
    "Latin-1": (EXAMPLE.replace("873458", "ñ").encode("latin-1"), "body: not UTF-8"),
    "a NUL": (EXAMPLE.replace("873458", "87\x0058").encode(), "body: not JSON"),
    "NULs after it": (EXAMPLE.encode() + b"\0\0", "body: not JSON"),
    "deep lists": (b'{"Status": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "body: nested too deeply"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "body: nested too deeply"),
    "a field twice": (b'{"Status": "OK", "Status": "ERROR"}', "body: field Status stands there twice"),
    "a strange field twice": (b'{"11887755": 1, "11887755": 2}', "body: field ? stands there twice"),
    "a field twice inside": (amount('1, "Amount": 2'), "body: field Amount stands there twice"),
    "NaN": (amount("NaN"), "body: a number that is not finite"),
    "Infinity": (amount("Infinity"), "body: a number that is not finite"),
    "-Infinity": (amount("-Infinity"), "body: a number that is not finite"),
    "NaN elsewhere": (EXAMPLE.replace('"LifeSpan": null', '"LifeSpan": NaN').encode(), "body: a number that is not"),
    "1e400": (amount("1e400"), "Data.Balance[0].Amount.Amount: an exponent or a length"),
    "1e999999": (amount("1e999999"), "Data.Balance[0].Amount.Amount: an exponent or a length"),
    "1e-999999": (amount("1e-999999"), "Data.Balance[0].Amount.Amount: an exponent or a length"),
    "0e999999": (amount("0e999999"), "Data.Balance[0].Amount.Amount: an exponent or a length"),
    "an absurd exponent": (amount("1e" + "9" * 40), "body: not JSON"),
    "a million digits": (amount("9" * 1_000_000), "Data.Balance[0].Amount.Amount: an exponent or a length"),
    "a leading zero": (amount("007"), "body: not JSON"),
    "a number as a string": (
        amount('"10000"'),
        "Data.Balance[0].Amount.Amount: Input should be an instance of Decimal",
    ),
    "a truth as a number": (amount("true"), "Data.Balance[0].Amount.Amount: Input should be an instance of Decimal"),
    "no number": (amount("null"), "Data.Balance[0].Amount.Amount: Input should be an instance of Decimal"),
    "no status": (envelope(Status=ABSENT), "Status: neither OK nor ERROR"),
    "a null status": (envelope(Status=None), "Status: neither OK nor ERROR"),
    "another status": (envelope(Status="ok"), "Status: neither OK nor ERROR"),
    "a status that cannot be compared": (envelope(Status=["OK"]), "Status: neither OK nor ERROR"),
    "no operation": (envelope(OperationId=ABSENT), "OperationId: Field required"),
    "a null operation": (envelope(OperationId=None), "OperationId: Input should be a valid string"),
    "an empty operation": (envelope(OperationId=""), "OperationId: String should match"),
    "a long operation": (envelope(OperationId="x" * 129), "OperationId: String should match"),
    "an operation with a space": (envelope(OperationId="a b"), "OperationId: String should match"),
    "an operation with a line feed": (envelope(OperationId="ab\n"), "OperationId: String should match"),
    "an operation in Greek": (envelope(OperationId="αβγ"), "OperationId: String should match"),
    "a number as operation": (envelope(OperationId=5), "OperationId: Input should be a valid string"),
    "data as a list": (envelope(Data=[]), "Data: Input should be"),
    "balances as an object": (envelope(Data={"Balance": {}}), "Data.Balance: Input should be a valid list"),
    "a balance that is none": (envelope(Data={"Balance": [None]}), "Data.Balance[0]: Input should be"),
    "no account": (element(AccountId=ABSENT), "Data.Balance[0].AccountId: Field required"),
    "an empty account": (element(AccountId=""), "Data.Balance[0].AccountId: empty, or with characters"),
    "an account with a NUL": (element(AccountId=CANARY + "\0"), "Data.Balance[0].AccountId: empty, or with characters"),
    "half a character": (element(AccountId="\ud800"), "Data.Balance[0].AccountId: "),
    "an account as a number": (element(AccountId=873458), "Data.Balance[0].AccountId: Input should be a valid string"),
    "another type": (element(Type=CANARY), "Data.Balance[0].Type: Input should be 'ClosingAvailable',"),
    "another indicator": (element(CreditDebitIndicator="credit"), "Data.Balance[0].CreditDebitIndicator: Input should"),
    "no offset": (element(DateTime="2017-07-21T17:32:28"), "Data.Balance[0].DateTime: not an ISO 8601"),
    "a date alone": (element(DateTime="2017-07-21"), "Data.Balance[0].DateTime: not an ISO 8601"),
    "no moment": (element(DateTime=CANARY), "Data.Balance[0].DateTime: not an ISO 8601"),
    "a moment as a number": (element(DateTime=1500672748), "Data.Balance[0].DateTime: not an ISO 8601"),
    "before the calendar": (element(DateTime="0001-01-01T00:00:00+1400"), "Data.Balance[0].DateTime: not an ISO"),
    "no amount": (element(Amount=ABSENT), "Data.Balance[0].Amount: Field required"),
    "a bare amount": (element(Amount=5), "Data.Balance[0].Amount: Input should be"),
    "no currency": (element(Amount={"Amount": 1}), "Data.Balance[0].Amount.Currency: Field required"),
    "a currency in small letters": (
        element(Amount={"Amount": 1, "Currency": "clp"}),
        "Data.Balance[0].Amount.Currency: String",
    ),
    "a currency and more": (
        element(Amount={"Amount": 1, "Currency": "CLP\n"}),
        "Data.Balance[0].Amount.Currency: String",
    ),
    "information as an object": (envelope(AdditionalInformation={"a": CANARY}), "AdditionalInformation: Input should"),
}


@pytest.mark.parametrize("name", UNREADABLE_BODIES)
def test_what_is_not_the_contract_is_unreadable_and_says_where(name: str) -> None:
    body, description = UNREADABLE_BODIES[name]
    outcome = failure(body)
    assert (outcome.kind, outcome.code, outcome.type) == (Kind.UNREADABLE, "UNREADABLE", None)
    assert outcome.description.startswith(description)
    assert len(outcome.description) <= 200


@pytest.mark.parametrize(
    ("content_type", "readable"),
    [
        (None, True),
        ("application/json", True),
        ('application/json; charset="UTF-8"', True),
        ("text/plain;charset=utf8", True),
        ("application/json; charset=ISO-8859-1", False),
        ("application/json; charset=utf-16", False),
        ("application/json; charset=no-such-thing", False),
    ],
)
def test_a_foreign_charset_is_accepted_only_where_it_means_the_same(content_type: str | None, readable: bool) -> None:
    assert read_answer(EXAMPLE.encode(), content_type).balances
    body = envelope(AdditionalInformation="año").replace(rb"\u00f1", "ñ".encode())
    if readable:
        assert read_answer(body, content_type).additional_information == "año"
    else:
        assert failure(body, content_type).description == "body: not UTF-8"


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(lambda value: json.dumps(value).encode())
)
def test_no_body_brings_another_exception(body: bytes) -> None:
    with pytest.raises(KhipuFailure):
        read_answer(body)


# --- what Khipu says when it fails


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"Code": "E201", "Type": "RETRY_IMMEDIATELY", "Description": "Target unavailable"},
            ("E201", "RETRY_IMMEDIATELY", "Target unavailable"),
        ),
        ({"Code": "E101", "Type": "SOMETHING_NEW"}, ("E101", "SOMETHING_NEW", "")),
        ({"Code": "E201", "Type": None, "Description": None}, ("E201", None, "")),
        ({"Code": "e201", "Type": "Wait-4"}, ("UNKNOWN", "Wait-4", "")),
        ({"Code": "E 201", "Type": "a b"}, ("UNKNOWN", None, "")),
        ({"Code": "E" * 33, "Type": "T" * 65}, ("UNKNOWN", None, "")),
        ({"Code": "E201\n", "Type": "DO_NOT_RETRY\n"}, ("UNKNOWN", None, "")),
        ({"Code": 201, "Type": ["DO_NOT_RETRY"], "Description": {"a": 1}}, ("UNKNOWN", None, "")),
        ({}, ("UNKNOWN", None, "")),
    ],
)
def test_an_error_envelope(fields: dict[str, object], expected: tuple[str, str | None, str]) -> None:
    outcome = failure(error(**fields))
    assert outcome.kind is Kind.ANSWERED
    assert (outcome.code, outcome.type, outcome.description) == expected


@pytest.mark.parametrize("nothing", [ABSENT, None, "boom", 5, []])
def test_an_error_without_an_error(nothing: object) -> None:
    assert failure(envelope(Status="ERROR", Error=nothing)) == Outcome(Kind.ANSWERED, "UNKNOWN")


def test_an_error_counts_whatever_else_is_wrong_or_said() -> None:
    refused = {"Code": "E101", "Type": "DO_NOT_RETRY", "Description": ""}
    for body in (
        envelope(Status="ERROR", OperationId=None, Data={"Balance": 5}, Error=refused),
        envelope(Status="OK", Error=refused),
        envelope(Status=None, Error=refused),
    ):
        assert failure(body) == Outcome(Kind.ANSWERED, "E101", "DO_NOT_RETRY")


@pytest.mark.parametrize(
    ("description", "scrubbed"),
    [
        ("La cuenta 11887755 no existe", "La cuenta # no existe"),
        ("RUT 12.345.678-9 bloqueado", "RUT # bloqueado"),
        ("RUT 12.345.678-K bloqueado", "RUT #-K bloqueado"),
        ("tarjeta 1234 5678 9012 3456.", "tarjeta #."),
        ("1188-7755, 11_88_77, 1 1 8 8", "#"),
        ("saldo 1,234,567", "saldo #"),
        ("cuenta \u0661\u0662\u0663\u0664", "cuenta #"),
        ("cuenta 1\u200b1\u200b8\u200b8", "cuenta #"),
        ("intento 3 de 5 en 180 s", "intento 3 de 5 en 180 s"),
        ("a\x00b\x1b[31mc\r\nd\te", "ab[31mc d e"),
        ("\u202egnirts", "gnirts"),
        ("\ud800x", "x"),
        (f"log-on {CANARY} refused", "log-on # refused"),
        (f"log-on {CANARY[:4]}\u200b{CANARY[4:]} refused", "log-on # refused"),
        ("x " * 97 + CANARY, "x " * 97 + "#"),
        ("x " * 250, "x " * 100),
        (f"log-on {CANARY.encode().hex()} refused", "log-on # refused"),
        (f"log-on {CANARY.encode().hex().upper()} refused", "log-on # refused"),
        (f"log-on {b64encode(CANARY.encode()).decode()} refused", "log-on #E= refused"),
        (f"log-on {b64encode(b'a:' + CANARY.encode()).decode()} refused", "log-on YTp#Q== refused"),
        (f"http://localhost/callbacks/{'aB3_-' * 8}xyz of yours", "http://localhost/callbacks/# of yours"),
        (f"http%3A%2F%2Flocalhost%2Fcallbacks%2F{'aB3_-' * 8}xyz", "#"),
    ],
)
def test_descriptions_are_scrubbed(description: str, scrubbed: str) -> None:
    assert failure(error(Code="E999", Description=description), hide=(CANARY, "")).description == scrubbed


def test_a_secret_is_no_code_and_no_type_but_a_documented_code_is_no_secret() -> None:
    outcome = failure(error(Code="PASSWORD-1", Type="PASSWORD-1"), hide=("PASSWORD-1",))
    assert (outcome.code, outcome.type) == ("UNKNOWN", None)
    assert failure(error(Code="E101", Type=None), hide=("101", "E101")).code == "E101"


def test_a_sum_is_no_code_and_no_type() -> None:
    outcome = failure(error(Code="271828182", Type="OF_271_828_CLP"))
    assert (outcome.code, outcome.type) == ("UNKNOWN", None)
    assert failure(error(Code="E1001", Type="WAIT_4_HOURS_BEFORE_RETRY")).code == "E1001"


SHORT = "123"


def test_an_operation_id_that_repeats_what_was_sent_loses_that_and_stays_unlike_others() -> None:
    token = "aB3_-" * 8 + "xyz"
    ids = [f"{CANARY}/1", f"{CANARY}/2", token, token[::-1], "6baf6c19-e485-463b-ae24-a821b0250123"]
    read = [read_answer(envelope(OperationId=each), hide=(CANARY, SHORT)).operation_id for each in ids]
    assert read[:2] == ["#/1", "#/2"]
    assert len(set(read)) == len(ids)
    assert token not in read
    assert read[4] == ids[4], "three digits are in many ids"
    assert read_accepted(envelope(OperationId=ids[0], Data=None), hide=(CANARY,)).operation_id == "#/1"


@pytest.mark.parametrize("password", ['p\u00e4ss"wörd/+%', "\ud800 half a letter"])
def test_a_secret_is_hidden_as_json_and_urls_write_it(password: str) -> None:
    quoted = [json.dumps(password)[1:-1], quote(password.encode("utf-8", "replace"), safe="")]
    outcome = failure(error(Code="E999", Description=" ".join(quoted)), hide=(password,))
    assert set(outcome.description) <= set("# ")


def test_a_field_named_like_a_secret_is_not_named() -> None:
    body = envelope(secret_of_ours=1)
    assert read_answer(body, hide=("secret_of_ours",)).drift == ("#",)
    twice = failure(b'{"secret_of_ours": 1, "secret_of_ours": 2}', hide=("secret_of_ours",))
    assert twice.description == "body: field # stands there twice"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (error(Code="E401", Type="DO_NOT_RETRY"), "E401"),
        (error(Type="DO_NOT_RETRY"), None),
        (envelope(Status="ERROR"), None),
        (EXAMPLE.encode(), None),
        (b'"Authorization failed"', None),
        (b"", None),
    ],
)
def test_the_body_of_an_http_error_counts_only_with_a_code(body: bytes, code: str | None) -> None:
    said = read_error(body)
    assert (said and said.code) == code


# --- 202


@pytest.mark.parametrize(
    ("life_span", "expected", "drift"),
    [
        ("2017-07-22T00:00:00-0400", datetime(2017, 7, 22, 4, tzinfo=UTC), ()),
        ("2017-07-22T00:00:00", datetime(2017, 7, 22, tzinfo=UTC), ()),
        (None, None, ("LifeSpan",)),
        (ABSENT, None, ("LifeSpan",)),
        ("soon", None, ("LifeSpan",)),
        (5, None, ("LifeSpan",)),
        ("9999-12-31T23:59:59-1400", None, ("LifeSpan",)),
    ],
)
@pytest.mark.parametrize("nothing", [None, {}, ABSENT])
def test_accepted(nothing: object, life_span: object, expected: datetime | None, drift: tuple[str, ...]) -> None:
    body = envelope(Data=nothing, Error=nothing, LifeSpan=life_span, AdditionalInformation="Data will be sent.")
    accepted = read_accepted(body)
    assert (accepted.life_span, accepted.drift) == (expected, drift)
    assert accepted.operation_id == "6baf6c19-e485-463b-ae24-a821b025c8a4"


def test_accepted_names_what_should_not_be_there() -> None:
    assert read_accepted(envelope(Foo=1)).drift == ("Data", "Foo", "LifeSpan")


def test_a_202_can_be_a_failure_too() -> None:
    with pytest.raises(KhipuFailure) as caught:
        read_accepted(error(Code="E101", Type="DO_NOT_RETRY"))
    assert caught.value.outcome.code == "E101"


# --- what is done with an answer


def fingerprint(*elements: object) -> str:
    return read_answer(envelope(Data={"Balance": list(elements)})).fingerprint()


def test_the_fingerprint_tells_a_change_of_balance_and_of_nothing_else() -> None:
    withheld = {**ELEMENT, "Type": "Withheld"}
    later = {**ELEMENT, "DateTime": "2018-07-21T17:32:28-0400"}
    assert fingerprint(ELEMENT, withheld) == fingerprint(withheld, later)
    others = [
        fingerprint(),
        fingerprint(ELEMENT),
        fingerprint(ELEMENT, ELEMENT),
        *(fingerprint({**ELEMENT, **change}) for change in (
            {"AccountId": "873459"},
            {"Type": "ClosingBooked"},
            {"CreditDebitIndicator": "Debit"},
            {"Amount": {"Amount": 10001, "Currency": "CLP"}},
            {"Amount": {"Amount": 10000, "Currency": "USD"}},
        )),
    ]  # fmt: skip
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(("one", "other"), [("10000", "10000.00"), ("10000", "1e4"), ("0", "-0.0"), ("0.10", "0.1")])
def test_one_sum_written_in_two_ways_is_one_fingerprint(one: str, other: str) -> None:
    assert read_answer(amount(one)).fingerprint() == read_answer(amount(other)).fingerprint()


def test_another_currency_is_foreign() -> None:
    answer = read_answer(EXAMPLE.encode())
    check_currency(answer, "CLP")
    check_currency(answer, None)
    check_currency(Answer("x"), "USD")
    with pytest.raises(KhipuFailure) as caught:
        check_currency(answer, "USD")
    description = "Data.Balance[0].Amount.Currency: not the currency configured"
    assert caught.value.outcome == Outcome(Kind.FOREIGN, "FOREIGN", description=description)
