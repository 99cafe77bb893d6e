"""Give access tokens to clients (OAuth's client credentials) at `POST /oauth/token`, and know which ones still count.

Where Khipu's real endpoint is, is not documented; this one follows RFC 6749, sections 2.3.1, 4.4 and 5.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote_plus

from worker.sandbox.bank import Bank, fingerprint
from worker.sandbox.http import Request, Response, json_response

PATH = "/oauth/token"


@dataclass(frozen=True, slots=True)
class Rules:
    """`clients`: id → secret (None: any). `expires_in`: seconds, None says nothing. `status`: instead of any token."""

    clients: Mapping[str, str] | None = None
    expires_in: int | None = 3600
    status: int = 200


class Tokens:
    """The authorization server. `given` and `refused` count; nothing here is billed or journalled."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self.reset()

    def reset(self) -> None:
        """As at the start; tokens given before do not count any more."""
        self.rules = Rules()
        self.given = self.refused = 0
        self._bank.tokens.clear()

    def handle(self, request: Request) -> Response:
        """Answer one request for a token."""
        if request.method != "POST":
            return Response(405, b"Method Not Allowed", "text/plain", {"Allow": "POST"})
        if self.rules.status != 200:
            return Response(self.rules.status, b"Whatever", "text/plain")
        if parse_qs(request.body.decode("latin-1")).get("grant_type") != ["client_credentials"]:
            return self._refuse(400, "unsupported_grant_type")
        if not self._knows(request.headers.get("authorization", "")):
            return self._refuse(401, "invalid_client")
        token = f"access-{secrets.token_urlsafe(24)}"
        self.given += 1
        self._bank.tokens[fingerprint(token)] = True
        life = {} if self.rules.expires_in is None else {"expires_in": self.rules.expires_in}
        return json_response({"access_token": token, "token_type": "Bearer", **life})

    def revoke(self) -> int:
        """End every token given so far; how many there were."""
        for known in self._bank.tokens:
            self._bank.tokens[known] = False
        return len(self._bank.tokens)

    def _refuse(self, status: int, error: str) -> Response:
        self.refused += 1
        return json_response({"error": error}, status)

    def _knows(self, authorization: str) -> bool:
        scheme, _, credentials = authorization.partition(" ")
        try:
            client, _, secret = base64.b64decode(credentials, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        client, secret = unquote_plus(client), unquote_plus(secret)
        if scheme.lower() != "basic" or not client or not secret:
            return False
        return self.rules.clients is None or self.rules.clients.get(client) == secret
