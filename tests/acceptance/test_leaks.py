"""Nothing leaks: the whole system, with a word of its own in every secret, polled through every way in which it ends.

    Machine ──▶ Mirror ──▶ sandbox                     Mirror answers some accounts itself, with all that it was sent
       └─ beat, worker, settler, webhook, flower ──▶ what they wrote, showed, stored or sent ──▶ tests/leaks.py

One run, one search of everything that somebody who may not know a secret can read. The search itself is tested in
tests/unit/test_leak_search.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import pytest
import requests
from leaks import Place, leaks_in
from machine import AMOUNT, OK, PATIENCE_S, Account, Machine, secret_variable, write_secret
from sandbox_client import JsonObject
from servers import ROOT, wait_until

from worker.policy import DeadLetterQueue
from worker.store import LOOPBACK, free_port
from worker.timetable import ANSWERS, POLLS

#: Kind → the word that stands in every secret of that kind, and nowhere else.
CANARIES = {
    "an account number": "NUMBER-CANARY",
    "an api key": "key-canary",
    "a token": "token-canary",
    "a user": "user-canary",
    "a password": 'password-canary-"é',
    "a client id": "client-id-canary",
    "a client secret": "client-secret-canary",
    "a notification token": "notification-canary",
    "Flower's password": "flower-canary",
    "the server's password": "redis-canary",
    "an amount": AMOUNT,
}
NUMBER, MONEY = "an account number", "an amount"
FLOWER_AUTH, NOTIFICATION_TOKEN, REDIS_PASSWORD = "operator:flower-canary", "notification-canary-1", "redis-canary-1"
#: Where Khipu's callback tokens may be a part of a text: as the webhook takes them.
CALLBACK_TOKEN = re.compile(r"(?<![\w-])[\w-]{43}(?![\w-])")

SHORT = "life-span 1s Z"
#: What the sandbox answers, sync: every kind of failure that it knows.
SYNC: Mapping[str, tuple[str | JsonObject, ...]] = {
    "plain": (OK,),
    "drifts": ({"behaviour": "ok", "amount": AMOUNT, "additional_information": f"of NUMBER-CANARY-OWN: {AMOUNT}"},),
    "null-data": ("no-data",),
    "empty": ("empty",),
    "immediately": ("error:E201:RETRY_IMMEDIATELY", OK),
    "waits": ("error:E202:WAIT_4_HOURS_BEFORE_RETRY",),
    "notified": ("error:E203:RETRY_AFTER_NOTIFICATION",),
    "notified-too": ("error:E203:RETRY_AFTER_NOTIFICATION", OK),
    "never": ("error:E401:DO_NOT_RETRY",),
    "never-too": ("error:E401:DO_NOT_RETRY", OK),
    "unknown-type": (f"error:E299:TYPE_{AMOUNT}",),
    "unknown-code": (f"error:{AMOUNT}:DO_NOT_RETRY",),
    "no-error": ("error:null",),
    "e101": ("error:E101:DO_NOT_RETRY", OK),
    "a000": ("error:A000:RETRY_IMMEDIATELY",),
    "bearer": (OK,),
    "bearer-a000": ("error:A000:DO_NOT_RETRY",),
    "client": (OK,),
    "client-refused": ("http:401",),
    **{
        f"http-{status}": (f"http:{status}",) for status in (204, 302, 400, 401, 403, 404, 408, 418, 429, 500, 502, 504)
    },
    "malformed": ("malformed",),
    "other-schema": ("schema",),
    "too-large": ("too-large",),
    "foreign": (OK, "foreign"),
    "other-currency": (f"ok:{AMOUNT}:USD",),
    "dropped": ("drop",),
    "hangs": ("hang",),
    "not-finite": ('http:200:{"OperationId": "1", "Status": "OK", "Data": {"Balance": [{"Amount": NaN}]}}',),
}
#: What the sandbox sends by callback.
CALLBACK: Mapping[str, tuple[str, ...]] = {
    "cb-plain": (f"{OK}@100ms",),
    "cb-twice": (f"{OK} | twice at once",),
    "cb-late": (f"{OK} | late 2s | {SHORT}", OK),
    "cb-never": (f"ok | never | {SHORT}",),
    "cb-ambiguous": ("ok@300ms | but drop",),
    "cb-error": ("error:E401:DO_NOT_RETRY",),
    "cb-log-on": ("error:E101:RETRY_IMMEDIATELY",),
    "cb-schema": ("schema",),
    "cb-foreign": ("ok", "foreign"),
    "cb-malformed": (f"malformed | {SHORT}",),
}


class Asked:
    """One request to Khipu's imitation, and everything in it that must not come back out."""

    def __init__(self, head: str, body: bytes) -> None:
        self.said: JsonObject = json.loads(body)
        self.callback_url: str | None = self.said.get("CallbackUrl")
        data = self.said["RequestData"]
        self.number: str = data["AccountNumber"]
        log_on = data.get("AccountCredential") or {}
        keys = re.findall(r"(?im)^(?:x-api-key|authorization): (?:Bearer )?(.+?)\r?$", head)
        urls = [self.callback_url, self.callback_url.rpartition("/")[2]] if self.callback_url else []
        self.secrets: list[str] = [self.number, *keys, *log_on.values(), *urls]
        self.text = f"{head}\n{body.decode()}"

    def encoded(self) -> str:
        """Every secret in forms that a literal search does not find."""
        forms: tuple[Callable[[str], str], ...] = (
            str,
            lambda text: json.dumps(text)[1:-1],
            lambda text: quote(text, safe=""),
            lambda text: text.encode().hex(),
            lambda text: text.encode().hex().upper(),
            lambda text: b64encode(text.encode()).decode(),
            lambda text: b64encode(b"1" + text.encode() + b"22").decode(),
        )
        return " ".join(form(secret) for secret in self.secrets for form in forms)


