"""The sandbox calls back as Khipu says, and in every other order that can be thought of."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
from hostile import Hostile, Peer, head
from sandbox_client import (
    PATIENCE_S,
    READY,
    JsonObject,
    SandboxClient,
    Step,
    account_id_of,
    log_on_of,
    sandbox_command,
    token_digest,
)

from worker.sandbox.callbacks import Rules

BANK = "bancosecurity.cl"
PATH = f"/v1/cl/banking/business/{BANK}/current/balances"
KEY = {"x-api-key": "a key"}
CREDENTIAL = {"username": "treasury", "password": "right"}
NUMBER = "10000001"
TOKEN = "Zm9vYmFy" * 5 + "token"
NOBODY = "http://127.0.0.1:1"


class Webhook(Hostile):
    """Answers each callback with the next status, the last one again and again."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses) or [204]
        super().__init__(self._answer)

    def _answer(self, peer: Peer) -> None:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        peer.answer(status, b"so be it" if status != 204 else b"")

    @property
    def bodies(self) -> list[bytes]:
        return [request.body for request in self.requests]


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        yield server


def ask(
    sandbox: SandboxClient, base: str = NOBODY, step: Step | None = None, number: str = NUMBER, **more: Any
) -> requests.Response:
    """One request whose answer is to go to `base`/callbacks/TOKEN; with `step` as the account's only one."""
    if step is not None:
        sandbox.set_script(number, [step])
    data = {"AccountNumber": number, "AccountCredential": CREDENTIAL, **more}
    body = {"RequestData": data, "CallbackUrl": f"{base}/callbacks/{TOKEN}"}
    return requests.post(f"{sandbox.url}{PATH}", json=body, headers=KEY, timeout=PATIENCE_S)


def test_the_answer_comes_after_the_202_under_the_same_operation(sandbox: SandboxClient, webhook: Webhook) -> None:
    accepted = ask(sandbox, webhook.url, "ok:10000")
    [record] = sandbox.wait_for_callbacks(1)
    [request] = webhook.requests
    assert accepted.status_code == 202
    assert {**accepted.json(), "LifeSpan": None} == {
        "OperationId": accepted.json()["OperationId"],
        "Status": "OK",
        "Data": None,
        "AdditionalInformation": "Data will be sent to the callback URL.",
        "Error": None,
        "LifeSpan": None,
    }
    assert request.line == f"POST /callbacks/{TOKEN} HTTP/1.1"
    assert request.headers["content-type"] == "application/json"
    body = json.loads(request.body)
    assert (body["OperationId"], body["Status"], body["LifeSpan"]) == (accepted.json()["OperationId"], "OK", None)
    assert body["Data"]["Balance"][0]["Amount"] == {"Amount": 10000, "Currency": "CLP"}
    assert (record["operation_id"], record["kind"], record["modifiers"]) == (body["OperationId"], "ok", [])
    assert (record["state"], record["status"], record["tries"], record["statuses"]) == ("acknowledged", 204, 1, [204])
    [asked] = sandbox.requests()
    assert (record["request"], record["number"]) == (asked["seq"], NUMBER)
    assert asked["answered_at"] <= record["sent_at"] <= record["ended_at"]


def test_the_latency_is_that_of_the_callback_and_not_of_the_202(sandbox: SandboxClient, webhook: Webhook) -> None:
    ask(sandbox, webhook.url, "ok@50ms | accept 20ms")
    [record], [asked] = sandbox.wait_for_callbacks(1), sandbox.requests()
    assert asked["answered_at"] - asked["started_at"] >= 0.02
    assert record["sent_at"] - asked["started_at"] >= 0.07


@pytest.mark.parametrize(
    ("step", "body"),
    [
        ("no-data", '"Data": null'),
        ("empty", '"Data": {"Balance": []}'),
        ("error:E201:RETRY_IMMEDIATELY:later", '"Status": "ERROR"'),
        ("error:null", '"Error": null'),
        ("malformed", '"Data": {'),
        ("schema", '{"Amount": "many"}'),
        ("foreign", account_id_of(f"not {NUMBER}")),
        ("drip:1ms", '"Amount": {"Amount": '),
        ("ok:12345678901234567.89:USD", '"Amount": 12345678901234567.89,'),
    ],
)
def test_every_answer_can_come_as_a_callback(sandbox: SandboxClient, webhook: Webhook, step: str, body: str) -> None:
    operation = ask(sandbox, webhook.url, step).json()["OperationId"]
    assert sandbox.wait_for_callbacks(1)[0]["state"] == "acknowledged"
    assert body in webhook.bodies[0].decode()
    assert operation in webhook.bodies[0].decode()


