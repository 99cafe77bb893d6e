"""Name what Khipu answers: the envelope, read strictly and with exact money. It asks nothing and decides nothing.

    bytes ──▶ JSON with Decimals ──▶ Status ──▶ Answer | Accepted, or a KhipuFailure that says what was wrong and where

What was wrong is told by the field's path and never by its value, so that it may stand in a log.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Annotated, Literal, NoReturn, TypeVar
from urllib.parse import quote, quote_plus

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError
from pydantic.alias_generators import to_pascal

from worker.errors import KhipuFailure, Kind, Outcome

BalanceType = Literal["ClosingAvailable", "ClosingBooked", "Withheld"]
Indicator = Literal["Credit", "Debit"]

#: `Error.Code` where there is none, or none that could be a code.
UNKNOWN_CODE = "UNKNOWN"
#: Characters of an `Outcome.description`.
DESCRIPTION_LIMIT = 200
#: Unknown fields named in `drift`: enough to see what changed, too few to flood a log.
DRIFT_LIMIT = 20
#: An exponent above this only comes from a notation such as 1e400, never from a number of digits that a bank wrote.
EXPONENT_LIMIT = 30
#: Digits, and decimals, of one amount. Not a rule about money: it keeps a bomb of digits off the stream.
DIGITS_LIMIT = 1000

CODE = re.compile(r"[A-Z0-9_-]{1,32}")
DOCUMENTED_CODE = re.compile(r"[A-Z][0-9]{3}")
TYPE = re.compile(r"[A-Za-z0-9_-]{1,64}")
FIELD_NAME = re.compile(r"(?!.*\d{4})[A-Za-z_][A-Za-z0-9_]{0,39}")
#: Account numbers, RUTs, cards and sums, however they are grouped: 4 digits or more with little between them.
LONG_NUMBER = re.compile(r"\d(?:[\W_]{0,2}\d){3,}")
#: More digits than any code or type has: an amount or a number in their place.
MANY_DIGITS = re.compile(r"(?:\D*\d){6}")
#: The secret part of a callback's URL. Who settles a callback knows its digest only, so it is known by its form …
CALLBACK_TOKEN = re.compile(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
#: … and in free text, however it is encoded, by its length: no word is as long.
LONG_RUN = re.compile(r"[A-Za-z0-9_%=-]{43,}")
#: Characters from which on a secret is looked for in other forms too, and in identifiers: shorter ones are in many.
TELLING_LENGTH = 8
CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s;\"']+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Balance:
    """One balance as the bank gave it; `amount` as received, `as_of` aware. `repr` hides whose and how much."""

    account_id: str = field(repr=False)
    type: BalanceType
    indicator: Indicator
    amount: Decimal = field(repr=False)
    currency: str
    as_of: datetime

    def payload(self) -> dict[str, str]:
        """The balance in plain strings: the amount without exponent, `as_of` in ISO 8601 with its offset."""
        return {
            "account_id": self.account_id,
            "type": self.type,
            "indicator": self.indicator,
            "amount": format(self.amount, "f"),
            "currency": self.currency,
            "as_of": self.as_of.isoformat(),
        }

    def identity(self) -> tuple[str, ...]:
        """What makes it another balance: everything but the moment, and 10000 is 10000.00."""
        amount = format(self.amount, "f")
        if "." in amount:
            amount = amount.rstrip("0").rstrip(".")
        amount = "0" if amount == "-0" else amount
        return (self.account_id, self.type, self.indicator, amount, self.currency)


@dataclass(frozen=True, slots=True)
class Answer:
    """An envelope with `Status: OK`. No balances means that the bank gave no data: never zero, and no error.

    `drift`: paths of fields that the contract does not know (`Data.Foo`), otherwise ignored.
    """

    operation_id: str = field(repr=False)
    balances: tuple[Balance, ...] = ()
    additional_information: str | None = field(default=None, repr=False)
    drift: tuple[str, ...] = ()

    def payload(self) -> list[dict[str, str]]:
        """The balances as they stand on the stream, in the order received."""
        return [balance.payload() for balance in self.balances]

    def fingerprint(self) -> str:
        """SHA-256 (hex) that differs when a balance does; order and `as_of` do not count."""
        identities = sorted(balance.identity() for balance in self.balances)
        return sha256(json.dumps(identities).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Accepted:
    """A 202: the answer will be sent to the callback, by `life_span` (aware) at the latest as far as Khipu says."""

    operation_id: str = field(repr=False)
    life_span: datetime | None = None
    drift: tuple[str, ...] = ()


def read_answer(body: bytes, content_type: str | None = None, *, hide: Collection[str] = ()) -> Answer:
    """Read the body of a 200, or of a callback. `content_type` is the header as received.

    `hide`: literal texts (account number, secrets) that must not survive in free text.
    Raises KhipuFailure: ANSWERED with Khipu's code and type, or UNREADABLE with the path of what was wrong.
    """
    envelope = _validated(_Envelope, _ok(body, content_type, hide))
    elements = (envelope.data and envelope.data.balance) or ()
    information = envelope.additional_information
    return Answer(
        operation_id=_masked_id(envelope.operation_id, hide),
        balances=tuple(element.named() for element in elements),
        additional_information=None if information is None else _hidden(_storable(information), hide),
        drift=_drift(envelope.unknown(), hide),
    )


def read_accepted(body: bytes, content_type: str | None = None, *, hide: Collection[str] = ()) -> Accepted:
    """Read the body of a 202; parameters and failures as with `read_answer`."""
    receipt = _validated(_Receipt, _ok(body, content_type, hide))
    life_span, drift = None, list(receipt.unknown())
    try:
        life_span = _moment(receipt.life_span, assume_utc=True)
    except ValueError:  # also for none at all
        drift.append("LifeSpan")
    if receipt.data:
        drift.append("Data")
    return Accepted(_masked_id(receipt.operation_id, hide), life_span, _drift(drift, hide))


def read_error(body: bytes, content_type: str | None = None, *, hide: Collection[str] = ()) -> Outcome | None:
    """What Khipu itself said in the body of an HTTP error; None unless it is an ERROR envelope with a code."""
    try:
        _ok(body, content_type, hide)
    except KhipuFailure as failure:
        said = failure.outcome
        return said if said.kind is Kind.ANSWERED and said.code != UNKNOWN_CODE else None
    return None


def check_currency(answer: Answer, expected: str | None) -> None:
    """Raise KhipuFailure (FOREIGN) when a balance is in another currency than the one configured."""
    for index, balance in enumerate(answer.balances):
        if expected is not None and balance.currency != expected:
            wrong = f"Data.Balance[{index}].Amount.Currency: not the currency configured"
            raise KhipuFailure(Outcome(Kind.FOREIGN, Kind.FOREIGN.value, description=wrong))


class _NotStrict(ValueError):
    """JSON that Python would read and we do not. The message holds no value."""


def _ok(body: bytes, content_type: str | None, hide: Collection[str]) -> dict[str, object]:
    """The envelope, once it is sure that it is no failure."""
    envelope = _parsed(body, content_type, hide)
    status, error = envelope.get("Status"), envelope.get("Error")
    # An Error that says something is a failure whatever Status says: a refused log-on must not pass for anything else.
    if status == "ERROR" or (isinstance(error, dict) and any(error.values())):
        raise KhipuFailure(_answered(error, hide))
    if status != "OK":
        raise _unreadable("Status", "neither OK nor ERROR")
    return envelope


def _parsed(body: bytes, content_type: str | None, hide: Collection[str]) -> dict[str, object]:
    """The JSON object in `body`, every number a Decimal."""
    try:
        envelope = json.loads(
            body.decode(_encoding(content_type)),
            parse_float=Decimal,
            parse_int=Decimal,
            parse_constant=_refuse_constant,
            object_pairs_hook=partial(_object, hide),
        )
    except _NotStrict as refusal:
        wrong = str(refusal)
    except UnicodeDecodeError:
        wrong = "not UTF-8"
    except RecursionError:
        wrong = "nested too deeply"
    except (ValueError, ArithmeticError):
        wrong = "not JSON"
    else:
        if isinstance(envelope, dict):
            return envelope
        wrong = "not a JSON object"
    # Raised out here because the exceptions above hold the whole body, and would be this one's context.
    raise _unreadable("body", wrong)


def _encoding(content_type: str | None) -> str:
    """JSON is UTF-8. Where another charset is declared, only what means the same in both is accepted."""
    declared = CHARSET.search(content_type or "")
    return "utf-8" if not declared or declared[1].lower() in {"utf-8", "utf8"} else "ascii"


def _refuse_constant(_: str) -> NoReturn:
    raise _NotStrict("a number that is not finite")


def _object(hide: Collection[str], pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; two fields of one name leave it open which of them is meant."""
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise _NotStrict(f"field {_hidden(_field_name(name), hide)} stands there twice")
        result[name] = value
    return result