def envelope(operation: str = "", **fields: object) -> bytes:
    balance = {
        "AccountId": "873458",
        "CreditDebitIndicator": "Credit",
        "DateTime": "2017-07-21T17:32:28-0400",
        "Type": "ClosingAvailable",
        "Amount": {"Amount": int(AMOUNT), "Currency": "CLP"},
    }
    whole = {"OperationId": operation or f"of-{os.urandom(8).hex()}", "Status": "OK", "Data": {"Balance": [balance]}}
    return json.dumps({**whole, "AdditionalInformation": None, "Error": None, **fields}).encode()


def error(**fields: object) -> bytes:
    said = {"Code": "E401", "Type": "DO_NOT_RETRY", "Description": "no", **fields}
    return envelope(Status="ERROR", Data=None, Error=said)


Body = Callable[[Asked], bytes]
#: A Khipu that says all it was told: as bodies of a 200, and of a callback.
ECHOES: Mapping[str, Body] = {
    "description": lambda asked: error(Description=" ".join(asked.secrets)),
    "encoded": lambda asked: error(Description=asked.encoded()),
    "code": lambda asked: error(Code=asked.secrets[1], Type=asked.secrets[0]),
    "log-on": lambda asked: error(Code="E101", Type=asked.secrets[-1], Description=asked.text),
    "information": lambda asked: envelope(AdditionalInformation=" ".join(asked.secrets)),
    "information-encoded": lambda asked: envelope(AdditionalInformation=asked.encoded()),
    "operation": lambda asked: envelope(f"{asked.secrets[1]}/{asked.number}/{os.urandom(8).hex()}"),
    "fields": lambda asked: envelope(**{secret.replace("-", "_"): 1 for secret in asked.secrets}),
    "values": lambda asked: envelope(Data={"Balance": [dict.fromkeys(("AccountId", "Type"), asked.text)]}),
    "status": lambda asked: envelope(Status=asked.text),
    "twice": lambda asked: f'{{"{asked.secrets[1]}": 1, "{asked.secrets[1]}": 2}}'.encode(),
    "malformed": lambda asked: b"{" + asked.text.encode(),
}
#: The same as whole answers: status, headers, body.
REPLIES: Mapping[str, Callable[[Asked], tuple[int, dict[str, str], bytes]]] = {
    **{name: lambda asked, body=body: (200, {}, body(asked)) for name, body in ECHOES.items()},  # type: ignore[misc]
    **{
        f"text-{status}": lambda asked, status=status: (status, {}, asked.text.encode())  # type: ignore[misc]
        for status in (400, 401, 500, 504)
    },
    "to-a-client": lambda asked: (200, {}, error(Description=asked.text, Type=asked.secrets[1])),
    "error-400": lambda asked: (400, {}, error(Description=asked.text)),
    "headers": lambda asked: (
        429,
        {
            "Retry-After": asked.number,
            "Location": f"http://127.0.0.1:1/{quote(asked.secrets[1])}",
            "X-Key": "key-canary",
        },
        b"",
    ),
    "type": lambda asked: (200, {"Content-Type": f"text/plain; charset={asked.secrets[1]}"}, asked.text.encode()),
}


