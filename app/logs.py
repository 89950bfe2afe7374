"""The log: one JSON object a line for collectors, plain text for a person at a terminal.

Both carry the request's ID on every line that was written on behalf of a request.
"""

import logging
import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Literal

from pydantic_core import from_json, to_json

from app.trace import current

LogFormat = Literal["auto", "json", "text"]
_LEVELS = {logging.INFO: "info", logging.ERROR: "error"}  # of requests
# What a pipe that is ready takes at once (POSIX, PIPE_BUF: Linux's).
_PIECE_BYTES = 4096


class StandardError:
    """Standard error for what must not depend on it: it never waits and never fails.

    The event loop writes a line for each request. A collector that has stopped reading would stop
    it, and a full disk every step that comes after a line. What is not taken is lost, and counted.
    """

    def __init__(self) -> None:
        self.lost = 0  # lines, or parts of one
        self._lock = threading.RLock()  # a signal's handler logs, too, whatever it came between
        self._is_cut = False  # the last line has no end
        self._terminal: int | None = None  # a descriptor of its own

    def claim_terminal(self) -> None:
        """Open the terminal once more: one that nobody reads says that it is ready, and waits.

        Not to wait is told to an open file, and standard error's is that of the shell, too.
        """
        if self._terminal is None and _is_terminal():
            with suppress(OSError):
                name = os.ttyname(sys.stderr.fileno())
                self._terminal = os.open(name, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)

    def write(self, text: str) -> None:
        """Write one line, if it is taken at once."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            try:
                descriptor = self._terminal or sys.stderr.fileno()
                if self._is_cut:
                    data = b"\n" + data
                while data:
                    if not select.select((), (descriptor,), (), 0)[1]:
                        raise BlockingIOError
                    data = data[os.write(descriptor, data[:_PIECE_BYTES]) :]
                    self._is_cut = bool(data)
            except (OSError, ValueError, AttributeError):  # closed, by now or from the start
                self.lost += 1

    def flush(self) -> None:
        """Do nothing: what is written is out."""


STANDARD_ERROR = StandardError()


def configure(level: str, log_format: LogFormat) -> None:
    """Send everything of `level` and above to standard error; `auto` is text on a terminal."""
    as_text = log_format == "text" or (log_format == "auto" and _is_terminal())
    STANDARD_ERROR.claim_terminal()
    handler = logging.StreamHandler(STANDARD_ERROR)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What no line of ours shows is not looked for: a third of a line's cost (Python's logging
    # HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # None: it was closed from the start


def write_request(logger: logging.Logger, level: int, request_id: str, members: str) -> None:
    """Write the line of an answered request, if `logger` writes lines of this level at all.

    `members` are those of a JSON object. There is such a line for each request, refusals included:
    a record of `logging`, and a dictionary to be encoded, would cost more than all the rest of a
    refusal. So a line of JSON goes without either, and only text takes its members apart.
    """
    if not logger.isEnabledFor(level):
        return
    handlers = logging.root.handlers
    if len(handlers) == 1 and type(handlers[0].formatter) is JsonFormatter:
        now, name = _time(time.time()), _LEVELS[level]
        handlers[0].stream.write(  # type: ignore[attr-defined] # `configure` made it
            f'{{"time":"{now}","level":"{name}","message":"request","request_id":"{request_id}",'
            f"{members}}}\n"
        )
    else:
        extra = {"fields": from_json(f"{{{members}}}"), "request_id": request_id}
        logger.log(level, "request", extra=extra)


class JsonFormatter(logging.Formatter):
    """One line, one object; `fields` of a record become members of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON without a line break."""
        fields: Mapping[str, object] = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "traceback": self.formatException(record.exc_info)}
        line: dict[str, object] = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        request_id = _request_id(record)
        if request_id:
            line["request_id"] = request_id
        return to_json(line | {**fields}, fallback=str).decode()


class TextFormatter(logging.Formatter):
    """Time, level, message, then `fields` as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line for people, a traceback below it."""
        parts = [
            f"{time.strftime('%H:%M:%S', time.localtime(record.created))} "
            f"{record.levelname:7} {record.getMessage()}"
        ]
        parts += [f"{name}={value}" for name, value in getattr(record, "fields", {}).items()]
        request_id = _request_id(record)
        if request_id:
            parts.append(f"id={request_id}")
        text = " ".join(parts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _time(seconds: float) -> str:
    """Return seconds of `time.time()` as ISO 8601 with milliseconds."""
    second, ms = divmod(round(seconds * 1000), 1000)
    return f"{_second(second)}.{ms:03}+00:00"


@lru_cache(maxsize=2)
def _second(epoch_s: int) -> str:
    """Return a whole second of UTC as ISO 8601; many lines share one."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))


def _request_id(record: logging.LogRecord) -> str | None:
    named: str | None = getattr(record, "request_id", None)
    if named:
        return named
    trace = current()
    return trace.request_id if trace else None
