"""A body on its way in: the image itself, or a form that holds images; fed as it arrives.

Starlette would spool a form to disk before any of our code runs, and its limits leave file parts
out; so it is parsed here, in memory.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import EmptyBody, MalformedForm, Problem, TooManyImages

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# Besides images a form may hold some other fields. Each part costs some 30 µs of the event loop: a
# form of nothing but parts would hold it for seconds.
SPARE_PARTS = 64
# The parser goes byte by byte, 0.1 s a MiB, through all that is not content (blanks behind a
# boundary, say). So much of it a form may have, and each of its parts: .NET sends the longest of
# names twice, in 1.3 KiB.
_FRAMING_BYTES = 8 * 1024
_FRAMING_BYTES_PER_IMAGE = 2 * 1024
_FRAMING_BYTES_PER_FIELD = 256
# What is fed at once, until that is looked at.
SLICE_BYTES = 16 * 1024
# A header's parameters cost ten times their bytes. Those of a form are two, and a file name may
# have semicolons of its own.
_MAX_PARAMETERS = 32
_MAX_HEADER_BYTES = 4 * 1024

# Pieces that are smaller are put together as they come: each has an overhead of its own. And so are
# those of a long body, in blocks: by the hundred they would leave the C library's heap in shreds. A
# photo of the usual size is not copied.
_BLOCK_BYTES = 1 << 20
_SMALL_BYTES = 16 * 1024


class Pieces:
    """Collects bytes as they arrive.

    One growing buffer would be moved some fifty times on its way to 20 MiB, on the event loop.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes | bytearray] = []
        self._block = bytearray()
        self._room = _BLOCK_BYTES  # for pieces as they come

    def add(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes; the first ones of some size are kept as they are."""
        if isinstance(chunk, bytes) and _SMALL_BYTES <= len(chunk) <= self._room:
            self._flush()
            self._pieces.append(chunk)
            self._room -= len(chunk)
            return
        self._block += chunk
        if len(self._block) >= _BLOCK_BYTES:
            self._flush()

    def join(self) -> bytes:
        """Return all of it; a single piece without a copy."""
        self._flush()
        return b"".join(self._pieces)

    def _flush(self) -> None:
        if self._block:
            self._pieces.append(self._block)
            self._block = bytearray()


class RawBody:
    """Collects a body that is one image."""

    def __init__(self) -> None:
        self._body = Pieces()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._body.add(chunk)

    def image(self) -> bytes:
        """Return the image, and let go of it.

        Raises:
            EmptyBody: nothing came.
        """
        image, self._body = self._body.join(), Pieces()
        if not image:
            raise EmptyBody("The request's body is empty; send an image.")
        return image


class Form:
    """Collects a form's fields as they arrive; file names are never looked at.

    Raises:
        MalformedForm: `content_type` names no usable boundary.
    """

    def __init__(self, content_type: str, max_images: int) -> None:
        boundary = _parameters(content_type.encode("latin-1")).get(b"boundary", b"")
        if not boundary:
            raise MalformedForm("The multipart Content-Type names no boundary.")
        # The parser knows the fields, and they know nobody: in a circle all of them would stay,
        # the body with them, until the garbage collector comes.
        too_many = f"The form has over {max_images + SPARE_PARTS} parts; "
        self._too_many: Callable[[], Problem] = (
            partial(MalformedForm, too_many + "send one image.")
            if max_images == 1
            else partial(TooManyImages, too_many + f"at most {max_images} images are taken.")
        )
        self._fields = _Fields(max_images + SPARE_PARTS, self._too_many)
        self._started = False
        self._boundary = b"\r\n--" + boundary
        self._boundaries_left = max_images + SPARE_PARTS + 1  # a line break may come before all
        try:
            self._parser = MultipartParser(boundary, self._fields.callbacks())
        except FormParserError as error:
            raise MalformedForm("The multipart boundary is not valid.") from error

    def feed(self, chunk: bytes) -> None:
        """Parse the next bytes of the body.

        Raises:
            MalformedForm: not a multipart form, or one of too little content.
            MalformedForm, TooManyImages: of too many parts, where one image or many are taken.
        """
        self._started = self._started or bool(chunk)
        # The parser takes as long over what only begins like a boundary.
        self._boundaries_left -= chunk.count(self._boundary)
        if self._boundaries_left < 0:
            raise self._too_many()
        for start in range(0, len(chunk), SLICE_BYTES):
            piece = chunk[start : start + SLICE_BYTES]
            try:
                self._parser.write(piece)
            except FormParserError as error:
                raise MalformedForm("The multipart form cannot be read.") from error
            self._fields.check(len(piece))

    def image(self) -> bytes:
        """Return the one image of the field `file`.

        Raises:
            EmptyBody, MalformedForm: as `images`; or it is empty, or there are several.
        """
        images = self.images("file")
        if len(images) > 1:
            raise MalformedForm(
                "The form has several fields 'file'; send many images to /classify/batch."
            )
        if not images[0]:
            raise EmptyBody("A field 'file' is empty; send an image.")
        return images[0]

    def images(self, field: str) -> list[bytes]:
        """Return the images of all the fields of that name, in order; one may be empty.

        Raises:
            EmptyBody: nothing came.
            MalformedForm: cut off before the closing boundary, or without the field.
        """
        if not self._started:
            raise EmptyBody("The request's body is empty; send an image.")
        if not self._fields.are_whole:
            raise MalformedForm("The multipart form ends before its closing boundary.")
        images = self._fields.found.get(field.encode(), [])
        if not images:
            raise MalformedForm(f"The form has no field '{field}'.")
        return images


class _Fields:
    """What a parser has found so far."""

    def __init__(self, most_parts: int, too_many: Callable[[], Problem]) -> None:
        self.found: dict[bytes, list[bytes]] = {}
        self.are_whole = False
        self._parts_left, self._too_many = most_parts, too_many
        self._framing_left = _FRAMING_BYTES
        self._header = (bytearray(), bytearray())  # name, value
        self._disposition = b""
        self._content = Pieces()

    def callbacks(self) -> "MultipartCallbacks":
        """Return what the parser is to call."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": self._add_content,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def check(self, size: int) -> None:
        """Refuse a form of whose last `size` bytes, and those before, too few were content.

        Raises:
            MalformedForm: it is one.
        """
        self._framing_left -= size  # what was content has been added
        if self._framing_left < 0:
            raise MalformedForm("The form has too little content between its boundaries.")

    def _begin(self) -> None:
        self._disposition, self._content = b"", Pieces()
        self._parts_left -= 1
        if self._parts_left < 0:
            raise self._too_many()
        is_image = self._parts_left >= SPARE_PARTS  # or may be
        self._framing_left += _FRAMING_BYTES_PER_IMAGE if is_image else _FRAMING_BYTES_PER_FIELD

    def _add(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)

    def _end_header(self) -> None:
        name, value = map(bytes, self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() == b"content-disposition":
            self._disposition = value

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        self._framing_left += end - start
        self._content.add(memoryview(data)[start:end])

    def _end_part(self) -> None:
        name = _parameters(self._disposition).get(b"name", b"")
        self.found.setdefault(name, []).append(self._content.join())
        self._content = Pieces()  # what is joined is here once

    def _end(self) -> None:
        self.are_whole = True


def _parameters(header: bytes) -> dict[bytes, bytes]:
    """Return the parameters of a header such as `form-data; name="file"`.

    Raises:
        MalformedForm: there are too many.
    """
    if len(header) > _MAX_HEADER_BYTES or header.count(b";") > _MAX_PARAMETERS:
        raise MalformedForm("A header of the form has too many parameters.")
    return parse_options_header(header)[1]
