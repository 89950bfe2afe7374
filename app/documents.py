"""JSON bodies: what clients send that can carry an image only as base64."""

import asyncio
import base64
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema

from app.admission import BodyBudget
from app.errors import DeadlineExceeded, InvalidParameter, MalformedJson, Problem
from app.forms import RawBody
from app.predictions import ScoreFunction
from app.settings import Settings
from app.uploads import read_body, unless_gone

# One white pixel, so that an example can be sent as it stands.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)
Document = TypeVar("Document", bound=BaseModel)
Answer = TypeVar("Answer")
# Of one document, lists and their elements included. Each costs a hundred times its bytes in memory
# while it is parsed, and time in which the event loop waits; an image is a single one.
MAX_MEMBERS = 100_000
# The time for a number grows with the square of its digits, and the parser holds the GIL.
MAX_DIGITS = 100
_SLICE_BYTES = 2**20
_LONG = b"0" * (MAX_DIGITS + 1)
_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"000000000")
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_\\"
# Base64 needs none, but .NET escapes each plus sign of it: some 300,000 in twenty MiB. Nothing but
# escapes, 3.5 million, would hold the GIL for a third of a second. Short ones cost a tenth of that:
# PHP escapes each slash, and where base64 has lines each end of one takes two.
MAX_ESCAPES = 400_000
MAX_BACKSLASHES = 1_500_000
# While a document is read its text is there up to three times over: one document at a time.
_READER = ThreadPoolExecutor(1, "mixer-document")
_LINE_BREAKS_AND_SPACES = b" \t\r\n\f\v"
# Decoded at once. A call holds the GIL: one for an image of 15 MB would hold it for 60 ms.
_BASE64_LETTERS = 1 << 20  # a multiple of four


def decode_base64(text: Any) -> bytes:
    """Return the bytes of RFC 4648 base64, line breaks and a data URL's head (RFC 2397) allowed.

    Raises:
        ValueError: no text, not base64, or a data URL without data.
    """
    if not isinstance(text, str):
        raise ValueError("it must be a text in base64")  # noqa: TRY004 - pydantic reports ValueErrors
    if text.startswith("data:"):
        _, comma, text = text.partition(",")
        if not comma:
            raise ValueError("it is a data URL without data")
    try:
        # As bytes, not split: a text of nothing but spaces would come apart into millions.
        return _decode_slices(text.encode("ascii"))
    except ValueError:  # a letter outside ASCII is one, too
        raise ValueError("it is not base64") from None


def _decode_slices(letters: bytes) -> bytes:
    """Return what `letters` stand for, slice by slice, line breaks and spaces left out."""
    plain, decoded = bytearray(), bytearray()
    for start in range(0, len(letters), _BASE64_LETTERS):
        plain += letters[start : start + _BASE64_LETTERS].translate(None, _LINE_BREAKS_AND_SPACES)
    for start in range(0, len(plain), _BASE64_LETTERS):
        if len(decoded) < start * 3 // 4:
            raise ValueError("there is more behind the padding")
        decoded += base64.b64decode(plain[start : start + _BASE64_LETTERS], validate=True)
    return bytes(decoded)


Base64Image = Annotated[
    bytes,
    BeforeValidator(decode_base64),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "examples": [EXAMPLE_IMAGE]}),
]


class ImageDocument(BaseModel):
    """An image for clients that have nothing but JSON."""

    image: Base64Image = Field(description="an image file in base64; a data URL will do")


class HuggingFaceParameters(BaseModel):
    """What an image-classification client of Hugging Face may ask for.

    What is not known is passed over, as by their servers.
    """

    top_k: int | None = Field(default=None, ge=1, description="at most so many labels; 5 if absent")
    function_to_apply: ScoreFunction | None = Field(
        default=None, description="how logits become scores; softmax if absent"
    )


class HuggingFaceDocument(BaseModel):
    """Hugging Face's request for image classification, where it has parameters."""

    inputs: Base64Image = Field(description="an image file in base64")
    parameters: HuggingFaceParameters | None = None


