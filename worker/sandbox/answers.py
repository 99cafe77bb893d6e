"""Write what Khipu would send for a step: the envelope, and everything that is not one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

from worker.sandbox.behaviour import LIFE_SPAN_S, Behaviour, LifeSpan, Money, Step
from worker.sandbox.http import Response

#: Chile's winter offset, all year: the sandbox shows offsets without a colon, not daylight saving.
CHILE = timezone(timedelta(hours=-4))
#: What the bank says without a description in the step, by the code's first characters, the longest first.
DESCRIPTIONS = {
    "A000": "The token has expired, was revoked or is invalid.",
    "E101": "Bad credentials.",
    "E102": "The account is blocked.",
    "E1": "The log-on at the bank failed.",
    "E2": "The bank is not available.",
    "E3": "There is no data.",
    "E4": "A parameter has a bad value.",
    "P0": "A parameter of the request is wrong.",
    "T0": "The scraping timed out.",
    "": "The service could not be completed.",
}
NGINX = "<html>\r\n<head><title>{0}</title></head>\r\n<body>\r\n<center><h1>{0}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"  # noqa: E501 - as nginx writes it
#: Status → content type and body, where a step gives none.
GATEWAY = {
    401: ("text/plain", '"Authorization failed"'),
    404: ("text/plain", "Not Found"),
    429: ("text/plain", "Too Many Requests"),
    500: ("text/plain", "Internal Server Error"),
    502: ("text/html", NGINX.format("502 Bad Gateway")),
    503: ("text/html", NGINX.format("503 Service Temporarily Unavailable")),
    504: ("text/html", NGINX.format("504 Gateway Time-out")),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What an answer is about. `amount` gives the account's own balance in a currency, as JSON number text."""

    number: str
    currency: str
    operation_id: str
    amount: Callable[[str], str]


def account_id_of(number: str) -> str:
    """The `AccountId` of an account whose steps name none: immutable, and not its number."""
    return f"{int.from_bytes(hashlib.sha256(number.encode()).digest()[:8]) % 10**10:010d}"


def moment(time: datetime) -> str:
    """ISO 8601 as Khipu writes it: seconds, offset without a colon."""
    return time.astimezone(CHILE).strftime("%Y-%m-%dT%H:%M:%S%z")


def render(step: Step, subject: Subject) -> Response:
    """The response of a step that answers (`hang` and `drop` do not)."""
    match step.behaviour:
        case Behaviour.OK | Behaviour.FOREIGN | Behaviour.DRIP:
            return _envelope(step, subject, data=_data(step, subject))
        case Behaviour.NO_DATA:
            return _envelope(step, subject, data="null")
        case Behaviour.EMPTY:
            return _envelope(step, subject, data='{"Balance": []}')
        case Behaviour.ERROR:
            return error(subject.operation_id, step)
        case Behaviour.HTTP:
            return _plain(step, subject)
        case Behaviour.MALFORMED:
            return Response(200, f'{{"OperationId": "{subject.operation_id}", "Status": "OK", "Data": {{'.encode())
        case Behaviour.SCHEMA:
            return _envelope(step, subject, data='{"Balance": {"Amount": "many"}}')
        case Behaviour.TOO_LARGE:
            body = _envelope(step, subject, data=_data(step, subject)).body
            return Response(200, body + b" " * (step.size - len(body)), sized=False)
    raise ValueError(f"{step.behaviour} has no response")


def error(operation_id: str, step: Step, status: int = 200) -> Response:
    """An envelope with `Status: ERROR`: with HTTP 200, unless the request itself was refused."""
    detail = None if step.null_error else {"Code": step.code, "Type": step.type, "Description": _description(step)}
    return _json(operation_id, "ERROR", "null", step.additional_information, json.dumps(detail), status=status)


def accepted(operation_id: str, life_span: LifeSpan, now: datetime) -> Response:
    """The 202 of callback mode."""
    information = "Data will be sent to the callback URL."
    return _json(operation_id, "OK", "null", information, life_span=_promise(life_span, now), status=202)


def promised(life_span: LifeSpan, now: datetime) -> datetime:
    """The moment that a 202 names, in whole seconds and never less; the default's, where it names none."""
    in_s = LIFE_SPAN_S if life_span.literal is not None else life_span.in_s
    return datetime.fromtimestamp(math.ceil(now.timestamp() + in_s), UTC)


def _promise(life_span: LifeSpan, now: datetime) -> str:
    """`LifeSpan` as JSON text; "" for no such field."""
    if life_span.literal is not None:
        return life_span.literal
    zone = UTC if life_span.offset in ("", "Z") else datetime.strptime(life_span.offset, "%z").tzinfo
    return json.dumps(promised(life_span, now).astimezone(zone).strftime("%Y-%m-%dT%H:%M:%S") + life_span.offset)


def _envelope(step: Step, subject: Subject, data: str) -> Response:
    return _json(subject.operation_id, "OK", data, step.additional_information)


def _json(
    operation_id: str,
    status_text: str,
    data: str,
    information: str | None,
    error_text: str = "null",
    life_span: str = "null",
    status: int = 200,
) -> Response:
    """Text and not `json.dumps` of the whole, because only text keeps an amount as it was written."""
    last = f', "LifeSpan": {life_span}' if life_span else ""
    text = (
        f'{{"OperationId": {json.dumps(operation_id)}, "Status": "{status_text}", "Data": {data}, '
        f'"AdditionalInformation": {json.dumps(information)}, "Error": {error_text}{last}}}'
    )
    return Response(status, text.encode())


def _data(step: Step, subject: Subject) -> str:
    foreign = step.behaviour is Behaviour.FOREIGN
    account_id = account_id_of(f"not {subject.number}" if foreign else subject.number)
    now = moment(datetime.now(UTC))
    elements = [_balance(money, subject, account_id, now) for money in step.balances]
    return f'{{"Balance": [{", ".join(elements)}]}}'


def _balance(money: Money, subject: Subject, account_id: str, now: str) -> str:
    currency = money.currency or subject.currency
    return (
        f'{{"AccountId": {json.dumps(money.account_id or account_id)}, '
        f'"CreditDebitIndicator": {json.dumps(money.indicator or "Credit")}, '
        f'"DateTime": {json.dumps(money.date_time or now)}, '
        f'"Type": {json.dumps(money.type or "ClosingAvailable")}, '
        f'"Amount": {{"Amount": {money.amount or subject.amount(currency)}, "Currency": {json.dumps(currency)}}}}}'
    )


def _description(step: Step) -> str:
    if step.description is not None:
        return step.description
    return next(text for prefix, text in DESCRIPTIONS.items() if step.code.startswith(prefix))


def _plain(step: Step, subject: Subject) -> Response:
    if step.status == 400 and step.body is None:
        refusal = Step(behaviour=Behaviour.ERROR, code="P002", type="DO_NOT_RETRY")
        return error(subject.operation_id, refusal, status=400)
    default = "application/json" if step.body is not None and step.status < 300 else "text/plain"
    content_type, body = GATEWAY.get(step.status, (default, ""))
    content_type = step.content_type or content_type
    return Response(step.status, (body if step.body is None else step.body).encode(), content_type, dict(step.headers))
