"""What answers a request with a problem, or stops start-up, drawn once: exception, status, when.

    StartupError                          stops start-up: one line, exit code 1
    Problem                               answers a request as RFC 9457 problem+json
    ├── EmptyBody                 400     no image in the request
    ├── MalformedForm             400     multipart that cannot be read, or without the field
    ├── MalformedJson             400     a JSON body that is none
    ├── Unauthorized              401     no API key, or none that is known
    ├── NoSuchModel               404     another model than the one that is served
    ├── BodyTimeout               408     the body took longer than MIXER_BODY_TIMEOUT_S
    ├── TooLarge                  413
    │   ├── BodyTooLarge                  more bytes than MIXER_MAX_UPLOAD_BYTES
    │   ├── TooManyPixels                 more pixels than MIXER_MAX_PIXELS, by the header
    │   └── TooManyImages                 more images than the queue can ever hold
    ├── UnsupportedFormat         415     not JPEG, PNG, WebP, GIF or BMP
    ├── CorruptImage              422     the format is right, the content is not
    ├── InvalidParameter          422     a query parameter, header or member out of range
    ├── QueueFull                 429     retry here, after Retry-After
    ├── InferenceFailed           500     the engine raised, or gave NaN
    ├── DecoderLost               500     the process that decoded the image has crashed
    ├── Fault                     500     a bug of ours
    ├── NotReady                  503     draining or broken: retry elsewhere
    │   └── NoDecoder                     no process that decodes can be had
    └── DeadlineExceeded          504     the request's time ran out

The class says what the client may know (`detail`); what only the operator may know goes to the log.
"""

from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic_core import to_json
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

PROBLEM_JSON = b"application/problem+json"
CLIENT_GONE, GONE = 499, "client-gone"  # a status that nginx made up, and its kind in the log


class ProblemBody(TypedDict):
    """An error, RFC 9457."""

    type: Annotated[str, Field(examples=["urn:problem-type:mixer-serve:corrupt-image"])]
    title: Annotated[str, Field(examples=["Corrupt image"])]
    status: Annotated[int, Field(examples=[422])]
    detail: Annotated[
        str, Field(examples=["The image cannot be decoded: image file is truncated."])
    ]


class StartupError(Exception):
    """A wrong setting, model or device. The message is one line: what, its value, the fix."""


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """An error answer; subclasses fix status and title, the instance says the detail."""

    status: ClassVar[int]
    title: ClassVar[str]
    reason: str | None = None  # for the metrics, where the kind alone would not tell why

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """The last part of the problem's type, stable for clients and dashboards."""
        return kind_of(self.title)

    def json(self) -> bytes:
        """Return the problem object as JSON."""
        return problem_json(self.status, self.title, self.detail)

    def body(self) -> ProblemBody:
        """Return the problem object of RFC 9457, section 3."""
        return problem_body(self.status, self.title, self.detail)


class EmptyBody(Problem):
    """The request carries no image."""

    status = 400
    title = "Empty body"


class MalformedForm(Problem):
    """The multipart form cannot be read, or lacks the field."""

    status = 400
    title = "Malformed form"


class MalformedJson(Problem):
    """The body says it is JSON, and is not."""

    status = 400
    title = "Malformed JSON"


class Unauthorized(Problem):
    """The request carries no API key that is known (RFC 9110, section 11.6.1)."""

    status = 401
    title = "Unauthorized"

    def __init__(self) -> None:
        super().__init__(
            "Send an API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.",
            headers={"WWW-Authenticate": "Bearer"},
        )


class NoSuchModel(Problem):
    """The client names another model, or another version, than the one that is served."""

    status = 404
    title = "No such model"


class BodyTimeout(Problem):
    """The body took longer to arrive than allowed; the connection closes."""

    status = 408
    title = "Request timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"The body did not arrive within {limit_s:g} s.", headers={"Connection": "close"}
        )


class TooLarge(Problem):
    """Something is over its limit."""

    status = 413
    title = "Too large"


class BodyTooLarge(TooLarge):
    """The body has more bytes than allowed; the connection closes, since the rest stays unread."""

    title = "Body too large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The body is larger than {limit_bytes} bytes.", headers={"Connection": "close"}
        )


class TooManyPixels(TooLarge):
    """The image's header declares more pixels than allowed."""

    title = "Too many pixels"


class TooManyImages(TooLarge):
    """One request holds more images than the queue."""

    title = "Too many images"


class UnsupportedFormat(Problem):
    """Not one of the allowed image formats, or not a media type we read."""

    status = 415
    title = "Unsupported format"


class CorruptImage(Problem):
    """The format is allowed, but the content cannot be decoded."""

    status = 422
    title = "Corrupt image"


class InvalidParameter(Problem):
    """A query parameter, a header or a member of a document is out of range."""

    status = 422
    title = "Invalid parameter"


class QueueFull(Problem):
    """The service has all the work it can finish in time."""

    status = 429
    title = "Queue full"

    def __init__(self, detail: str, retry_after_s: int, reason: str) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})
        self.reason = reason


class InferenceFailed(Problem):
    """The engine raised on this batch, or its logits are not finite."""

    status = 500
    title = "Inference failed"


class DecoderLost(Problem):
    """The process that decoded the image has ended; another one takes its place."""

    status = 500
    title = "Decoding failed"


class Fault(Problem):
    """A bug of ours."""

    status = 500
    title = HTTPStatus.INTERNAL_SERVER_ERROR.phrase

    def __init__(self) -> None:
        super().__init__("The service has a fault; its log has the details.")


class NotReady(Problem):
    """This replica is draining or broken; another one can answer."""

    status = 503
    title = "Not ready"


class NoDecoder(NotReady):
    """No process that decodes can be had; an upload is still to be decoded."""


class DeadlineExceeded(Problem):
    """The request's time ran out: in its body, in a queue, or before its answer."""

    status = 504
    title = "Deadline exceeded"


def first_line(error: Exception) -> str:
    """Return the first line of what a library says, which as a rule is what has happened."""
    return str(error).strip().partition("\n")[0]


@lru_cache(maxsize=64)
def kind_of(title: str) -> str:
    """Return a title as the last part of a problem's type."""
    return title.lower().replace(" ", "-")


@lru_cache(maxsize=64)
def problem_json(status: int, title: str, detail: str) -> bytes:
    """Return an RFC 9457 problem object as JSON; under overload it is the same one all the time."""
    return to_json(problem_body(status, title, detail))


def problem_body(status: int, title: str, detail: str) -> ProblemBody:
    """Return an RFC 9457 problem object; the type is stable for clients to switch on."""
    return ProblemBody(
        type=f"urn:problem-type:mixer-serve:{kind_of(title)}",
        title=title,
        status=status,
        detail=detail,
    )
