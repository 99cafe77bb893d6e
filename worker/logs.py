"""Write one line per event to stderr: for people on a terminal, JSON elsewhere; and never what an exception says.

    our own events (structlog) ──┐
    Celery's, kombu's, tornado's ┼─▶ values out ─▶ timestamp, level, event, fields ─▶ console | JSON
    warnings, uncaught errors ───┘

The text of an exception may hold anything: a request with its key, a line of a script with a balance. So a line has its
types and the frames that it came through instead, and other people's lines too. Events and fields: docs/logs.md.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from logging import StreamHandler
from pathlib import Path
from typing import Any, ClassVar, TextIO, assert_never

import structlog
from structlog.typing import EventDict, Processor

from worker.policy import Block, DeadLetter, Publish, Retry

log = structlog.get_logger()

#: The innermost frames tell where; those above are Celery's, the same every time.
MOST_FRAMES = 12
#: An exception's causes, and theirs; a chain may be a ring.
MOST_CAUSES = 5
#: What these say of every task, our own line per attempt says better.
DOUBLED = ("celery.worker.strategy", "celery.app.trace")
#: Level of a decision's line: what only waits is nothing to look at, what needs an operator is.
LEVELS = {Publish: logging.INFO, Retry: logging.INFO, DeadLetter: logging.WARNING, Block: logging.ERROR}

_timestamp = structlog.processors.TimeStamper(fmt="iso", utc=True)


def configure(level: int | str = logging.INFO, logfile: str | None = None) -> None:
    """Sends all of this process's lines to stderr or `logfile`: structlog's, logging's, warnings, uncaught errors."""
    handler = logging.FileHandler(logfile, encoding="utf-8") if logfile else logging.StreamHandler()
    is_terminal = logfile is None and sys.stderr.isatty()
    handler.setFormatter(formatter(is_terminal=is_terminal))
    _Lines.render = staticmethod(_renderer(is_terminal=is_terminal))
    handler.addFilter(without_values)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in DOUBLED:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a line that cannot be written would be printed with its arguments
    structlog.configure(
        processors=[
            _only_wanted,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            _timestamp,
            _types_and_frames,
            _in_order,
            _as_argument,
        ],
        logger_factory=_Lines,
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        cache_logger_on_first_use=True,
    )
    _catch_strays()


def _as_argument(_: object, __: str, entry: EventDict) -> tuple[tuple[EventDict], dict[str, Any]]:
    """For `_Lines`, which renders: whoever logs must not meet an error of that."""
    return (entry,), {}


class _Lines:
    """What our own events are written with: the root logger's handler, without a record of logging's for each.

    A record is looked at, copied and formatted as if it were somebody else's; that was half of what a line cost.
    """

    #: Set by `configure`, also for loggers that were used before.
    render: ClassVar[Callable[[Any, str, EventDict], Any]]

    def __init__(self, *_: object) -> None:
        self._root = logging.getLogger()

    def write(self, entry: EventDict) -> None:
        """One line, at once; one that cannot be rendered or written stops nothing, as with logging's handlers."""
        with suppress(Exception):
            line = f"{_Lines.render(None, '', entry)}\n"
            for handler in self._root.handlers:
                if isinstance(handler, StreamHandler) and handler.lock:
                    with handler.lock:
                        handler.stream.write(line)
                        handler.flush()

    debug = info = warning = error = critical = write


def _only_wanted(_: object, level: str, entry: EventDict) -> EventDict:
    """By the root logger's level, which may change after a logger was first used."""
    if not logging.getLogger().isEnabledFor(getattr(logging, level.upper())):
        raise structlog.DropEvent
    return entry


def formatter(*, is_terminal: bool) -> logging.Formatter:
    """What makes a line of a record, a structlog event or anybody else's."""
    others: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _timestamp,
    ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=others,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _types_and_frames,
            _in_order,
            _renderer(is_terminal=is_terminal),
        ],
    )


def line(event: str, **fields: object) -> str:
    """A JSON line made without logging: for signal handlers, which may interrupt a line that is being written."""
    entry = _timestamp(None, "info", {"level": "info", "event": event, **fields})
    return str(_renderer(is_terminal=False)(None, "info", _in_order(None, "info", entry))) + "\n"