class Mirror(ThreadingHTTPServer):
    """Khipu as our processes see it: the sandbox, but for the accounts in `replies` and `callbacks`, by number."""

    daemon_threads = True

    def __init__(self, sandbox_url: str) -> None:
        super().__init__((LOOPBACK, 0), MirrorHandler)
        self.sandbox_url = sandbox_url
        self.replies: dict[str, str] = {}
        self.callbacks: dict[str, str] = {}
        #: What nobody knows beforehand: tokens of callbacks, and of clients.
        self.tokens: list[str] = []
        self.statuses: list[int] = []

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}"

    def call_back(self, asked: Asked) -> None:
        """As Khipu does, garbage first."""
        assert asked.callback_url is not None
        garbage = requests.post(asked.callback_url, data=asked.text.encode(), timeout=PATIENCE_S)
        body = ECHOES[self.callbacks[asked.number]](asked)
        answer = requests.post(
            asked.callback_url, data=body, headers={"Content-Type": "application/json"}, timeout=PATIENCE_S
        )
        self.statuses += [garbage.status_code, answer.status_code]


class MirrorHandler(BaseHTTPRequestHandler):
    server: Mirror

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = Asked(str(self.headers), body)
        if asked.callback_url:
            self.server.tokens.append(asked.callback_url.rpartition("/")[2])
        self.server.tokens += [secret for secret in asked.secrets if secret.startswith("access-")]
        if asked.number in self.server.replies:
            self._send(*REPLIES[self.server.replies[asked.number]](asked))
        elif asked.number in self.server.callbacks:
            self._send(202, {}, envelope("/".join(asked.secrets[1:2]) + os.urandom(4).hex(), Data=None))
            threading.Thread(target=self.server.call_back, args=[asked]).start()
        else:
            self._pass_on(body)

    def _pass_on(self, body: bytes) -> None:
        """What breaks there breaks here."""
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        with suppress(requests.RequestException):
            answer = requests.post(
                self.server.sandbox_url + self.path, body, headers=headers, timeout=PATIENCE_S, allow_redirects=False
            )
            kept = {name: answer.headers[name] for name in ("Content-Type", "Retry-After") if name in answer.headers}
            self._send(answer.status_code, kept, answer.content)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        with suppress(OSError):
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """The test's own output is searched by nobody."""


