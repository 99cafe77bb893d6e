"""The sandbox, as a process of its own, answers as Khipu does and tells what it was asked."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import closing
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
import requests
from sandbox_client import (
    PATIENCE_S,
    READY,
    SandboxClient,
    account_id_of,
    fingerprint,
    log_on_of,
    running_sandbox,
    sandbox_command,
)

BANK = "bancosecurity.cl"
PATH = f"/v1/cl/banking/business/{BANK}/current/balances"
KEY = {"x-api-key": "a key"}
TOKEN = {"Authorization": "Bearer a.b.c"}
CREDENTIAL = {"username": "treasury", "password": "right"}
NUMBER = "10000001"
EXAMPLE = json.loads("""
{"OperationId": "6baf6c19-e485-463b-ae24-a821b025c8a4", "Status": "OK",
 "Data": {"Balance": [{"AccountId": "873458", "CreditDebitIndicator": "Credit", "DateTime": "2017-07-21T17:32:28-0400",
                       "Type": "ClosingAvailable", "Amount": {"Amount": 10000, "Currency": "CLP"}}]},
 "AdditionalInformation": null, "Error": null, "LifeSpan": null}
""")


def ask(
    sandbox: SandboxClient, number: object = NUMBER, headers: dict[str, str] = KEY, **more: Any
) -> requests.Response:
    body = {"RequestData": {"AccountNumber": number, "AccountCredential": CREDENTIAL, **more}}
    return send(sandbox, body, headers)


def send(sandbox: SandboxClient, body: object, headers: dict[str, str] = KEY, path: str = PATH) -> requests.Response:
    return requests.post(f"{sandbox.url}{path}", json=body, headers=headers, timeout=PATIENCE_S, allow_redirects=False)


def ask_and_leave_open(sandbox: SandboxClient, number: str = NUMBER, user: str = "treasury") -> socket.socket:
    """A request on a bare socket whose answer nobody reads yet."""
    body = json.dumps({"RequestData": {"AccountNumber": number, "AccountCredential": {"username": user}}})
    host, port = sandbox.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), PATIENCE_S)
    connection.sendall(f"POST {PATH} HTTP/1.1\r\nx-api-key: k\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def test_the_documented_example_word_for_word(sandbox: SandboxClient) -> None:
    answer = ask(sandbox, "873458")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.json() == EXAMPLE
    assert list(answer.json()) == list(EXAMPLE)


def test_an_account_that_was_told_nothing_has_a_balance_now(sandbox: SandboxClient) -> None:
    [balance] = ask(sandbox, Currency="USD").json()["Data"]["Balance"]
    assert balance["AccountId"] == account_id_of(NUMBER) != NUMBER
    assert balance["Amount"]["Currency"] == "USD"
    assert balance["DateTime"].endswith("-0400")
    assert datetime.strptime(balance["DateTime"], "%Y-%m-%dT%H:%M:%S%z")


def test_each_answer_has_its_own_operation_id_and_the_record_knows_it(sandbox: SandboxClient) -> None:
    ids = [ask(sandbox).json()["OperationId"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert [record["operation_id"] for record in sandbox.requests()] == ids


@pytest.mark.parametrize("amount", ["12345678901234567.89", "0", "-0.10", "1e3", "0.0001"])
def test_amounts_are_sent_as_they_are_written(sandbox: SandboxClient, amount: str) -> None:
    sandbox.set_script(NUMBER, [f"ok:{amount}:USD:my-id:ClosingBooked"])
    assert f'"Amount": {amount},' in ask(sandbox).text
    [balance] = json.loads(ask(sandbox).text, parse_float=Decimal)["Data"]["Balance"]
    assert (balance["AccountId"], balance["Type"], balance["Amount"]["Currency"]) == ("my-id", "ClosingBooked", "USD")


def test_an_amount_written_as_a_json_number_is_exact_too(sandbox: SandboxClient) -> None:
    plan = '{"script": [{"behaviour": "ok", "amount": 12345678901234567.89}]}'
    requests.put(f"{sandbox.url}/_sandbox/accounts/{NUMBER}", data=plan, timeout=PATIENCE_S).raise_for_status()
    assert '"Amount": 12345678901234567.89,' in ask(sandbox).text


def test_an_answer_may_hold_several_balances_and_a_remark(sandbox: SandboxClient) -> None:
    elements = [{"amount": "5"}, {"amount": "7", "type": "Withheld", "indicator": "Debit"}]
    step = {"behaviour": "ok", "balances": elements, "additional_information": "incomplete", "operation_id": "twice"}
    sandbox.set_script(NUMBER, [step])
    answers = [ask(sandbox).json() for _ in range(2)]
    assert [answer["OperationId"] for answer in answers] == ["twice", "twice"]
    assert answers[0]["AdditionalInformation"] == "incomplete"
    first, second = answers[0]["Data"]["Balance"]
    assert (first["Type"], second["Type"], second["CreditDebitIndicator"]) == ("ClosingAvailable", "Withheld", "Debit")


@pytest.mark.parametrize(
    ("step", "data"), [("no-data", None), ("empty", {"Balance": []}), ("schema", {"Balance": {"Amount": "many"}})]
)
def test_ok_without_a_balance(sandbox: SandboxClient, step: str, data: object) -> None:
    sandbox.set_script(NUMBER, [step])
    answer = ask(sandbox).json()
    assert (answer["Status"], answer["Data"], answer["Error"]) == ("OK", data, None)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("error:E201:RETRY_IMMEDIATELY:later", ("E201", "RETRY_IMMEDIATELY", "later")),
        ("error:A000:DO_NOT_RETRY", ("A000", "DO_NOT_RETRY", "The token has expired, was revoked or is invalid.")),
        (
            "error:E199:WAIT_4_HOURS_BEFORE_RETRY",
            ("E199", "WAIT_4_HOURS_BEFORE_RETRY", "The log-on at the bank failed."),
        ),
        ("error:X:SOMETHING_NEW:", None),
        ("error:E999:null:custom", ("E999", None, "custom")),
    ],
)
def test_errors_come_with_200(sandbox: SandboxClient, step: str, error: tuple[str, str | None, str] | None) -> None:
    if error is None:
        with pytest.raises(requests.HTTPError, match="error takes"):
            sandbox.set_script(NUMBER, [step])
        return
    sandbox.set_script(NUMBER, [step])
    answer = ask(sandbox)
    body = answer.json()
    assert (answer.status_code, body["Status"], body["Data"]) == (200, "ERROR", None)
    assert tuple(body["Error"].values()) == error


def test_an_error_may_have_no_error_object(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["error:null"])
    body = ask(sandbox).json()
    assert (body["Status"], body["Error"]) == ("ERROR", None)


@pytest.mark.parametrize(
    ("status", "content_type", "text"),
    [
        (401, "text/plain", '"Authorization failed"'),
        (404, "text/plain", "Not Found"),
        (500, "text/plain", "Internal Server Error"),
        (504, "text/html", "<center>nginx</center>"),
    ],
)
def test_http_failures_look_like_those_on_the_wire(
    sandbox: SandboxClient, status: int, content_type: str, text: str
) -> None:
    sandbox.set_script(NUMBER, [f"http:{status}"])
    answer = ask(sandbox)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, content_type)
    assert text in answer.text


def test_http_with_any_body_and_headers(sandbox: SandboxClient) -> None:
    throttled = {"behaviour": "http", "status": 429, "headers": {"Retry-After": "7"}, "body": "slow down"}
    sandbox.set_script(NUMBER, [throttled, 'http:200:{"Amount": NaN}', "http:400"])
    answer = ask(sandbox)
    assert (answer.status_code, answer.headers["Retry-After"], answer.text) == (429, "7", "slow down")
    assert ask(sandbox).text == '{"Amount": NaN}'
    refused = ask(sandbox)
    assert (refused.status_code, refused.json()["Error"]["Code"]) == (400, "P002")


def test_malformed_is_cut_short(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["malformed"])
    answer = ask(sandbox)
    assert answer.headers["Content-Type"] == "application/json"
    with pytest.raises(requests.JSONDecodeError):
        answer.json()


def test_too_large_is_good_but_for_its_unannounced_length(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["too-large:3000000"])
    answer = ask(sandbox)
    assert "Content-Length" not in answer.headers
    assert len(answer.content) == 3_000_000
    assert answer.json()["Status"] == "OK"


def test_foreign_is_another_account(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["foreign", "foreign:someone"])
    ids = [ask(sandbox).json()["Data"]["Balance"][0]["AccountId"] for _ in range(2)]
    assert ids[0] != account_id_of(NUMBER)
    assert ids[1] == "someone"


def test_drop_closes_the_connection(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["drop"])
    with pytest.raises(requests.ConnectionError):
        ask(sandbox)
    [record] = sandbox.wait_for(1)
    assert (record["state"], record["answered_at"], record["aborted"]) == ("dropped", None, False)


def test_drip_comes_byte_by_byte_and_ends(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["drip:1ms"])
    assert ask(sandbox).json()["Status"] == "OK"
    assert sandbox.wait_for(1)[0]["state"] == "answered"


def test_a_client_that_leaves_a_drip_is_seen(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["drip:10ms"])
    with closing(ask_and_leave_open(sandbox)) as connection:
        assert connection.recv(1)
    assert sandbox.wait_for(1)[0]["aborted"]


def test_hang_never_answers_and_the_clients_leaving_is_seen(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["hang"])
    with closing(ask_and_leave_open(sandbox)):
        [record] = sandbox.wait_for(1, ended=False)
        assert (record["state"], record["ended_at"]) == ("in-flight", None)
        assert sandbox.stats()["in_flight"] == 1
    [record] = sandbox.wait_for(1)
    assert (record["state"], record["aborted"], record["answered_at"]) == ("aborted", True, None)
    assert sandbox.stats()["in_flight"] == 0
    assert sandbox.answer_hanging(NUMBER) == 0


def test_a_client_that_leaves_before_a_slow_answer_gets_none(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["ok@30ms", "ok@60ms"])
    ask_and_leave_open(sandbox).close()
    sandbox.wait_for(1)
    ask(sandbox)  # longer than what was left of the first
    assert [record["state"] for record in sandbox.requests()] == ["aborted", "answered"]
    assert sandbox.stats()["answered"] == 1


def test_a_hanging_request_is_answered_when_told(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["hang"])
    with closing(ask_and_leave_open(sandbox)) as connection:
        sandbox.wait_for(1, ended=False)
        assert sandbox.answer_hanging(NUMBER, "error:E201:RETRY_IMMEDIATELY") == 1
        assert b"RETRY_IMMEDIATELY" in connection.recv(65_536)
    assert [record["state"] for record in sandbox.requests()] == ["answered"]


def test_latency_is_kept(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, ["ok@50ms", "ok"], latency="20ms-30ms")
    ask(sandbox)
    ask(sandbox)
    slow, fast = (record["answered_at"] - record["started_at"] for record in sandbox.wait_for(2))
    assert slow >= 0.05
    assert fast >= 0.02


def test_defaults_are_for_all_accounts_each_at_its_own_step(sandbox: SandboxClient) -> None:
    sandbox.set_defaults(["empty", "no-data"], cycle=True)
    for number in ("1", "2", "1", "1"):
        ask(sandbox, number)
    seen = [(record["number"], record["behaviour"]) for record in sandbox.requests()]
    assert seen == [("1", "empty"), ("2", "empty"), ("1", "no-data"), ("1", "empty")]


def test_chance_is_repeatable(sandbox: SandboxClient) -> None:
    runs = []
    for _ in range(2):
        sandbox.set_random(NUMBER, {"ok": 1.5, "empty": 0.5, "http:500": 1}, seed=3)
        runs.append([ask(sandbox).text for _ in range(20)])
    behaviours = [record["behaviour"] for record in sandbox.requests()]
    assert behaviours[:20] == behaviours[20:]
    assert set(behaviours) == {"ok", "empty", "http:500"}


def test_a_wrong_step_is_refused_with_its_reason(sandbox: SandboxClient) -> None:
    with pytest.raises(requests.HTTPError, match="unknown behaviour 'okay'"):
        sandbox.set_script(NUMBER, ["okay"])


@pytest.mark.parametrize("headers", [KEY, TOKEN])
def test_both_schemes_work(sandbox: SandboxClient, headers: dict[str, str]) -> None:
    assert ask(sandbox, headers=headers).json()["Status"] == "OK"


def test_a_token_needs_no_credential_and_a_key_does(sandbox: SandboxClient) -> None:
    body = {"RequestData": {"AccountNumber": NUMBER}}
    assert send(sandbox, body, TOKEN).status_code == 200
    answer = send(sandbox, body, KEY)
    assert (answer.status_code, answer.json()["Status"], answer.json()["Error"]["Code"]) == (400, "ERROR", "P002")


def test_both_schemes_at_once_are_refused(sandbox: SandboxClient) -> None:
    answer = ask(sandbox, headers={**KEY, **TOKEN})
    assert (answer.status_code, answer.json()["Error"]["Code"]) == (400, "P003")


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Basic abc"}, {"Authorization": "Bearer "}, {"x-api-key": ""}]
)
def test_neither_scheme_is_unauthorized(sandbox: SandboxClient, headers: dict[str, str]) -> None:
    answer = ask(sandbox, headers=headers)
    assert (answer.status_code, answer.headers["Content-Type"]) == (401, "text/plain")
    assert answer.json() == "Authorization failed"


def test_only_accepted_keys_come_in_once_there_is_a_list(sandbox: SandboxClient) -> None:
    sandbox.set_keys(["another key"])
    assert ask(sandbox).status_code == 401
    assert ask(sandbox, headers={"x-api-key": "another key"}).status_code == 200
    [refused, _] = sandbox.requests(number=NUMBER)
    assert (refused["behaviour"], refused["status"], refused["log_on"]) == ("refused:401", 401, None)


@pytest.mark.parametrize("number", ["", "1" * 21, 12345, None])
def test_the_account_number_has_1_to_20_characters(sandbox: SandboxClient, number: object) -> None:
    answer = ask(sandbox, number)
    assert (answer.status_code, answer.json()["Status"], answer.json()["Error"]["Code"]) == (400, "ERROR", "P001")
    assert answer.json()["Error"]["Type"] == "DO_NOT_RETRY"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ([], "P003"),
        ({"RequestData": None}, "P003"),
        ({"RequestData": {"AccountNumber": "1", "AccountCredential": "x", "Currency": "clp"}}, "P002"),
        ({"RequestData": {"AccountNumber": "1", "AccountCredential": "x"}, "CallbackUrl": "u" * 256}, "P002"),
    ],
)
def test_other_wrong_bodies_are_refused(sandbox: SandboxClient, body: object, code: str) -> None:
    answer = send(sandbox, body)
    assert (answer.status_code, answer.json()["Error"]["Code"]) == (400, code)


@pytest.mark.parametrize("path", ["/", "/v1/cl/banking/vip/bank/current/balances", "/_sandbox/nothing"])
def test_other_paths_do_not_exist(sandbox: SandboxClient, path: str) -> None:
    assert send(sandbox, {}, path=path).status_code == 404


def test_callback_mode_is_accepted(sandbox: SandboxClient) -> None:
    body = {"RequestData": {"AccountNumber": NUMBER, "AccountCredential": "x"}, "CallbackUrl": "http://127.0.0.1:1/"}
    answer = send(sandbox, body)
    assert (answer.status_code, answer.json()["Status"], answer.json()["Data"]) == (202, "OK", None)
    assert datetime.strptime(answer.json()["LifeSpan"], "%Y-%m-%dT%H:%M:%S%z")
    [record] = sandbox.requests()
    assert (record["behaviour"], record["callback"]) == ("accepted", True)


def test_records_are_in_order_and_hold_fingerprints_only(sandbox: SandboxClient) -> None:
    ask(sandbox)
    ask(sandbox, "20000002", TOKEN, Currency="USD")
    first, second = sandbox.requests()
    assert second["seq"] == first["seq"] + 1
    assert first["started_at"] <= first["answered_at"] <= second["started_at"]
    assert (first["institution"], first["number"], first["scheme"]) == (BANK, NUMBER, "api-key")
    assert first["key_fingerprint"] == fingerprint("a key")
    assert first["credential_fingerprint"] == fingerprint(CREDENTIAL)
    assert first["log_on"] == log_on_of(BANK, "treasury")
    assert (second["scheme"], second["currency"], second["log_on"]) == ("bearer", "USD", fingerprint("a.b.c"))
    assert sandbox.requests(first["seq"]) == [second]
    shown = json.dumps([first, second, sandbox.stats()])
    assert not any(secret in shown for secret in ("a key", "a.b.c", "right", "treasury"))


def test_records_are_forgotten_and_numbers_go_on(sandbox: SandboxClient) -> None:
    ask(sandbox)
    [before] = sandbox.requests()
    sandbox.forget()
    assert (sandbox.requests(), sandbox.stats()["requests"]) == ([], 0)
    ask(sandbox)
    assert sandbox.requests()[0]["seq"] == before["seq"] + 1


def test_history_is_bounded() -> None:
    with running_sandbox("--history", "3") as sandbox:
        for number in range(5):
            ask(sandbox, str(number))
        assert [record["number"] for record in sandbox.requests()] == ["2", "3", "4"]
        assert sandbox.stats()["requests"] == 5


def test_overlaps_of_one_log_on_are_counted_whatever_the_account(sandbox: SandboxClient) -> None:
    sandbox.set_defaults(["hang"])
    users = {"10000001": "same", "10000002": "same", "10000003": "other"}
    connections = [ask_and_leave_open(sandbox, number, user) for number, user in users.items()]
    sandbox.wait_for(3, ended=False)
    stats = sandbox.stats()
    for connection in connections:
        connection.close()
    assert (stats["in_flight"], stats["overlaps"]) == (3, 1)
    assert stats["log_ons"][log_on_of(BANK, "same")]["max_in_flight"] == 2
    assert stats["log_ons"][log_on_of(BANK, "other")]["max_in_flight"] == 1
    sandbox.wait_for(3)


def test_requests_one_after_another_do_not_overlap(sandbox: SandboxClient) -> None:
    for _ in range(3):
        ask(sandbox)
    stats = sandbox.stats()
    assert (stats["requests"], stats["overlaps"], stats["max_in_flight"]) == (3, 0, 1)
    assert stats["accounts"][NUMBER]["behaviours"] == {"ok": 3}


def test_hundreds_of_slow_answers_are_held_at_once(sandbox: SandboxClient) -> None:
    sandbox.set_defaults(["hang"])
    connections = [ask_and_leave_open(sandbox, NUMBER, f"user-{index}") for index in range(300)]
    sandbox.wait_for(300, ended=False)
    assert sandbox.stats()["max_in_flight"] == 300
    assert sandbox.answer_hanging(NUMBER) == 300
    answers = [connection.recv(65_536) for connection in connections]
    for connection in connections:
        connection.close()
    assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers)


def test_wrong_credentials_lock_the_user_out_until_the_bank_unlocks(sandbox: SandboxClient) -> None:
    sandbox.set_log_on("treasury", {"password": "right"})
    wrong = {**CREDENTIAL, "password": "wrong"}
    codes = [_code(ask(sandbox, AccountCredential=wrong)) for _ in range(3)]
    assert [*codes, _code(ask(sandbox))] == ["E101", "E101", "E101", "E102"]
    assert sandbox.log_ons()["treasury"] == {"wrong": 3, "wrong_in_a_row": 3, "locked": True}
    sandbox.unlock("treasury")
    assert _code(ask(sandbox)) is None
    assert [record["behaviour"] for record in sandbox.requests()][-2:] == ["error:E102:DO_NOT_RETRY", "ok"]


def _code(answer: requests.Response) -> str | None:
    error = answer.json()["Error"]
    return None if error is None else str(error["Code"])


def test_a_token_is_not_checked_at_the_bank(sandbox: SandboxClient) -> None:
    sandbox.set_log_on("treasury", {"password": "another"})
    assert _code(ask(sandbox, headers=TOKEN)) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly_while_requests_hang(number: signal.Signals) -> None:
    with running_sandbox() as sandbox:
        sandbox.set_defaults(["hang"])
        with closing(ask_and_leave_open(sandbox)) as connection:
            sandbox.wait_for(1, ended=False)
            assert sandbox.pid is not None
            os.kill(sandbox.pid, number)
            assert _read_to_the_end(connection) == b""


def _read_to_the_end(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65_536)
    except ConnectionResetError:
        return b""


def test_a_busy_port_is_one_line_and_code_2(sandbox: SandboxClient) -> None:
    port = sandbox.url.rpartition(":")[2]
    ended = subprocess.run(
        sandbox_command("--port", port), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"sandbox: cannot listen on 127.0.0.1:{port}: the port is taken\n"


def test_the_log_has_one_line_per_request_without_number_or_secret() -> None:
    process = subprocess.Popen(
        sandbox_command("--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with closing(SandboxClient(process.stdout.readline().removeprefix(READY).strip())) as sandbox:
        ask(sandbox)
        ask(sandbox, "1" * 21)
        sandbox.stats()
    process.terminate()
    _, log = process.communicate(timeout=PATIENCE_S)
    first, second = log.splitlines()
    assert f"{BANK} ***01 ok answered 200" in first
    assert "***11 refused:400:P001 answered 400" in second
    assert not any(secret in log for secret in (NUMBER, "1" * 20, "a key", "right", "treasury"))
