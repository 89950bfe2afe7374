"""Tensors of the Open Inference Protocol v2, as JSON and in its binary extension.

https://github.com/kserve/open-inference-protocol and, for the binary form,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md:
the body is JSON, then the raw tensors in the order of their mention; the header
`Inference-Header-Content-Length` says where the JSON ends.
"""

import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import to_json

from app.answers import Steps
from app.documents import decode_base64, parse_document
from app.errors import InvalidParameter, TooManyImages
from app.predictions import ranked, softmax

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
IMAGE, LABEL, INDEX, SCORE, PROBABILITIES = "image", "label", "index", "score", "probabilities"
# MLServer's own client writes a `null` where it has none.
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda sent: {} if sent is None else sent)]
OutputName = Literal["label", "index", "score", "probabilities"]
_DATATYPES = {LABEL: "BYTES", INDEX: "INT64", SCORE: "FP32", PROBABILITIES: "FP32"}
_LENGTH = struct.Struct("<I")  # before each element of a BYTES tensor


class InputTensor(BaseModel):
    """Encoded images: BYTES, in JSON as base64."""

    name: Literal["image"]
    shape: list[int] = Field(max_length=8)
    datatype: Literal["BYTES"]
    parameters: Parameters = {}
    data: list[Any] | None = None


class OutputRequest(BaseModel):
    """One output that the client wants, and how."""

    name: OutputName
    parameters: Parameters = {}


class InferRequest(BaseModel):
    """The JSON part of a request."""

    id: str | None = Field(default=None, max_length=1024)  # which is answered as it came
    parameters: Parameters = {}
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[OutputRequest] | None = Field(default=None, max_length=len(_DATATYPES))

    @property
    def wanted(self) -> list[OutputRequest]:
        """The outputs asked for; without a wish, the best labels.

        What an output does not say of its form, the request's `binary_data_output` does.

        Raises:
            InvalidParameter: one of the two is neither true nor false.
        """
        is_binary = _flag(self.parameters, "binary_data_output", usual=False)
        wanted = self.outputs or [OutputRequest(name=n) for n in ("label", "index", "score")]
        return [
            OutputRequest(
                name=one.name,
                parameters={
                    **one.parameters,
                    "binary_data": _flag(one.parameters, "binary_data", usual=is_binary),
                },
            )
            for one in wanted
        ]


def read_request(
    body: bytes, json_length: str | None, max_images: int
) -> tuple[InferRequest, list[bytes]]:
    """Return the request and its encoded images.

    Raises:
        MalformedJson, InvalidParameter: not a request of the protocol.
        TooManyImages: more than `max_images`.
    """
    length = len(body)
    if json_length is not None:
        if not (json_length.isdecimal() and len(json_length) < 16 and int(json_length) <= length):
            raise InvalidParameter(f"{JSON_LENGTH_HEADER} must be a number up to the body's size.")
        length = int(json_length)
    request = parse_document(memoryview(body)[:length], InferRequest)
    [tensor] = request.inputs
    size = tensor.parameters.get("binary_data_size")
    if size is not None:
        if size != len(body) - length:
            raise InvalidParameter("binary_data_size differs from what follows the JSON.")
        images = _split(memoryview(body)[length:], max_images)
    else:
        images = [_image(element) for element in _flat(tensor.data or [])]
    if not images:
        raise InvalidParameter("The input 'image' is empty.")
    if min(tensor.shape, default=0) < 0 or math.prod(tensor.shape) != len(images):
        raise InvalidParameter(f"The shape {tensor.shape} does not hold {len(images)} images.")
    return request, images