#: A worker in which some accounts end in a fault of ours that quotes everything it has in hand.
CRASHING = """
import sys
from celery.__main__ import main
from worker import tasks

def ask(attempt):
    if attempt.token.account.startswith("crashes"):
        held = attempt.credentials
        said = (attempt.begun.definition.number, held.key.get_secret_value(), held.account_credential)
        raise KeyError(f"{said} {attempt.callback_url}")
    return asked(attempt)

asked, tasks.ask = tasks.ask, ask
sys.argv[:1] = ["celery"]
main()
"""
#: A worker with one line too many.
TALKATIVE = """
import sys
from celery.__main__ import main
from worker import tasks

def ask(attempt):
    tasks.log.info(attempt.credentials.key.get_secret_value())
    return asked(attempt)

asked, tasks.ask = tasks.ask, ask
sys.argv[:1] = ["celery"]
main()
"""
BROKEN_FILE = """
[logins.one]
[[accounts]]
alias = "one"
institution = "bancosecurity.cl"
number = ["NUMBER-CANARY-8888"]
login = "two"
password = "password-canary-\\"é"
"""

KINDS = [
    *(
        Account(alias, steps, mode="sync", number="NUMBER-CANARY-OWN" if alias == "drifts" else "")
        for alias, steps in SYNC.items()
    ),
    *(Account(alias, steps) for alias, steps in CALLBACK.items()),
    *(Account(f"echo-{name}", mode="sync") for name in REPLIES),
    *(Account(f"cb-echo-{name}") for name in ECHOES),
    Account("crashes", mode="sync"),
    Account("crashes-cb"),
    Account("vanishes", mode="sync"),
]
#: Each at an institution of its own: so many failures at one would open its breaker, and hold the others.
ACCOUNTS = [replace(account, institution=f"{account.alias}.cl") for account in KINDS]
#: Accounts that end in a dead letter, one for each queue.
DEAD = {
    "never": DeadLetterQueue.DO_NOT_RETRY,
    "notified": DeadLetterQueue.AFTER_NOTIFICATION,
    "waits": DeadLetterQueue.RETRIES_EXHAUSTED,
    "too-large": DeadLetterQueue.BAD_ANSWER,
}
#: Those that end in no attempt: their poll crashes, or is not begun.
WITHOUT_END = {"crashes", "crashes-cb", "vanishes"}
#: Logins whose key fails: were it everybody's, it would block them all.
OWN_KEYS = {"a000", "http-401", "http-403", "echo-text-401"}
BEARER = ("bearer", "bearer-a000")
CLIENTS = ("client", "client-refused", "echo-to-a-client")


