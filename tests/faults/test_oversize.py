"""Promise 7: nobody can make it hold, write or read more than it said it would."""

import contextlib
import io
import json
import os
import select
import socket
import time
from itertools import product
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import dial, get, one, post, read_answer
from tests.faults.test_bounds import observe
from tests.processes import files_to_write

LIMIT = 2**20
HEAD = b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Type: image/jpeg\r\n"


def answered(client: socket.socket) -> bytes:
    """Return what has come back so far, without waiting."""
    client.setblocking(False)
    try:
        return client.recv(65536)
    except BlockingIOError:
        return b""
    finally:
        client.settimeout(40)


def test_declared_length_is_refused_unread(fake: Start, figure: Figure) -> None:
    """100 requests that declare ten gigabytes are refused before a byte of their body is sent."""
    with fake() as server:
        one(server.url, post(make_image()))
        before = server.resident_mib()
        start = time.monotonic()
        for _ in range(100):
            with dial(server.url) as client:
                client.sendall(HEAD + b"Content-Length: 10000000000\r\n\r\n")
                answer = read_answer(client)
                assert b" 413 " in answer
                assert b"connection: close" in answer.lower()
                assert b"application/problem+json" in answer
        growth = server.resident_mib() - before
        figure(f"{(time.monotonic() - start) * 10:.1f} ms each, memory grew by {growth:.1f} MiB")
        assert growth < 16


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /classify/batch HTTP/1.1\r\nContent-Type: image/jpeg\r\n", 415),
        (b"POST /classify HTTP/1.1\r\nContent-Encoding: gzip\r\n", 415),
        (b"POST /classify HTTP/1.1\r\nX-Request-Timeout-Ms: soon\r\n", 422),
        (b"POST /nothing HTTP/1.1\r\n", 404),
        (b"GET /livez HTTP/1.1\r\n", 200),
    ],
)
def test_declared_length_behind_another_answer(fake: Start, head: bytes, status: int) -> None:
    """A body that declares ten gigabytes is not read, whatever else its request is answered."""
    with fake() as server, dial(server.url) as client:
        client.sendall(head + b"Host: test\r\nContent-Length: 10000000000\r\n\r\n")
        answer = read_answer(client)
        assert int(answer[9:12]) == status
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 64 * LIMIT:
                sent += client.send(bytes(65536))
        assert sent < 16 * LIMIT  # in the kernel's buffers


@pytest.mark.parametrize("path", ["/classify", "/explain"])
@pytest.mark.parametrize(
    ("digits", "status"), [("0" * 5000 + "{}", 200), ("0" * 5000 + "9" * 19, 413)]
)
def test_length_of_many_digits(fake: Start, path: str, digits: str, status: int) -> None:
    """A Content-Length with thousands of zeros ahead is the number that it is."""
    image = make_image()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\n"
    with fake() as server, dial(server.url) as client:
        length = digits.format(len(image))
        client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + image)
        assert int(read_answer(client)[9:12]) in ({200, 503} if status == 200 else {413})


def test_json_of_many_members(fake: Start, figure: Figure) -> None:
    """JSON of a million empty lists is refused before it is parsed into a thousand times more."""
    lists = b"[" + b"[]," * 2_000_000 + b"[]]"
    tensor = b'{"inputs":[{"name":"image","shape":[1],"datatype":"BYTES","data":' + lists + b"}]}"
    with fake() as server:
        one(server.url, post(make_image()))
        before = server.resident_mib()
        for path, body in (("/v2/models/fake/infer", tensor), ("/classify", lists)):
            answer = one(server.url, post(body, path=path, Content_Type="application/json"))
            assert answer.status == 422
        growth = server.resident_mib() - before
        figure(f"memory grew by {growth:.0f} MiB for bodies of {len(body) >> 20}")
        assert growth < 64


