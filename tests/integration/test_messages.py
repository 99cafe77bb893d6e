"""The messages that the scripts push are those that the installed Celery and kombu would push for the same call."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Queue
from servers import ValkeyServer
from world import OUTCOMES, Entry, World, read, read_entries

import worker.tasks  # noqa: F401 - registers them
from worker.celery import POLL_TASK, configuration
from worker.policy import DeadLetterQueue
from worker.timetable import POLLS, Token


@pytest.fixture
def world(store: redis.Redis) -> World:
    world = World(store)
    world.apply(read("a", "b"))
    return world


@pytest.fixture
def app(valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """An app with our configuration on a real kombu connection; it has our tasks, as every app of this process has."""
    monkeypatch.setenv("BALANCES_REDIS_URL", valkey_server.url)
    app = Celery("balances", set_as_current=False)
    app.conf.update(configuration())
    yield app
    app.close()


def published(app: Celery, client: redis.Redis, token: Token) -> dict[str, Any]:
    """What `apply_async` pushes for this attempt, taken off the queue again."""
    assert client.llen(POLLS) == 0
    kwargs = dict(zip(("login", "account", "poll", "attempt"), token.args, strict=True))
    app.tasks[POLL_TASK].apply_async(kwargs=kwargs, task_id=token.task_id, retries=token.attempt - 1)
    return json.loads(client.rpop(POLLS))


def normalised(message: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one message to the next, and with the body as the JSON that it is."""
    headers, properties = dict(message["headers"]), dict(message["properties"])
    assert headers.pop("origin")
    assert properties.pop("delivery_tag")
    properties.pop("reply_to")  # where results would go, of whoever publishes
    body = message["body"]
    if properties.pop("body_encoding", None) == "base64":
        body = base64.b64decode(body).decode()
    return {**message, "headers": headers, "properties": properties, "body": json.loads(body)}


def pushed(world: World, alias: str, attempt: int) -> tuple[Token, dict[str, Any]]:
    """The account's message at that attempt, as the script pushed it, taken off the queue."""
    world.due_now(alias)
    for _ in range(attempt - 1):
        world.claim()
        world.begin(world.token(alias))
        world.postpone(world.token(alias), 0)
        world.client.delete(POLLS)
    world.claim()
    return world.token(alias), json.loads(world.client.rpop(POLLS))


@pytest.mark.parametrize("attempt", [1, 2, 11])
def test_a_polls_message_is_celerys_own_in_every_field(world: World, app: Celery, attempt: int) -> None:
    token, ours = pushed(world, "a", attempt)
    theirs = published(app, world.client, token)
    assert normalised(ours) == normalised(theirs)
    assert ours.keys() == theirs.keys()
    assert theirs["properties"].keys() - ours["properties"].keys() == {"body_encoding"}
    assert ours["headers"].keys() == theirs["headers"].keys()


def test_the_longest_names_come_through_whole(world: World, app: Celery) -> None:
    alias, login = "a" + "-9" * 31, "l" + "0" * 62
    world.apply(read_entries(Entry(alias, login, number="7" * 20)))
    token, ours = pushed(world, alias, 1)
    assert normalised(ours) == normalised(published(app, world.client, token))


def test_every_message_has_a_tag_of_its_own(world: World) -> None:
    tags = [pushed(world, "a", 1)[1]["properties"]["delivery_tag"]]
    world.settle(world.begin(world.token("a")))
    tags.append(pushed(world, "a", 2)[1]["properties"]["delivery_tag"])
    assert len(set(tags)) == 2


def test_a_message_carries_the_token_and_nothing_else(world: World) -> None:
    token, ours = pushed(world, "a", 1)
    args, kwargs, _ = json.loads(ours["body"])
    assert (args, kwargs) == ([], {"login": "acme", "account": "a", "poll": token.poll, "attempt": 1})
    text = json.dumps(ours)
    assert "@" not in text
    assert "9000000" not in text, "the account's number"


def test_kombu_decodes_a_poll_to_its_arguments(world: World, app: Celery) -> None:
    world.due_now("a")
    world.claim()
    token = world.token("a")
    with app.connection_for_read() as connection, connection.channel() as channel:
        message = Queue(POLLS, channel=channel).get(no_ack=True, accept=["json"])
        args, kwargs, embed = message.decode()
    assert (args, Token(**kwargs)) == ([], token)
    assert set(embed) == {"callbacks", "errbacks", "chain", "chord"}
    assert (message.headers["id"], message.headers["task"], message.headers["retries"]) == (
        token.task_id,
        POLL_TASK,
        0,
    )
    assert message.properties["correlation_id"] == token.task_id


@pytest.mark.parametrize("queue", DeadLetterQueue)
def test_a_dead_letter_is_the_polls_message_with_a_reason(world: World, app: Celery, queue: DeadLetterQueue) -> None:
    token, message = pushed(world, "a", 2)
    world.begin(token)
    assert world.timetable.suspend(token, queue, OUTCOMES["suspend"])
    letter = json.loads(world.client.lindex(queue, 0))
    reason = letter["headers"].pop("reason")
    assert letter["properties"]["delivery_info"].pop("routing_key") == queue
    assert message["properties"]["delivery_info"].pop("routing_key") == POLLS
    assert letter == message
    assert reason.keys() == {"code", "type", "description", "attempts", "first_at", "last_at"}
    assert (reason["code"], reason["type"], reason["attempts"]) == ("E401", "DO_NOT_RETRY", 2)

    with app.connection_for_read() as connection, connection.channel() as channel:
        decoded = Queue(queue, channel=channel).get(no_ack=True, accept=["json"])
        args, kwargs, _ = decoded.decode()
    assert (args, Token(**kwargs)) == ([], token)
    assert decoded.headers["reason"] == reason


def test_a_blocked_logins_letter_is_one_too(world: World, app: Celery) -> None:
    token, message = pushed(world, "a", 1)
    world.begin(token)
    world.block(token)
    with app.connection_for_read() as connection, connection.channel() as channel:
        decoded = Queue(DeadLetterQueue.DO_NOT_RETRY, channel=channel).get(no_ack=True, accept=["json"])
    assert Token(**decoded.decode()[1]) == token
    assert decoded.headers["reason"]["accounts"] == ["a", "b"]
    assert decoded.headers["reason"]["code"] == "E101"
    assert {**decoded.headers, "reason": None} == {**message["headers"], "reason": None}


@pytest.mark.parametrize(
    "description",
    ["", 'a "quoted" \\ back/slash', "línea, 銀行 🏦", "@login@ @reason@ %1 %%", "tab\tand\nline", "{}[],:null"],
)
def test_whatever_the_bank_says_stays_one_string_of_the_reason(world: World, description: str) -> None:
    token, _ = pushed(world, "a", 1)
    world.begin(token)
    outcome = replace(OUTCOMES["suspend"], description=description)
    world.timetable.suspend(token, DeadLetterQueue.DO_NOT_RETRY, outcome)
    [(_, letter)] = world.timetable.letters()
    assert letter["headers"]["reason"]["description"] == description
    assert Token(**json.loads(letter["body"])[1]) == token
    assert world.account("a")["description"] == description
    world.check()