class Leaky(Machine):
    """A machine with every process of the Procfile, behind a mirror."""

    def __init__(self, directory: Path) -> None:
        self.webhook_port, self.flower_port, self.exporter_port = free_port(), free_port(), free_port()
        super().__init__(
            directory,
            ACCOUNTS,
            retry={"max_waits": 1, "wait": "2s"},
            limits={"callback_grace": "1s", "login_hold": "2s", "life_span": "2s", "request_deadline": "4s"},
            bearer=BEARER,
            clients=CLIENTS,
            server={"requirepass": REDIS_PASSWORD},
        )

    def __enter__(self) -> Self:
        super().__enter__()
        self.mirror = Mirror(self.sandbox.url)
        self._mirroring = threading.Thread(target=self.mirror.serve_forever)
        self._mirroring.start()
        self.mirror.replies = {self.number(f"echo-{name}"): name for name in REPLIES}
        self.mirror.callbacks = {self.number(f"cb-echo-{name}"): name for name in ECHOES}
        self.ears = self.store.pubsub()
        self.ears.psubscribe("*")
        return self

    def __exit__(self, *args: Any) -> None:
        self.ears.close()
        self.mirror.shutdown()
        self.mirror.server_close()
        self._mirroring.join()
        super().__exit__(*args)

    def env(self) -> dict[str, str]:
        return {
            **super().env(),
            "BALANCES_KHIPU_URL": self.mirror.url,
            "BALANCES_CALLBACK_URL": f"http://{LOOPBACK}:{self.webhook_port}",
            "BALANCES_WEBHOOK_PORT": str(self.webhook_port),
            "BALANCES_FLOWER_PORT": str(self.flower_port),
            "BALANCES_EXPORTER_PORT": str(self.exporter_port),
            "BALANCES_FLOWER_AUTH": FLOWER_AUTH,
            "BALANCES_NOTIFICATION_TOKEN": NOTIFICATION_TOKEN,
            "BALANCES_SECRETS_DIR": str(self.secrets_dir),
        }

    @property
    def secrets_dir(self) -> Path:
        directory = self.directory / "secrets"
        directory.mkdir(exist_ok=True)
        return directory

    def secrets(self) -> dict[str, str]:
        found = {
            secret_variable("default", "API_KEY"): 'key-canary/"+%1',
            secret_variable("default", "CLIENT_ID"): "client-id-canary-1",
            secret_variable("default", "CLIENT_SECRET"): "client-secret-canary-1",
        }
        for login in self.logins:
            if login in BEARER:
                found[secret_variable(login, "TOKEN")] = f"token-canary.{login}.signature"
            elif login in CLIENTS:
                found[secret_variable(login, "CLIENT_ID")] = f"client-id-canary-{login}"
            elif login != "vanishes":
                found[secret_variable(login, "ACCOUNT_CREDENTIAL")] = json.dumps(log_on(login))
            if login in OWN_KEYS:
                found[secret_variable(login, "API_KEY")] = f'key-canary/"+%{login}'
        return found

    # ------------------------------------------------------------------------------------------------ the day

    def live(self) -> None:
        """Everything happens once."""
        write_secret(self.secrets_dir, "vanishes", log_on("vanishes"))
        self.beat()
        flower = ("-m", "celery", "-A", "worker", "flower", f"--conf={ROOT}/config/flowerconfig.py")
        self.flower = self.start("flower", *flower, "--persistent=True", f"--db={self.directory}/flower.db")
        wait_until(lambda: self.store.execute_command("PUBSUB", "NUMPAT") > 1, PATIENCE_S, "Flower hears events")
        options = ("worker", "-E", "--loglevel", "DEBUG")
        polls = ("-c", CRASHING, "-A", "worker", *options, "-Q", POLLS, "-n", "worker@%h", "--concurrency=16")
        self.worker_process = self.start("worker", *polls)
        settler = ("-m", "celery", "-A", "worker", *options, "-Q", ANSWERS, "-n", "settler@%h", "-c", "2")
        self.settler = self.start("settler", *settler)
        self.webhook = self.start("webhook", "-m", "worker.webhook")
        wait_until(lambda: self.answers(self.webhook_url("/healthz")), PATIENCE_S, "a webhook")
        self.until_present(self.worker_process)
        (self.secrets_dir / "vanishes.account_credential").unlink()
        self.kick(*self.accounts)
        for alias in self.accounts.keys() - WITHOUT_END:
            wait_until(lambda alias=alias: self.outcomes(alias), 3 * PATIENCE_S, f"an end of {alias}")
        wait_until(lambda: len(self.worker_process.said("poll crashed")) >= 2, PATIENCE_S, "the crashes")
        wait_until(lambda: self.worker_process.said("credential refused"), PATIENCE_S, "a missing secret")
        for alias in ("foreign", "cb-foreign"):
            self.until_entries(alias, 1)
            self.kick(alias)
            self.until_state(alias, "suspended")
        for alias, queue in DEAD.items():
            self.until_state(alias, "suspended", "parked")
            assert self.letter(alias)[0] is queue
        self.settle_all()

    def settle_all(self) -> None:
        """No poll goes out any more, and no answer waits: its body stands in Redis as it came, until it is settled."""
        for alias in self.accounts:
            self.timetable.pause(alias)
        under_way = {"dispatched", "polling"}
        wait_until(lambda: not under_way & {self.account(alias)["state"] for alias in self.accounts}, PATIENCE_S)
        wait_until(lambda: not self.store.exists("answers"), PATIENCE_S, "no answer that is not settled")

    def answers(self, url: str) -> bool:
        with suppress(requests.ConnectionError):
            return requests.get(url, timeout=PATIENCE_S).ok
        return False

    def webhook_url(self, path: str) -> str:
        return f"http://{LOOPBACK}:{self.webhook_port}{path}"

    # ------------------------------------------------------------------------------------------------ what is searched

    def shown_by_flower(self) -> Iterator[Place]:
        """Its pages as they come, the data of its tables, its API."""
        url, auth = f"http://{LOOPBACK}:{self.flower_port}", tuple(FLOWER_AUTH.split(":"))

        def get(path: str) -> str:
            answer = requests.get(url + path, auth=auth, timeout=PATIENCE_S)  # type: ignore[arg-type]
            assert answer.ok, (path, answer.text)
            return answer.text

        tasks = [f"{alias}.{self.account(alias)['poll']}" for alias in self.accounts]
        wait_until(lambda: all(task in get("/api/tasks?limit=1000") for task in tasks), PATIENCE_S, "all polls")
        workers = re.findall(r'flower_worker_online\{worker="([^"]+)"', get("/metrics"))
        paths = ["/", "/workers", "/tasks", "/broker", "/metrics", "/api/tasks?limit=1000", "/api/workers?refresh=1"]
        paths += ["/api/queues/length", "/tasks/datatable?draw=1&start=0&length=1000&search[value]=&order[0][column]=0"]
        paths += [f"/worker/{worker}" for worker in workers if worker.startswith("worker@")]
        paths += [f"{kind}/{task}" for task in tasks for kind in ("/task", "/api/task/info")]
        yield from (Place(f"Flower {path}", get(path)) for path in paths)

    def kept_by_flower(self) -> Iterator[Place]:
        assert self.flower.stop() == 0
        files = list(self.directory.glob("flower.db*"))
        assert b"crashes" in b"".join(path.read_bytes() for path in files), "its file holds what it saw"
        yield from (Place(str(path.name), path.read_bytes()) for path in files)

    def shown_by_exporter(self) -> Iterator[Place]:
        if importlib.util.find_spec("worker.exporter") is None:
            return
        self.start("exporter", "-m", "worker.exporter")
        url = f"http://{LOOPBACK}:{self.exporter_port}"
        wait_until(lambda: self.answers(f"{url}/metrics"), PATIENCE_S, "an exporter")
        for path in ("/metrics", "/"):
            yield Place(f"exporter {path}", requests.get(url + path, timeout=PATIENCE_S).text)

    def in_redis(self) -> Iterator[Place]:
        """Every key and every field of it."""
        for key in self.store.scan_iter(count=1000):
            for field, value in self._values(key):
                yield Place(f"Redis {key} {field}", value, allowed_in(key, field))

    def _values(self, key: str) -> Iterator[tuple[str, str]]:
        match self.store.type(key):
            case "string":
                yield "", str(self.store.get(key))
            case "hash":
                found: Any = self.store.hgetall(key)
                yield from found.items()
            case "list":
                yield from (("", text) for text in self.store.lrange(key, 0, -1))  # type: ignore[union-attr]
            case "set":
                yield "", str(self.store.smembers(key))
            case "zset":
                yield "", str(self.store.zrange(key, 0, -1))
            case "stream":
                entries: Any = self.store.xrange(key)
                yield from ((name, value) for _, fields in entries for name, value in fields.items())

    def ever_written(self) -> Iterator[Place]:
        """Every command that changed a key: what was there for a moment only, too."""
        for command in self.written():
            key = command[1].decode("utf-8", "replace") if len(command) > 1 else ""
            if not key.startswith("answer:"):  # a body as it came, until it is settled
                name = command[0].decode()
                for before, part in pairwise(command):
                    yield Place(f"AOF {name} {key}", part, allowed_in(key, before.decode("utf-8", "replace")))

    def heard(self) -> Iterator[Place]:
        """Everything that was broadcast: Celery's events and remote control; kombu writes a body in base64."""
        self.store.publish("no more", "")
        while (message := self.ears.get_message(timeout=PATIENCE_S)) is not None and message["channel"] != "no more":
            if message["type"] == "pmessage":
                yield Place(f"channel {message['channel']}", message["data"])
                sent = json.loads(message["data"])
                yield Place(f"channel {message['channel']}, its body", b64decode(sent["body"]))

    def told_by_commands(self) -> Iterator[Place]:
        """What operators' commands print: amounts where they ask for them, never anything else."""
        commands = [
            ("accounts",),
            ("accounts", "cb-echo-log-on"),
            ("dead", "list"),
            ("dead", "show", "cb-echo-log-on", "--json"),
            ("dead", "redrive", "never-too", "never"),
            ("release", "notified-too"),
            ("unblock", "e101"),
            ("check",),
            ("audit",),
            ("latest",),
            ("history", "plain"),
            ("tail", "--from", "0", "--no-follow", "--json"),
        ]
        for command in commands:
            is_list = command in {("accounts",), ("dead", "list"), ("latest",)}
            for options in ((), ("--json",)) if is_list else ((),):
                done = self.balances(*command, *options)
                assert done.stdout or done.stderr, command
                allowed = frozenset({MONEY} if command[0] in {"latest", "history", "tail"} else ())
                yield Place(" ".join((*command, *options)), done.stdout, allowed)
                yield Place(f"{' '.join(command)}, stderr", done.stderr)
        for arguments in (("report",), ("inspect", "conf")):
            done = self.celery(*arguments)
            yield Place(f"celery {' '.join(arguments)}", done.stdout + done.stderr)

    def told_by_wrong_starts(self) -> Iterator[Place]:
        """Processes and commands that find something wrong: what they say about it."""
        self.accounts_path.write_text(BROKEN_FILE)
        beat = next(process for process in self.processes if process.name == "beat")
        wait_until(lambda: beat.said("accounts file not applied"), PATIENCE_S, "the broken file")
        for command in (("check",), ("up",)):
            done = self.balances(*command)
            assert done.returncode == 2, done
            yield Place(f"{command[0]} of a broken file", done.stdout + done.stderr)
        self.write_accounts()
        variable = secret_variable("plain", "ACCOUNT_CREDENTIAL")
        for name, value in {
            "broken": '{"user": "user-canary", "password": "password-canary-\\"é',
            "": "",
            "named as a file": "user-canary/password-canary",
        }.items():
            changed = {variable: "", f"{variable}_FILE": value} if "file" in name else {variable: value}
            worker = self.start("misled", "-m", "celery", "-A", "worker", "worker", "-Q", ANSWERS, **changed)
            assert worker.ended() == 2
        for wrong in ("BALANCES_REDIS_URL", "BALANCES_KHIPU_URL"):
            webhook = self.start("misled", "-m", "worker.webhook", **{wrong: "http://user:redis-canary@[no-url"})
            assert webhook.ended() == 2

    def outage(self) -> Iterator[Place]:
        """The server goes, comes back with another password, and then with its own."""
        beat = next(process for process in self.processes if process.name == "beat")
        self.server.kill()
        wait_until(lambda: beat.said("the server is away"), PATIENCE_S, "an outage")
        done = self.balances("accounts")
        yield Place("accounts without a server", done.stdout + done.stderr)
        answer = requests.post(self.webhook_url(f"/callbacks/{'x' * 43}"), data="{}", timeout=PATIENCE_S)
        yield Place("the webhook without a server", answer.text)
        self.server.start()
        wait_until(lambda: beat.said("the server is back"), PATIENCE_S, "the server again")
        wrong = self.server.url.replace(REDIS_PASSWORD, "redis-canary-2")
        mistaken = self.start(
            "mistaken", "-c", "from worker.cli import main; main(['check'])", BALANCES_REDIS_URL=wrong
        )
        assert mistaken.ended() == 1

    def from_strangers(self) -> Iterator[Place]:
        """What the webhook answers to those who have no token, or whose body is garbage."""
        for path, headers, body in (
            (f"/callbacks/{'x' * 43}", {}, "{}"),
            ("/notifications", {"Authorization": "Bearer notification-canary-2"}, "{}"),
            ("/notifications", {"Authorization": f"Bearer {NOTIFICATION_TOKEN}"}, '{"login": "umbrella"}'),
            ("/notifications", {"Authorization": f"Bearer {NOTIFICATION_TOKEN}"}, '{"password-canary-é": 1}'),
        ):
            headers = {"Content-Type": "application/json", **headers}
            answer = requests.post(self.webhook_url(path), body.encode(), headers=headers, timeout=PATIENCE_S)
            yield Place(f"webhook {path}", answer.text)

    def logs(self) -> Iterator[Place]:
        for process in self.processes:
            assert "Traceback" not in process.text(), process.name
            yield Place(f"log of {process.name}", process.text())


