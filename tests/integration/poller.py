"""A worker's whole path of one poll, in this process: begin, ask, decide, apply; only Celery is not there.

poller = Poller(store, accounts_file, khipu_url, secrets)
poller.poll("a")                                  # claimed, and run as a worker would; returns what it raised
"""

from __future__ import annotations

from collections.abc import Mapping

import redis
from celery.exceptions import Ignore
from celery.exceptions import Retry as CeleryRetry
from world import STREAM, World

from worker import tasks
from worker.accounts import parse_accounts
from worker.celery import Wiring
from worker.credentials import CredentialStore
from worker.errors import DeadLettered
from worker.khipu import KhipuClient
from worker.oauth import AccessTokens
from worker.settings import load_settings


class Poller:
    """One worker, with secrets of its own, on the `world` of an accounts file. `verify`: as of KhipuClient."""

    def __init__(
        self,
        store: redis.Redis,
        accounts: str,
        khipu_url: str,
        secrets: Mapping[str, str],
        *,
        world: World | None = None,
        env: Mapping[str, str] | None = None,
        verify: bool | str = True,
    ) -> None:
        self.world = world or World(store)
        settings = load_settings({"BALANCES_REDIS_URL": "redis://127.0.0.1", "BALANCES_ACCOUNTS": "-", **(env or {})})
        self.apply(accounts)
        khipu = KhipuClient(khipu_url, verify=verify)
        timetable = self.world.timetable
        self.wiring = Wiring(settings, timetable, khipu, AccessTokens(khipu), CredentialStore(secrets, None), True)

    def apply(self, accounts: str) -> None:
        self.world.apply(parse_accounts(accounts, "accounts.toml", callback_configured=True))

    def hold(self, secrets: Mapping[str, str]) -> None:
        """Other secrets from here on."""
        credentials = CredentialStore(secrets, None)
        wiring = self.wiring
        self.wiring = Wiring(wiring.settings, wiring.timetable, wiring.khipu, wiring.access_tokens, credentials, True)

    def poll(self, alias: str) -> BaseException | None:
        """Poll the account now: it is due, or its wait is over."""
        if self.world.state(alias) == "scheduled":
            self.world.due_now(alias)
        self.world.claim()
        return self.run(alias)

    def run(self, alias: str) -> BaseException | None:
        """Take the message of the account's last token, as a worker does."""
        try:
            tasks.run(self.wiring, self.world.token(alias))
        except (Ignore, CeleryRetry, DeadLettered) as end:
            return end
        return None

    def published(self) -> list[dict[str, str]]:
        """The entries of the stream."""
        return [fields for _, fields in self.world.client.xrange(STREAM)]  # type: ignore[misc, union-attr]

    def everything(self) -> str:
        """All that Redis holds, as text."""
        return repr(self.world.snapshot())
