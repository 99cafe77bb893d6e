"""Get access tokens by OAuth's client credentials (RFC 6749, 4.4), and keep each until shortly before it ends.

    login, client id and secret ──▶ kept? ──▶ access token
                                      └─ no ─▶ one request to `token_url`, for which others of this login wait ─┘

oauthlib words the request and reads the reply; `KhipuClient.exchange` sends it, by the rules of every request. Nothing
here goes to Khipu's balance call, and no token leaves this process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.parse import quote_plus

import requests
from oauthlib.oauth2 import BackendApplicationClient, OAuth2Error
from pydantic import SecretStr

from worker.credentials import Credentials
from worker.errors import KhipuFailure, Kind, Outcome
from worker.khipu import HEADER_VALUE, KhipuClient, kind_of, retry_after
from worker.transport import Reply

#: Seconds for one request for a token, at most: it is taken from the time for the balances.
REQUEST_LIMIT_S = 30.0
#: Seconds before its end at which a token is no longer kept, but never more than this share of its life.
MARGIN_S, MARGIN_SHARE = 60.0, 0.2
#: Seconds that a token is kept where nobody says how long it lives, and at most.
UNKNOWN_LIFE_S, LONGEST_LIFE_S = 600, 86_400
#: Characters; what is longer fits no header.
TOKEN_LIMIT = 16_384
#: What the server says of a client that it does not know or that may not do this: asking again would change nothing.
CLIENT_ERRORS = frozenset({"invalid_client", "unauthorized_client"})
#: What oauthlib raises for a reply that is none.
TROUBLE = (OAuth2Error, Warning, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class AccessToken:
    """What a request to Khipu is authorized with. `is_kept`: got for an earlier request, so Khipu may have ended it."""

    credentials: Credentials
    is_kept: bool


@dataclass(frozen=True, slots=True)
class _Grant:
    """A token as the server gave it, good until `until_s` of the clock."""

    token: SecretStr
    until_s: float


@dataclass(slots=True)
class _Kept:
    """What is kept for one login: the grant, and for which client it was given."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    client: tuple[str, Credentials] | None = None
    grant: _Grant | None = None


class AccessTokens:
    """The access tokens of this process, one for each login. `clock`: monotonic seconds."""

    def __init__(self, client: KhipuClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._kept: dict[str, _Kept] = {}

    def get(self, login: str, token_url: str, credentials: Credentials, *, deadline_s: float) -> AccessToken:
        """A token for this client, within `deadline_s`. Raises KhipuFailure, never `sent`: Khipu got nothing."""
        started_s = self._clock()
        kept = self._kept.setdefault(login, _Kept())
        if not kept.lock.acquire(timeout=max(deadline_s, 0)):
            raise _failure(Outcome(Kind.TIMEOUT, Kind.TIMEOUT, description="another poll waits for the token"))
        try:
            client = (token_url, credentials)
            if kept.client == client and kept.grant is not None and self._clock() < kept.grant.until_s:
                return AccessToken(_authorized(credentials, kept.grant), is_kept=True)
            left_s = deadline_s - (self._clock() - started_s)
            kept.client, kept.grant = client, None
            kept.grant = self._ask(token_url, credentials, min(left_s, REQUEST_LIMIT_S))
            return AccessToken(_authorized(credentials, kept.grant), is_kept=False)
        finally:
            kept.lock.release()

    def forget(self, login: str, token: AccessToken) -> None:
        """Keep this token no longer: Khipu refused it. One that took its place meanwhile stays."""
        kept = self._kept[login]
        grant = kept.grant
        if grant is not None and grant.token == token.credentials.key:
            kept.grant = None  # without the lock: at worst a newer one is asked for again

    def _ask(self, token_url: str, credentials: Credentials, deadline_s: float) -> _Grant:
        asked_s = self._clock()
        try:
            reply = self._client.exchange(_request(token_url, credentials), deadline_s=deadline_s)
        except KhipuFailure as failure:
            outcome = failure.outcome
        else:
            outcome = _refusal(reply)
            if reply.status == HTTPStatus.OK:
                read = _read(reply.body or b"")
                if not isinstance(read, Outcome):
                    token, life_s = read
                    return _Grant(token, asked_s + life_s - min(MARGIN_S, life_s * MARGIN_SHARE))
                outcome = read
        # Raised out here because the exceptions above hold the request, and would be this one's context.
        raise _failure(outcome)


def _authorized(credentials: Credentials, grant: _Grant) -> Credentials:
    return replace(credentials, key=grant.token, client_id=None)


def _request(token_url: str, credentials: Credentials) -> requests.PreparedRequest:
    """The client authenticates by HTTP Basic, which every server must take (RFC 6749, 2.3.1: both parts encoded)."""
    assert credentials.client_id is not None, "the scheme needs one"  # noqa: S101
    body = BackendApplicationClient("").prepare_request_body()
    auth = (
        quote_plus(credentials.client_id.get_secret_value()),
        quote_plus(credentials.key.get_secret_value()),
    )
    headers = {
        "Accept": "application/json",
        "Accept-Encoding": "gzip",
        "Content-Type": "application/x-www-form-urlencoded",
    }
    return requests.Request("POST", token_url, headers=headers, data=body, auth=auth).prepare()


def _read(body: bytes) -> tuple[SecretStr, int] | Outcome:
    """The token and its life in seconds, or what is wrong with the reply; never its text, which may hold the token."""
    try:
        said = BackendApplicationClient("").parse_request_body_response(body.decode())
    except TROUBLE as error:
        return _said(error) or _unreadable("no reply to a request for a token")
    token, life_s = said.get("access_token"), said.get("expires_in")
    if not isinstance(token, str) or len(token) > TOKEN_LIMIT or not HEADER_VALUE.fullmatch(token):
        return _unreadable("access_token: cannot stand in a header")
    if str(said.get("token_type", "bearer")).lower() != "bearer":
        return _unreadable("token_type: not Bearer")
    return SecretStr(token), min(max(int(life_s or UNKNOWN_LIFE_S), 0), LONGEST_LIFE_S)


def _refusal(reply: Reply) -> Outcome:
    """An HTTP error of the token's server."""
    wait = retry_after(reply.headers.get("retry-after", ""), datetime.now(UTC))
    refusal = Outcome(kind_of(reply.status), f"HTTP_{reply.status}", description="HTTP error", retry_after=wait)
    if 400 <= reply.status < 500:
        try:
            BackendApplicationClient("").parse_request_body_response((reply.body or b"").decode())
        except TROUBLE as error:
            said = _said(error)
            return refusal if said is None else replace(said, code=refusal.code)
    return refusal


def _said(error: BaseException) -> Outcome | None:
    """The server's own error, which is one of a few words; None where it is none of a client."""
    word = getattr(error, "error", None)
    if word not in CLIENT_ERRORS:
        return None
    return Outcome(Kind.UNAUTHORIZED, Kind.UNAUTHORIZED, description=str(word))


def _unreadable(description: str) -> Outcome:
    return Outcome(Kind.UNREADABLE, Kind.UNREADABLE, description=description)


def _failure(outcome: Outcome) -> KhipuFailure:
    """The outcome as one of a request for a token: nothing was sent to Khipu, which an operator must see."""
    description = f"Khipu was not asked, for want of an access token: {outcome.description}"
    return KhipuFailure(replace(outcome, code=f"TOKEN_{outcome.code}", description=description), sent=False)