def write_response(
    head: dict[str, Any],
    wanted: Sequence[OutputRequest],
    logits: Sequence[NDArray[np.float32]],
    labels: tuple[str, ...],
    top_k: int,
) -> Steps[tuple[bytes, int | None]]:
    """Return the body, and the length of its JSON if tensors follow in binary.

    `logits` are those of each image, float32 [classes].
    """
    texts = np.array(labels, object)
    counts = [values_each(output, len(labels), top_k) for output in wanted]
    ranks = [n for n, output in zip(counts, wanted, strict=True) if not _is_whole(output)]
    rows: list[list[NDArray[Any]]] = [[] for _ in wanted]
    for image in logits:  # of a thousand with thousands of classes only the best are kept
        yield
        probabilities = softmax(image)
        order = ranked(image, max(ranks)) if ranks else np.empty(0, np.int64)
        for output, count, row in zip(wanted, counts, rows, strict=True):
            row.append(_values(output, probabilities, order[:count], texts))
    outputs, tail = [], []
    for output, stack in zip(wanted, rows, strict=True):
        yield
        values = np.stack(stack)  # [images, top_k or classes]
        datatype = "BYTES" if values.dtype == object else _DATATYPES[output.name]
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": datatype,
            "shape": list(values.shape),
        }
        if output.parameters["binary_data"]:
            raw = _joined(values) if datatype == "BYTES" else values.tobytes()
            tensor["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            tensor["data"] = values.reshape(-1).tolist()
        outputs.append(tensor)
    text = to_json({**head, "outputs": outputs})
    return b"".join([text, *tail]), len(text) if tail else None


def _values(
    output: OutputRequest,
    probabilities: NDArray[np.float64],
    order: NDArray[np.int64],
    texts: NDArray[np.object_],
) -> NDArray[Any]:
    """Return one output's values for one image of which `order` are the best; texts as objects."""
    if output.name == INDEX:
        return order.astype("<i8")
    if output.name == LABEL:
        best: NDArray[Any] = texts[order]
        return best
    if output.name == SCORE:
        return probabilities[order].astype("<f4")
    if _is_whole(output):
        return probabilities.astype("<f4")
    scored = zip(probabilities[order], order, texts[order], strict=True)
    return np.array([f"{score:f}:{index}:{text}" for score, index, text in scored], object)


def _is_whole(output: OutputRequest) -> bool:
    """Return whether an output is of all classes, in their order."""
    return output.name == PROBABILITIES and "classification" not in output.parameters


def values_each(output: OutputRequest, classes: int, top_k: int) -> int:
    """Return how many values an output has for each image.

    Raises:
        InvalidParameter: the wish for some of the probabilities is no number.
    """
    if output.name != PROBABILITIES:
        return top_k
    if _is_whole(output):
        return classes
    # Triton's classification extension: the best ones, as "score:index:label".
    return min(positive(output.parameters["classification"], "classification"), classes)


def positive(value: Any, name: str) -> int:
    """Return the value of a parameter that is a number of things.

    Raises:
        InvalidParameter: it is not a positive whole number.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidParameter(f"{name} must be a positive whole number.")
    return value


def _flag(parameters: dict[str, Any], name: str, *, usual: bool) -> bool:
    """Return a parameter that is true or false, `usual` where it is not there.

    Raises:
        InvalidParameter: it is something else.
    """
    value = parameters.get(name, usual)
    if not isinstance(value, bool):
        raise InvalidParameter(f"{name} must be true or false.")
    return value


def _split(data: memoryview, most: int) -> list[bytes]:
    """Return the elements of a BYTES tensor: `most` at most, where 20 MiB may hold millions."""
    elements: list[bytes] = []
    position = 0
    while position < len(data):
        start = position + _LENGTH.size
        if start > len(data):
            break
        position = start + _LENGTH.unpack_from(data, position)[0]
        if len(elements) == most:
            raise TooManyImages(f"The request holds more than {most} images.")
        elements.append(bytes(data[start:position]))
    if position != len(data):
        raise InvalidParameter("The binary tensor 'image' is cut off.")
    return elements


def _joined(texts: NDArray[Any]) -> bytes:
    encoded = [text.encode() for text in texts.reshape(-1)]
    return b"".join(_LENGTH.pack(len(text)) + text for text in encoded)


def _flat(data: list[Any]) -> list[Any]:
    """Return the elements of a tensor whose rows may be lists of their own."""
    while data and all(isinstance(row, list) for row in data):
        data = [element for row in data for element in row]
    return data


def _image(element: Any) -> bytes:
    try:
        return decode_base64(element)
    except ValueError as error:
        raise InvalidParameter(f"inputs.0.data: {error}.") from None
