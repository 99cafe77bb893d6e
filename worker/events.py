"""Name what stands on the stream: the data of every event as a model, and its JSON Schema, made from that model.

    fields of an entry ──▶ read_event ──▶ Event, whose `data` is a BalanceObserved, an AccountSuspended … or Unknown
    models ──▶ python -m worker.events ──▶ worker/schemas/<type>.json

The models are open: a field that a later version adds is kept (in `model_extra`) and refuses nothing. Reads no stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic.json_schema import GenerateJsonSchema

from worker.balances import Indicator
from worker.errors import BalancesError

SCHEMAS = Path(__file__).parent / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: `dataschema` of an event, and `$id` of its schema, is this and the type.
URN = "urn:balance-poller:"
DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class MalformedEntry(BalancesError):
    """An entry of the stream is not what its type promises. Names fields, never values."""


def _exact(value: object) -> Decimal:
    if isinstance(value, str) and DECIMAL.fullmatch(value):
        return Decimal(value)
    raise ValueError("not a decimal string")


Amount = Annotated[
    Decimal,
    BeforeValidator(_exact),
    WithJsonSchema({"type": "string", "pattern": f"^{DECIMAL.pattern}$"}),
    Field(repr=False, description="Decimal string, exactly as the bank wrote it; the sign of the money is `indicator`"),
]
Code = Annotated[
    str,
    Field(pattern=r"^[A-Z0-9_-]{1,32}$", description="Khipu's error code, or a failure without one, such as HTTP_504"),
]


class Data(BaseModel):
    """What every event's data has in common: nothing but being open and exact."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", hide_input_in_errors=True)


class Unknown(Data):
    """An event of a type that this version does not know; its fields are in `model_extra`."""


class _AboutAccount(Data):
    account: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="The account's alias")
    institution: str = Field(min_length=1, description="The bank, as in Khipu's path")
    poll: int = Field(ge=0, description="The answer's poll, or the account's last one; they grow. 0: never polled")


class ObservedBalance(Data):
    """One balance of an answer."""

    account_id: str = Field(min_length=1, repr=False, description="The bank's immutable id of the account")
    type: str = Field(
        pattern=r"^[A-Za-z]{1,64}$",
        description="Which balance; pass over one that you do not know",
        examples=["ClosingAvailable", "ClosingBooked", "Withheld"],
    )
    indicator: Indicator = Field(description="Debit: the money is owed")
    amount: Amount
    currency: str = Field(pattern=r"^[A-Z]{3}$", description="ISO 4217")
    as_of: AwareDatetime = Field(description="The moment that the bank gives, with its offset")

    @property
    def signed(self) -> Decimal:
        """The amount with the sign that `indicator` gives it."""
        return self.amount.copy_negate() if self.indicator == "Debit" else self.amount


class BalanceObserved(_AboutAccount):
    """One answer of the bank about one account. No balances: the bank gave no data, which is never zero."""

    operation_id: str = Field(
        pattern=r"^[!-~]{1,128}$", repr=False, description="Khipu's OperationId: once on the stream"
    )
    balances: tuple[ObservedBalance, ...]
    fetched_at: AwareDatetime = Field(description="When the answer was read")
    late: bool = Field(description="The answer's poll was no longer the account's current one")
    changed: bool = Field(description="It is the newest answer, and other balances than in the newest before it")
    additional_information: str | None = Field(repr=False, description="What the bank added, such as incomplete data")


class AccountSuspended(_AboutAccount):
    """From now on no balance of the account comes until it is resumed."""

    state: Literal["suspended", "parked", "blocked"]
    code: Code
    queue: str = Field(min_length=1, description="The dead-letter queue that says why")


class AccountResumed(_AboutAccount):
    """The account is polled again."""

    by: str = Field(
        min_length=1,
        description="What brought it back; more may come",
        examples=["release", "redrive", "unblock", "new credential", "answer"],
    )


class AccountOverdue(_AboutAccount):
    """The account is due for longer than its own interval and was not polled."""

    since: AwareDatetime = Field(description="When it became due")
    interval: int = Field(ge=1, description="The account's own interval, in seconds")


TYPES: dict[str, type[Data]] = {
    "balance.observed.v1": BalanceObserved,
    "account.suspended.v1": AccountSuspended,
    "account.resumed.v1": AccountResumed,
    "account.overdue.v1": AccountOverdue,
}


@dataclass(frozen=True, slots=True)
class Event:
    """One CloudEvent; `entry` is its id on the stream, and so its place."""

    entry: str
    id: str
    type: str
    source: str
    subject: str
    time: datetime
    data: Data


class _Attributes(BaseModel):
    """The attributes that every entry has as fields; others are passed over."""

    model_config = ConfigDict(hide_input_in_errors=True)

    specversion: Literal["1.0"]
    id: str = Field(min_length=1)
    type: str = Field(min_length=1)
    source: str = Field(min_length=1)
    subject: str = Field(min_length=1)
    time: AwareDatetime
    data: str


def read_event(entry: str, fields: Mapping[str, str]) -> Event:
    """The event that stands in an entry's fields. Raises MalformedEntry."""
    try:
        said = _Attributes.model_validate(fields)
        data = TYPES.get(said.type, Unknown).model_validate_json(said.data)
    except ValidationError as error:
        wrong = {".".join(map(str, each["loc"])) or "data" for each in error.errors()}
        raise MalformedEntry(f"{entry}: {', '.join(sorted(wrong))}") from None  # the cause would quote the fields
    return Event(entry, said.id, said.type, said.source, said.subject, said.time, data)


# ------------------------------------------------------------------------------------------------------------- schemas


class _Plain(GenerateJsonSchema):
    """Without the titles that only repeat a field's name."""

    def field_title_should_be_set(self, _schema: object) -> bool:
        return False


def schema(type_: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of the data of this type."""
    made = TYPES[type_].model_json_schema(schema_generator=_Plain)
    return {"$schema": DIALECT, "$id": URN + type_, **made}


def schema_text(type_: str) -> str:
    """The schema as it stands in its file."""
    return json.dumps(schema(type_), indent=2, ensure_ascii=False) + "\n"


def write_schemas(folder: Path = SCHEMAS) -> None:
    """Write every type's schema to `<type>.json`."""
    folder.mkdir(exist_ok=True)
    for type_ in TYPES:
        (folder / f"{type_}.json").write_text(schema_text(type_), encoding="utf-8")


if __name__ == "__main__":
    write_schemas()
