"""The log: one JSON object a line for collectors, plain text for a person at a terminal.

Both carry the request's ID on every line that was written on behalf of a request.
"""

import logging
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from pydantic_core import to_json

from app.trace import current

LogFormat = Literal["auto", "json", "text"]


def configure(level: str, log_format: LogFormat) -> None:
    """Send everything of `level` and above to standard error; `auto` is text on a terminal."""
    as_text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What no line of ours shows is not looked for: a third of a line's cost (Python's logging
    # HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def write_request(
    logger: logging.Logger, level: int, request_id: str, fields: Mapping[str, object]
) -> None:
    """Write the line of an answered request, if `logger` writes lines of this level at all.

    There is one for each request, refusals included: a record of `logging` with all that belongs to
    it costs more than everything else about a refusal, so a line of JSON goes without one.
    """
    if not logger.isEnabledFor(level):
        return
    handlers = logging.root.handlers
    if len(handlers) == 1 and type(handlers[0].formatter) is JsonFormatter:
        line = json_line(
            time.time(), logging.getLevelName(level).lower(), "request", request_id, fields
        )
        handlers[0].stream.write(line + "\n")  # type: ignore[attr-defined] # `configure` made it
    else:
        logger.log(level, "request", extra={"fields": fields, "request_id": request_id})


def json_line(
    seconds: float, level: str, message: str, request_id: str | None, fields: Mapping[str, object]
) -> str:
    """Return one line as JSON without its line break; `seconds` are of `time.time()`."""
    line: dict[str, object] = {
        "time": f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03}+00:00",
        "level": level,
        "message": message,
    }
    if request_id:
        line["request_id"] = request_id
    line.update(fields)
    return to_json(line, fallback=str).decode()


class JsonFormatter(logging.Formatter):
    """One line, one object; `fields` of a record become members of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON without a line break."""
        fields: Mapping[str, object] = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "traceback": self.formatException(record.exc_info)}
        level, message = record.levelname.lower(), record.getMessage()
        return json_line(record.created, level, message, _request_id(record), fields)


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
