"""Let tests and operators set how the sandbox behaves, and see what it was asked.

| call under `/_sandbox` | does |
|---|---|
| `PUT /accounts/{number}` | a plan: `{"script": ["ok@2s", "hang"], "latency": "1s"}`, or `{"random": …}` |
| `PUT /accounts` | many: `{"number": plan, …}` |
| `POST /accounts/{number}/answer` | answers its hanging requests with `{"step": "ok"}`; tells how many |
| `POST /accounts/{number}/callbacks` | sends its waiting callbacks now, or `{"step": …}` instead; tells how many |
| `PUT /defaults` | the plan of all accounts that have none |
| `PUT /log-ons/{user}` | `{"credential": …}`: what is right; wrong ones get E101, three in a row lock the user (E102) |
| `POST /log-ons/{user}/unlock` | the bank lifts the lock |
| `DELETE /log-ons/{user}` | no longer checked |
| `PUT /keys` | `{"accepted": ["key", …]}`: all others get 401; `null`: any is good |
| `PUT /tokens` | of `POST /oauth/token`: `{"clients": {"id": "secret"}, "expires_in": 3600, "status": 200}` |
| `DELETE /tokens` | ends every access token given so far; tells how many |
| `PUT /callbacks` | `{"pauses": ["1s", "2s", "4s", "8s"], "timeout": "10s", "hold_log_on": true}`; see below |
| `DELETE /accounts` | all of the above is as at the start; waiting callbacks are dropped, hanging requests stay |
| `GET /requests?since=N` | records after number N, oldest first; see below |
| `GET /callbacks?since=N` | the same for callbacks; `request` is the number of the request that one answers |
| `DELETE /requests` | forgets records and counts, of requests and callbacks |
| `GET /stats` | counts, in all, per account, per log-on |
| `GET /log-ons` | per user: wrong, wrong_in_a_row, locked |

Both also take `limit` (10,000), `number` (one account), `ended=1` (only what is over) and, instead of sleeping in
tests, `count` and `wait`: they answer as soon as there are `count` such records, or after `wait` seconds.
Of `/tokens`, `clients` null means that any is good (others get `invalid_client`), `expires_in` null is not told, and a
`status` other than 200 is all that is answered.
`pauses` stand between the tries of a callback that nobody takes (none: one try), `timeout` is for one try, and with
`hold_log_on` the log-on of an accepted request is in use until its callback is sent (or until LifeSpan), else until the
202: `overlaps` counts accordingly. `GET /healthz` answers `{"status": "ok"}`.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice

from worker.sandbox.bank import Bank, LogOn, fingerprint
from worker.sandbox.callbacks import Callbacks, Rules
from worker.sandbox.endpoint import Endpoint
from worker.sandbox.http import Exchange, Request, Response, json_response
from worker.sandbox.journal import CallbackRecord, History, Journal, Record
from worker.sandbox.notation import parse_plan, parse_step
from worker.sandbox.reading import NotationError, allow, flag, integer, seconds
from worker.sandbox.tokens import Rules as TokenRules
from worker.sandbox.tokens import Tokens

PREFIX = "/_sandbox"
LIMIT = 10_000
LONGEST_WAIT_S = 300.0
#: Times as long as a look at the journal took until the next one, so that a flood of requests is not held up by looks.
PAUSE_PER_LOOK = 10

Handler = Callable[[Request, str], Response]
AnyHistory = History[Record] | History[CallbackRecord]


class Control:
    """The control API over one bank, its endpoint, their callbacks and their journal."""

    def __init__(self, bank: Bank, endpoint: Endpoint, callbacks: Callbacks, journal: Journal, tokens: Tokens) -> None:
        self._bank = bank
        self._tokens = tokens
        self._endpoint = endpoint
        self._callbacks = callbacks
        self._journal = journal
        self._histories: dict[str, AnyHistory] = {"requests": journal.requests, "callbacks": journal.callbacks}
        self._tasks: set[asyncio.Task[None]] = set()
        self._routes: dict[tuple[str, str], Handler] = {
            ("PUT", "/accounts/X"): self._put_account,
            ("PUT", "/accounts"): self._put_accounts,
            ("DELETE", "/accounts"): self._reset,
            ("POST", "/accounts/X/answer"): self._answer_hanging,
            ("POST", "/accounts/X/callbacks"): self._send_callbacks,
            ("PUT", "/callbacks"): self._put_rules,
            ("PUT", "/defaults"): self._put_defaults,
            ("GET", "/log-ons"): self._get_log_ons,
            ("PUT", "/log-ons/X"): self._put_log_on,
            ("DELETE", "/log-ons/X"): self._delete_log_on,
            ("POST", "/log-ons/X/unlock"): self._unlock,
            ("PUT", "/keys"): self._put_keys,
            ("PUT", "/tokens"): self._put_tokens,
            ("DELETE", "/tokens"): self._revoke_tokens,
            ("DELETE", "/requests"): self._forget,
            ("GET", "/stats"): self._stats,
        }

    def handle(self, exchange: Exchange) -> None:
        """Answer one call of the control API."""
        request = exchange.request
        name = request.path.removeprefix(f"{PREFIX}/")
        if request.method == "GET" and name in self._histories:
            task = asyncio.get_running_loop().create_task(self._watch(exchange, name, self._histories[name]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            exchange.gone = partial(_cancel, task)
        else:
            exchange.answer(self._call(request))

    def _call(self, request: Request) -> Response:
        path = request.path.removeprefix(PREFIX)
        if found := re.fullmatch(r"(/accounts|/log-ons)/([^/]+)(/\w+)?", path):
            path, name = f"{found[1]}/X{found[3] or ''}", found[2]
        else:
            name = ""
        handler = self._routes.get((request.method, path))
        if handler is None:
            return json_response({"error": f"no {request.method} {request.path} here"}, 404)
        try:
            return handler(request, name)
        except ValueError as error:
            return json_response({"error": str(error)}, 400)

    def _put_account(self, request: Request, number: str) -> Response:
        self._bank.define(number, parse_plan(_json(request)))
        return json_response({})

    def _put_accounts(self, request: Request, _: str) -> Response:
        plans = {number: parse_plan(plan) for number, plan in _object(request).items()}
        for number, plan in plans.items():
            self._bank.define(number, plan)
        return json_response({"accounts": len(plans)})

    def _put_defaults(self, request: Request, _: str) -> Response:
        self._bank.define_default(parse_plan(_json(request)))
        return json_response({})

    def _answer_hanging(self, request: Request, number: str) -> Response:
        step = parse_step(_object(request).get("step", "ok"))
        return json_response({"answered": self._endpoint.release(number, step)})

    def _send_callbacks(self, request: Request, number: str) -> Response:
        step = _object(request).get("step")
        return json_response({"sent": self._callbacks.send(number, None if step is None else parse_step(step))})

    def _put_rules(self, request: Request, _: str) -> Response:
        self._callbacks.rules = _rules(_object(request))
        return json_response({})

    def _put_log_on(self, request: Request, user: str) -> Response:
        body = _object(request)
        if set(body) != {"credential"}:
            raise NotationError('a log-on is {"credential": what is right}')
        self._bank.log_ons[user] = LogOn(body["credential"])
        return json_response({})

    def _delete_log_on(self, _: Request, user: str) -> Response:
        return json_response({"deleted": self._bank.log_ons.pop(user, None) is not None})

    def _unlock(self, _: Request, user: str) -> Response:
        if user not in self._bank.log_ons:
            return json_response({"error": "no such log-on is checked"}, 404)
        log_on = self._bank.log_ons[user]
        log_on.locked, log_on.wrong_in_a_row = False, 0
        return json_response({})

    def _get_log_ons(self, _: Request, __: str) -> Response:
        return json_response(
            {
                user: {"wrong": log_on.wrong, "wrong_in_a_row": log_on.wrong_in_a_row, "locked": log_on.locked}
                for user, log_on in self._bank.log_ons.items()
            }
        )

    def _put_keys(self, request: Request, _: str) -> Response:
        keys = _object(request).get("accepted")
        if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
            raise NotationError("accepted is a list of strings, or null")
        self._bank.keys = None if keys is None else frozenset(map(fingerprint, keys))
        return json_response({})

    def _put_tokens(self, request: Request, _: str) -> Response:
        self._tokens.rules = _token_rules(_object(request))
        return json_response({})

    def _revoke_tokens(self, _: Request, __: str) -> Response:
        return json_response({"revoked": self._tokens.revoke()})

    def _reset(self, _: Request, __: str) -> Response:
        self._bank.reset()
        self._tokens.reset()
        self._callbacks.rules = Rules()
        self._callbacks.drop()
        return json_response({})

    def _forget(self, _: Request, __: str) -> Response:
        self._journal.clear()
        return json_response({})

    def _stats(self, _: Request, __: str) -> Response:
        journal = self._journal
        total = journal.total.as_json()
        total["overlaps"] = sum(count.overlaps for count in journal.log_ons.values())
        total["callbacks"] = {"waiting": self._callbacks.owed, **journal.called_back}
        total["tokens"] = {"given": self._tokens.given, "refused": self._tokens.refused}
        total["accounts"] = {number: count.as_json() for number, count in journal.accounts.items()}
        total["log_ons"] = {name: count.as_json() for name, count in journal.log_ons.items()}
        return json_response(total)

    async def _watch(self, exchange: Exchange, name: str, history: AnyHistory) -> None:
        """Wait until there is enough to tell, or no more time, and tell it."""
        query = exchange.request.query
        try:
            count, wait_s = int(query.get("count", "0")), min(float(query.get("wait", "0")), LONGEST_WAIT_S)
            records = _find(history, query)
        except ValueError as error:
            exchange.answer(json_response({"error": str(error)}, 400))
            return
        deadline = asyncio.get_running_loop().time() + wait_s
        pause_s = 0.0
        while len(records) < count and await _changed_by(history, deadline):
            await asyncio.sleep(pause_s)
            looked_at = time.monotonic()
            records = _find(history, query)
            pause_s = PAUSE_PER_LOOK * (time.monotonic() - looked_at)
        exchange.answer(json_response({name: [record.as_json() for record in records], "last": history.last}))


async def _changed_by(history: AnyHistory, deadline: float) -> bool:
    try:
        async with asyncio.timeout_at(deadline):
            await history.change()
    except TimeoutError:
        return False
    return True


def _find(history: AnyHistory, query: Mapping[str, str]) -> list[Record | CallbackRecord]:
    number, ended = query.get("number"), query.get("ended") == "1"
    found = (
        record
        for record in history.since(int(query.get("since", "0")))
        if (number is None or record.number == number) and not (ended and not record.over)
    )
    return list(islice(found, int(query.get("limit", LIMIT))))


def _rules(fields: Mapping[str, object]) -> Rules:
    """What is not named is as at the start."""
    allow(fields, ("pauses", "timeout", "hold_log_on"), "callbacks")
    rules = Rules()
    if "pauses" in fields:
        pauses = fields["pauses"]
        if not isinstance(pauses, list):
            raise NotationError(f"pauses is a list such as ['1s', '2s'], not {pauses!r}")
        rules = replace(rules, pauses_s=tuple(map(seconds, pauses)))
    if "timeout" in fields:
        rules = replace(rules, timeout_s=seconds(fields["timeout"]))
    if "hold_log_on" in fields:
        rules = replace(rules, hold_log_on=flag(fields, "hold_log_on"))
    return rules


def _token_rules(fields: Mapping[str, object]) -> TokenRules:
    """What is not named is as at the start."""
    allow(fields, ("clients", "expires_in", "status"), "tokens")
    clients = fields.get("clients")
    if clients is not None and not (isinstance(clients, dict) and all(isinstance(s, str) for s in clients.values())):
        raise NotationError('clients is {"id": "secret"}, or null')
    rules = TokenRules(clients)
    if "expires_in" in fields:
        life = None if fields["expires_in"] is None else integer(fields, "expires_in", 0, 10**9)
        rules = replace(rules, expires_in=life)
    if "status" in fields:
        rules = replace(rules, status=integer(fields, "status", 200, 599))
    return rules


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def _json(request: Request) -> object:
    """The body, with fractional numbers as the text they were written in: amounts are sent exactly so."""
    try:
        body: object = json.loads(request.body or b"{}", parse_float=str)
    except ValueError as error:
        raise NotationError(f"the body is not JSON: {error}") from None
    return body


def _object(request: Request) -> dict[str, object]:
    body = _json(request)
    if not isinstance(body, dict):
        raise NotationError("the body is no JSON object")
    return body