def _answered(error: object, hide: Collection[str]) -> Outcome:
    """What Khipu's `Error` says, as far as it can be trusted to be what its fields are called."""
    said = error if isinstance(error, dict) else {}
    description = said.get("Description")
    return Outcome(
        kind=Kind.ANSWERED,
        code=_token(CODE, said.get("Code"), hide) or UNKNOWN_CODE,
        type=_token(TYPE, said.get("Type"), hide),
        description=_scrubbed(description, hide) if isinstance(description, str) else "",
    )


def _token(pattern: re.Pattern[str], value: object, hide: Collection[str]) -> str | None:
    """A code or type that has the form of one; a documented code always counts, too short to give anything away."""
    if not isinstance(value, str) or not pattern.fullmatch(value) or MANY_DIGITS.search(value):
        return None
    return value if DOCUMENTED_CODE.fullmatch(value) or _hidden(value, hide) == value else None


def _scrubbed(text: str, hide: Collection[str]) -> str:
    """Free text from outside, fit for a log. Hidden before masked and cut, or parts of a secret would be left."""
    visible = "".join(character for character in text if character.isprintable() or character.isspace())
    hidden = _hidden(" ".join(visible.split()), hide)
    return LONG_NUMBER.sub("#", hidden)[:DESCRIPTION_LIMIT]


