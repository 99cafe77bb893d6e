"""Lay out what operators see in a terminal of 80 columns: tables, one account's story, moments and distances.

Moments are shown in the local time of the terminal (`TZ`), and every heading says which that is; `--json` is UTC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from worker.ops import AccountRow, AuditRow, LetterRow, Reason, Story
from worker.server import Finding

#: Trouble first: the order in which accounts are listed, and the colour of each state.
COLOURS = {
    "blocked": "bold red",
    "suspended": "red",
    "parked": "magenta",
    "waiting": "yellow",
    "awaiting": "cyan",
    "polling": "cyan",
    "dispatched": "cyan",
    "paused": "dim",
    "scheduled": "green",
}
#: Alone in its column: an account that should have been polled is worse than any state.
OVERDUE = ("overdue", "bold red")
#: What ends a state that has no due time.
ENDS = {
    "blocked": "on unblock",
    "suspended": "on redrive",
    "parked": "on release",
    "paused": "on resume",
    "polling": "now",
    "dispatched": "now",
}
#: The same in a sentence.
WHEN = {
    "blocked": "when its login is unblocked",
    "suspended": "when it is redriven",
    "parked": "when it is released",
    "paused": "when it is resumed",
}
#: The column that stands right.
AMOUNT = "amount"
#: Between two columns.
GAP = 2

DAY_S = 86400
UNITS = (("d", DAY_S), ("h", 3600), ("min", 60), ("s", 1))


# -------------------------------------------------------------------------------------------------- moments, distances


def moment(when: str, now: datetime, *, seconds: bool = False) -> str:
    """An ISO 8601 moment on the local clock: "14:36" today, "Mon 14:36" within a week, else the date."""
    local, today = datetime.fromisoformat(when).astimezone(), now.astimezone()
    if abs((local.date() - today.date()).days) >= 7:
        return f"{local:%Y-%m-%d}"
    return f"{local:{'' if local.date() == today.date() else '%a '}%H:%M{':%S' if seconds else ''}}"


def zone(now: datetime) -> str:
    """The local time zone by its distance: "UTC", "UTC-3", "UTC+5:30"."""
    offset = now.astimezone().utcoffset() or timedelta(0)
    minutes = abs(int(offset.total_seconds())) // 60
    sign = "" if not minutes else "-" if offset < timedelta(0) else "+"
    return f"UTC{sign}{minutes // 60 or ''}{f':{minutes % 60:02}' if minutes % 60 else ''}"


def distance(when: str | None, now: datetime) -> str:
    """How far an ISO 8601 moment is from now: "in 3 h 52 min", "now", "12 s ago", "-" for none."""
    if when is None:
        return "-"
    seconds = round((datetime.fromisoformat(when) - now).total_seconds())
    if seconds == 0:
        return "now"
    return f"in {duration(seconds)}" if seconds > 0 else f"{duration(-seconds, most=1)} ago"


def duration(seconds: int, most: int = 2) -> str:
    """The `most` largest units of a duration, no seconds beside minutes: "3 h 52 min", "12 min", "5 s"."""
    parts: list[str] = []
    for name, size in UNITS:
        count, seconds = divmod(seconds, size)
        if count and not (parts and name == "s"):
            parts.append(f"{count} {name}")
        elif parts:
            break
    return " ".join(parts[:most]) or "0 s"


def utc(ms: int) -> datetime:
    """The aware moment of `ms` since the epoch."""
    return datetime.fromtimestamp(ms / 1000, UTC)


# -------------------------------------------------------------------------------------------------------------- tables


class Fitting:
    """Rows in the first of several layouts that is not wider than the terminal; in the last one where none fits.

    Nothing is folded or cut, so that an alias can be copied. Not rich's `Table`, which takes 7 s for 10,000 rows.
    """

    def __init__(self, columns: Mapping[str, Sequence[str | Text]], layouts: Sequence[Sequence[str]]) -> None:
        self._columns = columns
        self._layouts = layouts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        layout = next((layout for layout in self._layouts if self._fits(layout, options)), self._layouts[-1])
        widths = list(map(self._width, layout))
        rows = zip(*(self._columns[name] for name in layout), strict=True)
        for row in ([Text(name, "bold") for name in layout], *rows):
            line: list[Segment] = []
            for name, width, cell in zip(layout, widths, row, strict=True):
                blank = " " * (width - cell_len(str(cell)))
                style = console.get_style(cell.style) if isinstance(cell, Text) else None
                left, right = (blank, "") if name == AMOUNT else ("", blank)
                line += [Segment(left), Segment(str(cell), style), Segment(right + " " * GAP)]
            while line and not line[-1].text.strip():
                line.pop()
            yield from [*line, Segment.line()]

    def _fits(self, layout: Sequence[str], options: ConsoleOptions) -> bool:
        return sum(map(self._width, layout)) + GAP * (len(layout) - 1) <= options.max_width

    def _width(self, name: str) -> int:
        return max(cell_len(str(cell)) for cell in (name, *self._columns[name]))


def table_of(*columns: str, wrap: str = "") -> Table:
    """An empty table without lines; only the column `wrap` may break its cells, between words."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column != wrap and column != columns[0])
    return table