def test_any_body_and_headers_can_come_as_a_callback(sandbox: SandboxClient, webhook: Webhook) -> None:
    step = {"behaviour": "http", "status": 200, "body": "NaN", "content_type": "text/x", "headers": {"X-Y": "z"}}
    assert ask(sandbox, webhook.url, step).status_code == 202
    sandbox.wait_for_callbacks(1)
    [request] = webhook.requests
    assert (request.body, request.headers["content-type"], request.headers["x-y"]) == (b"NaN", "text/x", "z")


def test_a_large_body_may_be_refused_before_it_is_all_there(sandbox: SandboxClient) -> None:
    def refuse(peer: Peer) -> None:
        peer.connection.recv(65536)
        peer.reply(413, b"too much")
        peer.gone()

    with Hostile(refuse) as webhook:
        ask(sandbox, webhook.url, "too-large:30000000")
        [record] = sandbox.wait_for_callbacks(1)
    assert (record["state"], record["status"], record["body"]) == ("refused", 413, "too much")


@pytest.mark.parametrize("step", ["http:401", "http:504", "drop"])
def test_what_has_no_body_happens_instead_of_the_202(sandbox: SandboxClient, step: str) -> None:
    if step == "drop":
        with pytest.raises(requests.ConnectionError):
            ask(sandbox, step=step)
    else:
        assert f"http:{ask(sandbox, step=step).status_code}" == step
    assert sandbox.stats()["callbacks"] == {"waiting": 0}


def test_without_a_callback_url_the_modifiers_do_nothing(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["ok:7 | never | but drop"])
    body = {"RequestData": {"AccountNumber": NUMBER, "AccountCredential": CREDENTIAL}}
    answer = requests.post(f"{sandbox.url}{PATH}", json=body, headers=KEY, timeout=PATIENCE_S)
    assert answer.json()["Data"]["Balance"][0]["Amount"]["Amount"] == 7
    assert sandbox.stats()["callbacks"] == {"waiting": 0}


def test_a_refused_log_on_comes_in_the_callback(sandbox: SandboxClient, webhook: Webhook) -> None:
    sandbox.set_log_on("treasury", {"password": "another"})
    for _ in range(4):
        assert ask(sandbox, webhook.url).status_code == 202
    kinds = [record["kind"] for record in sandbox.wait_for_callbacks(4)]
    assert kinds == ["error:E101:DO_NOT_RETRY"] * 3 + ["error:E102:DO_NOT_RETRY"]


# --- when


def test_early_is_answered_before_the_202(sandbox: SandboxClient, webhook: Webhook) -> None:
    operation = ask(sandbox, webhook.url, "ok | early | twice").json()["OperationId"]
    records, [asked] = sandbox.callbacks(), sandbox.requests()
    assert [record["state"] for record in records] == ["acknowledged"] * 2
    assert {record["operation_id"] for record in records} == {operation}
    assert max(record["ended_at"] for record in records) <= asked["answered_at"]


def test_early_does_not_keep_the_202_from_a_client_while_nobody_takes_the_callback(sandbox: SandboxClient) -> None:
    sandbox.set_callback_rules(pauses=["1h"])
    assert ask(sandbox, step="ok | early").status_code == 202
    [record] = sandbox.callbacks()
    assert (record["state"], record["tries"]) == ("sending", 1)


def test_a_client_that_leaves_before_an_early_callback_is_over_is_counted_once(sandbox: SandboxClient) -> None:
    gate = threading.Event()

    def wait(peer: Peer) -> None:
        gate.wait(PATIENCE_S)
        peer.answer(204)

    with Hostile(wait) as webhook:
        sandbox.set_script(NUMBER, ["ok | early"])
        with pytest.raises(requests.Timeout):
            requests.post(
                f"{sandbox.url}{PATH}",
                json={
                    "RequestData": {"AccountNumber": NUMBER, "AccountCredential": "x"},
                    "CallbackUrl": f"{webhook.url}/t",
                },
                headers=KEY,
                timeout=0.05,
            )
        sandbox.wait_for(1)
        gate.set()
        sandbox.wait_for_callbacks(1)
    stats = sandbox.stats()
    assert (stats["aborted"], stats["answered"], stats["in_flight"]) == (1, 0, 0)
    assert [count["in_flight"] for count in stats["log_ons"].values()] == [0]