@pytest.mark.parametrize("text", ["\N{GRINNING FACE}", "!"])
def test_refused_documents_are_let_go(fake: Start, figure: Figure, text: str) -> None:
    """A document that is refused is gone with its answer, not with the next garbage collection."""
    body = json.dumps({"image": text + "A" * 5_000_000}, ensure_ascii=False).encode()
    with fake() as server:
        one(server.url, post(make_image()))
        before = server.resident_mib()
        for _ in range(20):
            answer = one(server.url, post(body, Content_Type="application/json"))
            assert answer.status == 422
        growth = server.resident_mib() - before
        figure(f"memory grew by {growth:.0f} MiB after 20 of 5 MB")
        assert growth < 80


def test_chunked_body_stops_at_the_limit(fake: Start, figure: Figure) -> None:
    """A chunked body is answered 413 within 128 KiB of the limit; nothing is written to disk."""
    with fake(max_upload_bytes=LIMIT) as server:
        one(server.url, post(make_image()))
        before, most = server.resident_mib(), 0
        for _ in range(100):
            with dial(server.url) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
                client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
                sent, answer = 0, b""
                while not answer and sent < 4 * LIMIT:
                    client.sendall(b"4000\r\n" + bytes(0x4000) + b"\r\n")
                    sent += 0x4000
                    if sent > LIMIT:
                        select.select([client], [], [], 2)  # its answer needs a moment
                    answer = answered(client)
                assert b" 413 " in answer
                most = max(most, sent)
        growth = server.resident_mib() - before
        written = files_to_write(server.process.pid) - {server.log}
        figure(f"answered {(most - LIMIT) // 1024} KiB after the limit, +{growth:.1f} MiB")
        assert most <= LIMIT + 128 * 1024
        assert growth < 16
        assert written == set()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *product(["/classify", "/explain", "/"], ["form", "chunks", "raw"]),
        ("/classify/batch", "form"),
    ],
)
def test_uploads_are_in_memory(fake: Start, path: str, kind: str) -> None:
    """While a body of over 1 MiB arrives, the service and its decoders have no file to write to."""
    image = io.BytesIO()
    Image.effect_noise((700, 600), 80).convert("RGB").save(image, "BMP")
    body, content_type = image.getvalue(), "image/bmp"
    if kind == "form":
        name = "files" if path == "/classify/batch" else "file"
        part = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'
        body = part.encode() + body + b"\r\n--b--\r\n"
        content_type = "multipart/form-data; boundary=b"
    request = post(body, path, Content_Type=content_type)
    if kind == "chunks":
        head, _, _ = request.partition(b"Content-Length")
        request = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body
        request += b"\r\n0\r\n\r\n"
    with fake() as server, dial(server.url) as client:
        client.sendall(request[:-10])
        give_up = time.monotonic() + 20
        while observe(server.url)["body_bytes"] < 1_200_000:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        written = set[Path]().union(*map(files_to_write, server.pids()))
        assert written == {server.log}
        client.sendall(request[-10:])
        assert read_answer(client).startswith(b"HTTP/1.1 200 ")


def test_files_to_write(tmp_path: Path) -> None:
    """Of a process's open files, those that it may write are found, and no others."""
    (tmp_path / "read").touch()
    with (tmp_path / "read").open("rb"), (tmp_path / "written").open("ab"):
        found = files_to_write(os.getpid())
    assert tmp_path / "written" in found
    assert tmp_path / "read" not in found


def test_chunked_body_behind_its_answer(fake: Start) -> None:
    """What comes of a body that has its answer already ends the connection at the limit."""
    head = HEAD.replace(b"/classify", b"/classify?top_k=999")
    with fake(max_upload_bytes=LIMIT) as server, dial(server.url) as client:
        client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = read_answer(client)
        assert b" 422 " in answer
        assert b"connection: close" not in answer.lower()
        client.sendall(b"%x\r\n" % (LIMIT + 1) + bytes(LIMIT + 1) + b"\r\n")
        client.settimeout(10)
        assert client.recv(1) == b""


