"""Name what is polled: read the accounts file strictly, and report every mistake in it at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Scheme = Literal["api-key", "bearer", "client-credentials"]


class Definition(BaseModel):
    """One account as Redis holds it and `begin` hands it to a worker: everything that is not secret, resolved.

    `number` and the money it leads to never reach a log: it is kept out of `repr`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    alias: str
    country: str
    segment: str
    institution: str
    number: Annotated[str, Field(repr=False)]
    currency: str | None = None
    send_currency: bool = False
    login: str
    scheme: Scheme = "api-key"
    mode: Literal["sync", "callback"] = "sync"
    every_ms: int | None = None
    cron: str | None = None
    timezone: str | None = None
    min_gap_ms: int = 0