def test_late_is_after_life_span(sandbox: SandboxClient, webhook: Webhook) -> None:
    accepted = ask(sandbox, webhook.url, "ok@1h | late 50ms | life-span 10ms").json()
    [record] = sandbox.wait_for_callbacks(1)
    sent = datetime.fromisoformat(record["time"])
    assert sent >= datetime.fromisoformat(accepted["LifeSpan"]) + timedelta(milliseconds=49)


def test_never_waits_until_it_is_told(sandbox: SandboxClient, webhook: Webhook) -> None:
    operation = ask(sandbox, webhook.url, "ok:1 | never").json()["OperationId"]
    ask(sandbox, webhook.url, number="10000002")
    sandbox.wait_for_callbacks(1, number="10000002")
    assert sandbox.stats()["callbacks"] == {"waiting": 1, "sending": 0, "acknowledged": 1}
    assert sandbox.send_callbacks(NUMBER, "ok:2") == 1
    [record] = sandbox.wait_for_callbacks(1, number=NUMBER)
    assert record["operation_id"] == operation
    assert b'"Amount": 2,' in webhook.bodies[-1]
    assert sandbox.send_callbacks(NUMBER) == 0


def test_a_waiting_callback_can_be_sent_at_once(sandbox: SandboxClient, webhook: Webhook) -> None:
    ask(sandbox, webhook.url, "ok:3@48h")
    assert sandbox.send_callbacks(NUMBER) == 1
    sandbox.wait_for_callbacks(1)
    assert b'"Amount": 3,' in webhook.bodies[0]


def test_a_reset_drops_what_waits_and_what_is_tried(sandbox: SandboxClient) -> None:
    sandbox.set_callback_rules(pauses=["1h"])
    ask(sandbox, step="ok | never")
    ask(sandbox, step="ok")
    sandbox.callbacks(count=1, wait=PATIENCE_S)
    sandbox.reset()
    assert (sandbox.send_callbacks(NUMBER), sandbox.callbacks()) == (0, [])
    assert sandbox.stats()["callbacks"] == {"waiting": 0}


# --- how often, and what


def test_twice_is_the_same_again_after_the_first(sandbox: SandboxClient, webhook: Webhook) -> None:
    ask(sandbox, webhook.url, "ok | twice 20ms")
    first, second = sandbox.wait_for_callbacks(2)
    assert webhook.bodies[0] == webhook.bodies[1]
    assert second["sent_at"] - first["ended_at"] >= 0.02
    assert ([first["copy"], second["copy"]], first["modifiers"]) == ([1, 2], ["twice"])


@pytest.mark.parametrize(("step", "same"), [("ok:1 | twice at once", True), ("ok:1 | and ok:2", False)])
def test_two_at_once_are_on_two_connections_at_the_same_moment(sandbox: SandboxClient, step: str, same: bool) -> None:
    both = threading.Barrier(2)

    def together(peer: Peer) -> None:
        peer.request()
        both.wait(PATIENCE_S)
        peer.reply(204)
        peer.gone()

    with Hostile(together) as webhook:
        ask(sandbox, webhook.url, step)
        records = sandbox.wait_for_callbacks(2)
        bodies = [request.body for request in webhook.requests]
    assert [record["state"] for record in records] == ["acknowledged"] * 2
    assert (bodies[0] == bodies[1]) is same
    assert json.loads(bodies[0])["OperationId"] == json.loads(bodies[1])["OperationId"]


def test_then_is_another_answer_of_the_same_operation(sandbox: SandboxClient, webhook: Webhook) -> None:
    ask(sandbox, webhook.url, "ok:1 | then error:E201:RETRY_IMMEDIATELY@20ms")
    first, second = sandbox.wait_for_callbacks(2)
    assert (first["kind"], second["kind"]) == ("ok", "error:E201:RETRY_IMMEDIATELY")
    assert first["operation_id"] == second["operation_id"]
    assert second["sent_at"] - first["ended_at"] >= 0.02
    assert json.loads(webhook.bodies[1])["Status"] == "ERROR"


