"""Say what the accounts of `config/sandbox.toml` do, and which bank log-ons are right.

Everything happens within the first 40 seconds of `balances up`; what an operator releases or redrives then succeeds.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

#: The account number that answers with the example of Khipu's API page, word for word, its OperationId included.
EXAMPLE_NUMBER = "873458"
EXAMPLE = {
    "behaviour": "ok",
    "amount": "10000",
    "currency": "CLP",
    "account_id": "873458",
    "type": "ClosingAvailable",
    "date_time": "2017-07-21T17:32:28-0400",
    "operation_id": "6baf6c19-e485-463b-ae24-a821b025c8a4",
}
BOOKED_TOO = {"behaviour": "ok", "balances": [{}, {"type": "ClosingBooked"}]}
OVERDRAWN = {
    "behaviour": "ok",
    "amount": "1250000",
    "indicator": "Debit",
    "additional_information": "The credit line is not included.",
}
IMMEDIATELY = "error:E201:RETRY_IMMEDIATELY:The bank did not answer in time."
IN_FOUR_HOURS = "error:E202:WAIT_4_HOURS_BEFORE_RETRY:The bank's portal is under maintenance."
AFTER_NOTIFICATION = "error:E203:RETRY_AFTER_NOTIFICATION:The bank asks its customer to accept new terms."
NEVER = "error:E401:DO_NOT_RETRY:The account does not exist."

#: Account number → plan; the aliases are those of `config/sandbox.toml`.
PLANS: Mapping[str, object] = {
    EXAMPLE_NUMBER: {"script": [EXAMPLE]},
    "10010001": {"script": [BOOKED_TOO], "latency": "0.2s-1s"},  # acme-operating
    "10010002": {"script": ["ok:48250000"], "latency": "0.2s-1s"},  # acme-payroll: never changes
    "10010003": {"script": ["ok::USD"], "latency": "0.2s-2s"},  # acme-usd
    "10010004": {"script": ["no-data"], "latency": "0.5s"},  # acme-taxes
    "10010005": {"script": ["ok@2s | early", "ok@3s | twice", "ok@1s"], "cycle": True},  # acme-callbacks
    "10020001": {"script": [IMMEDIATELY, IMMEDIATELY, "ok"], "latency": "0.5s"},  # globex-operating
    "10020002": {"script": ["http:504", "malformed", "ok"], "latency": "0.5s-1s"},  # globex-reserve
    "10030001": {"script": [IN_FOUR_HOURS, "ok"], "latency": "1s"},  # initech-operating
    "10030002": {"script": [OVERDRAWN], "latency": "1s-3s"},  # initech-payroll
    "10040001": {"script": [AFTER_NOTIFICATION, "ok"], "latency": "1s"},  # umbrella-operating
    "10040002": {"script": [NEVER, "ok"], "latency": "1s"},  # umbrella-savings
    "10050001": {"script": ["ok"], "latency": "0.5s"},  # hooli-operating: its log-on is wrong
    "10050002": {"script": ["ok"], "latency": "0.5s"},  # hooli-payroll: the same log-on
    "10060001": {"script": ["ok"], "latency": "0.2s-2s"},  # wonka-operating
    "10060002": {"script": ["ok::CLF"], "latency": "0.2s-2s"},  # wonka-uf
    # wonka-callbacks
    "10060003": {"script": ["ok@2s | but http:504 | life-span 5s", "ok@1s | late 2s | life-span 2s", "ok@1s"]},
}

#: Login of `config/sandbox.toml` → its `AccountCredential` at the bank.
CREDENTIALS: Mapping[str, Mapping[str, str]] = {
    login: {"username": f"{login}-treasury", "password": f"sandbox-{login}"}
    for login in ("acme", "globex", "initech", "umbrella", "hooli")
}
#: The login whose configured password is wrong; CREDENTIALS holds the right one.
WRONG_LOGIN = "hooli"
#: The login that uses a token.
BEARER_LOGIN = "wonka"
#: 2100-01-01: a token that does not end.
TOKEN_EXPIRES = 4_102_444_800


def plans() -> dict[str, object]:
    """Account number → plan, as `PUT /_sandbox/accounts` takes them."""
    return dict(PLANS)


def log_ons() -> dict[str, object]:
    """User → the right credential."""
    return {credential["username"]: dict(credential) for credential in CREDENTIALS.values()}


def sandbox_secrets() -> dict[str, str]:
    """The environment variables that hold the secrets of `config/sandbox.toml`'s logins; worth nothing elsewhere."""
    secrets = {
        "BALANCES_SECRET_DEFAULT_API_KEY": "sandbox-api-key",
        f"BALANCES_SECRET_{BEARER_LOGIN.upper()}_TOKEN": _token(),
    }
    for login, credential in CREDENTIALS.items():
        sent = {**credential, "password": "forgotten"} if login == WRONG_LOGIN else credential
        secrets[f"BALANCES_SECRET_{login.upper().replace('-', '_')}_ACCOUNT_CREDENTIAL"] = json.dumps(sent)
    return secrets


def _token() -> str:
    """Something with the shape of a JWT and an `exp`; nobody checks its signature."""
    parts = ({"alg": "HS256", "typ": "JWT"}, {"sub": BEARER_LOGIN, "exp": TOKEN_EXPIRES}, {"sandbox": True})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts)
