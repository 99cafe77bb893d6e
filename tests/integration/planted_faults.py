"""Plant a fault: replace a piece of a script's text while a test runs, as if somebody had written it so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from unittest import mock


@dataclass(frozen=True)
class Patch:
    """In the file `script`.lua, `old` (which stands there once) becomes `new`."""

    script: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        assert text.count(self.old) == 1, f"{self.script}.lua has this {text.count(self.old)} times: {self.old}"
        return text.replace(self.old, self.new)


@contextmanager
def patched(*patches: Patch) -> Iterator[None]:
    """Timetables made inside run the patched scripts. Every patch must fit."""
    texts = {patch.script: _read(patch.script) for patch in patches}
    for patch in patches:
        texts[patch.script] = patch.apply(texts[patch.script])

    def script_text(name: str) -> str:
        return "\n".join(texts.get(part) or _read(part) for part in ("shared", name))

    with mock.patch("worker.scripts.script_text", script_text), mock.patch("worker.timetable.script_text", script_text):
        yield


def _read(name: str) -> str:
    return (resources.files("worker") / "lua" / f"{name}.lua").read_text(encoding="utf-8")