def test_the_operation_may_be_another_one(sandbox: SandboxClient, webhook: Webhook) -> None:
    accepted = ask(sandbox, webhook.url, "ok | other-operation").json()
    [record] = sandbox.wait_for_callbacks(1)
    assert json.loads(webhook.bodies[0])["OperationId"] == record["operation_id"] != accepted["OperationId"]


def test_the_token_may_be_a_wrong_one(sandbox: SandboxClient, webhook: Webhook) -> None:
    ask(sandbox, webhook.url, "ok | wrong-token")
    [record] = sandbox.wait_for_callbacks(1)
    path = webhook.requests[0].line.split(" ")[1]
    assert (path.startswith("/callbacks/"), len(path)) == (True, len(f"/callbacks/{TOKEN}"))
    assert record["token"] == token_digest(f"http://h{path}") != token_digest(f"http://h/{TOKEN}")


@pytest.mark.parametrize("reaction", ["http:504", "drop", "hang"])
def test_the_request_may_fail_and_the_callback_come_all_the_same(
    sandbox: SandboxClient, webhook: Webhook, reaction: str
) -> None:
    sandbox.set_script(NUMBER, [f"ok | but {reaction}"])
    if reaction == "http:504":
        assert ask(sandbox, webhook.url).status_code == 504
    else:
        with pytest.raises((requests.ConnectionError, requests.Timeout)):
            _ask_briefly(sandbox, webhook)
    [record] = sandbox.wait_for_callbacks(1)
    [asked] = sandbox.wait_for(1)
    assert (record["state"], asked["behaviour"]) == ("acknowledged", reaction)
    assert record["operation_id"] == asked["operation_id"]


def _ask_briefly(sandbox: SandboxClient, webhook: Webhook) -> None:
    body = {
        "RequestData": {"AccountNumber": NUMBER, "AccountCredential": CREDENTIAL},
        "CallbackUrl": f"{webhook.url}/t",
    }
    requests.post(f"{sandbox.url}{PATH}", json=body, headers=KEY, timeout=0.2)


@pytest.mark.parametrize(
    ("written", "in_s", "ends"),
    [
        ("5m", 300, "-0400"),
        ("-5m", -300, "-0400"),
        ("5m +0900", 300, "+0900"),
        ("5m Z", 300, "Z"),
        ("5m naive", 300, ""),
        ("48h", 172_800, "-0400"),
    ],
)
def test_life_span_is_a_moment_in_any_offset(sandbox: SandboxClient, written: str, in_s: int, ends: str) -> None:
    before = datetime.now(UTC)
    text = ask(sandbox, step=f"ok | never | life-span {written}").json()["LifeSpan"]
    assert (text[19:], len(text[:19])) == (ends, 19)
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    least = before + timedelta(seconds=in_s)
    assert least <= moment <= least + timedelta(seconds=PATIENCE_S)


def test_life_span_is_half_an_hour_if_nothing_is_said(sandbox: SandboxClient) -> None:
    text = ask(sandbox, step="ok | never").json()["LifeSpan"]
    assert text.endswith("-0400")
    assert timedelta(minutes=29) < datetime.fromisoformat(text) - datetime.now(UTC) < timedelta(minutes=31)


@pytest.mark.parametrize(
    ("life_span", "sent"), [("null", None), ("unreadable", "soon"), ({"literal": 7}, 7), ({"literal": ""}, "")]
)
def test_life_span_may_be_no_moment(sandbox: SandboxClient, life_span: object, sent: object) -> None:
    step = {"behaviour": "ok", "callback": {"never": True, "life_span": life_span}}
    assert ask(sandbox, step=step).json()["LifeSpan"] == sent


def test_life_span_may_be_absent(sandbox: SandboxClient) -> None:
    assert "LifeSpan" not in ask(sandbox, step="ok | never | life-span absent").json()


# --- whether it is taken


def test_what_is_refused_with_5xx_comes_again_until_it_is_taken(sandbox: SandboxClient) -> None:
    sandbox.set_callback_rules(pauses=["0s", "1ms", "2ms"])
    with Webhook(503, 500, 200) as webhook:
        ask(sandbox, webhook.url)
        [record] = sandbox.wait_for_callbacks(1)
    assert (record["state"], record["tries"], record["statuses"]) == ("acknowledged", 3, [503, 500, 200])
    assert record["body"] == "so be it"
    assert len(webhook.bodies) == 3
    assert len(set(webhook.bodies)) == 1


