"""Imitate Khipu's balances call over HTTP, with every way to fail, as a process of its own.

    http ◀── endpoint ──▶ bank ──▶ notation, behaviour      what is asked, and what is answered
     ▲                    tokens                             access tokens, for who asks by client credentials
     ▲          ├───────▶ answers, journal
     │          └───────▶ callbacks ──▶ sender              what is answered later
     └────── control                                        what tests set and see

It shares no code with the client that it tests. `behaviour` explains the notation, `control` the control API,
`scenarios` the accounts of `config/sandbox.toml`, `openapi.yaml` the call and its callback. It sends nothing to other
machines.
"""

from worker.sandbox.scenarios import EXAMPLE_NUMBER, sandbox_secrets
from worker.sandbox.server import PortUnavailable, serve

__all__ = ["EXAMPLE_NUMBER", "PortUnavailable", "sandbox_secrets", "serve"]