def by_trouble(rows: Iterable[AccountRow]) -> list[AccountRow]:
    """Overdue accounts first, then by state, then by name."""
    order = {state: place for place, state in enumerate(COLOURS)}
    return sorted(rows, key=lambda row: (not row.overdue, order[row.state], row.alias))


def accounts_table(rows: Iterable[AccountRow], now: datetime) -> Fitting:
    """One line per account, trouble first."""
    rows = by_trouble(rows)
    at = f"at ({zone(now)})"
    columns: dict[str, list[str | Text]] = {
        "account": [row.alias for row in rows],
        "login": [row.login for row in rows],
        "institution": [row.institution for row in rows],
        "state": [state(row) for row in rows],
        "outcome": [row.last_outcome or "-" for row in rows],
        "last balance": [distance(row.last_ok, now) for row in rows],
        "next due": [ENDS.get(row.state) or distance(row.next_due, now) for row in rows],
        at: [moment(row.next_due, now) if row.next_due else "" for row in rows],
    }
    layouts = [
        ("account", "login", "institution", "state", "outcome", "last balance", "next due", at),
        ("account", "login", "state", "outcome", "last balance", "next due", at),
        ("account", "state", "outcome", "last balance", "next due", at),
        ("account", "state", "outcome", "last balance", "next due"),
        ("account", "state", "outcome", "next due"),
        ("account", "state", "next due"),
        ("account", "state"),
    ]
    return Fitting(columns, layouts)


def state(row: AccountRow) -> Text:
    """The state in its colour."""
    return Text(*OVERDUE) if row.overdue else Text(row.state, COLOURS[row.state])


def tally(counts: Mapping[str, int]) -> Text:
    """ "14 accounts: 2 blocked, 1 waiting, 11 scheduled", trouble first."""
    total = sum(counts.values())
    text = Text(f"{total} account{'' if total == 1 else 's'}", "bold")
    colours = dict([OVERDUE]) | COLOURS
    for place, name in enumerate(name for name in colours if counts.get(name)):
        text.append(": " if place == 0 else ", ", "none").append(f"{counts[name]} {name}", colours[name])
    return text


def tally_rows(rows: Iterable[AccountRow]) -> Text:
    """The tally of these accounts."""
    return tally(Counter(state(row).plain for row in rows))


def letters_table(rows: Iterable[LetterRow], now: datetime) -> Table | Text:
    """One line per dead letter, queue by queue."""
    table = table_of("account", "code", "what was said", "since", wrap="what was said")
    queue = ""
    for row in rows:
        if row.queue != queue:
            queue = row.queue
            table.add_row(Text(queue.removeprefix("balances.dead."), "bold red"))
        name = f"  {row.alias}" if row.alias else f"  (login {row.login})"
        table.add_row(name, row.code, row.description or row.type, distance(row.last_at, now))
    return table if queue else Text("no dead letters", "green")