@pytest.mark.parametrize("status", [302, 400, 404, 409, 413])
def test_what_is_refused_otherwise_does_not_come_again(sandbox: SandboxClient, status: int) -> None:
    sandbox.set_callback_rules(pauses=["0s"] * 4)
    with Webhook(status) as webhook:
        ask(sandbox, webhook.url)
        [record] = sandbox.wait_for_callbacks(1)
    assert (record["state"], record["statuses"]) == ("refused", [status])


def test_it_gives_up_after_all_its_tries(sandbox: SandboxClient) -> None:
    sandbox.set_callback_rules(pauses=["0s"] * len(Rules().pauses_s))
    ask(sandbox)
    [record] = sandbox.wait_for_callbacks(1)
    assert (record["state"], record["statuses"]) == ("given-up", [None] * 5)
    assert record["trouble"] == "the connection was refused"


@pytest.mark.parametrize(
    ("said", "trouble"),
    [(b"", "the connection broke"), (b"nonsense\r\n\r\n", "what came is not HTTP"), (None, "no answer in time")],
)
def test_who_does_not_answer_properly_is_nobody(sandbox: SandboxClient, said: bytes | None, trouble: str) -> None:
    def answer(peer: Peer) -> None:
        peer.request()
        if said is None:
            peer.gone()
        else:
            peer.send(said)

    sandbox.set_callback_rules(pauses=[], timeout="200ms")
    with Hostile(answer) as webhook:
        ask(sandbox, webhook.url)
        [record] = sandbox.wait_for_callbacks(1)
    assert (record["state"], record["statuses"], record["trouble"]) == ("given-up", [None], trouble)


def test_only_the_beginning_of_what_comes_back_is_kept(sandbox: SandboxClient) -> None:
    def answer(peer: Peer) -> None:
        peer.request()
        peer.send(head(200) + b"x" * 100_000)
        peer.gone()

    with Hostile(answer) as webhook:
        ask(sandbox, webhook.url)
        [record] = sandbox.wait_for_callbacks(1)
    assert (record["status"], record["body"]) == (200, "x" * 1024)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:1/t",
        "http://example.com/t",
        "http://10.0.0.1/t",
        "http://0.0.0.0/t",
        "http://127.0.0.1.example.com/t",
        "http://127.1/t",
        "http://[::ffff:8.8.8.8]/t",
        "http://[::]/t",
        "http://[:.]/t",
        "http://127.0.0.1:99999/t",
    ],
)
def test_nothing_is_ever_sent_to_another_machine(sandbox: SandboxClient, url: str) -> None:
    body = {"RequestData": {"AccountNumber": NUMBER, "AccountCredential": CREDENTIAL}, "CallbackUrl": url}
    answer = requests.post(f"{sandbox.url}{PATH}", json=body, headers=KEY, timeout=PATIENCE_S)
    [record] = sandbox.wait_for_callbacks(1)
    assert (answer.status_code, record["state"], record["tries"]) == (202, "not-sent", 0)
    assert record["trouble"].startswith("the ")


@pytest.mark.parametrize(
    "url",
    [
        None,
        7,
        "",
        "callbacks/x",
        "ftp://127.0.0.1/x",
        "http:///x",
        "http://user@127.0.0.1/x",
        "http://127.0.0.1/x y",
        "http://127.0.0.1/x\r\nX-Y: z",
        "http://127.0.0.1/" + "x" * 239,
    ],
)
def test_a_wrong_callback_url_is_refused(sandbox: SandboxClient, url: object) -> None:
    body = {"RequestData": {"AccountNumber": NUMBER, "AccountCredential": CREDENTIAL}, "CallbackUrl": url}
    answer = requests.post(f"{sandbox.url}{PATH}", json=body, headers=KEY, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["Error"]["Code"]) == (400, "P002")
    assert sandbox.callbacks() == []


def test_a_callback_url_of_255_characters_is_taken(sandbox: SandboxClient) -> None:
    url = "http://127.0.0.1/" + "x" * 238
    body = {"RequestData": {"AccountNumber": NUMBER, "AccountCredential": CREDENTIAL}, "CallbackUrl": url}
    assert requests.post(f"{sandbox.url}{PATH}", json=body, headers=KEY, timeout=PATIENCE_S).status_code == 202


# --- what is remembered