async def read_document(
    request: Request, settings: Settings, budget: BodyBudget, kind: type[Document]
) -> tuple[Document, float]:
    """Return a JSON body as a `kind`, and until when its request must be answered.

    Raises:
        EmptyBody: nothing came.
        BodyTooLarge, BodyTimeout, DeadlineExceeded, UnsupportedFormat, QueueFull, ClientDisconnect:
            as for every body.
        MalformedJson: not JSON.
        InvalidParameter: not a `kind`, the detail names the member; or a header out of range.
    """
    parse = partial(parse_document, kind=kind)
    return await read_alone(request, settings, budget, parse)


async def read_alone(
    request: Request, settings: Settings, budget: BodyBudget, parse: Callable[[bytes], Answer]
) -> tuple[Answer, float]:
    """Return what `parse` makes of a body off the event loop, and the request's deadline.

    Raises:
        EmptyBody: nothing came.
        BodyTooLarge, BodyTimeout, UnsupportedFormat, InvalidParameter, QueueFull, ClientDisconnect:
            as for every body.
        DeadlineExceeded: its time ran out, maybe behind the documents of others.
    """
    body, deadline = await read_body(request, settings, budget)
    wanted = [body]  # the executor keeps what was cancelled until its turn would have come
    del body
    found = asyncio.get_running_loop().run_in_executor(_READER, _outcome, parse, wanted)
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            outcome = await unless_gone(request, found)
    except TimeoutError:
        raise DeadlineExceeded("The request's time ran out before its body was read.") from None
    finally:
        wanted.clear()
    if isinstance(outcome, Problem):
        raise outcome
    return outcome, deadline


def _outcome(parse: Callable[[bytes], Answer], wanted: list[RawBody]) -> Answer | Problem:
    """Return what `parse` makes of the body that is wanted, or the problem that it is.

    The body is joined here: twelve of 20 MiB at once would hold the event loop for 100 ms.
    Raised through the future that waits for it, a problem would be in a circle with its traceback,
    which holds the body and all that was made of it, until the garbage collector comes.
    """
    try:
        return parse(wanted.pop().image())
    except Problem as problem:
        problem.__traceback__ = problem.__cause__ = problem.__context__ = None
        return problem


def parse_document(body: bytes | memoryview, kind: type[Document]) -> Document:
    """Return JSON text as a `kind`.

    Raises:
        MalformedJson: not JSON.
        InvalidParameter: not a `kind`, or too many members; the detail names the member.
    """
    text = bytes(body)
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_MEMBERS:  # none of them is in base64
        raise InvalidParameter(f"body: more than {MAX_MEMBERS:,} members.")
    if text.count(b"\\u") > MAX_ESCAPES or text.count(b"\\") > MAX_BACKSLASHES:
        raise InvalidParameter("body: more escaped letters than a picture has.")
    if _has_long_number(text):
        raise InvalidParameter(f"body: a number of more than {MAX_DIGITS} digits.")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        # Without its context, whose frames know the text, and this one.
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            raise MalformedJson(f"The body is not JSON: {message}.") from None
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidParameter(f"{place}: {message}.") from None


def _after_scheme(text: bytes) -> bytes:
    """Return what follows a data URL's `data:image/…;base64,` (RFC 2397), or the text itself."""
    head, _, rest = text.partition(b",")
    return rest if head.startswith(b"data:") and head.endswith(b";base64") else text


def _has_long_number(text: bytes) -> bool:
    """Return whether so many digits stand in a row anywhere but in a string of base64.

    Looked for slice by slice: the calls hold the GIL.
    """
    end = 0  # of the last string that has such a row
    for begin in range(0, len(text), _SLICE_BYTES):
        digits = text[begin : begin + _SLICE_BYTES + MAX_DIGITS].translate(_DIGITS_ALIKE)
        while (found := digits.find(_LONG, max(0, end - begin))) >= 0:
            start = begin + found
            quote = text.rfind(b'"', end, start)
            if quote < 0 or _after_scheme(text[quote + 1 : start]).translate(None, _BASE64):
                return True
            end = text.find(b'"', start) + 1
            if end == 0:  # a string without an end: the parser tells
                return False
    return False
