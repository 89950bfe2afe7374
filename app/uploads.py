"""Reading a request's images: raw body or multipart form, in memory, counted as it arrives.

Starlette would spool a form to disk before any of our code runs, and its limits leave file parts
out; so the body is counted at `receive` and parsed here.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from app.admission import BodyBudget
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    EmptyBody,
    InvalidParameter,
    MalformedForm,
    UnsupportedFormat,
)
from app.settings import Settings

FORM = "multipart/form-data"
JSON = "application/json"
RAW = "application/octet-stream"
# Besides images a form may hold some other fields. Each part costs some 30 µs of the event loop: a
# form of nothing but parts would hold it for seconds.
SPARE_PARTS = 16
TIMEOUT_HEADER = "x-request-timeout-ms"
Answer = TypeVar("Answer")


def read_deadline(request: Request, settings: Settings) -> float:
    """Return until when the request must be answered, in seconds of `time.monotonic()`.

    Raises:
        InvalidParameter: `X-Request-Timeout-Ms` is not a positive whole number.
    """
    timeout_ms = settings.request_timeout_ms
    asked = request.headers.get(TIMEOUT_HEADER)
    if asked is not None:
        if not (asked.isascii() and asked.isdecimal() and 0 < len(asked) < 16 and int(asked)):
            raise InvalidParameter("X-Request-Timeout-Ms must be a positive whole number.")
        timeout_ms = min(timeout_ms, int(asked))
    return time.monotonic() + timeout_ms / 1000


async def read_image(request: Request, settings: Settings, budget: BodyBudget) -> bytes:
    """Return the request's one image: multipart field `file`, or the raw body.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, MalformedForm, UnsupportedFormat, QueueFull: as their
            names say.
    """
    media_type = media_type_of(request)
    if media_type == FORM:
        images = await _read_form(request, "file", settings, budget)
        if len(images) > 1:
            raise MalformedForm(
                "The form has several fields 'file'; send many images to /classify/batch."
            )
        return images[0]
    if media_type and media_type != RAW and not media_type.startswith("image/"):
        raise UnsupportedFormat(
            f"Send the image as {FORM} with field 'file', raw as image/* or {RAW}, "
            f"or as {JSON} in base64."
        )
    return await read_body(request, settings, budget)


async def read_body(request: Request, settings: Settings, budget: BodyBudget) -> bytes:
    """Return the whole body.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, QueueFull: as their names say.
    """
    body = bytearray()
    await _receive(request, settings, budget, body.extend)
    if not body:
        raise EmptyBody("The request's body is empty; send an image.")
    return bytes(body)


async def read_images(request: Request, settings: Settings, budget: BodyBudget) -> list[bytes]:
    """Return the images of the repeated multipart field `files`, in order.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, MalformedForm, UnsupportedFormat, QueueFull: as their
            names say.
    """
    if media_type_of(request) != FORM:
        raise UnsupportedFormat(f"Send the images as {FORM} with repeated field 'files'.")
    return await _read_form(request, "files", settings, budget)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Await `work`, cancelling it as soon as the client hangs up.

    The body must have been read: the server's next message is then the disconnect.

    Raises:
        ClientDisconnect: the client has gone.
    """
    task = asyncio.current_task()
    assert task is not None, "runs inside the request's task"

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if watcher.done() and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


def media_type_of(request: Request) -> str:
    """Return the body's media type without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _receive(
    request: Request, settings: Settings, budget: BodyBudget, feed: Callable[[bytes], None]
) -> None:
    """Feed the body on as it arrives, within its limits of size and time."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > settings.max_upload_bytes:
        raise BodyTooLarge(settings.max_upload_bytes)
    size = 0  # of what is here: a promise of bytes must not shut others out
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > settings.max_upload_bytes:
                    raise BodyTooLarge(settings.max_upload_bytes)
                budget.cover(size)
                feed(chunk)
    except TimeoutError:
        raise BodyTimeout(settings.body_timeout_s) from None


async def _read_form(
    request: Request, field: str, settings: Settings, budget: BodyBudget
) -> list[bytes]:
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise MalformedForm("The multipart Content-Type names no boundary.")
    form = _Form(boundary, settings.queue_size + SPARE_PARTS)
    await _receive(request, settings, budget, form.feed)
    images = form.fields().get(field.encode(), [])
    if not images:
        raise MalformedForm(f"The form has no field '{field}'.")
    if not all(images):
        raise EmptyBody(f"A field '{field}' is empty; send an image.")
    return images


class _Form:
    """Collects a form's fields as they arrive; file names are never looked at."""

    def __init__(self, boundary: bytes, max_parts: int) -> None:
        self._parts_left = max_parts
        self._fields: dict[bytes, list[bytes]] = {}
        self._header = (bytearray(), bytearray())  # name, value
        self._name = b""
        self._content = bytearray()
        self._started = self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
                    "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
                    "on_header_end": self._end_header,
                    "on_part_data": self._add_content,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise MalformedForm("The multipart boundary is not valid.") from error

    def feed(self, chunk: bytes) -> None:
        """Parse the next bytes of the body.

        Raises:
            MalformedForm: not a multipart form.
        """
        self._started = self._started or bool(chunk)
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise MalformedForm("The multipart form cannot be read.") from error

    def fields(self) -> dict[bytes, list[bytes]]:
        """Return the parts' contents by field name, in order.

        Raises:
            EmptyBody: nothing came.
            MalformedForm: cut off before the closing boundary.
        """
        if not self._started:
            raise EmptyBody("The request's body is empty; send an image.")
        if not self._ended:
            raise MalformedForm("The multipart form ends before its closing boundary.")
        return self._fields

    def _begin(self) -> None:
        self._name, self._content = b"", bytearray()
        self._parts_left -= 1
        if self._parts_left < 0:
            raise MalformedForm("The form has more parts than images can be taken.")

    def _add(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)

    def _end_header(self) -> None:
        name, value = map(bytes, self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            self._name = options.get(b"name", b"")

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        self._content += memoryview(data)[start:end]

    def _end_part(self) -> None:
        self._fields.setdefault(self._name, []).append(bytes(self._content))
        self._content = bytearray()

    def _end(self) -> None:
        self._ended = True
