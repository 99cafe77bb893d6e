"""Access tokens: got once, kept as long as they are good, asked for again when Khipu refuses one; never shown."""

from __future__ import annotations

import base64
import json
import queue
import threading
from collections.abc import Callable
from urllib.parse import unquote_plus

import pytest
import redis
from hostile import Hostile, Peer, head
from poller import Poller
from pydantic import SecretStr
from sandbox_client import SandboxClient, fingerprint
from servers import wait_until
from test_khipu import AT_ONCE_S, KEY, LONG_S, SHORT_S, answering, failing

from worker import tasks
from worker.credentials import Credentials
from worker.errors import KhipuFailure, Kind
from worker.khipu import KhipuClient
from worker.lifecycle import unblock_with_new_secrets
from worker.oauth import AccessToken, AccessTokens
from worker.transport import BODY_LIMIT

CLIENT = Credentials("client-credentials", SecretStr(f"{KEY} + %/é?"), client_id=SecretStr("canary-client:1"))
NUMBER = "NUMBER-CANARY-1"
SECRETS = {"BALANCES_SECRET_ACME_CLIENT_ID": "canary-id", "BALANCES_SECRET_ACME_CLIENT_SECRET": "canary-secret"}


class Clock:
    """Monotonic seconds that stand still."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def tokens(clock: Callable[[], float] | None = None) -> AccessTokens:
    client = KhipuClient("http://khipu.invalid")
    return AccessTokens(client) if clock is None else AccessTokens(client, clock)


def get(access_tokens: AccessTokens, url: str, *, login: str = "acme", deadline_s: float = LONG_S) -> AccessToken:
    return access_tokens.get(login, url, CLIENT, deadline_s=deadline_s)


def granting(**more: object) -> bytes:
    return json.dumps({"access_token": "canary-access", "token_type": "Bearer", **more}).encode()


# --- one token


def test_the_client_is_named_by_basic_authentication_and_nothing_else() -> None:
    with Hostile(answering(200, granting())) as server:
        token = get(tokens(), f"{server.url}/oauth/token")
    assert token == AccessToken(Credentials("client-credentials", SecretStr("canary-access")), is_kept=False)
    [request] = server.requests
    assert request.line == "POST /oauth/token HTTP/1.1"
    assert request.headers["content-type"] == "application/x-www-form-urlencoded"
    assert request.body == b"grant_type=client_credentials"
    scheme, _, encoded = request.headers["authorization"].partition(" ")
    sent_id, _, sent_secret = base64.b64decode(encoded).decode().partition(":")
    assert (scheme, unquote_plus(sent_id), unquote_plus(sent_secret)) == (
        "Basic",
        "canary-client:1",
        CLIENT.key.get_secret_value(),
    )


@pytest.mark.parametrize(
    ("expires_in", "kept_s"),
    [(3600, 3540), (100, 80), (None, 540), (10**9, 86_340)],
    ids=["an hour", "shorter than five margins", "not told", "for ever"],
)
def test_a_token_is_kept_until_shortly_before_its_end(
    sandbox: SandboxClient, expires_in: int | None, kept_s: float
) -> None:
    sandbox.set_tokens(expires_in=expires_in)
    clock = Clock()
    access_tokens = tokens(clock)
    first = get(access_tokens, sandbox.token_url)
    clock.now_s += kept_s - 1
    assert get(access_tokens, sandbox.token_url) == AccessToken(first.credentials, is_kept=True)
    clock.now_s += 2
    assert get(access_tokens, sandbox.token_url).credentials != first.credentials
    assert sandbox.stats()["tokens"] == {"given": 2, "refused": 0}


def test_a_token_without_a_life_is_used_once() -> None:
    with Hostile(answering(200, granting(expires_in=-5))) as server:
        access_tokens = tokens()
        assert not [get(access_tokens, server.url).is_kept for _ in range(2)][1]
    assert len(server.requests) == 2


def test_another_secret_or_address_gets_another_token(sandbox: SandboxClient) -> None:
    access_tokens = tokens()
    get(access_tokens, sandbox.token_url)
    other = Credentials("client-credentials", SecretStr("another"), client_id=CLIENT.client_id)
    assert not access_tokens.get("acme", sandbox.token_url, other, deadline_s=LONG_S).is_kept
    assert not access_tokens.get("acme", f"{sandbox.token_url}?", other, deadline_s=LONG_S).is_kept


def test_others_of_the_login_wait_for_one_request_and_other_logins_do_not() -> None:
    arrived: queue.Queue[Peer] = queue.Queue()
    enough = threading.Event()

    def hold(peer: Peer) -> None:
        peer.request()
        arrived.put(peer)
        enough.wait(LONG_S)
        peer.reply(200, granting(expires_in=3600))
        peer.gone()

    got: queue.Queue[AccessToken] = queue.Queue()
    with Hostile(hold) as server:
        access_tokens = tokens()
        logins = ["acme"] * 4 + ["globex"]
        threads = [
            threading.Thread(target=lambda name=login: got.put(get(access_tokens, server.url, login=name)))
            for login in logins
        ]
        for thread in threads:
            thread.start()
        for _ in range(2):
            arrived.get(timeout=AT_ONCE_S)
        with failing() as failures:
            get(access_tokens, server.url, deadline_s=SHORT_S)
        assert len(server.requests) == 2
        enough.set()
        for thread in threads:
            thread.join()
    assert sorted(got.get().is_kept for _ in threads) == [False, False, True, True, True]
    assert len(server.requests) == 2
    assert (failures[0].outcome.code, failures[0].sent) == ("TOKEN_TIMEOUT", False)


# --- no token


@pytest.mark.parametrize(
    ("status", "body", "kind", "code", "why"),
    [
        (401, b'{"error": "invalid_client"}', Kind.UNAUTHORIZED, "HTTP_401", "invalid_client"),
        (400, b'{"error": "invalid_client"}', Kind.UNAUTHORIZED, "HTTP_400", "invalid_client"),
        (400, b'{"error": "unauthorized_client"}', Kind.UNAUTHORIZED, "HTTP_400", "unauthorized_client"),
        (200, b'{"error": "invalid_client"}', Kind.UNAUTHORIZED, "UNAUTHORIZED", "invalid_client"),
        (401, b"", Kind.UNAUTHORIZED, "HTTP_401", "HTTP error"),
        (403, b"<html>", Kind.UNAUTHORIZED, "HTTP_403", "HTTP error"),
        (400, b'{"error": "invalid_scope"}', Kind.BAD_REQUEST, "HTTP_400", "HTTP error"),
        (400, f'{{"error": "{KEY}"}}'.encode(), Kind.BAD_REQUEST, "HTTP_400", "HTTP error"),
        (400, b"\xff", Kind.BAD_REQUEST, "HTTP_400", "HTTP error"),
        (404, b"", Kind.NOT_FOUND, "HTTP_404", "HTTP error"),
        (429, b"", Kind.THROTTLED, "HTTP_429", "HTTP error"),
        (500, b'{"error": "invalid_client"}', Kind.SERVER_ERROR, "HTTP_500", "HTTP error"),
        (503, b"", Kind.SERVER_ERROR, "HTTP_503", "HTTP error"),
        (204, b"", Kind.UNREADABLE, "HTTP_204", "HTTP error"),
        (200, b"", Kind.UNREADABLE, "UNREADABLE", "no reply to a request for a token"),
        (200, b"<html>", Kind.UNREADABLE, "UNREADABLE", "no reply to a request for a token"),
        (200, b"[]", Kind.UNREADABLE, "UNREADABLE", "no reply to a request for a token"),
        (200, b"null", Kind.UNREADABLE, "UNREADABLE", "no reply to a request for a token"),
        (200, b"[" * 100_000, Kind.UNREADABLE, "UNREADABLE", "no reply to a request for a token"),
        (200, b"\xff", Kind.UNREADABLE, "UNREADABLE", "no reply to a request for a token"),
        (200, granting(expires_in="soon"), Kind.UNREADABLE, "UNREADABLE", "no reply to a request for a token"),
        (200, granting(expires_in=[]), Kind.UNREADABLE, "UNREADABLE", "no reply to a request for a token"),
        (200, granting().replace(b'"Bearer"', b'"Bearer", "expires_in": 1e400'), Kind.UNREADABLE, "UNREADABLE", None),
        (200, granting(access_token=""), Kind.UNREADABLE, "UNREADABLE", "access_token: cannot stand in a header"),
        (200, granting(access_token="a\r\nb"), Kind.UNREADABLE, "UNREADABLE", None),
        (200, granting(access_token="a" * 20_000), Kind.UNREADABLE, "UNREADABLE", None),
        (200, granting(access_token=5), Kind.UNREADABLE, "UNREADABLE", "access_token: cannot stand in a header"),
        (200, granting(token_type="mac"), Kind.UNREADABLE, "UNREADABLE", "token_type: not Bearer"),
        (200, b" " * (BODY_LIMIT + 1), Kind.UNREADABLE, "UNREADABLE", "body: larger than 1 MiB"),
    ],
)
def test_what_is_no_token(status: int, body: bytes, kind: Kind, code: str, why: str | None) -> None:
    with Hostile(answering(status, body)) as server, failing() as failures:
        get(tokens(), server.url)
    outcome = failures[0].outcome
    assert (outcome.kind, outcome.code, failures[0].sent) == (kind, f"TOKEN_{code}", False)
    assert outcome.description.startswith("Khipu was not asked, for want of an access token: ")
    assert why is None or outcome.description.endswith(f": {why}")
    assert len(server.requests) == 1


def test_a_scope_that_nobody_asked_for_is_no_mistake() -> None:
    with Hostile(answering(200, granting(scope="all of it", refresh_token="canary", expires_in="60"))) as server:
        assert not get(tokens(), server.url).is_kept


def test_a_redirect_takes_the_client_nowhere() -> None:
    with Hostile(answering(200, granting())) as elsewhere:
        with Hostile(answering(307, Location=elsewhere.url)) as server, failing() as failures:
            get(tokens(), server.url)
        assert elsewhere.connections == 0
    assert (failures[0].outcome.kind, failures[0].outcome.code) == (Kind.BAD_REQUEST, "TOKEN_HTTP_307")


def test_the_deadline_is_a_total() -> None:
    def drip(peer: Peer) -> None:
        peer.request()
        peer.send(head(200, {"Content-Length": "1000"}))
        peer.drip(b" " * 1000)

    with Hostile(drip) as server, failing() as failures:
        get(tokens(), server.url, deadline_s=SHORT_S)
    assert (failures[0].outcome.code, failures[0].sent) == ("TOKEN_TIMEOUT", False)


def test_a_failure_is_not_kept(sandbox: SandboxClient) -> None:
    access_tokens = tokens()
    sandbox.set_tokens(status=503)
    with pytest.raises(KhipuFailure):
        get(access_tokens, sandbox.token_url)
    sandbox.set_tokens()
    assert not get(access_tokens, sandbox.token_url).is_kept


def test_only_the_token_that_was_refused_is_forgotten(sandbox: SandboxClient) -> None:
    access_tokens = tokens()
    first = get(access_tokens, sandbox.token_url)
    access_tokens.forget("acme", first)
    second = get(access_tokens, sandbox.token_url)
    access_tokens.forget("acme", first)
    assert get(access_tokens, sandbox.token_url) == AccessToken(second.credentials, is_kept=True)


# --- a poll


def accounts(token_url: str, more: str = 'mode = "sync"') -> str:
    return f"""