def decided(decision: Publish | Retry | DeadLetter | Block) -> dict[str, object]:
    """The fields of a line that tells a decision."""
    told: dict[str, object] = {"decision": type(decision).__name__}
    match decision:
        case Publish():
            return told
        case Retry(countdown):
            return {**told, "countdown_s": round(countdown.total_seconds(), 1)}
        case DeadLetter(queue):
            return {**told, "queue": queue}
        case Block(credential):
            return {**told, "credential": credential}
    assert_never(decision)


# -------------------------------------------------------------------------------------------------------- rendering


def _renderer(*, is_terminal: bool) -> Processor:
    if is_terminal:
        return structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ)
    return _as_json


def _type_name(value: object) -> str:
    """What JSON has no word for is not shown: its `repr` may be anything."""
    return type(value).__name__


#: `json.dumps` with a default would make one for each line.
_json = json.JSONEncoder(default=_type_name, skipkeys=True)


def _as_json(_: object, __: str, entry: EventDict) -> str:
    return _json.encode(entry)


def _in_order(_: object, __: str, entry: EventDict) -> EventDict:
    """When, how bad and what first, then the fields."""
    first = {name: entry.pop(name) for name in ("timestamp", "level", "event") if name in entry}
    return {**first, "event": str(first.get("event", "")).strip(), **entry}


def _types_and_frames(_: object, __: str, entry: EventDict) -> EventDict:
    """An exception as `error`, its types, and `at`, its frames."""
    entry.pop("stack_info", None)
    found = entry.pop("exc_info", None)
    error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        entry.update(error=types(error), at=frames(error))
    return entry


# ---------------------------------------------------------------------------------------------------------- no values


def types(error: BaseException) -> str:
    """`OperationalError < ConnectionRefusedError (Connection refused)`: what it is, and what it comes from.

    The words are the operating system's, by number; an exception's own text is never asked for.
    """
    return " < ".join(type(each).__name__ + _system_error(each) for each in _causes(error))


def _system_error(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return f" ({os.strerror(number)})" if isinstance(number, int) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(MOST_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def frames(error: BaseException) -> list[str]:
    """Where it was raised, innermost last: `worker/tasks.py:120 ask`."""
    walked = list(traceback.walk_tb(error.__traceback__))[-MOST_FRAMES:]
    return [f"{_short(frame.f_code.co_filename)}:{number} {frame.f_code.co_name}" for frame, number in walked]


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-2:])


def without_values(record: logging.LogRecord) -> bool:
    """A handler's filter: puts types in the place of exceptions among a record's arguments; lets every record pass."""
    record.msg = _harmless(record.msg)
    if isinstance(record.args, Mapping):
        record.args = {name: _harmless(value) for name, value in record.args.items()}
        if record.name == "celery.app.trace" and "exc" in record.args:  # it makes texts of them itself
            record.args.update(exc=str(record.args["exc"]).partition("(")[0], traceback="", args="", kwargs="")
    elif record.args:
        record.args = tuple(map(_harmless, record.args))
    return True


def _harmless(value: Any) -> Any:
    return types(value) if isinstance(value, BaseException) else value


# -------------------------------------------------------------------------------------------------------------- strays


def _catch_strays() -> None:
    """Python's own ways to write to stderr."""
    logging.captureWarnings(True)  # so that Celery, which does this too, leaves what follows alone
    warnings.showwarning = _show_warning
    sys.excepthook = _uncaught
    sys.unraisablehook = lambda caught: log.error("uncaught error", exc_info=caught.exc_value)
    threading.excepthook = _uncaught_in_thread


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001 - the signature of warnings.showwarning
    line: str | None = None,  # noqa: ARG001
) -> None:
    if issubclass(category, PendingDeprecationWarning):  # Python drops them, Celery turns them on
        return
    # Libraries that warn of their input quote it, in a plain UserWarning (pydantic does); others speak of the code.
    text = "" if category is UserWarning else " ".join(str(message).split())
    log.warning("warning", category=category.__name__, text=text, at=[f"{_short(filename)}:{lineno}"])


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("uncaught error", exc_info=error)


def _uncaught_in_thread(caught: threading.ExceptHookArgs) -> None:
    if not issubclass(caught.exc_type, SystemExit):
        name = caught.thread.name if caught.thread else ""
        log.critical("uncaught error", thread=name, exc_info=caught.exc_value)
