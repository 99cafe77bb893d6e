"""The schemas: files and models agree, version 1 only ever grows, and what our own code can publish fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import closed, validate_entry, validator

from worker import events
from worker.accounts import parse_accounts
from worker.balances import read_answer
from worker.events import SCHEMAS, TYPES, BalanceObserved, MalformedEntry, Unknown, read_event, schema, schema_text
from worker.stream import observed

FROZEN = Path(__file__).parent / "schemas_v1"

#: Keywords that say nothing about what is valid.
WORDS = {"title", "description", "examples"}

FILE = b"""
[logins.acme]
[[accounts]]
alias = "acme-operating"
institution = "bancosecurity.cl"
number = "11887755"
login = "acme"
"""
DEFINITION = parse_accounts(FILE, "accounts.toml", callback_configured=False).definitions["acme-operating"]

OBSERVED = {
    "account": "acme-operating",
    "institution": "bancosecurity.cl",
    "poll": 1795343223001,
    "operation_id": "6baf6c19-e485-463b-ae24-a821b025c8a4",
    "balances": [
        {
            "account_id": "873458",
            "type": "ClosingAvailable",
            "indicator": "Debit",
            "amount": "12345678901234567.89",
            "currency": "CLP",
            "as_of": "2017-07-21T17:32:28-04:00",
        }
    ],
    "fetched_at": "2026-11-22T10:27:03.255+00:00",
    "additional_information": None,
    "late": False,
    "changed": True,
}
ABOUT = {"account": "a", "institution": "bancosecurity.cl", "poll": 0}
VALID = {
    "balance.observed.v1": OBSERVED,
    "account.suspended.v1": {**ABOUT, "state": "parked", "code": "HTTP_504", "queue": "balances.dead.bad-answer"},
    "account.resumed.v1": {**ABOUT, "by": "new credential"},
    "account.overdue.v1": {**ABOUT, "since": "2026-11-22T10:27:03.255Z", "interval": 900},
}


def entry(type_: str, data: object, /, **attributes: str) -> dict[str, str]:
    said: Any = data
    return {
        "specversion": "1.0",
        "id": said.get("operation_id", f"{said.get('account')}.{said.get('poll')}.{type_}"),
        "source": "/khipu/cl/business/bancosecurity.cl",
        "type": type_,
        "subject": said.get("account", "?"),
        "time": "2026-11-22T10:27:03.255Z",
        "datacontenttype": "application/json",
        "dataschema": f"urn:balance-poller:{type_}",
        "data": json.dumps(data),
        **attributes,
    }


# --------------------------------------------------------------------------------------------------------------- files


def test_every_type_has_its_file_and_every_file_its_type() -> None:
    assert {path.name for path in SCHEMAS.iterdir()} == {f"{type_}.json" for type_ in TYPES}


@pytest.mark.parametrize("type_", TYPES)
def test_the_file_is_what_the_model_makes(type_: str) -> None:
    assert (SCHEMAS / f"{type_}.json").read_text("utf-8") == schema_text(type_), "python -m worker.events writes it"


@pytest.mark.parametrize("type_", TYPES)
def test_a_schema_is_draft_2020_12_under_the_name_that_entries_give(type_: str) -> None:
    assert jsonschema_rs.meta.is_valid(schema(type_))
    assert schema(type_)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema(type_)["$id"] == f"urn:balance-poller:{type_}"


def test_it_writes_the_files(tmp_path: Path) -> None:
    events.write_schemas(tmp_path / "schemas")
    written = {path.name: path.read_bytes() for path in (tmp_path / "schemas").iterdir()}
    assert written == {path.name: path.read_bytes() for path in SCHEMAS.iterdir()}


# ------------------------------------------------------------------------------------------------------------- entries


@pytest.mark.parametrize("type_", TYPES)
def test_an_entry_of_every_type_is_valid_and_read_as_its_model(type_: str) -> None:
    fields = entry(type_, VALID[type_])
    validate_entry(fields)
    event = read_event("1795343223001-0", fields)
    assert isinstance(event.data, TYPES[type_])
    assert (event.entry, event.id, event.type) == ("1795343223001-0", fields["id"], type_)
    assert (event.subject, event.source) == (VALID[type_]["account"], "/khipu/cl/business/bancosecurity.cl")
    assert event.time == datetime(2026, 11, 22, 10, 27, 3, 255000, UTC)


def test_money_is_exact_and_its_owner_is_in_no_repr() -> None:
    event = read_event("1-0", entry("balance.observed.v1", OBSERVED))
    assert isinstance(event.data, BalanceObserved)
    [balance] = event.data.balances
    assert (balance.amount, balance.signed) == (Decimal("12345678901234567.89"), Decimal("-12345678901234567.89"))
    assert balance.as_of.utcoffset() == timedelta(hours=-4)
    assert all(word not in repr(event.data) for word in ("12345678901234567", "873458", "6baf6c19"))


def test_what_a_later_version_adds_refuses_nothing_and_is_kept() -> None:
    data = deepcopy(OBSERVED) | {"overdraft": "50"}
    data["balances"][0]["limit"] = {"amount": "7"}
    fields = entry("balance.observed.v1", data, traceparent="00-0af7")
    open_schema = jsonschema_rs.Draft202012Validator(schema("balance.observed.v1"))
    open_schema.validate(data)
    event = read_event("1-0", fields)
    assert isinstance(event.data, BalanceObserved)
    assert event.data.model_extra == {"overdraft": "50"}
    assert event.data.balances[0].model_extra == {"limit": {"amount": "7"}}
    with pytest.raises(jsonschema_rs.ValidationError, match="limit"):
        validator("balance.observed.v1").validate(data)


def test_an_unknown_type_is_an_event_all_the_same() -> None:
    event = read_event("1-0", entry("balance.observed.v2", {"account": "a", "poll": 1, "money": "lots"}))
    assert isinstance(event.data, Unknown)
    assert event.data.model_extra == {"account": "a", "poll": 1, "money": "lots"}
    assert event.type == "balance.observed.v2"


def change(**values: object) -> dict[str, str]:
    """The entry with fields of its first balance, or of the data, replaced."""
    data: Any = deepcopy(OBSERVED)
    for name, value in values.items():
        (data["balances"][0] if name in data["balances"][0] else data)[name] = value
    return entry("balance.observed.v1", data)


MALFORMED = {
    "no fields": {},
    "another specversion": entry("balance.observed.v1", OBSERVED, specversion="2.0"),
    "an empty id": entry("balance.observed.v1", OBSERVED, id=""),
    "a time without an offset": entry("balance.observed.v1", OBSERVED, time="2026-11-22T10:27:03"),
    "not JSON": entry("balance.observed.v1", OBSERVED, data="{"),
    "not an object": entry("balance.observed.v1", OBSERVED, data="[]"),
    "an unknown type and not an object": entry("x.v1", OBSERVED, data="7"),
    "bytes that are no UTF-8": entry("balance.observed.v1", OBSERVED, data='{"account": "\udcff"}'),
    "another type's data": entry("balance.observed.v1", VALID["account.resumed.v1"]),
    "a number for an amount": change(amount=10000),
    "an amount with an exponent": change(amount="1e4"),
    "an amount that is none": change(amount="NaN"),
    "a number for a moment": change(as_of=1500672748),
    "a moment without an offset": change(as_of="2017-07-21T17:32:28"),
    "an unknown indicator": change(indicator="Both"),
    "a text for a number": change(poll="12"),
    "a number for a truth": change(late=0),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_entry_is_refused_without_its_values(what: str) -> None:
    with pytest.raises(MalformedEntry) as refusal:
        read_event("1795343223001-0", MALFORMED[what])
    assert str(refusal.value).startswith("1795343223001-0: ")
    assert refusal.value.__cause__ is None
    assert all(word not in str(refusal.value) for word in ("12345678901234567", "873458", "1e4"))


@pytest.mark.parametrize("what", [what for what in MALFORMED if "amount" in what or "moment" in what or "text" in what])
def test_the_schema_refuses_what_the_model_refuses(what: str) -> None:
    with pytest.raises(jsonschema_rs.ValidationError):
        validate_entry(MALFORMED[what])


printable = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30).filter(str.isprintable)
moments = st.builds(
    lambda micros, minutes: datetime.fromtimestamp(micros / 1e6, timezone(timedelta(minutes=minutes))),
    st.integers(-(2 * 10**15), 7 * 10**15),
    st.integers(-14 * 60, 14 * 60),
)
amounts = st.builds(Decimal.scaleb, st.integers(-(10**20), 10**20).map(Decimal), st.integers(-20, 8).map(Decimal))
raw_balances = st.fixed_dictionaries(
    {
        "AccountId": printable,
        "CreditDebitIndicator": st.sampled_from(["Credit", "Debit"]),
        "DateTime": moments.map(datetime.isoformat),
        "Type": st.sampled_from(["ClosingAvailable", "ClosingBooked", "Withheld"]),
        "Amount": st.fixed_dictionaries({"Amount": amounts, "Currency": st.from_regex(r"[A-Z]{3}", fullmatch=True)}),
    }
)


@settings(deadline=None)
@given(st.lists(raw_balances, max_size=3), st.none() | st.text(), st.from_regex(r"[!-~]{1,128}", fullmatch=True))
def test_every_answer_that_is_taken_from_the_bank_is_valid_on_the_stream(
    balances: list[dict[str, Any]], information: str | None, operation: str
) -> None:
    body = {"OperationId": operation, "Status": "OK", "Data": {"Balance": balances}}
    text = json.dumps({**body, "AdditionalInformation": information}, default=str)
    answer = read_answer(re.sub(r'"Amount": "([^"{]+)"', r'"Amount": \1', text).encode())
    data = {**observed(DEFINITION, 1795343223001, answer, 1795343223255), "late": True, "changed": False}
    fields = entry("balance.observed.v1", data)
    validate_entry(fields)
    event = read_event("1-0", fields)
    assert isinstance(event.data, BalanceObserved)
    assert [each.amount for each in event.data.balances] == [each["Amount"]["Amount"] for each in balances]
    assert [each.as_of.isoformat() for each in event.data.balances] == [each["DateTime"] for each in balances]


# ------------------------------------------------------------------------------------------------------ version 1 grows


def breaks(old: Any, new: Any, where: str = "data") -> Iterator[str]:
    """Where `new` is more than an additive change of `old`.

    Additive: everything that the old schema says of a field (being required or not, included) still stands, word for
    word; a new field is optional; words are free. So a consumer with the old schema accepts every new entry, and one
    with the new schema every old entry that is still on the stream. Anything else is a new type, `….v2`.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            if name not in old and where.endswith(".properties"):
                continue
            yield from breaks(old.get(name), new.get(name), f"{where}.{name}")
    elif old != new:
        yield where