def test_records_have_no_token_and_can_be_chosen(sandbox: SandboxClient, webhook: Webhook) -> None:
    for number in ("10000001", "10000002", "10000001"):
        ask(sandbox, webhook.url, number=number)
        sandbox.wait_for_callbacks(1, number=number)
    records = sandbox.wait_for_callbacks(3)
    assert [record["number"] for record in records] == ["10000001", "10000002", "10000001"]
    assert {record["token"] for record in records} == {token_digest(f"{webhook.url}/callbacks/{TOKEN}")}
    assert sandbox.callbacks(records[0]["seq"], number="10000001") == [records[2]]
    assert TOKEN not in json.dumps([records, sandbox.requests(), sandbox.stats()])
    sandbox.forget()
    assert (sandbox.callbacks(), sandbox.stats()["callbacks"]) == ([], {"waiting": 0})


def test_the_log_has_one_line_per_callback_without_number_or_token() -> None:
    process = subprocess.Popen(
        sandbox_command("--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with closing(SandboxClient(process.stdout.readline().removeprefix(READY).strip())) as sandbox:
        sandbox.set_callback_rules(pauses=[])
        ask(sandbox)
        sandbox.wait_for_callbacks(1)
    process.terminate()
    _, log = process.communicate(timeout=PATIENCE_S)
    assert log.splitlines()[-1].endswith(f"sandbox {BANK} ***01 callback ok given-up - 1")
    assert not any(secret in log for secret in (NUMBER, TOKEN, "127.0.0.1"))


def test_the_log_on_is_in_use_until_the_callback_is_sent(sandbox: SandboxClient, webhook: Webhook) -> None:
    sandbox.set_script("10000001", ["ok@48h"])
    ask(sandbox, webhook.url)
    assert _log_on(sandbox) == {"in_flight": 1, "overlaps": 0}
    ask(sandbox, webhook.url, number="10000002")
    sandbox.wait_for_callbacks(1)
    assert _log_on(sandbox) == {"in_flight": 1, "overlaps": 1}
    sandbox.send_callbacks("10000001")
    sandbox.wait_for_callbacks(2)
    ask(sandbox, webhook.url, number="10000002")
    sandbox.wait_for_callbacks(3)
    assert _log_on(sandbox) == {"in_flight": 0, "overlaps": 1}
    assert sandbox.stats()["max_in_flight"] == 1


def test_the_log_on_is_in_use_until_life_span_at_most(sandbox: SandboxClient) -> None:
    ask(sandbox, step="ok | never | life-span 10ms")
    deadline = datetime.now(UTC) + timedelta(seconds=PATIENCE_S)
    while _log_on(sandbox)["in_flight"] and datetime.now(UTC) < deadline:
        pass
    assert _log_on(sandbox)["in_flight"] == 0
    assert sandbox.stats()["callbacks"]["waiting"] == 1


def test_the_log_on_may_count_as_free_from_the_202(sandbox: SandboxClient) -> None:
    sandbox.set_callback_rules(hold_log_on=False)
    for _ in range(2):
        ask(sandbox, step="ok | never")
    assert _log_on(sandbox) == {"in_flight": 0, "overlaps": 0}


def _log_on(sandbox: SandboxClient) -> JsonObject:
    count = sandbox.stats()["log_ons"][log_on_of(BANK, "treasury")]
    return {name: count[name] for name in ("in_flight", "overlaps")}


def test_many_callbacks_wait_at_once_and_all_arrive(sandbox: SandboxClient, webhook: Webhook) -> None:
    numbers = [str(20_000_000 + index) for index in range(200)]
    sandbox.set_scripts({number: ["ok | never"] for number in numbers})
    operations = {ask(sandbox, webhook.url, number=number).json()["OperationId"] for number in numbers}
    assert sandbox.stats()["callbacks"]["waiting"] == 200
    for number in numbers:
        sandbox.send_callbacks(number)
    records = sandbox.wait_for_callbacks(200)
    assert {record["operation_id"] for record in records} == operations
    assert {json.loads(body)["OperationId"] for body in webhook.bodies} == operations
    assert sandbox.stats()["callbacks"] == {"waiting": 0, "sending": 0, "acknowledged": 200}


def test_wrong_rules_are_refused_with_their_reason(sandbox: SandboxClient) -> None:
    with pytest.raises(requests.HTTPError, match="duration 'soon'"):
        sandbox.set_callback_rules(pauses=["soon"])
