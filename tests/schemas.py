"""Hold what stands on the stream against the schemas in the package: whole entries, and no field that none declares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jsonschema_rs
import redis

from worker.events import SCHEMAS, URN

#: The attributes of CloudEvents 1.0 that every entry has, and no other.
ATTRIBUTES = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "specversion": {"const": "1.0"},
        "id": {"type": "string", "minLength": 1},
        "source": {"type": "string", "pattern": "^/khipu/[a-z]{2}/[a-z-]+/[a-z0-9.-]+$"},
        "type": {"enum": sorted(path.stem for path in SCHEMAS.glob("*.json"))},
        "subject": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]*$"},
        "time": {"type": "string", "format": "date-time", "pattern": "Z$"},
        "datacontenttype": {"const": "application/json"},
        "dataschema": {"type": "string"},
        "data": {"type": "string"},
    },
    "additionalProperties": False,
    "minProperties": 9,
}
#: What tests put on the stream themselves, to have it long.
FILLER = {"data": "{}"}


def validate_stream(client: redis.Redis, stream: str = "balances") -> int:
    """Fail at the first entry that is not what its type promises; returns how many there are."""
    entries = [fields for _, fields in client.xrange(stream) if fields != FILLER]
    for fields in entries:
        validate_entry(fields)
    return len(entries)


def validate_entry(fields: Mapping[str, str]) -> None:
    validator(None).validate(dict(fields))
    data = json.loads(fields["data"])
    validator(fields["type"]).validate(data)
    assert fields["dataschema"] == URN + fields["type"]
    assert fields["subject"] == data["account"]
    assert fields["id"] == data.get("operation_id", f"{data['account']}.{data['poll']}.{fields['type']}")


@lru_cache
def validator(type_: str | None) -> jsonschema_rs.Draft202012Validator:
    """Of the data of this type, None: of the attributes. What *we* publish has no field beyond those declared."""
    schema = ATTRIBUTES if type_ is None else closed(json.loads((SCHEMAS / f"{type_}.json").read_text("utf-8")))
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True)


def closed(schema: Any) -> Any:
    """The schema without its openness."""
    if isinstance(schema, dict):
        return {name: False if name == "additionalProperties" else closed(part) for name, part in schema.items()}
    return [closed(part) for part in schema] if isinstance(schema, list) else schema