def meaning(schema: Any, defs: dict[str, Any]) -> Any:
    """The schema without words, each `$ref` replaced by what it refers to, lists of names in order."""
    if isinstance(schema, list):
        return sorted(schema) if all(isinstance(each, str) for each in schema) else [meaning(s, defs) for s in schema]
    if not isinstance(schema, dict):
        return schema
    told = {**defs[schema["$ref"].rpartition("/")[2]], **schema} if "$ref" in schema else schema
    kept = {name: meaning(part, defs) for name, part in told.items() if name not in WORDS | {"$ref", "$defs"}}
    if "properties" in told:  # whose keys are fields, whatever they are called
        kept["properties"] = {name: meaning(part, defs) for name, part in told["properties"].items()}
    return kept


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return list(breaks(meaning(old, old.get("$defs", {})), meaning(new, new.get("$defs", {}))))


def frozen(type_: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FROZEN / f"{type_}.json").read_text("utf-8"))
    return loaded


@pytest.mark.parametrize("type_", sorted(path.stem for path in FROZEN.iterdir()))
def test_the_schema_is_an_additive_change_of_the_frozen_one(type_: str) -> None:
    assert type_ in TYPES, "a type that was published is never withdrawn"
    assert differences(frozen(type_), schema(type_)) == [], "not additive: make a new type, with .v2 at its end"


