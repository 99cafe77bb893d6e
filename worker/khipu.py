"""Ask Khipu once: one request under one total deadline, and name how it ended.

    definition + credentials ──▶ request ──▶ status, headers, body ──▶ Answer | Accepted, or a KhipuFailure

It never asks twice, follows no redirect and does not decide what a failure leads to (`policy` does). Every request is
billed and may log in at a bank, so nothing below this module may repeat one either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import quote

import requests
from pydantic import JsonValue

from worker.accounts import Definition
from worker.balances import Accepted, Answer, read_accepted, read_answer, read_error
from worker.credentials import Credentials
from worker.errors import KhipuFailure, Kind, Outcome
from worker.policy import LOG_ON_ERROR
from worker.transport import Reply, Resolver, Transport, fail, resolve

#: Shorter texts are not searched for in descriptions: they would blot out ordinary words and hide nothing.
SHORTEST_SECRET = 3
#: What every balance call says of itself.
HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip",
    "Content-Type": "application/json",
}
#: `json.dumps` would make an encoder for each request.
_as_json = json.JSONEncoder(separators=(",", ":")).encode
#: What may stand in a header without starting another one.
HEADER_VALUE = re.compile(r"[\x21-\x7e]+")


class KhipuClient:
    """Khipu's balance call. One object serves all threads; each thread keeps its own connection alive.

    `verify`: True, or the path of a CA bundle.
    """

    def __init__(self, base_url: str, *, verify: bool | str = True, resolver: Resolver = resolve) -> None:
        self._base_url = base_url.rstrip("/")
        self._transport = Transport(verify=verify, resolver=resolver)
        self._urls: dict[tuple[str, str, str], str] = {}

    def fetch(
        self,
        definition: Definition,
        credentials: Credentials,
        *,
        deadline_s: float,
        callback_url: str | None = None,
    ) -> Answer | Accepted:
        """Ask for the balances of one account; over within `deadline_s` seconds, whatever the other side does.

        With `callback_url` Khipu may accept and answer there later. Raises KhipuFailure, and nothing else for
        whatever can happen on the way; its `sent` tells whether Khipu may have got the request.
        """
        request = self._request(definition, credentials, callback_url)
        reply = self._transport.exchange(request, deadline_s=deadline_s)
        try:
            return _read(reply, never_shown(definition, credentials, callback_url), callback_url is not None)
        except KhipuFailure as failure:
            failure.sent = True
            if failure.outcome.kind is not Kind.ANSWERED:
                self._transport.close()  # who answers this may go on with more of it
            raise

    def exchange(self, request: requests.PreparedRequest, *, deadline_s: float) -> Reply:
        """Send a request that is no balance call, by the same rules: once, within a total deadline, no redirect, 1 MiB.

        Raises KhipuFailure where there is no reply: CONNECTION, TIMEOUT or UNREADABLE.
        """
        try:
            return self._transport.exchange(request, deadline_s=deadline_s)
        finally:
            self._transport.close()  # the next request of this thread goes to another host

    def reach(self, url: str, *, deadline_s: float) -> datetime | None:
        """Connect to the host of `url` as a request would, and send nothing.

        Returns when its certificate ends, None for plain http. Raises KhipuFailure: CONNECTION or TIMEOUT.
        """
        return self._transport.reach(url, deadline_s=deadline_s)

    def _request(
        self, definition: Definition, credentials: Credentials, callback_url: str | None
    ) -> requests.PreparedRequest:
        """As `requests.Request(…).prepare()` makes it, but for its URL, which is prepared once an institution."""
        request = requests.PreparedRequest()
        request.method, request.url = "POST", self._url(definition)
        request.body = _body(definition, credentials, callback_url)
        length = str(len(request.body))
        # A plain dictionary: nobody looks for a name in another case, and one that allows it costs as much as the body.
        request.headers = {**HEADERS, **_authentication(credentials), "Content-Length": length}  # type: ignore[assignment]
        return request

    def _url(self, definition: Definition) -> str:
        parts = definition.country, definition.segment, definition.institution
        if parts not in self._urls:
            path = "/v1/{}/banking/{}/{}/current/balances".format(*map(_path_part, parts))
            self._urls[parts] = requests.Request("POST", self._base_url + path).prepare().url or ""
        return self._urls[parts]


# --- the request


def _path_part(text: str) -> str:
    """One part of the path, which stays one part."""
    if text in {"", ".", ".."}:
        fail(Kind.BAD_REQUEST, "country, segment or institution cannot stand in a path")
    return quote(text, safe="")


def _authentication(credentials: Credentials) -> dict[str, str]:
    """One scheme per request, never both."""
    key = credentials.key.get_secret_value()
    if not HEADER_VALUE.fullmatch(key):  # it would start another one
        fail(Kind.UNAUTHORIZED, "the key or token cannot stand in a header")
    return {"x-api-key": key} if credentials.scheme == "api-key" else {"Authorization": f"Bearer {key}"}


def _body(definition: Definition, credentials: Credentials, callback_url: str | None) -> bytes:
    data: dict[str, JsonValue] = {"AccountNumber": definition.number}
    if definition.send_currency and definition.currency is not None:
        data["Currency"] = definition.currency
    if credentials.scheme == "api-key" and credentials.account_credential is not None:
        data["AccountCredential"] = credentials.account_credential
    envelope: dict[str, JsonValue] = {"RequestData": data}
    if callback_url is not None:
        envelope["CallbackUrl"] = callback_url
    return _as_json(envelope).encode()


def never_shown(
    definition: Definition, credentials: Credentials | None, callback_url: str | None = None
) -> tuple[str, ...]:
    """Every text of a request that must not come back out in a description."""
    texts = [definition.number]
    if credentials is not None:
        texts += [credentials.key.get_secret_value(), *_texts(credentials.account_credential)]
        texts += [] if credentials.client_id is None else [credentials.client_id.get_secret_value()]
    if callback_url is not None:
        texts += [callback_url, callback_url.rpartition("/")[2]]
    return tuple(text for text in texts if len(text) >= SHORTEST_SECRET)


def _texts(value: JsonValue) -> Iterator[str]:
    """All strings and numbers in a JSON value, however deep."""
    match value:
        case None | bool():
            return
        case dict():
            for inner in value.values():
                yield from _texts(inner)
        case list():
            for inner in value:
                yield from _texts(inner)
        case _:
            yield str(value)


# --- the reply


def _read(reply: Reply, hide: Sequence[str], callback_wanted: bool) -> Answer | Accepted:
    """Branch on the status, then on the body: failures arrive as 200 too."""
    content_type = reply.headers.get("content-type")
    if reply.status == HTTPStatus.OK:
        return read_answer(reply.body or b"", content_type, hide=hide)
    if reply.status != HTTPStatus.ACCEPTED:
        raise KhipuFailure(_refusal(reply, hide))
    if not callback_wanted:
        fail(Kind.UNREADABLE, "HTTP 202 to a request without a callback")
    try:
        return read_accepted(reply.body or b"", content_type, hide=hide)
    except KhipuFailure as failure:
        if failure.outcome.kind is not Kind.UNREADABLE:
            raise
        # Whatever its body says: a 202 means that Khipu is at work, and must not be asked again meanwhile.
        return Accepted(operation_id="", drift=("body",))


def _refusal(reply: Reply, hide: Sequence[str]) -> Outcome:
    """An HTTP error; an envelope in its body knows better, but only a bank's refusal outweighs that of the key."""
    kind = kind_of(reply.status)
    wait = retry_after(reply.headers.get("retry-after", ""), datetime.now(UTC))
    said = read_error(reply.body or b"", reply.headers.get("content-type"), hide=hide)
    if said is None:
        return Outcome(kind, f"HTTP_{reply.status}", description=_phrase(reply.status), retry_after=wait)
    if kind is Kind.UNAUTHORIZED and not LOG_ON_ERROR.fullmatch(said.code):
        return replace(said, kind=kind, retry_after=wait)
    return replace(said, retry_after=wait)


def kind_of(status: int) -> Kind:
    """What an HTTP error means, whatever its body says."""
    match status:
        case 401 | 403:
            return Kind.UNAUTHORIZED
        case 404:
            return Kind.NOT_FOUND
        case 408 | 425 | 429:
            return Kind.THROTTLED
        case _ if 300 <= status < 500:
            return Kind.BAD_REQUEST
        case _ if 500 <= status < 600:
            return Kind.SERVER_ERROR
        case _:
            return Kind.UNREADABLE


def _phrase(status: int) -> str:
    """The status in words: ours, not the server's."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "a status that HTTP does not know"


def retry_after(value: str, now: datetime) -> timedelta | None:
    """Seconds or an HTTP date; None for what is neither, or over."""
    if re.fullmatch(r"[0-9]{1,9}", value):
        return timedelta(seconds=int(value))
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the latter for a year or an offset of twenty digits
        return None
    return max(moment.replace(tzinfo=moment.tzinfo or UTC) - now, timedelta()) or None