def test_a_client_that_still_sends_reads_its_413(fake: Start, figure: Figure) -> None:
    """Clients that only read when all is sent get their 413, not a broken connection."""
    with fake(max_upload_bytes=LIMIT) as server:
        for size in (LIMIT + 1, 8 * LIMIT, 64 * LIMIT):
            answer = httpx2.post(f"{server.url}/classify", content=bytes(size), timeout=30)
            assert answer.status_code == 413

        def chunks() -> object:
            for _ in range(64):
                yield bytes(LIMIT)

        answer = httpx2.post(f"{server.url}/classify", content=chunks(), timeout=30)  # type: ignore[arg-type] # an iterator of bytes
        figure("413 read for 1, 8 and 64 times the limit, and chunked")
        assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/classify", "/explain", "/classify/batch"])
def test_forms_over_the_limit_leave_nothing(fake: Start, figure: Figure, path: str) -> None:
    """100 forms that turn out too large grow memory by less than 16 MiB."""
    part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + bytes(LIMIT)
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(piece), piece)
        for piece in (part[start : start + 65536] for start in range(0, len(part), 65536))
    )
    head = b"POST %b HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n" % path.encode()
    head += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    with fake(max_upload_bytes=LIMIT) as server:

        def attack(times: int) -> None:
            for _ in range(times):
                with dial(server.url) as client:
                    client.sendall(head + chunks)
                    assert b" 413 " in read_answer(client)

        attack(5)
        before = server.resident_mib()
        attack(100)
        growth = server.resident_mib() - before
        figure(f"{path}: +{growth:.1f} MiB")
        assert growth < 16


@pytest.mark.parametrize("path", ["/", "/classify"])
def test_too_many_headers(fake: Start, figure: Figure, path: str) -> None:
    """A hundred headers are taken; ten thousand tiny ones are refused before they fill memory."""
    with fake() as server:
        one(server.url, post(make_image()))
        few = b"".join(b"h%d:\r\n" % number for number in range(90))
        many = b"a:\r\n" * 16_000
        taken = post(make_image(), path).replace(b"\r\n\r\n", b"\r\n" + few + b"\r\n", 1)
        assert one(server.url, taken).status == 200
        before = server.resident_mib()
        clients = [dial(server.url) for _ in range(200)]
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\n%b" % (path.encode(), many))
        answers = [read_answer(client) for client in clients]
        growth = server.resident_mib() - before
        for client in clients:
            client.close()
        figure(f"{len(answers)} × 431, memory grew by {growth:.1f} MiB")
        assert {answer[9:12] for answer in answers} == {b"431"}
        assert growth < 32


@pytest.mark.slow
def test_a_million_one_byte_chunks(fake: Start, figure: Figure) -> None:
    """100 requests of a million one-byte chunks grow memory by less than 8 MiB."""
    with fake() as server:
        body = b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n"
        request = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body
        one(server.url, post(bytes(2**20)))
        one(server.url, post(make_image()))
        before = server.resident_mib()
        start = time.monotonic()
        for _ in range(100):
            with dial(server.url) as client:
                client.sendall(request)
                assert b" 415 " in read_answer(client)
        growth = server.resident_mib() - before
        figure(f"{(time.monotonic() - start) / 100:.2f} s each, memory grew by {growth:.1f} MiB")
        assert growth < 8


@pytest.mark.parametrize(
    "waste",
    [
        b"1;" + b"x" * 200 + b"\r\nx\r\n",  # chunk extensions
        b"0001\r\nx\r\n",  # for comparison, allowed
    ],
)
def test_chunk_extensions_are_bounded(fake: Start, waste: bytes) -> None:
    """Framing many times larger than the body it frames ends the connection."""
    with fake() as server, dial(server.url) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(100):
                client.sendall(waste * 500)
            client.sendall(b"0\r\n\r\n")
            answer = read_answer(client)
        except ConnectionError:
            answer = b""
        if len(waste) < 20:
            assert b" 415 " in answer
        else:
            assert answer == b""  # cut off
        assert one(server.url, get("/livez")).status == 200
