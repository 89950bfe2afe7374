"""Forms as honest clients write them, and what makes one cost too much."""

import base64
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import documents
from app.admission import Admission
from app.errors import InvalidParameter, MalformedForm, QueueFull, TooManyImages
from app.forms import SLICE_BYTES, Form
from app.latency import LatencyTable
from app.settings import Settings

TYPE = "multipart/form-data; boundary=b"


def part(disposition: bytes, content: bytes = b"x") -> bytes:
    """Return one part behind its boundary."""
    head = b"--b\r\nContent-Disposition: form-data; " + disposition
    return head + b"\r\n\r\n" + content + b"\r\n"


def fed(body: bytes, images: int = 1, content_type: str = TYPE) -> Form:
    """Return a form that has been read."""
    form = Form(content_type, images)
    form.feed(body + b"--b--\r\n")
    return form


@pytest.mark.parametrize("lead", [b"", b"\r\n"])
def test_fields_beside_the_image(lead: bytes) -> None:
    """An image may come with 64 other fields and a line break before all, but no more."""
    image = part(b'name="file"', b"image")
    field = part(b'name="note"')
    assert fed(lead + field * 64 + image).image() == b"image"
    with pytest.raises(MalformedForm, match="over 65 parts; send one image"):
        fed(lead + field * 66 + image)


@pytest.mark.parametrize("size", [50, 10_000])  # parts over several reads, or all in one
def test_more_images_than_are_ever_taken(size: int) -> None:
    """A form with far more images than the queue holds is too large, not malformed."""
    form = Form(TYPE, 10)
    body = part(b'name="files"') * 80

    def feed() -> None:
        for start in range(0, len(body), size):
            form.feed(body[start : start + size])

    with pytest.raises(TooManyImages, match="over 74 parts; at most 10 images"):
        feed()


def test_longest_names() -> None:
    """A hundred images with names of 255 bytes, each sent twice as .NET does, are taken."""
    name = "像" * 85
    quoted = base64.b64encode(name.encode())
    escaped = b"".join(b"%%%02X" % byte for byte in name.encode())
    one = part(b"name=files; filename=\"=?utf-8?B?%b?=\"; filename*=utf-8''%b" % (quoted, escaped))
    assert fed(one * 100, images=1024).images("files") == [b"x"] * 100


@pytest.mark.parametrize("more", [b";a=b" * 33, b";" + b"a" * 4080])
def test_parameters_are_few(more: bytes) -> None:
    """A header of the form has a few parameters of some length, as a name with semicolons has."""
    assert fed(part(b'name="file"; filename="a;b;c.jpg"')).image() == b"x"
    with pytest.raises(MalformedForm, match="parameters"):
        fed(part(b'name="file"' + more))
    with pytest.raises(MalformedForm, match="parameters"):
        fed(part(b'name="file"'), content_type=TYPE + more.decode())


def test_what_is_joined_is_held_once() -> None:
    """Once a part is whole its pieces are let go, though the form may take longer to end."""
    form = Form(TYPE, 1)
    form.feed(part(b'name="file"', bytes(2 * SLICE_BYTES)) + b"--b--")
    assert form._fields._content.join() == b""
    assert len(form.image()) == 2 * SLICE_BYTES


@given(st.binary(max_size=60), st.text("AB=\n ", max_size=40), st.integers(1, 6))
def test_base64_in_slices(data: bytes, noise: str, quads: int) -> None:
    """Slice by slice, texts are what they are as a whole: an image, or no base64."""
    for text in (base64.b64encode(data).decode(), base64.b64encode(data).decode() + noise, noise):
        plain = text.replace("\n", "").replace(" ", "")
        if len(plain) % 4:  # no base64 (RFC 4648, 4), though Python takes some of it
            continue
        try:
            whole = base64.b64decode(plain, validate=True)
        except ValueError:
            whole = None
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(documents, "_BASE64_LETTERS", 4 * quads)
            try:
                found = documents.decode_base64(text)
            except ValueError:
                found = None
        assert found == whole