def _hidden(text: str, hide: Collection[str]) -> str:
    """The text without these literals, in whatever form they stand there, and without anything as long as a token."""
    for form in sorted({form for literal in filter(None, hide) for form in _forms(literal)}, key=len, reverse=True):
        text = text.replace(form, "#")
    return LONG_RUN.sub("#", text)


def _forms(literal: str) -> Iterator[str]:
    """The literal as it is, and as JSON, a URL, hex or base64 would write it."""
    yield literal
    if len(literal) < TELLING_LENGTH:
        return
    for text in {literal, json.dumps(literal)[1:-1], json.dumps(literal, ensure_ascii=False)[1:-1]}:
        raw = text.encode("utf-8", "replace")
        yield from (text, quote(raw, safe=""), quote(raw), quote_plus(raw), raw.hex(), raw.hex().upper())
        for offset in range(3):  # base64 differs with where in its group of three bytes the text begins
            whole = b64encode(b"\0" * offset + raw).decode()
            encoded = whole[-(-offset * 4 // 3) : (offset + len(raw)) * 4 // 3]
            yield from (encoded, encoded.replace("+", "-").replace("/", "_"))


def _masked_id(operation_id: str, hide: Collection[str]) -> str:
    """The `OperationId` without what must not be shown, and still another one for another operation."""
    for literal in hide:
        if len(literal) >= TELLING_LENGTH:
            operation_id = operation_id.replace(literal, "#")
    return CALLBACK_TOKEN.sub(lambda token: sha256(token[0].encode()).hexdigest(), operation_id)


def _storable(text: str) -> str:
    """The text with every character that some store or terminal would choke on replaced."""
    return "".join(character if character.isprintable() or character in "\t\n\r" else "\ufffd" for character in text)


def _field_name(name: str) -> str:
    """A stranger's field name, if it can be nothing but a name."""
    return name if FIELD_NAME.fullmatch(name) else "?"


def _drift(paths: Iterable[str], hide: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted({_hidden(path, hide) for path in paths})[:DRIFT_LIMIT])


def _unreadable(where: str, wrong: str) -> KhipuFailure:
    description = f"{where}: {wrong}"[:DESCRIPTION_LIMIT]
    return KhipuFailure(Outcome(Kind.UNREADABLE, Kind.UNREADABLE.value, description=description))


def _moment(value: object, *, assume_utc: bool = False) -> datetime:
    """An aware datetime from ISO 8601. Raises ValueError, without the value."""
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
        if moment is not None and moment.tzinfo is None and assume_utc:
            moment = moment.replace(tzinfo=UTC)
        if moment is not None and moment.tzinfo is not None:
            moment.astimezone(UTC)  # year 1 and year 9999 have offsets that lead out of the calendar
            return moment
    except (ValueError, OverflowError):
        pass
    raise ValueError("not an ISO 8601 date and time with an offset")


def _sane(amount: Decimal) -> Decimal:
    """Refuse what only looks like an amount: its plain form would be many times longer than what was sent."""
    _, digits, exponent = amount.as_tuple()
    if not isinstance(exponent, int) or exponent > EXPONENT_LIMIT or max(len(digits), -exponent) > DIGITS_LIMIT:
        raise ValueError("an exponent or a length that no amount has")
    return amount


def _printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("empty, or with characters that cannot be printed")
    return text


class _Part(BaseModel):
    """A part of the envelope. Unknown fields are kept just long enough to be named."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="allow", alias_generator=to_pascal, hide_input_in_errors=True
    )

    def unknown(self) -> Iterator[str]:
        """Paths, seen from here, of the fields that nobody declared."""
        return map(_field_name, self.model_extra or ())


class _Amount(_Part):
    amount: Annotated[Decimal, AfterValidator(_sane)]
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}\z")]


class _Balance(_Part):
    account_id: Annotated[str, AfterValidator(_printable)]
    credit_debit_indicator: Indicator
    date_time: Annotated[datetime, BeforeValidator(_moment)]
    type: BalanceType
    amount: _Amount

    def named(self) -> Balance:
        return Balance(
            account_id=self.account_id,
            type=self.type,
            indicator=self.credit_debit_indicator,
            amount=self.amount.amount,
            currency=self.amount.currency,
            as_of=self.date_time,
        )

    def unknown(self) -> Iterator[str]:
        return chain(super().unknown(), (f"Amount.{path}" for path in self.amount.unknown()))


class _Data(_Part):
    balance: list[_Balance] | None = None

    def unknown(self) -> Iterator[str]:
        elements = (f"Balance[].{path}" for element in self.balance or () for path in element.unknown())
        return chain(super().unknown(), elements)


class _Receipt(_Part):
    """What every envelope has, whatever it carries. Fields of type object were looked at before, or do not matter."""

    operation_id: Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,128}\z")]
    status: object = None
    error: object = None
    life_span: object = None
    data: object = None
    additional_information: object = None


class _Envelope(_Receipt):
    data: _Data | None = None
    additional_information: str | None = None

    def unknown(self) -> Iterator[str]:
        inside = (f"Data.{path}" for path in (self.data.unknown() if self.data else ()))
        return chain(super().unknown(), inside)


_Shape = TypeVar("_Shape", bound=_Receipt)


def _validated(shape: type[_Shape], envelope: dict[str, object]) -> _Shape:
    """The envelope in its declared shape; the first thing wrong with it is enough to refuse it."""
    try:
        return shape.model_validate(envelope)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    raise _unreadable(_path(first["loc"]), first["msg"].removeprefix("Value error, "))


def _path(steps: tuple[int | str, ...]) -> str:
    """`Data.Balance[0].Amount` from pydantic's steps."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
