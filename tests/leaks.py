"""Search texts for planted canaries, in the forms in which a secret may get out unnoticed.

canaries (kind → word) ──▶ forms: plain, JSON, HTML, URL, hex, base64 …        text ──▶ find_leaks ──▶ "kind, form"
"""

from __future__ import annotations

import html
import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, quote_plus


@dataclass(frozen=True, slots=True)
class Place:
    """A text that somebody can read, and the kinds of canaries that may stand there."""

    name: str
    text: str | bytes
    allowed: frozenset[str] = frozenset()


def find_leaks(text: str | bytes, canaries: Mapping[str, str], allowed: Iterable[str] = ()) -> list[str]:
    """Every kind of canary in the text, other than those allowed, with the form in which it stands there."""
    readable = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    lowered = readable.lower()
    found = []
    for kind, word in canaries.items():
        if kind not in allowed:
            found += [f"{kind}, {form}" for form, hay in forms(word) if hay in (lowered if form == "hex" else readable)]
    return found


def leaks_in(places: Iterable[Place], canaries: Mapping[str, str]) -> dict[str, list[str]]:
    """Where something leaks: place → what. Its name must not tell either."""
    by_allowed: dict[frozenset[str], list[Place]] = {}
    for place in places:
        by_allowed.setdefault(place.allowed, []).append(place)
    leaks: dict[str, list[str]] = {}
    for allowed, alike in by_allowed.items():
        # All at once first: it is the number of searches that takes the time.
        if find_leaks("\n".join(map(_readable, alike)), canaries, allowed) or find_leaks(_names(alike), canaries):
            for place in alike:
                if found := find_leaks(place.text, canaries, allowed) + find_leaks(place.name, canaries):
                    leaks[place.name] = found
    return leaks


def _readable(place: Place) -> str:
    return place.text.decode("utf-8", "replace") if isinstance(place.text, bytes) else place.text


def _names(places: Iterable[Place]) -> str:
    return "\n".join(place.name for place in places)


@lru_cache(maxsize=4096)
def forms(word: str) -> tuple[tuple[str, str], ...]:
    """The word as it may be written, by the name of the form; each text once."""
    written = {text: form for form, text in reversed(list(_forms(word)))}
    return tuple((form, text) for text, form in reversed(written.items()))


def _forms(word: str) -> Iterator[tuple[str, str]]:
    texts = {
        "plain": word,
        "JSON": json.dumps(word)[1:-1],
        "JSON of any letter": json.dumps(word, ensure_ascii=False)[1:-1],
    }
    yield from texts.items()
    yield "JSON twice", json.dumps(texts["JSON"])[1:-1]
    yield "HTML", html.escape(word)
    yield "repr", repr(word)[1:-1]
    for text in texts.values():
        for url in (quote(text, safe=""), quote(text), quote_plus(text)):
            yield "URL", url
        yield "hex", text.encode().hex()
        for encoded in _base64(text.encode()):
            yield "base64", encoded
            yield "base64", encoded.replace("+", "-").replace("/", "_")
    if word.isdigit() and len(word) > 6:
        for mark in ",.' _":
            yield "grouped", f"{int(word):,}".replace(",", mark)


def _base64(raw: bytes) -> Iterator[str]:
    """What base64 makes of the bytes wherever they stand in what is encoded: at each of three alignments."""
    for offset in range(3):
        whole = b64encode(b"\0" * offset + raw).decode()
        yield whole[-(-offset * 4 // 3) : (offset + len(raw)) * 4 // 3]
