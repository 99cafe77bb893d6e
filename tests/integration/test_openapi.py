"""Hold three things together that must not drift apart: the sandbox, the client, and the description of the call.

worker/sandbox/openapi.yaml ──▶ requests, generated ──▶ sandbox ──▶ answers ──▶ as described?
                   └──▶ documents, one thing wrong in each ──▶ worker.balances ──▶ read, exactly if as described?
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hostile import Hostile
from hypothesis import HealthCheck, given, settings
from pydantic import BaseModel, SecretStr
from sandbox_client import PATIENCE_S, SandboxClient, Step
from schemathesis import Case, GenerationMode

from worker import balances, khipu
from worker.accounts import Definition
from worker.balances import read_accepted, read_answer
from worker.credentials import Credentials
from worker.errors import KhipuFailure, Kind
from worker.policy import ErrorType

DESCRIPTION = Path(khipu.__file__).parent / "sandbox" / "openapi.yaml"
PATH = "/v1/{country}/banking/{segment}/{institution}/current/balances"
NUMBER = "10000001"
CREDENTIAL = {"username": "treasury"}
KEY, TOKEN = {"x-api-key": "the-key"}, {"Authorization": "Bearer the.right.token"}
#: Generated requests for each of the two schemes, right ones and wrong ones: about 2 s for 100 of them.
EXAMPLES = 100

#: The models of worker.balances, and where they are described. Error has none: `_answered` reads it by hand.
MODELS: dict[str, tuple[type[BaseModel], ...]] = {
    "Answer": (balances._Envelope,),
    "Accepted": (balances._Receipt,),
    "Data": (balances._Data,),
    "Balance": (balances._Balance,),
    "Amount": (balances._Amount,),
}


def _loaded() -> Any:
    return schemathesis.openapi.from_path(DESCRIPTION)


RAW: dict[str, Any] = _loaded().raw_schema
SCHEMAS: dict[str, Any] = RAW["components"]["schemas"]


@cache
def validator(name: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": RAW["components"]})


@pytest.fixture
def sandbox(shared: SandboxClient) -> SandboxClient:
    shared.reset()
    shared.set_keys([KEY["x-api-key"], TOKEN["Authorization"].removeprefix("Bearer ")])
    shared.set_callback_rules(pauses=[])
    return shared


# --- the description itself


def test_the_description_is_openapi() -> None:
    assert RAW["openapi"].startswith("3.1.")
    _loaded().validate()


def test_its_examples_are_what_it_describes() -> None:
    operation = RAW["paths"][PATH]["post"]
    told = [
        *_examples(operation["requestBody"], "Request"),
        *_examples(operation["responses"]["200"], "Answer"),
        *_examples(operation["responses"]["202"], "Accepted"),
        *_examples(operation["callbacks"]["answer"]["{$request.body#/CallbackUrl}"]["post"]["requestBody"], "Answer"),
    ]
    assert len(told) == 7
    for name, value in told:
        validator(name).validate(value)


def _examples(part: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    media = part["content"]["application/json"]
    assert media["schema"]["$ref"].endswith(f"/{name}")
    for example in media["examples"].values():
        named = example.get("$ref", "").rpartition("/")[2]
        yield name, (RAW["components"]["examples"][named] if named else example)["value"]


# --- the sandbox


def described(scheme: str) -> Any:
    """The operation with one way to authenticate, and with what OpenAPI cannot say: a key needs a credential."""
    raw = deepcopy(RAW)
    raw["security"] = [{scheme: []}]
    data = raw["components"]["schemas"]["RequestData"]
    if scheme == "key":
        data["required"].append("AccountCredential")
        data["properties"]["AccountCredential"] = {"not": {"type": "null"}}
    return schemathesis.openapi.from_dict(raw)[PATH]["POST"]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("scheme", "headers"), [("token", TOKEN), ("key", KEY)])
def test_the_sandbox_takes_what_is_described_and_refuses_what_is_not(
    sandbox: SandboxClient, scheme: str, headers: dict[str, str], mode: GenerationMode
) -> None:
    """All of schemathesis' checks, among them: no 5xx, nothing undescribed sent, no wrong key or method accepted."""
    seen: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(case=described(scheme).as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        response = case.call(base_url=sandbox.url, headers=headers)
        seen.add(response.status_code)
        case.validate_response(response)

    check()
    assert seen >= ({200, 202} if mode is GenerationMode.POSITIVE else {400, 404})


URL = "https://poller.example/callbacks/"
REQUEST: dict[str, Any] = {"RequestData": {"AccountNumber": NUMBER, "Currency": "CLP"}, "CallbackUrl": URL}
#: Values at the limits of what is described, by the path of their field.
LIMITS = {
    "RequestData.AccountNumber": ("1", "1" * 20, "1" * 21, "ñ" * 20),
    "RequestData.Currency": ("USD", "US", "USDX", "usd", "UsD", "USD\n", "ÄÖÜ"),
    "CallbackUrl": (
        URL.ljust(255, "x"),
        URL.ljust(256, "x"),
        *("http://h", "https://h:1/", "http://[::1]:8080/a?b#c", "HTTP://h/", "ftp://h/", "http://", "h/a"),
        *("http://h:123456/", "http://u@h/", "http://h/a b", "http://h/ñ", "http://h/\n", "http://h\n"),
    ),
}


def test_the_sandbox_takes_a_request_exactly_if_it_is_described(sandbox: SandboxClient) -> None:
    """What generated requests hardly ever meet: each field gone, of another type, and at its limits."""
    requested = [changed for _, changed in variants(REQUEST)]
    for path, steps in _places(REQUEST):
        for text in LIMITS.get(path, ()):
            requested.append(_changed(REQUEST, steps, lambda holder, key, text=text: holder.update({key: text})))
    taken = {True: 0, False: 0}
    for body in requested:
        valid = validator("Request").is_valid(body)
        status = send(sandbox, body, TOKEN).status_code
        assert (status in {200, 202}) is valid, f"{status}: {body}"
        taken[valid] += 1
    assert min(taken.values()) > 10


ANSWERS: Sequence[Step] = (
    "ok",
    "ok:12345678901234567.89:USD:an-id:ClosingBooked",
    "ok:-0.5e3:CLF::Withheld",
    {"behaviour": "ok", "indicator": "Debit", "additional_information": "incomplete"},
    {"behaviour": "ok", "balances": [{}, {"type": "ClosingBooked"}]},
    "no-data",
    "empty",
    "foreign",
    *(f"error:E201:{type_}" for type_ in ErrorType),
)
#: What breaks the contract on purpose.
BREACHES: Sequence[Step] = ("schema", "error:X:SOMETHING_NEW", "error:E999:null", 'http:200:{"Status": "OK"}')


def test_every_answer_of_the_sandbox_is_described(sandbox: SandboxClient) -> None:
    sandbox.set_script(NUMBER, [*ANSWERS, *BREACHES])
    told = [ask(sandbox).json() for _ in (*ANSWERS, *BREACHES)]
    valid = [validator("Answer").is_valid(body) for body in told]
    assert valid == [True] * len(ANSWERS) + [False] * len(BREACHES)
    assert set(fields(told[: len(ANSWERS)])) == set(declared("Answer"))


def test_every_callback_of_the_sandbox_is_described(sandbox: SandboxClient) -> None:
    with Hostile(lambda peer: peer.answer(204)) as webhook:
        for step in ANSWERS:
            sandbox.set_script(NUMBER, [step])
            ask(sandbox, callback_url=f"{webhook.url}/callbacks/token")
        sandbox.wait_for_callbacks(len(ANSWERS))
        told = [json.loads(request.body) for request in webhook.requests]
    for body in told:
        validator("Answer").validate(body)
    assert set(fields(told)) == set(declared("Answer"))


@pytest.mark.parametrize(
    ("life_span", "valid"),
    [
        *((text, True) for text in ("30m", "-5m Z", "1h +0900", "30m naive", "null", "absent")),
        ("unreadable", False),
    ],
)
def test_every_202_of_the_sandbox_is_described(sandbox: SandboxClient, life_span: str, valid: bool) -> None:
    sandbox.set_script(NUMBER, [f"ok | never | life-span {life_span}"])
    answer = ask(sandbox, callback_url="http://127.0.0.1:1/token")
    assert answer.status_code == 202
    assert validator("Accepted").is_valid(answer.json()) is valid
    assert set(fields([answer.json()])) == set(declared("Accepted")) - (
        {"LifeSpan"} if life_span == "absent" else set()
    )


@pytest.mark.parametrize(
    ("step", "headers", "status"),
    [
        ("ok", {}, 401),
        ("ok", {**KEY, **TOKEN}, 400),
        *((f"http:{status}", KEY, status) for status in (400, 401, 404, 500)),
    ],
)
def test_every_refusal_of_the_sandbox_is_described(
    sandbox: SandboxClient, step: str, headers: dict[str, str], status: int
) -> None:
    sandbox.set_script(NUMBER, [step])
    answer = ask(sandbox, headers)
    assert answer.status_code == status
    _loaded()[PATH]["POST"].validate_response(answer)


def ask(sandbox: SandboxClient, headers: dict[str, str] = KEY, callback_url: str | None = None) -> requests.Response:
    body: dict[str, Any] = {"RequestData": {"AccountNumber": NUMBER, "AccountCredential": CREDENTIAL}}
    if callback_url is not None:
        body["CallbackUrl"] = callback_url
    return send(sandbox, body, headers)


def send(sandbox: SandboxClient, body: object, headers: dict[str, str]) -> requests.Response:
    path = PATH.format(country="cl", segment="business", institution="bancosecurity.cl")
    return requests.post(f"{sandbox.url}{path}", json=body, headers=headers, timeout=PATIENCE_S)


def fields(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all fields in a JSON value, lists aside: `Data.Balance.Type`."""
    if isinstance(value, list):
        for element in value:
            yield from fields(element, path)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield f"{path}{name}"
            yield from fields(inner, f"{path}{name}.")


def declared(name: str, path: str = "") -> Iterator[str]:
    """Paths of all fields that a schema names."""
    for field, schema in SCHEMAS[name]["properties"].items():
        yield f"{path}{field}"
        for inner in _referred(schema):
            yield from declared(inner, f"{path}{field}.")


def _referred(schema: Any) -> Iterator[str]:
    for part in (schema, schema.get("items", {}), *schema.get("oneOf", ())):
        if (name := part.get("$ref", "").rpartition("/")[2]) and "properties" in SCHEMAS[name]:
            yield name


# --- the client: what it reads


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_exactly_the_fields_that_are_described(name: str) -> None:
    for model in MODELS[name]:
        assert {field.alias for field in model.model_fields.values()} == set(SCHEMAS[name]["properties"])


def test_every_described_object_of_an_answer_has_its_model() -> None:
    used = {"Answer", "Accepted", *_all_referred("Answer"), *_all_referred("Accepted")}
    assert used == {*MODELS, "Error"}


def _all_referred(name: str) -> Iterator[str]:
    for schema in SCHEMAS[name]["properties"].values():
        for inner in _referred(schema):
            yield inner
            yield from _all_referred(inner)


@pytest.mark.parametrize("name", ["Balance", "Amount"])
def test_a_model_requires_what_is_required(name: str) -> None:
    for model in MODELS[name]:
        required = {field.alias for field in model.model_fields.values() if field.is_required()}
        assert required == set(SCHEMAS[name].get("required", ()))


@pytest.mark.parametrize("field", ["CreditDebitIndicator", "Type"])
def test_an_enumeration_is_the_same(field: str) -> None:
    model = balances._Balance.model_json_schema(by_alias=True)
    assert set(model["properties"][field]["enum"]) == set(SCHEMAS["Balance"]["properties"][field]["enum"])


def test_the_client_looks_at_exactly_the_described_fields_of_an_error() -> None:
    class Asked(dict[str, object]):
        names: set[str] = set()  # noqa: RUF012 - one object

        def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
            self.names.add(name)
            return super().get(name, default)

    asked = Asked()
    balances._answered(asked, ())
    assert asked.names == set(SCHEMAS["Error"]["properties"])


def test_every_type_of_error_has_its_rule() -> None:
    assert set(SCHEMAS["Error"]["properties"]["Type"]["enum"]) == set(ErrorType)


BALANCE = RAW["components"]["examples"]["balance"]["value"]
FAILURE = RAW["components"]["examples"]["failure"]["value"]
ACCEPTED = RAW["paths"][PATH]["post"]["responses"]["202"]["content"]["application/json"]["examples"]["accepted"][
    "value"
]
#: Anything that a field may be given instead of what belongs there.
OTHERS: Sequence[Any] = (None, True, 7, 7.5, "", "x", "ok", [], ["x"], {}, {"Added": 1})
#: Where the client takes more than is described, on purpose: why. A failure is one whatever else is wrong with it, lest
#: a refused log-on pass for something that may be tried again: so a document with Status ERROR has no place here.
LENIENT = {
    ("Answer", "LifeSpan"): "an answer's is of no use",
    ("Answer", "Error"): "one that says nothing is none",
    ("Accepted", "LifeSpan"): "one that cannot be read is drift, and the default is taken",
    ("Accepted", "AdditionalInformation"): "a 202's is of no use",
    ("Accepted", "Data"): "what should not be there is drift",
    ("Accepted", "Error"): "one that says nothing is none",
}


@pytest.mark.parametrize(
    ("name", "document", "read"), [("Answer", BALANCE, read_answer), ("Accepted", ACCEPTED, read_accepted)]
)
def test_the_client_reads_what_is_described_and_nothing_else(
    name: str, document: dict[str, Any], read: Callable[[bytes], Any]
) -> None:
    apart = set()
    for path, changed in variants(document):
        valid, readable = validator(name).is_valid(changed), _reads(read, changed)
        assert readable or not valid, f"{path} is described, and cannot be read: {changed}"
        if readable and not valid:
            apart.add((name, path))
    assert apart == {place for place in LENIENT if place[0] == name}


def test_the_client_reads_every_failure_that_is_described_as_one() -> None:
    described = [changed for _, changed in variants(FAILURE) if validator("Answer").is_valid(changed)]
    assert len(described) > 10
    for changed in described:
        with pytest.raises(KhipuFailure) as caught:
            read_answer(json.dumps(changed).encode())
        assert caught.value.outcome.kind is Kind.ANSWERED


def _reads(read: Callable[[bytes], Any], document: object) -> bool:
    """Whether the client makes sense of it, with nothing in it that it does not know."""
    try:
        return not [path for path in read(json.dumps(document).encode()).drift if path.rpartition(".")[2] == "Added"]
    except KhipuFailure as failure:
        return failure.outcome.kind is Kind.ANSWERED


def variants(document: Any) -> Iterator[tuple[str, Any]]:
    """Each field of a document gone, with each other value, and with another one beside it."""
    yield "", document
    for path, steps in list(_places(document)):
        yield path, _changed(document, steps, lambda holder, key: holder.pop(key))
        for other in OTHERS:
            yield path, _changed(document, steps, lambda holder, key, other=other: holder.update({key: other}))
        beside = f"{path.rpartition('.')[0]}.Added"
        yield beside, _changed(document, steps, lambda holder, _: holder.update({"Added": 1}))


def _places(value: Any, path: str = "", steps: tuple[Any, ...] = ()) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if isinstance(value, list):
        for index, element in enumerate(value):
            yield from _places(element, path, (*steps, index))
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield f"{path}{name}", (*steps, name)
            yield from _places(inner, f"{path}{name}.", (*steps, name))


def _changed(document: Any, steps: tuple[Any, ...], change: Callable[[Any, Any], object]) -> Any:
    document = deepcopy(document)
    holder = document
    for step in steps[:-1]:
        holder = holder[step]
    change(holder, steps[-1])
    return document


@pytest.mark.parametrize(
    ("name", "field", "text"),
    [
        *(("Balance", "DateTime", text) for text in ("2017-07-21T17:32:28-0400", "2017-07-21T17:32:28Z")),
        *(("Balance", "DateTime", text) for text in ("2017-07-21T17:32:28.123+09:00", "2017-07-21T17:32:28", "17:32")),
        *(("Amount", "Currency", text) for text in ("CLP", "clp", "CL", "CLPX", "CLP\n", "ÄÖÜ")),
        *(("Balance", "Type", text) for text in ("ClosingAvailable", "ClosingBooked", "Withheld", "closingbooked")),
        *(("Balance", "CreditDebitIndicator", text) for text in ("Credit", "Debit", "DEBIT")),
        *(("Balance", "AccountId", text) for text in ("1", "0" * 40, "")),
        *(("Answer", "OperationId", text) for text in ("1", "a-b_c", "", "a b", "ñ", "x" * 128, "x" * 129)),
        *(("Answer", "Status", text) for text in ("OK", "ok", "PENDING")),
    ],
)
def test_a_format_is_the_same(name: str, field: str, text: str) -> None:
    changed = deepcopy(BALANCE)
    {
        "Answer": changed,
        "Balance": changed["Data"]["Balance"][0],
        "Amount": changed["Data"]["Balance"][0]["Amount"],
    }[name][field] = text
    assert validator("Answer").is_valid(changed) is _reads(read_answer, changed)


@pytest.mark.parametrize(
    "text",
    [
        "2017-07-22T00:00:00-0400",
        "2017-07-22T00:00:00",
        "2017-07-22T00:00:00Z",
        "2017-07-22T00:00:00.5+04:30",
        "soon",
        "",
    ],
)
def test_a_life_span_is_understood_exactly_if_it_is_described(text: str) -> None:
    body = {**ACCEPTED, "LifeSpan": text}
    assert validator("Accepted").is_valid(body) is (read_accepted(json.dumps(body).encode()).life_span is not None)


# --- the client: what it sends


DEFINITION = Definition(
    alias="acme-operating",
    country="cl",
    segment="business",
    institution="bancosecurity.cl",
    number=NUMBER,
    currency="CLP",
    send_currency=True,
    login="acme",
)
ALL_CREDENTIALS = (
    Credentials("api-key", SecretStr("k"), {"username": "u", "password": "p"}),
    Credentials("api-key", SecretStr("k"), "text"),
    Credentials("bearer", SecretStr("a.b.c")),
)


def test_the_client_sends_exactly_what_is_described() -> None:
    sent = [
        json.loads(khipu._body(definition, credentials, callback_url))
        for definition in (DEFINITION, DEFINITION.model_copy(update={"send_currency": False}))
        for credentials in ALL_CREDENTIALS
        for callback_url in (None, "https://poller.example/callbacks/" + "x" * 43)
    ]
    for body in sent:
        validator("Request").validate(body)
    names = {path for path in fields(sent) if not path.startswith("RequestData.AccountCredential.")}
    assert names == set(declared("Request"))
