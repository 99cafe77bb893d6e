"""Lay the status out as one HTML page, for a phone as well: no build, nothing loaded from elsewhere, nothing to press.

It is made of elements, never of text, so that everything from outside is escaped. The script only fetches this page
again, every few seconds and while a filter is typed; without it the filters are a form like any other.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator
from datetime import datetime
from hashlib import sha256
from urllib.parse import urlencode
from xml.etree.ElementTree import Element, tostring

from worker.figures import Figures
from worker.ops import BY_TROUBLE, Standing, Wanted, iso
from worker.status import PAGE, Case, Status, Trouble
from worker.tables import ENDS, distance, utc

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b1f24; --soft: #5b6570; --line: #dfe3e8;
  --red: #b3261e; --redback: #fdecea; --amber: #8a5300; --green: #1a6b3c; --blue: #0b57a4; --violet: #6b3fa0 }
@media (prefers-color-scheme: dark) { :root { --back: #0f1216; --card: #181c22; --text: #e6e9ee; --soft: #9aa4b0;
  --line: #2b323b; --red: #ff8a80; --redback: #2c1716; --amber: #f2b65a; --green: #7fd39b; --blue: #8ab8f0;
  --violet: #c3a2ef } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 1rem }
a { color: var(--blue) }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.05rem; margin: 0 }
header { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; justify-content: space-between;
  margin-bottom: 1rem }
header.wrong h1 { color: var(--red) }
header.fine h1 { color: var(--green) }
.soft, small { color: var(--soft); font-size: .87rem }
code { font: .87rem/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--back);
  color: var(--text); border: 1px solid var(--line); border-radius: 5px; padding: .1rem .4rem;
  display: inline-block; max-width: 100%; user-select: all; overflow-wrap: anywhere }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 9px; padding: .8rem 1rem;
  margin-bottom: .8rem }
.trouble { border-left: 5px solid var(--red) }
.trouble p { margin: .25rem 0 .5rem; max-width: 48rem }
.trouble ul { list-style: none; margin: .5rem 0 0; padding: 0 }
.trouble li { display: flex; flex-wrap: wrap; gap: .1rem .7rem; align-items: baseline; padding: .4rem 0;
  border-top: 1px solid var(--line) }
.trouble li > span { flex: 1 1 22rem; overflow-wrap: anywhere }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1.2rem 0 .7rem }
nav a { background: var(--card); border: 1px solid var(--line); border-radius: 99px; padding: .2rem .75rem;
  text-decoration: none; color: inherit }
nav a[aria-current] { border-color: var(--blue); box-shadow: 0 0 0 1px var(--blue) }
nav b { margin-left: .1rem }
form { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .8rem }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 7px; padding: .45rem .6rem; min-width: 0 }
input { flex: 1 1 14rem }
select { flex: 0 1 auto }
table { width: 100%; border-collapse: collapse; background: var(--card); border: 1px solid var(--line);
  border-radius: 9px }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .87rem }
th, td { padding: .5rem .8rem; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
thead th { border-top: 0; white-space: nowrap }
td time { white-space: nowrap }
td small { display: block }
td small code { margin-top: .2rem }
.state { font-weight: 600; white-space: nowrap }
.blocked, .suspended, .overdue { color: var(--red) }
.parked { color: var(--violet) }
.waiting { color: var(--amber) }
.polling, .dispatched, .awaiting { color: var(--blue) }
.scheduled { color: var(--green) }
.paused { color: var(--soft) }
.pages { display: flex; gap: 1rem; margin: .8rem 0 }
#lost { background: var(--redback); color: var(--red); border: 1px solid var(--red); border-radius: 9px;
  padding: .6rem 1rem; margin-bottom: .8rem; font-weight: 600 }
@media (max-width: 46rem) {
  main { padding: .75rem }
  thead { display: none }
  table, tbody, tr, td { display: block; border: 0; background: none }
  tr { background: var(--card); border: 1px solid var(--line); border-radius: 9px; padding: .6rem .9rem;
    margin-bottom: .6rem }
  td { padding: .12rem 0; display: flex; gap: .6rem }
  td:empty { display: none }
  td::before { content: attr(data-is); flex: 0 0 6.2rem; color: var(--soft); font-size: .87rem }
  td.who { display: block; font-size: 1.05rem }
  td.who::before { display: none }
  td > div { flex: 1; min-width: 0 }
  td time { white-space: normal }
  td time small { display: inline; margin-left: .3rem }
}
"""