[logins.acme]
scheme = "client-credentials"
token_url = "{token_url}"

[[accounts]]
alias = "a"
institution = "bancosecurity.cl"
number = "{NUMBER}"
login = "acme"
{more}
"""


@pytest.fixture
def poller(store: redis.Redis, sandbox: SandboxClient) -> Poller:
    return Poller(store, accounts(sandbox.token_url), sandbox.url, SECRETS)


def test_polls_are_authorized_by_one_access_token(poller: Poller, sandbox: SandboxClient) -> None:
    for _ in range(3):
        assert poller.poll("a") is None
    assert len(poller.published()) == 3
    asked = sandbox.requests()
    assert {request["scheme"] for request in asked} == {"bearer"}
    assert len({request["key_fingerprint"] for request in asked}) == 1
    assert sandbox.stats()["tokens"] == {"given": 1, "refused": 0}


def test_a_kept_token_that_khipu_ended_costs_one_more_request(poller: Poller, sandbox: SandboxClient) -> None:
    assert poller.poll("a") is None
    assert sandbox.revoke_tokens() == 1
    assert poller.poll("a") is None
    assert [request["status"] for request in sandbox.requests()] == [200, 401, 200]
    assert len(poller.published()) == 2
    assert poller.world.client.hget("counts", "second requests") == "1"


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("refusal", ["http:401", "error:A000:DO_NOT_RETRY"])
def test_what_khipu_refuses_twice_or_at_once_blocks_the_login(
    poller: Poller, sandbox: SandboxClient, is_kept: bool, refusal: str
) -> None:
    if is_kept:
        poller.poll("a")
    sandbox.set_script(NUMBER, [refusal])
    sandbox.forget()
    assert "login blocked" in str(poller.poll("a"))
    assert len(sandbox.requests()) == (2 if is_kept else 1)
    assert poller.world.login()["blocked"] == "key"
    prints = tasks.make_offer(poller.wiring, "acme", "client-credentials").fingerprints
    assert poller.world.client.hgetall("failed") == {prints.key: "key"}


def test_a_server_that_gives_the_refused_token_again_makes_no_second_request(
    store: redis.Redis, sandbox: SandboxClient
) -> None:
    with Hostile(answering(200, granting(expires_in=3600))) as server:
        poller = Poller(store, accounts(server.url), sandbox.url, SECRETS)
        poller.poll("a")
        sandbox.set_script(NUMBER, ["http:401"])
        assert "login blocked" in str(poller.poll("a"))
    assert (len(server.requests), len(sandbox.requests())) == (2, 2)


def test_an_unknown_client_blocks_without_asking_khipu_and_a_new_secret_unblocks(
    poller: Poller, sandbox: SandboxClient
) -> None:
    sandbox.set_tokens(clients={"canary-id": "canary-new"})
    assert str(poller.poll("a")) == "TOKEN_HTTP_401 (login blocked)"
    logins = poller.world.timetable.logins
    assert "not asked" in logins()["acme"]["description"]
    unblock_with_new_secrets(poller.wiring, logins())
    assert logins()["acme"]["blocked"] == "key"
    poller.hold({**SECRETS, "BALANCES_SECRET_ACME_CLIENT_SECRET": "canary-new"})
    unblock_with_new_secrets(poller.wiring, logins())
    assert "blocked" not in logins()["acme"]
    assert poller.poll("a") is None
    assert sandbox.stats()["tokens"] == {"given": 1, "refused": 1}
    assert len(sandbox.requests()) == 1


@pytest.mark.parametrize("mode", ["sync", "callback"])
def test_a_token_server_that_is_away_is_waited_for_and_khipu_not_asked(
    store: redis.Redis, sandbox: SandboxClient, mode: str
) -> None:
    env = {"BALANCES_CALLBACK_URL": "http://127.0.0.1:1"}
    text = accounts(sandbox.token_url, f'mode = "{mode}"')
    poller = Poller(store, text, sandbox.url, SECRETS, env=env)
    sandbox.set_tokens(status=503)
    assert "TOKEN_HTTP_503: again in" in str(poller.poll("a"))
    assert poller.world.state("a") == "waiting"
    assert sandbox.requests() == []


def test_what_the_token_took_is_taken_from_the_deadline_of_the_balances(
    store: redis.Redis, sandbox: SandboxClient
) -> None:
    def late(peer: Peer) -> None:
        peer.request()
        peer.server.closing.wait(1.5)
        peer.reply(200, granting())
        peer.gone()

    sandbox.set_script(NUMBER, ["hang"])
    with Hostile(late) as server:
        text = '[limits]\nrequest_deadline = "2s"\n' + accounts(server.url)
        poller = Poller(store, text, sandbox.url, SECRETS)
        assert "TIMEOUT: again in" in str(poller.poll("a"))
    wait_until(lambda: sandbox.requests(ended=1), what="the end of the request")
    [request] = sandbox.requests()
    assert float(request["ended_at"]) - float(request["started_at"]) < 1.9


def test_redis_knows_neither_client_nor_token(poller: Poller, sandbox: SandboxClient) -> None:
    poller.poll("a")
    sandbox.set_script(NUMBER, ["http:401"])
    poller.poll("a")
    held = poller.everything()
    assert "failed" in held
    for secret in ("canary-id", "canary-secret", "access-", fingerprint("canary-secret")):
        assert secret not in held