def test_every_type_is_frozen() -> None:
    assert {path.stem for path in FROZEN.iterdir()} == {type_ for type_ in TYPES if type_.endswith(".v1")}


Change = Callable[[dict[str, Any], dict[str, Any]], object]
#: Of the schema and of an element of `balances`.
BREAKING: dict[str, tuple[Change, str]] = {
    "a field removed": (lambda data, _: data["properties"].pop("late"), "data.properties.late"),
    "a field renamed": (
        lambda data, _: data["properties"].update(delayed=data["properties"].pop("late")),
        "data.properties.late",
    ),
    "a field's type narrowed": (
        lambda data, _: data["properties"].update(additional_information={"type": "string"}),
        "data.properties.additional_information.anyOf",
    ),
    "a field's type widened": (
        lambda data, _: data["properties"]["poll"].update(type=["integer", "string"]),
        "data.properties.poll.type",
    ),
    "a bound added": (lambda data, _: data["properties"]["poll"].update(maximum=9), "data.properties.poll.maximum"),
    "a pattern dropped": (
        lambda _, balance: balance["properties"]["currency"].pop("pattern"),
        "data.properties.balances.items.properties.currency.pattern",
    ),
    "a value more": (
        lambda _, balance: balance["properties"]["indicator"]["enum"].append("Both"),
        "data.properties.balances.items.properties.indicator.enum",
    ),
    "an old field required no more": (lambda data, _: data["required"].remove("late"), "data.required"),
    "a new field required": (
        lambda _, balance: (
            balance["properties"].update(limit={"type": "string"}),
            balance["required"].append("limit"),
        ),
        "data.properties.balances.items.required",
    ),
    "closed": (lambda data, _: data.update(additionalProperties=False), "data.additionalProperties"),
    "another id": (lambda data, _: data.update({"$id": "urn:x"}), "data.$id"),
}
ADDITIVE: dict[str, Change] = {
    "a new optional field": lambda data, _: data["properties"].update(overdraft={"type": "string"}),
    "a new optional field of a balance": lambda _, balance: balance["properties"].update(limit={"type": "string"}),
    "a new field that is called like a word": lambda data, _: data["properties"].update(title={"type": "string"}),
    "other words": lambda data, _: data.update(description="Other words."),
    "other words about a field": lambda _, balance: balance["properties"]["type"].update(examples=["Expected"]),
    "another order": lambda data, _: data["required"].reverse(),
    "another name for a definition": lambda data, balance: (
        data["$defs"].update(Balance=balance),
        data["properties"]["balances"]["items"].update({"$ref": "#/$defs/Balance"}),
    ),
}


@pytest.mark.parametrize("what", BREAKING)
def test_a_change_that_could_harm_a_consumer_is_found(what: str) -> None:
    mutate, where = BREAKING[what]
    assert where in changed(mutate)


@pytest.mark.parametrize("what", ADDITIVE)
def test_an_additive_change_is_let_pass(what: str) -> None:
    assert changed(ADDITIVE[what]) == []


def changed(mutate: Change) -> list[str]:
    old = frozen("balance.observed.v1")
    new = deepcopy(old)
    mutate(new, new["$defs"]["ObservedBalance"])
    assert new != old
    return differences(old, new)


def test_a_closed_schema_is_closed_at_every_depth() -> None:
    assert "true" not in json.dumps(closed(schema("balance.observed.v1")))