SCRIPT = """
'use strict'
const PAUSE_MS = 10000, form = document.forms[0]
let asked = 0, typed = 0

async function show(query) {
  const mine = ++asked
  try {
    const answer = await fetch(location.pathname + query, { cache: 'no-store', signal: AbortSignal.timeout(PAUSE_MS) })
    const page = new DOMParser().parseFromString(await answer.text(), 'text/html')
    if (mine !== asked) return
    for (const id of ['top', 'troubles', 'accounts'])
      document.getElementById(id).replaceWith(page.getElementById(id))
    document.title = page.title
    history.replaceState(null, '', location.pathname + query)
    document.getElementById('lost').hidden = true
  } catch {
    if (mine === asked) document.getElementById('lost').hidden = false
  }
}

function asTyped() {
  const query = new URLSearchParams(new FormData(form))
  for (const [name, value] of [...query]) if (!value) query.delete(name)
  return query.size ? '?' + query : ''
}

form.addEventListener('input', () => {
  clearTimeout(typed)
  typed = setTimeout(() => show(asTyped()), 200)
})
form.addEventListener('submit', event => {
  event.preventDefault()
  show(asTyped())
})
setInterval(() => { if (!String(getSelection())) show(location.search) }, PAUSE_MS)
"""


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def of_status(status: Status) -> bytes:
    """The page."""
    now = utc(status.figures.now_ms)
    troubles = status.troubles
    verdict = _verdict(len(troubles))
    return _document(
        verdict,
        _el(
            "header",
            _el("h1", verdict),
            _el("span", f"{now:%a %d %b %H:%M:%S} UTC", class_="soft"),
            id="top",
            class_="wrong" if troubles else "fine",
        ),
        _el("section", *(_trouble(each, now) for each in troubles), id="troubles"),
        _form(status.wanted, sorted({institution for institution, _ in status.figures.accounts})),
        _accounts(status, now),
    )


def _verdict(count: int) -> str:
    return "Nothing is wrong" if not count else "1 thing is wrong" if count == 1 else f"{count} things are wrong"


def without_redis() -> bytes:
    """The page while Redis is away."""
    trouble = Trouble(
        "Redis is away",
        "Nothing is polled and nothing is known until it is back; nothing is lost. Start it, then:",
        "balances check",
    )
    return _document(
        "Redis is away",
        _el("header", _el("h1", "Redis is away"), id="top", class_="wrong"),
        _el("section", _trouble(trouble, utc(0)), id="troubles"),
        _form(Wanted(), []),
        _el("section", id="accounts"),
    )


def _document(title: str, *content: Element) -> bytes:
    lost = _el("p", "This page is not current: the exporter does not answer.", id="lost", role="alert", hidden="hidden")
    page = _el(
        "html",
        _el(
            "head",
            _el("meta", charset="utf-8"),
            _el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            _el("link", rel="icon", href="data:,"),
            _el("title", f"{title} · balances"),
            _el("style", STYLE),
        ),
        _el("body", _el("main", lost, *content), _el("script", SCRIPT)),
        lang="en",
    )
    return b"<!doctype html>" + tostring(page, encoding="unicode", method="html").encode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------------ troubles


def _trouble(trouble: Trouble, now: datetime) -> Element:
    cases: list[Element] = [_case(each, now) for each in trouble.cases]
    if trouble.more:
        cases.append(_el("li", _el("span", f"and {trouble.more} more", class_="soft")))
    return _el(
        "article",
        _el("h2", trouble.title),
        _el("p", f"{trouble.advice} ", *([_el("code", trouble.command)] if trouble.command else [])),
        *([_el("ul", *cases)] if cases else []),
        class_="card trouble",
    )


def _case(case: Case, now: datetime) -> Element:
    since: list[str | Element] = [] if case.since_ms is None else [" · ", _moment(case.since_ms, now)]
    about = [" · ", case.why] if case.why else []
    return _el(
        "li",
        _el("span", _el("b", case.who), *about, *since),
        *([_el("code", case.command)] if case.command else []),
    )


# ------------------------------------------------------------------------------------------------------------ accounts


def _form(wanted: Wanted, institutions: Iterable[str]) -> Element:
    text = _el("input", type="search", name="q", value=wanted.text, placeholder="alias, or login", maxlength="64")
    text.set("aria-label", "alias, or login")
    return _el(
        "form",
        text,
        _select("state", "any state", wanted.state, ("overdue", *BY_TROUBLE)),
        _select("institution", "any institution", wanted.institution, institutions),
        _el("button", "Show"),
        method="get",
    )


def _select(name: str, any_: str, chosen: str, values: Iterable[str]) -> Element:
    options = [_el("option", any_, value="")]
    for value in values:
        options.append(_el("option", value, value=value, **({"selected": "selected"} if value == chosen else {})))
    select = _el("select", *options, name=name)
    select.set("aria-label", name)
    return select


