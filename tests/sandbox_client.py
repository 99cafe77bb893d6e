"""Drive a sandbox from a test: start one, set what it answers, see what it was asked.

with running_sandbox() as sandbox:
    sandbox.set_script("10000001", ["error:E201:RETRY_IMMEDIATELY", "ok:12345678901234567.89"])
    ...
    [first, second] = sandbox.wait_for(2, number="10000001")

    sandbox.set_script("10000002", ["ok | never", "ok@1s | twice at once"])  # with CallbackUrl
    ...
    sandbox.send_callbacks("10000002")
    [callback] = sandbox.wait_for_callbacks(1)
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import requests

#: Seconds after which a test that waits for the sandbox gives up.
PATIENCE_S = 20.0
READY = "sandbox listening on "

Step = str | Mapping[str, Any]
JsonObject = dict[str, Any]


def fingerprint(value: object) -> str:
    """How the sandbox's records show a key, a token or a credential: sha256, of sorted JSON unless a string."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def account_id_of(number: str) -> str:
    """The `AccountId` of an account whose script names none."""
    return f"{int.from_bytes(hashlib.sha256(number.encode()).digest()[:8]) % 10**10:010d}"


def log_on_of(institution: str, user: str) -> str:
    """The name of a session at the bank in records and `stats()["log_ons"]`."""
    return fingerprint([institution, user])


def token_digest(url: str) -> str:
    """How the sandbox's callback records show the secret of a callback URL, which is the last part of its path."""
    return fingerprint(urlsplit(url).path.rpartition("/")[2])