def findings_table(findings: Iterable[Finding]) -> Table:
    """One line per thing looked at."""
    table = table_of("", "what", "found", wrap="found")
    for finding in findings:
        mark = Text("ok", "green") if finding.is_right else Text("wrong", "bold red")
        table.add_row(mark, finding.name, finding.detail)
    return table


def audit_table(rows: Iterable[AuditRow], now: datetime) -> Table | Text:
    """One line per order, newest first."""
    at = f"at ({zone(now)})"
    table = table_of(at, "who", "what", "of", "outcome", wrap="outcome")
    table.columns[1].no_wrap = False
    for row in rows:
        table.add_row(moment(row.at, now, seconds=True), row.actor, row.action, row.subject, row.outcome)
    return table if table.row_count else Text("no order was given")


def observed_table(observations: Iterable[dict[str, Any]], now: datetime) -> Fitting | Text:
    """One line per balance; an account without data has one line that says so."""
    as_of = f"as of ({zone(now)})"
    names = ("account", "type", AMOUNT, "", as_of, "fetched")
    lines = [line for data in observations for line in _observed_lines(data, now)]
    if not lines:
        return Text("no balance yet")
    columns = dict(zip(names, map(list, zip(*lines, strict=True)), strict=True))
    layouts = [names, names[:5], names[:4], ("account", AMOUNT, "")]
    return Fitting(columns, layouts)


def _observed_lines(data: Mapping[str, Any], now: datetime) -> Iterator[tuple[str, str, str | Text, str, str, str]]:
    fetched = distance(data["fetched_at"], now)
    if not data["balances"]:
        yield data["account"], "-", Text("no data", "dim"), "", "", fetched
    for each in data["balances"]:
        yield data["account"], each["type"], amount(each), each["currency"], moment(each["as_of"], now), fetched


def amount(balance: Mapping[str, str]) -> str:
    """The amount with the sign that debit gives it."""
    return ("-" if balance["indicator"] == "Debit" else "") + balance["amount"]


# -------------------------------------------------------------------------------------------------------------- stream


def event_line(attributes: Mapping[str, str], data: Mapping[str, Any]) -> Text:
    """One entry of the stream as one line: when (local), which account, what."""
    local = datetime.fromisoformat(attributes["time"]).astimezone()
    line = Text(f"{local:%d %b %H:%M:%S} {zone(local)}  ", "dim")
    line.append(f"{attributes['subject']:<18}  ", "none")
    if attributes["type"] == "balance.observed.v1":
        return line.append(_observed_words(data), "dim" if data["late"] else "none")
    word = attributes["type"].split(".")[1]
    return line.append(_event_words(word, data), (COLOURS | dict([OVERDUE])).get(data.get("state", word), "green"))


def _observed_words(data: Mapping[str, Any]) -> str:
    balances = [f"{amount(each)} {each['currency']} {each['type']}" for each in data["balances"]]
    marks = [mark for mark in ("changed", "late") if data[mark]]
    return ", ".join([*(balances or ["no data"]), *marks])


def _event_words(word: str, data: Mapping[str, Any]) -> str:
    """What became of an account."""
    if "state" in data:
        what = "its login is blocked" if data["state"] == "blocked" else data["state"]
        return f"{what}: {data['code']}" if data.get("code") else what
    if "since" in data:
        return f"{word} since {datetime.fromisoformat(data['since']).astimezone():%d %b %H:%M:%S}"
    return f"{word} by {data['by']}" if data.get("by") else word


# -------------------------------------------------------------------------------------------------------------- a story


def account_story(story: Story, now: datetime) -> RenderableType:
    """One account in words: what it is, why it is where it is, its last polls, and what can be typed."""
    title = Text.assemble((story.row.alias, "bold"), "  ", state(story.row))
    facts = f"{story.row.institution} · login {story.row.login} · {story.interval}"
    parts: list[RenderableType] = [title, Text(facts, "dim"), "", *map(Text, _told(story, now)), ""]
    if story.attempts:
        parts += [Text(f"last polls ({zone(now)})", "bold"), _attempts_table(story, now), ""]
    return Group(*parts, Text("what you can type", "bold"), *(f"  {command}" for command in story.commands))


