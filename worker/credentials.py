"""Find a login's secrets where this process may read them, and fingerprint them."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue, SecretStr

from worker.accounts import Scheme


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one request of a login needs. `repr` shows the scheme only.

    `key`: the api key (scheme `api-key`) or the token (`bearer`). `account_credential`: any JSON value, the bank
    log-on, sent as `AccountCredential` with `api-key` only; None with the other schemes.
    """

    scheme: Scheme
    key: SecretStr
    account_credential: JsonValue = None

    def __repr__(self) -> str:
        return f"Credentials(scheme={self.scheme!r})"