class SandboxClient:
    """The control API of a sandbox at `url`. A wrong call raises `requests.HTTPError` with the sandbox's reason.

    `pid`: its process, where this side started it.
    """

    def __init__(self, url: str, pid: int | None = None) -> None:
        self.url = url
        self.pid = pid
        self._session = requests.Session()
        self._session.trust_env = False

    def close(self) -> None:
        """Close the connection to it."""
        self._session.close()

    def set_script(
        self, number: str, steps: Sequence[Step], *, latency: str | None = None, cycle: bool = False
    ) -> None:
        """What the account answers, one step per request; the last repeats, or all do."""
        self._call("PUT", f"/accounts/{number}", _plan(steps, latency, cycle))

    def set_scripts(self, plans: Mapping[str, Sequence[Step]], *, latency: str | None = None) -> None:
        """Many accounts in one call."""
        self._call("PUT", "/accounts", {number: _plan(steps, latency, False) for number, steps in plans.items()})

    def set_random(self, number: str, weights: Mapping[str, float], *, seed: int = 0) -> None:
        """Chance for one account."""
        self._call("PUT", f"/accounts/{number}", {"random": {"weights": dict(weights), "seed": seed}})

    def set_defaults(self, steps: Sequence[Step] = ("ok",), *, latency: str | None = None, cycle: bool = False) -> None:
        """What all accounts without a script answer; each is at its own step."""
        self._call("PUT", "/defaults", _plan(steps, latency, cycle))

    def set_log_on(self, user: str, credential: object) -> None:
        """Which AccountCredential is right for `user` (an object matches field by field)."""
        self._call("PUT", f"/log-ons/{quote(user)}", {"credential": credential})

    def unlock(self, user: str) -> None:
        """The bank lifts its lock."""
        self._call("POST", f"/log-ons/{quote(user)}/unlock")

    def log_ons(self) -> JsonObject:
        """Per checked user: `wrong`, `wrong_in_a_row`, `locked`."""
        return self._call("GET", "/log-ons")

    def set_keys(self, accepted: Sequence[str] | None) -> None:
        """Which api keys and tokens Khipu takes; None: any."""
        self._call("PUT", "/keys", {"accepted": None if accepted is None else list(accepted)})

    def set_tokens(self, **rules: object) -> None:
        """How `POST /oauth/token` answers: `clients`, `expires_in`, `status`; what is not named is as at the start."""
        self._call("PUT", "/tokens", rules)

    def revoke_tokens(self) -> int:
        """Khipu ends every access token given so far; how many there were."""
        return int(self._call("DELETE", "/tokens")["revoked"])

    @property
    def token_url(self) -> str:
        return f"{self.url}/oauth/token"

    def answer_hanging(self, number: str, step: Step = "ok") -> int:
        """Answer the account's hanging requests now; how many there were."""
        return int(self._call("POST", f"/accounts/{number}/answer", {"step": step})["answered"])

    def requests(self, since: int = 0, **filters: str | int | float) -> list[JsonObject]:
        """Records after number `since`; filters: `number`, `ended=1`, `limit`, `count` with `wait`."""
        found: list[JsonObject] = self._call("GET", "/requests", params={"since": since, **filters})["requests"]
        return found

    def wait_for(
        self, count: int, *, since: int = 0, number: str | None = None, ended: bool = True, wait: float = PATIENCE_S
    ) -> list[JsonObject]:
        """The records, as soon as there are `count` of them (over, unless `ended=False`). Raises AssertionError."""
        filters: dict[str, str | int | float] = {"count": count, "wait": wait, "ended": int(ended)}
        if number is not None:
            filters["number"] = number
        found = self.requests(since, **filters)
        assert len(found) >= count, f"{len(found)} of {count} requests after {wait} s"
        return found

    def set_callback_rules(
        self, *, pauses: Sequence[str] | None = None, timeout: str | None = None, hold_log_on: bool | None = None
    ) -> None:
        """Pauses between the tries of a callback (`[]`: one try), the time for one try, and whether a log-on counts as
        in use until its callback is sent. None: as at the start (5 tries, 10 s, yes)."""
        rules = {"pauses": pauses, "timeout": timeout, "hold_log_on": hold_log_on}
        self._call("PUT", "/callbacks", {name: value for name, value in rules.items() if value is not None})

    def send_callbacks(self, number: str, step: Step | None = None) -> int:
        """Send the account's waiting callbacks now, `never` too, or `step` instead; how many there were."""
        return int(self._call("POST", f"/accounts/{number}/callbacks", {} if step is None else {"step": step})["sent"])

    def callbacks(self, since: int = 0, **filters: str | int | float) -> list[JsonObject]:
        """Records of callbacks after number `since`; filters: `number`, `ended=1`, `limit`, `count` with `wait`."""
        found: list[JsonObject] = self._call("GET", "/callbacks", params={"since": since, **filters})["callbacks"]
        return found

    def wait_for_callbacks(
        self, count: int, *, since: int = 0, number: str | None = None, ended: bool = True, wait: float = PATIENCE_S
    ) -> list[JsonObject]:
        """The callbacks' records, as soon as there are `count` (dealt with, unless `ended=False`). AssertionError."""
        filters: dict[str, str | int | float] = {"count": count, "wait": wait, "ended": int(ended), "limit": 100_000}
        if number is not None:
            filters["number"] = number
        found = self.callbacks(since, **filters)
        assert len(found) >= count, f"{len(found)} of {count} callbacks after {wait} s"
        return found

    def stats(self) -> JsonObject:
        """Counts: in all, per account number, per log-on, and of callbacks by state (`waiting`: not sent yet)."""
        return self._call("GET", "/stats")

    def forget(self) -> None:
        """Forget records and counts only."""
        self._call("DELETE", "/requests")

    def reset(self) -> None:
        """Everything is as at the start: plans, balances, log-ons, keys, callbacks, records, counts."""
        self._call("DELETE", "/accounts")
        self.forget()

    def _call(
        self, method: str, path: str, body: object = None, params: Mapping[str, str | int | float] | None = None
    ) -> JsonObject:
        answer = self._session.request(
            method, f"{self.url}/_sandbox{path}", json=body, params=params, timeout=PATIENCE_S * 2
        )
        found: JsonObject = answer.json()
        if not answer.ok:
            raise requests.HTTPError(found.get("error"), response=answer)
        return found


def _plan(steps: Sequence[Step], latency: str | None, cycle: bool) -> JsonObject:
    plan: JsonObject = {"script": list(steps), "cycle": cycle}
    return plan if latency is None else {**plan, "latency": latency}


def sandbox_command(*arguments: str) -> list[str]:
    """The command of a sandbox process."""
    return [sys.executable, "-m", "worker.sandbox", *arguments]


@contextmanager
def running_sandbox(*arguments: str) -> Iterator[SandboxClient]:
    """A sandbox in a process of its own on a free port, healthy; stopped at the end, and checked to stop cleanly."""
    command = sandbox_command("--port", "0", "--quiet", *arguments)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    client = None
    try:
        client = SandboxClient(_url_of(process), process.pid)
        assert requests.get(f"{client.url}/healthz", timeout=PATIENCE_S).json() == {"status": "ok"}
        yield client
    finally:
        if client is not None:
            client.close()
        process.terminate()
        try:
            code = process.wait(PATIENCE_S)
        finally:
            process.kill()
            if process.stdout is not None:
                process.stdout.close()
    assert code == 0, f"the sandbox ended with {code}"


def _url_of(process: subprocess.Popen[str]) -> str:
    """Where it listens, from its first line: no port is guessed, so none can be lost to another process."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(READY), f"the sandbox did not start: {line!r}"
    return line.removeprefix(READY).strip()