def log_on(login: str) -> dict[str, str]:
    return {"username": f"user-canary-{login}", "password": f'password-canary-"é%/+{login}'}


def allowed_in(key: str, field: str) -> frozenset[str]:
    """Where design.md lets a number or an amount stand."""
    if key.startswith(("account:", "callback:", "answer:")) and field == "definition":
        return frozenset({NUMBER})
    if key in {"balances", "latest"}:
        return frozenset({MONEY})
    return frozenset()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leaky]:
    with Leaky(tmp_path_factory.mktemp("leaks")) as machine:
        machine.live()
        yield machine


def test_nothing_that_anybody_can_read_has_a_secret_a_number_or_an_amount_but_where_it_belongs(machine: Leaky) -> None:
    places = [
        *machine.shown_by_flower(),
        *machine.shown_by_exporter(),
        *machine.told_by_commands(),
        *machine.from_strangers(),
        *machine.in_redis(),
        *machine.heard(),
        *machine.told_by_wrong_starts(),
        *machine.outage(),
        *machine.ever_written(),
        *machine.kept_by_flower(),
        *machine.logs(),
    ]
    assert set(machine.mirror.statuses) >= {200, 400}, "callbacks came, and garbage was refused"
    tokens = machine.mirror.tokens
    assert len(tokens) > len(ECHOES)
    assert {"access-"} < {token[:7] for token in tokens}
    canaries = {**CANARIES, **{f"token {number}": token for number, token in enumerate(tokens)}}
    assert leaks_in(places, canaries) == {}
    found = {place.name.split()[1] for place in places if place.name.startswith("Redis ") and AMOUNT in str(place.text)}
    assert found == {"balances", "latest"}, "what may be somewhere is found there: the search works"


def test_every_kind_of_end_was_searched(machine: Leaky) -> None:
    """The run above went where it says: otherwise it would prove nothing."""
    outcomes = {outcome.split()[1] for alias in machine.accounts for outcome in machine.outcomes(alias)}
    assert outcomes >= {"ok", "E101", "E201", "E202", "E203", "E401", "A000", "UNKNOWN", "FOREIGN", "UNREADABLE"}
    assert outcomes >= {"CONNECTION", "TIMEOUT", "LIFESPAN_EXCEEDED", "HTTP_401", "HTTP_400", "HTTP_500", "HTTP_504"}


def test_one_secret_in_one_line_of_a_log_is_found(tmp_path: Path) -> None:
    """What was searched above would have been red for it."""
    with Machine(tmp_path, [Account("acme")]) as machine:
        machine.beat()
        machine.until_present(machine.start("worker", "-c", TALKATIVE, "-A", "worker", "worker", "--loglevel", "INFO"))
        machine.kick("acme")
        machine.until_entries("acme", 1)
        places = [Place(f"log of {process.name}", process.text()) for process in machine.processes]
        assert leaks_in(places, CANARIES).keys() == {"log of worker"}