def _accounts(status: Status, now: datetime) -> Element:
    rows = [_row(each, now) for each in status.accounts]
    heads = ("account", "state", "last balance", "next step", "why")
    table = _el("table", _el("thead", _el("tr", *(_el("th", head) for head in heads))), _el("tbody", *rows))
    return _el(
        "section",
        _el("nav", *_chips(status.figures, status.wanted)),
        *([table] if rows else [_el("p", "No account fits.", class_="card")]),
        _el("div", *_pages(status), class_="pages"),
        id="accounts",
    )


def _chips(figures: Figures, wanted: Wanted) -> Iterator[Element]:
    """Every state in which there are accounts, and a way to see only those."""
    counts = {"overdue": figures.overdue.count}
    for state in BY_TROUBLE:
        counts[state] = sum(number for (_, name), number in figures.accounts.items() if name == state)
    yield _chip("all", sum(figures.accounts.values()), Wanted(), wanted)
    for state, count in counts.items():
        if count or state == wanted.state:
            yield _chip(state, count, Wanted(state=state), wanted)


def _chip(name: str, count: int, leads_to: Wanted, wanted: Wanted) -> Element:
    chip = _el("a", _el("span", name, class_=name), " ", _el("b", f"{count:,}"), href=_address(leads_to))
    if leads_to.state == wanted.state:
        chip.set("aria-current", "true")
    return chip


def _row(standing: Standing, now: datetime) -> Element:
    row = standing.row
    state = [_el("span", row.state, class_=f"state {row.state}")]
    if row.overdue:
        state += [_el("span", "overdue", class_="state overdue")]
    return _el(
        "tr",
        _cell("account", _el("b", row.alias), _el("small", f"{row.login} · {row.institution}"), class_="who"),
        _cell("state", *_spaced(state)),
        _cell("last balance", *_last(row.last_ok, now)),
        _cell("next step", *_next(standing, now)),
        _cell("why", *_reason(standing)),
    )


def _cell(is_: str, *content: str | Element, class_: str = "") -> Element:
    cell = _el("td", *([_el("div", *content)] if content else []), **({"class_": class_} if class_ else {}))
    cell.set("data-is", is_)
    return cell


def _spaced(elements: Iterable[Element]) -> Iterator[str | Element]:
    for element in elements:
        yield from (element, " ")


def _last(last_ok: str | None, now: datetime) -> Iterator[str | Element]:
    if last_ok is None:
        yield "none yet"
    else:
        yield _moment_of(datetime.fromisoformat(last_ok), now)


def _next(standing: Standing, now: datetime) -> Iterator[str | Element]:
    if standing.due_ms is None:
        yield ENDS[standing.row.state]
    else:
        yield _moment(standing.due_ms, now)


def _reason(standing: Standing) -> Iterator[str | Element]:
    if standing.why:
        yield _el("span", standing.why)
    if standing.row.state in {"blocked", "suspended", "parked", "paused"}:
        yield _el("small", _el("code", standing.command))


def _pages(status: Status) -> Iterator[str | Element]:
    first = (status.page - 1) * PAGE
    shown = len(status.accounts)
    if status.page > 1:
        yield _el("a", "← before", href=_address(status.wanted, status.page - 1))
    if status.pages > 1 and shown:
        rest = status.found - first - shown
        yield _el("span", f"{first + 1:,} to {first + shown:,} of {status.found:,}; {rest:,} more", class_="soft")
    if status.page < status.pages:
        yield _el("a", "next →", href=_address(status.wanted, status.page + 1))


def _address(wanted: Wanted, page: int = 1) -> str:
    asked = {
        "q": wanted.text,
        "state": wanted.state,
        "institution": wanted.institution,
        "page": page if page > 1 else "",
    }
    query = urlencode({name: value for name, value in asked.items() if value})
    return f"?{query}"


# ------------------------------------------------------------------------------------------------------------ elements


def _moment(ms: int, now: datetime) -> Element:
    return _moment_of(utc(ms), now)


def _moment_of(moment: datetime, now: datetime) -> Element:
    """Both the distance and the moment: the one to understand, the other to compare with a log."""
    is_today = moment.date() == now.date()
    clock = f"{moment:%H:%M:%S}" if is_today else f"{moment:%a %d %b %H:%M}"
    text = iso(round(moment.timestamp() * 1000))
    return _el("time", distance(text, now), _el("small", f" {clock} UTC"), datetime=text)


def _el(tag: str, *content: str | Element, class_: str = "", **attributes: str) -> Element:
    """An element with its content in order; a text is only ever text."""
    element = Element(tag, {**({"class": class_} if class_ else {}), **attributes})
    for each in content:
        if isinstance(each, Element):
            element.append(each)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + each
        else:
            element.text = (element.text or "") + each
    return element
