"""Reading a request's images: raw body or multipart form, in memory, counted as it arrives."""

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from app.admission import BodyBudget
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    DeadlineExceeded,
    InvalidParameter,
    UnsupportedFormat,
)
from app.forms import SLICE_BYTES, Form, RawBody
from app.settings import Settings
from app.turns import TURN_S, Turns

FORM = "multipart/form-data"
JSON = "application/json"
RAW = "application/octet-stream"
TIMEOUT_HEADER = "x-request-timeout-ms"
_MAX_TIMEOUT_DIGITS = 15
LATE_BODY = "The request's time ran out before its body was here."
Answer = TypeVar("Answer")


def deadline_after(asked: str | None, settings: Settings) -> float:
    """Return until when a request must be answered, in seconds of `time.monotonic()`.

    `asked` is its `X-Request-Timeout-Ms`, if it has one.

    Raises:
        InvalidParameter: that is not a positive whole number.
    """
    timeout_ms = settings.request_timeout_ms
    if asked is not None:
        digits = asked.lstrip("0")
        if not (asked.isascii() and digits.isdecimal()):
            raise InvalidParameter("X-Request-Timeout-Ms must be a positive whole number.")
        if len(digits) <= _MAX_TIMEOUT_DIGITS:  # more are more than any setting
            timeout_ms = min(timeout_ms, int(digits))
    return time.monotonic() + timeout_ms / 1000


def is_longer(declared: str, limit: int) -> bool:
    """Return whether a `Content-Length` is over `limit`; one that is no number is not.

    It may have thousands of zeros ahead, which `int` alone would refuse to read.
    """
    digits = declared.lstrip("0")
    return digits.isdecimal() and (len(digits) > 18 or int(digits) > limit)


def image_reader(content_type: str) -> Form | RawBody:
    """Return what reads a body of that type with one image: a form's field `file`, or all of it.

    Raises:
        MalformedForm: a form without a boundary.
        UnsupportedFormat: a type that holds no image.
    """
    media_type = _media_type(content_type)
    if media_type == FORM:
        return Form(content_type, 1)
    if media_type and media_type != RAW and not media_type.startswith("image/"):
        raise UnsupportedFormat(
            f"Send the image as {FORM} with field 'file', raw as image/* or {RAW}, "
            f"or as {JSON} in base64."
        )
    return RawBody()


async def read_image(
    request: Request, settings: Settings, budget: BodyBudget
) -> tuple[bytes, float]:
    """Return the request's one image, multipart field `file` or the raw body; and its deadline.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, DeadlineExceeded, MalformedForm, UnsupportedFormat,
            InvalidParameter, QueueFull, ClientDisconnect: as their names say.
    """
    reader = image_reader(request.headers.get("content-type", ""))
    deadline = await _receive(request, settings, budget, reader)
    return reader.image(), deadline


async def read_body(
    request: Request, settings: Settings, budget: BodyBudget
) -> tuple[RawBody, float]:
    """Return the whole body, in pieces yet, and the request's deadline.

    Raises:
        BodyTooLarge, BodyTimeout, DeadlineExceeded, UnsupportedFormat, InvalidParameter, QueueFull,
            ClientDisconnect: as their names say.
    """
    body = RawBody()
    return body, await _receive(request, settings, budget, body)


async def read_images(
    request: Request, settings: Settings, budget: BodyBudget
) -> tuple[list[bytes], float]:
    """Return the images of the repeated multipart field `files`, in order; and the deadline.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, DeadlineExceeded, MalformedForm, TooManyImages,
            UnsupportedFormat, InvalidParameter, QueueFull, ClientDisconnect: as their names say.
    """
    if media_type_of(request) != FORM:
        raise UnsupportedFormat(f"Send the images as {FORM} with repeated field 'files'.")
    form = Form(request.headers["content-type"], settings.queue_size)
    deadline = await _receive(request, settings, budget, form)
    return form.images("files"), deadline


async def unless_gone(request: Request, work: Awaitable[Answer]) -> Answer:
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
    return _media_type(request.headers.get("content-type", ""))


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip(" \t").lower()


async def _receive(
    request: Request, settings: Settings, budget: BodyBudget, reader: Form | RawBody
) -> float:
    """Feed the body on as it arrives, within its limits; return the deadline of what follows.

    What a client asks for counts from its headers on. Where it does not ask, the body has a time of
    its own, and the setting's begins when it is here. In seconds of `time.monotonic()`.
    """
    asked = request.headers.get(TIMEOUT_HEADER)
    deadline = deadline_after(asked, settings)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedFormat(
            "Send the body as it is, without Content-Encoding.", {"Accept-Encoding": "identity"}
        )
    if is_longer(request.headers.get("content-length", ""), settings.max_upload_bytes):
        raise BodyTooLarge(settings.max_upload_bytes)
    size = 0  # of what is here: a promise of bytes must not shut others out
    patience_s = settings.body_timeout_s
    if asked is not None:
        patience_s = min(patience_s, deadline - time.monotonic())
    try:
        async with asyncio.timeout(patience_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > settings.max_upload_bytes:
                    raise BodyTooLarge(settings.max_upload_bytes)
                budget.cover(size)
                if isinstance(reader, Form):
                    await _parse(reader, chunk, request.app.state.service.turns)
                else:
                    reader.feed(chunk)
    except TimeoutError:
        if patience_s < settings.body_timeout_s:
            raise DeadlineExceeded(LATE_BODY) from None
        raise BodyTimeout(settings.body_timeout_s) from None
    return deadline_after(None, settings) if asked is None else deadline


async def _parse(form: Form, chunk: bytes, turns: Turns) -> None:
    """Feed a form slice by slice: parts and their headers are read byte by byte."""
    await turns.mine()
    began = time.monotonic()
    for start in range(0, len(chunk), SLICE_BYTES):
        if time.monotonic() - began > TURN_S:
            await turns.mine()
            began = time.monotonic()
        form.feed(chunk[start : start + SLICE_BYTES])
