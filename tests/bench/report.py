"""Figures as people read them: a median with its spread, tables with ratios, plots; and the page they stand on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log10
from pathlib import Path
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return median(self.values)

    def text(self, digits: int = 2) -> str:
        """The median, and from where to where the measurements went."""
        if len(self.values) == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({min(self.values):,.{digits}f}–{max(self.values):,.{digits}f})"


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page: `name` as in `make bench ONLY=name`, markdown below the title; plots by file name."""

    name: str
    title: str
    text: str
    plots: dict[str, str] = field(default_factory=dict)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ratio(value: float, base: float) -> str:
    """With two decimals, or more where those would be nothing."""
    share = value / base
    return f"{share:.2f}×" if share >= 0.01 else f"{share:.1g}×"


# ------------------------------------------------------------------------------------------------------------ the page

BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"


def write(page: Path, sections: Iterable[Section], about: str) -> None:
    """Puts each section between its marks on the page; what was measured at another time stays."""
    text = page.read_text()
    for section in sections:
        begin, end = BEGIN.format(section.name), END.format(section.name)
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n## {section.title}\n\n{about}\n\n{section.text.strip()}\n{end}{after}"
        for name, plot in section.plots.items():
            (page.parent / name).write_text(plot)
    page.write_text(text)


# --------------------------------------------------------------------------------------------------------------- plots

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 60, 170, 30, 45
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700")


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over a logarithmic axis: what grows against what it costs."""

    title: str
    across: str
    up: str
    lines: dict[str, list[tuple[float, float]]]

    def svg(self) -> str:
        xs = sorted({x for points in self.lines.values() for x, _ in points})
        top = 1.25 * max(y for points in self.lines.values() for _, y in points)
        parts = [*self._frame(xs, top)]
        for number, (name, points) in enumerate(self.lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            at = [(self._x(x, xs), self._y(y, top)) for x, y in points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
            parts.append(_label(WIDTH - RIGHT + 12, TOP + 16 * number + 8, name, "start", colour))
        body = "\n".join(parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
        )

    def _frame(self, xs: Sequence[float], top: float) -> Iterable[str]:
        yield _label(LEFT, 16, self.title, "start", "#1f2328", 13)
        yield _label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.across)
        yield _label(LEFT, TOP - 2, self.up, "end")
        for x in xs:
            yield _label(self._x(x, xs), HEIGHT - BOTTOM + 16, f"{x:,.0f}")
        for step in range(5):
            y = top * step / 4
            at = self._y(y, top)
            yield f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="#d0d7de"/>'
            yield _label(LEFT - 6, at + 4, f"{y:.3g}", "end")

    def _x(self, x: float, xs: Sequence[float]) -> float:
        low, high = log10(xs[0]), log10(xs[-1])
        return LEFT + 14 + (log10(x) - low) / ((high - low) or 1) * (WIDTH - RIGHT - LEFT - 28)

    def _y(self, y: float, top: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - TOP)


def _label(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#57606a", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{text}</text>'