def _told(story: Story, now: datetime) -> Iterator[str]:
    """The sentences, what lies on top first."""
    yield from map(_sentence, story.limits)
    if story.row.state == "paused":
        yield f"It is paused; underneath it is {story.underneath}. Nothing is asked before it is resumed."
    if story.block:
        yield f"Its login {story.row.login} is blocked: {_said(story.block, now)}."
        yield from _block_told(story)
    if story.reason:
        yield f"It is {story.underneath}: {_said(story.reason, now)}."
        yield f"Its letter is in {story.reason.queue}; its next poll comes {WHEN[story.underneath]}."
    yield from _step_told(story, now)
    if counted := list(_counted(story)):
        yield f"Since its last balance: {', '.join(counted)}."
    yield f"Last balance: {_beside(story.row.last_ok, now)}." if story.row.last_ok else "It has no balance yet."


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _counted(story: Story) -> Iterator[str]:
    if story.waits:
        yield f"long wait {story.waits} of {story.max_waits}"
    if story.tries:
        yield f"short retry {story.tries}"
    if story.losses:
        yield f"{story.losses} poll{'' if story.losses == 1 else 's'} lost with a worker"


def _said(reason: Reason, now: datetime) -> str:
    code = " ".join(filter(None, (reason.code, reason.type)))
    words = f", {reason.description.removesuffix('.')}" if reason.description else ""
    return f"{code}{words}; {_beside(reason.since, now)}"


def _block_told(story: Story) -> Iterator[str]:
    what = "log-on at the bank" if story.blocked_by == "bank" else "key or token towards Khipu"
    yield f"Its {what} failed and is not sent again, for any account that uses it."
    if story.is_manual:
        yield "Only an operator lifts this block, when the bank takes the log-on again."
    else:
        yield "Another one, put where the workers find it, lifts the block within a minute; or an operator does."


def _step_told(story: Story, now: datetime) -> Iterator[str]:
    match story.underneath:
        case "scheduled" if story.due:
            yield f"Next poll: {_due(story, story.due, now)}."
        case "waiting" if story.due:
            yield f"It waits after {story.row.last_outcome}; next try: {_due(story, story.due, now)}."
        case "awaiting" if story.due:
            yield f"Khipu took the request; its callback is awaited: {_beside(story.due, now)} at the latest."
        case "dispatched":
            yield "Its poll is in the queue, for the next free worker."
        case "polling":
            yield f"Its poll is under way (attempt {story.row.attempt})."
    if story.row.overdue and not story.holder:
        yield "It is overdue by more than its own interval: is a worker running? See: balances check"
    if story.holder and story.due and datetime.fromisoformat(story.due) <= now:
        yield f"Its login is busy with {story.holder}; one account of a login is polled at a time."


def _due(story: Story, due: str, now: datetime) -> str:
    """When the next step is due, and what lies over it."""
    soon = "as soon as that allows" if story.limits else "at once"
    when = _beside(due, now) if datetime.fromisoformat(due) > now or story.row.overdue else soon
    return f"{when}, but only {WHEN[story.row.state]}" if story.row.state in WHEN else when


def _beside(when: str | None, now: datetime) -> str:
    """A distance with its moment: "in 4 h 3 min (14:36:20 UTC)"."""
    return f"{distance(when, now)} ({moment(when, now, seconds=True)} {zone(now)})" if when else "-"


def _attempts_table(story: Story, now: datetime) -> Table:
    table = table_of("  ended", "poll", "attempt", "outcome", "took")
    for each in story.attempts:
        outcome = Text(each.outcome, "green" if each.outcome == "ok" else "yellow")
        ended = f"  {moment(each.ended_at, now, seconds=True)}"
        table.add_row(ended, str(each.poll), str(each.attempt), outcome, f"{each.duration_s:.2f} s")
    return table
