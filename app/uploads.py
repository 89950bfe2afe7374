"""Reading a request's images: raw body or multipart form, in memory, counted as it arrives.

Starlette would spool a form to disk before any of our code runs, and its limits leave file parts
out; so the body is counted at `receive` and parsed here.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from app.errors import BodyTooLarge, EmptyBody, MalformedForm, UnsupportedFormat

FORM = "multipart/form-data"
RAW = "application/octet-stream"
Answer = TypeVar("Answer")


async def read_image(request: Request, max_bytes: int) -> bytes:
    """Return the request's one image: multipart field `file`, or the raw body.

    Raises:
        EmptyBody, BodyTooLarge, MalformedForm, UnsupportedFormat: as their names say.
    """
    media_type = _media_type(request)
    if media_type == FORM:
        images = await _read_form(request, "file", max_bytes)
        if len(images) > 1:
            raise MalformedForm(
                "The form has several fields 'file'; send many images to /classify/batch."
            )
        return images[0]
    if media_type and media_type != RAW and not media_type.startswith("image/"):
        raise UnsupportedFormat(
            f"Send the image as {FORM} with field 'file', or raw as image/* or {RAW}."
        )
    body = await _read_body(request, max_bytes)
    if not body:
        raise EmptyBody("The request's body is empty; send an image.")
    return body


async def read_images(request: Request, max_bytes: int) -> list[bytes]:
    """Return the images of the repeated multipart field `files`, in order.

    Raises:
        EmptyBody, BodyTooLarge, MalformedForm, UnsupportedFormat: as their names say.
    """
    if _media_type(request) != FORM:
        raise UnsupportedFormat(f"Send the images as {FORM} with repeated field 'files'.")
    return await _read_form(request, "files", max_bytes)


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


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_body(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(max_bytes)
    return bytes(body)


async def _read_form(request: Request, field: str, max_bytes: int) -> list[bytes]:
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise MalformedForm("The multipart Content-Type names no boundary.")
    body = await _read_body(request, max_bytes)
    if not body:
        raise EmptyBody("The request's body is empty; send an image.")
    images = _Form(boundary).parse(body).get(field.encode(), [])
    if not images:
        raise MalformedForm(f"The form has no field '{field}'.")
    if not all(images):
        raise EmptyBody(f"A field '{field}' is empty; send an image.")
    return images


class _Form:
    """Collects a form's fields; file names are never looked at."""

    def __init__(self, boundary: bytes) -> None:
        self._fields: dict[bytes, list[bytes]] = {}
        self._header = [bytearray(), bytearray()]  # name, value
        self._name = b""
        self._content: list[bytes] = []
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_part_data": lambda data, start, end: self._content.append(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def parse(self, body: bytes) -> dict[bytes, list[bytes]]:
        """Return the parts' contents by field name, in order.

        Raises:
            MalformedForm: not a multipart form, or cut off before its closing boundary.
        """
        try:
            self._parser.write(body)
        except MultipartParseError as error:
            raise MalformedForm("The multipart form cannot be read.") from error
        if not self._ended:
            raise MalformedForm("The multipart form ends before its closing boundary.")
        return self._fields

    def _begin(self) -> None:
        self._name, self._content = b"", []

    def _add(self, which: int, data: bytes) -> None:
        self._header[which] += data

    def _end_header(self) -> None:
        name, value = map(bytes, self._header)
        self._header = [bytearray(), bytearray()]
        if name.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            self._name = options.get(b"name", b"")

    def _end_part(self) -> None:
        self._fields.setdefault(self._name, []).append(b"".join(self._content))

    def _end(self) -> None:
        self._ended = True