def test_a_free_decoder_is_used() -> None:
    """However long the last pictures took, the next is taken while a decoder is free."""
    settings = Settings(decode_threads=2)
    latency = LatencyTable(settings.max_batch, settings.decode_threads)
    latency.observe_batch(1, 0.001)
    latency.observe_decode(5.0)
    admission = Admission(settings, latency)
    deadline = time.monotonic() + 60
    for _ in range(2):
        admission.enter()
        admission.admit(1, deadline)
    with pytest.raises(QueueFull, match="too long"):
        admission.enter()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"image": "eA==", "more": [%s]}' % (b"9" * 101), "a number of more than 100 digits"),
        (b'{"image": "eA==", "more": -%s}' % (b"9" * 4300), "a number of more than 100 digits"),
        (b'{"image": "%s", "more": 1.%s}' % (b"9" * 400, b"9" * 400), "a number of more than"),
        (b'"data:;base64,":%s' % (b"9" * 101), "a number of more than 100 digits"),
        (b'"data:,%s"' % (b"9" * 101), "a number of more than 100 digits"),
        (b"1" * 3_000_000, "a number of more than 100 digits"),
        (b" " * (2**20 - 60) + b"9" * 101, "a number of more than 100 digits"),
    ],
)
def test_what_takes_a_parser_long(body: bytes, said: str) -> None:
    """Numbers without end are refused before they are parsed."""
    with pytest.raises(InvalidParameter, match=said):
        documents.parse_document(body, documents.ImageDocument)


def test_escapes_are_counted() -> None:
    """Text of nothing but escapes is refused before it is parsed, at 400,001 of them."""
    body = b'{"image": "%s"}'
    found = documents.parse_document(body % (rb"\u0041" * 400_000), documents.ImageDocument)
    assert found.image == bytes(300_000)
    for escapes in (rb"\u0041" * 400_001, rb"\/" * 1_500_001):
        with pytest.raises(InvalidParameter, match="more escaped letters than a picture has"):
            documents.parse_document(body % escapes, documents.ImageDocument)


def test_base64_as_dot_net_writes_it() -> None:
    """20 MiB of base64 with each plus sign escaped, as System.Text.Json does, are an image."""
    image = np.random.default_rng(0).bytes(14_500_000)
    text = base64.b64encode(image).replace(b"+", rb"\u002B")
    assert 20 * 2**20 - 500_000 < len(text) < 20 * 2**20
    body = b'{"image": "%s"}' % text
    assert documents.parse_document(body, documents.ImageDocument).image == image


def test_base64_in_lines() -> None:
    """20 MiB of base64 in lines of 76 letters, each slash escaped, as PHP does, are an image."""
    image = np.random.default_rng(0).bytes(14_000_000)
    text = base64.encodebytes(image).replace(b"\n", rb"\r\n").replace(b"/", rb"\/")
    assert 19 * 2**20 < len(text) < 20 * 2**20
    body = b'{"image": "%s"}' % text
    assert documents.parse_document(body, documents.ImageDocument).image == image


@pytest.mark.parametrize("scheme", [b"", b"data:image/bmp;base64,"])
@pytest.mark.parametrize("place", [0, 2**20 - 50])
def test_digits_in_base64(place: int, scheme: bytes) -> None:
    """Base64 may be digits only, by the hundred; a number of a hundred digits is one, too."""
    image = b"A" * (place // 4 * 4) + b"0" * 3000 + rb"\/" + b"9" * 2999
    number = b"9" * 100
    body = b'{"image": "%s%s", "unknown": [%s, "%s"]}' % (scheme, image, number, b"8" * 500)
    found = documents.parse_document(body, documents.ImageDocument)
    assert found.image == base64.b64decode(image.replace(b"\\", b""))
