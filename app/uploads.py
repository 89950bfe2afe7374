"""Reading a request's images: raw body or multipart form, in memory, counted as it arrives."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

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
from app.forms import Form, RawBody
from app.settings import Settings

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
        is_number = asked.isascii() and asked.isdecimal() and len(asked) <= _MAX_TIMEOUT_DIGITS
        if not (is_number and int(asked)):
            raise InvalidParameter("X-Request-Timeout-Ms must be a positive whole number.")
        timeout_ms = min(timeout_ms, int(asked))
    return time.monotonic() + timeout_ms / 1000


def is_longer(declared: str, limit: int) -> bool:
    """Return whether a `Content-Length` is over `limit`; one that is no number is not.

    It may have thousands of zeros ahead, which `int` alone would refuse to read.
    """
    digits = declared.lstrip("0")
    return digits.isdecimal() and (len(digits) > 18 or int(digits) > limit)


def read_deadline(request: Request, settings: Settings) -> float:
    """Return `deadline_after` for a request."""
    return deadline_after(request.headers.get(TIMEOUT_HEADER), settings)


def after_body(deadline: float, request: Request, settings: Settings) -> float:
    """Return a request's deadline once its body is here.

    What a client asks for counts from its headers on. Where it does not ask, the body has had a
    time of its own, and the setting's begins now.
    """
    if TIMEOUT_HEADER in request.headers:
        return deadline
    return deadline_after(None, settings)


def image_reader(content_type: str, max_images: int) -> Form | RawBody:
    """Return what reads a body of that type with one image: a form's field `file`, or all of it.

    Raises:
        MalformedForm: a form without a boundary.
        UnsupportedFormat: a type that holds no image.
    """
    media_type = content_type.partition(";")[0].strip(" \t").lower()
    if media_type == FORM:
        return Form(content_type, max_images)
    if media_type and media_type != RAW and not media_type.startswith("image/"):
        raise UnsupportedFormat(
            f"Send the image as {FORM} with field 'file', raw as image/* or {RAW}, "
            f"or as {JSON} in base64."
        )
    return RawBody()


async def read_image(request: Request, settings: Settings, budget: BodyBudget) -> bytes:
    """Return the request's one image: multipart field `file`, or the raw body.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, DeadlineExceeded, MalformedForm, UnsupportedFormat,
            QueueFull: as their names say.
    """
    reader = image_reader(request.headers.get("content-type", ""), settings.queue_size)
    await _receive(request, settings, budget, reader.feed)
    return reader.image()


async def read_body(request: Request, settings: Settings, budget: BodyBudget) -> bytes:
    """Return the whole body.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, DeadlineExceeded, QueueFull: as their names say.
    """
    body = RawBody()
    await _receive(request, settings, budget, body.feed)
    return body.image()


async def read_images(request: Request, settings: Settings, budget: BodyBudget) -> list[bytes]:
    """Return the images of the repeated multipart field `files`, in order.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, DeadlineExceeded, MalformedForm, UnsupportedFormat,
            QueueFull: as their names say.
    """
    if media_type_of(request) != FORM:
        raise UnsupportedFormat(f"Send the images as {FORM} with repeated field 'files'.")
    form = Form(request.headers["content-type"], settings.queue_size)
    await _receive(request, settings, budget, form.feed)
    return form.images("files")


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
    return request.headers.get("content-type", "").partition(";")[0].strip(" \t").lower()


async def _receive(
    request: Request, settings: Settings, budget: BodyBudget, feed: Callable[[bytes], None]
) -> None:
    """Feed the body on as it arrives, within its limits of size and time."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedFormat(
            "Send the body as it is, without Content-Encoding.", {"Accept-Encoding": "identity"}
        )
    if is_longer(request.headers.get("content-length", ""), settings.max_upload_bytes):
        raise BodyTooLarge(settings.max_upload_bytes)
    size = 0  # of what is here: a promise of bytes must not shut others out
    patience_s = settings.body_timeout_s
    if TIMEOUT_HEADER in request.headers:
        patience_s = min(patience_s, read_deadline(request, settings) - time.monotonic())
    try:
        async with asyncio.timeout(patience_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > settings.max_upload_bytes:
                    raise BodyTooLarge(settings.max_upload_bytes)
                budget.cover(size)
                feed(chunk)
    except TimeoutError:
        if patience_s < settings.body_timeout_s:
            raise DeadlineExceeded(LATE_BODY) from None
        raise BodyTimeout(settings.body_timeout_s) from None
