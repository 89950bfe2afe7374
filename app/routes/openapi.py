"""What the OpenAPI document says of requests and errors beyond what FastAPI finds by itself."""

from typing import Any

from pydantic import BaseModel

from app import errors
from app.errors import Problem

BYTES = {"type": "string", "format": "binary"}
# One of each, worded as the service words it.
_PROBLEMS: tuple[Problem, ...] = (
    errors.EmptyBody("The request's body is empty; send an image."),
    errors.MalformedForm("The form has no field 'file'."),
    errors.MalformedJson("The body is not JSON: Invalid JSON: EOF while parsing a string."),
    errors.Unauthorized(),
    errors.NoSuchModel("The model here is mixer-cifar10, version 1f0c2d3e4a5b."),
    errors.BodyTimeout(30),
    errors.BodyTooLarge(20 * 2**20),
    errors.TooManyPixels("The image has 65535 x 65535 pixels; at most 50000000 are taken here."),
    errors.TooManyImages("The request holds 2000 images; at most 1024 are taken."),
    errors.UnsupportedFormat("The upload is not a JPEG, PNG, WebP, GIF or BMP image."),
    errors.CorruptImage("The image cannot be decoded: image file is truncated."),
    errors.InvalidParameter("top_k is 11; it must be from 1 to 10."),
    errors.QueueFull("The queue is too long.", 2, "queue-budget"),
    errors.InferenceFailed("The engine failed on this batch; the next may pass."),
    errors.DecoderLost("The process that decoded the image has ended."),
    errors.NotReady("Draining: this replica is about to stop."),
    errors.DeadlineExceeded("The request's time ran out before its image was classified."),
)
_DESCRIPTIONS = {
    400: "No image, or a body that cannot be read",
    401: "No API key, or none that is known",
    404: "No such model",
    408: "The body took too long to arrive",
    413: "Too many bytes, pixels or images",
    415: "Not an image format or media type that is read",
    422: "A corrupt image, or a parameter out of range",
    429: "Busy: try again after Retry-After",
    500: "The engine or a decoder failed",
    503: "Draining or broken: try another replica",
    # Named here and not as a parameter: a fuzzer that asks for 1 ms would take the 504 for a fault.
    504: "The request's time ran out: X-Request-Timeout-Ms, or the service's own",
}
# Of an answer's headers those that a client acts on.
_HEADERS = {
    401: {"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}}},
    429: {
        "Retry-After": {
            "description": "seconds until the queue will have room, as measured",
            "schema": {"type": "integer", "minimum": 1},
        }
    },
}
CLASSIFY_STATUSES = (400, 401, 408, 413, 415, 422, 429, 500, 503, 504)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that may answer with these problems, with examples."""
    return {status: _response(status) for status in statuses}


def image_body(document: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """Return the `requestBody` of a route that takes one image in every way there is."""
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": BYTES},
                    "required": ["file"],
                },
                "example": {"file": "cat.jpg"},
            },
            "image/*": {"schema": BYTES, "example": "(the bytes of cat.jpg)"},
            "application/octet-stream": {"schema": BYTES, "example": "(the bytes of cat.jpg)"},
            "application/json": json_content(document, example),
        },
    }


def json_content(document: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """Return the media type object of a JSON body; its schema stands in the document in full."""
    return {"schema": _inlined(document.model_json_schema()), "example": example}


def _response(status: int) -> dict[str, Any]:
    examples = {
        problem.kind: {"summary": problem.title, "value": problem.body()}
        for problem in _PROBLEMS
        if problem.status == status
    }
    return {
        "description": _DESCRIPTIONS[status],
        "headers": _HEADERS.get(status, {}),
        "content": {
            "application/problem+json": {
                "schema": {"$ref": "#/components/schemas/ProblemBody"},
                "examples": examples,
            }
        },
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with its `$defs` put where they are referred to."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            reference = node.get("$ref")
            if reference is not None:
                return resolve(definitions[reference.rpartition("/")[2]])
            return {name: resolve(value) for name, value in node.items()}
        if isinstance(node, list):
            return [resolve(value) for value in node]
        return node

    resolved: dict[str, Any] = resolve(schema)
    return resolved
