"""The command `mixer-classify`, against a running server and a model file."""

import asyncio
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.client.command import main
from app.client.errors import ImageError, ServerError
from app.client.files import find_images
from app.client.local import LocalClassifier
from app.client.remote import RemoteClassifier
from app.client.results import Prediction
from app.engine import OnnxEngine
from app.nursery import nursery
from tests.fakes import make_image
from tests.outputs import (
    CLOSED,
    buffered,
    run_closed,
    run_into_closed_pipe,
    run_into_full_disk,
)
from tests.processes import ROOT, Server, serving

MODULE = "app.client.command"
MODEL = str(ROOT / "app" / "models" / "mixer-cifar10.onnx")
BUSY_ANSWER = (
    b'{"model": {"name": "busy", "version": "1"},'
    b' "predictions": [{"label": "x", "index": 0, "score": 1.0}]}'
)


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", MODULE, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=buffered(PYTHONPATH=str(ROOT)),
        timeout=120,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with four images, one of them deeper, and a text."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    names = ("a.png", "b.PNG", "c, d.png", "deep/e.bmp")
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(folder / name)
    (folder / "notes.txt").write_text("hello")
    return folder


def agree(mine: Any, theirs: Any) -> None:
    """Check that labels are the same, and scores but for the size of the batch they were in."""
    assert [one["label"] for one in mine] == [one["label"] for one in theirs]
    scores = [one["score"] for one in theirs]
    assert [one["score"] for one in mine] == pytest.approx(scores, abs=1e-5)


def by_name(text: str) -> dict[str, dict[str, Any]]:
    """Return JSON lines by file name."""
    return {Path(row["path"]).name: row for row in map(json.loads, text.splitlines())}


def test_server_and_model_agree(live: Server, folder: Path) -> None:
    """A folder through a server and through the model file gives the labels of `/classify`."""
    remote = run(live.url, folder, "--format", "jsonl", "--top-k", 2)
    local = run(MODEL, folder, "--format", "jsonl", "--top-k", 2)
    assert remote.returncode == local.returncode == 0, remote.stderr + local.stderr
    found = by_name(remote.stdout)
    assert set(found) == {"a.png", "b.PNG", "c, d.png", "e.bmp"}
    data = (folder / "a.png").read_bytes()
    answer = httpx2.post(f"{live.url}/classify?top_k=2", content=data).json()
    agree(found["a.png"]["predictions"], answer["predictions"])
    for name, row in by_name(local.stdout).items():
        agree(row["predictions"], found[name]["predictions"])


def test_table(live: Server, folder: Path) -> None:
    """By default a table names each file and its labels, in the order of the files."""
    done = run(live.url, folder / "b.PNG", folder / "a.png", "--top-k", 1)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        str(folder / "b.PNG"),
        str(folder / "a.png"),
    ]
    assert done.stdout.count("%") == 2
    assert done.stderr == ""


def test_csv(live: Server, folder: Path) -> None:
    """CSV has a header and a row per file, whatever is in its name."""
    file = folder / "out.csv"
    done = run(live.url, folder, "--format", "csv", "--top-k", 2, "-o", file)
    assert done.returncode == 0, done.stderr
    with file.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["path", "model", "label_1", "score_1", "label_2", "score_2", "error"]
    assert {Path(row[0]).name for row in rows} == {"a.png", "b.PNG", "c, d.png", "e.bmp"}
    assert all(float(row[3]) >= float(row[5]) for row in rows)


def test_globs(live: Server, folder: Path) -> None:
    """A glob means the files it matches, each once, however often they are named."""
    done = run(live.url, folder / "*.png", folder / "a.png", "--format", "jsonl")
    assert set(by_name(done.stdout)) == {"a.png", "c, d.png"}
    assert len(done.stdout.splitlines()) == 2
    deep = run(live.url, "**/*.bmp", "--format", "jsonl", cwd=folder)
    assert set(by_name(deep.stdout)) == {"e.bmp"}
    (folder / "notes.txt").write_text("no image")
    tree = run(live.url.replace("http:", "HTTP:"), f"{folder}/**", "--format", "jsonl")
    assert set(by_name(tree.stdout)) == {"a.png", "b.PNG", "c, d.png", "e.bmp"}


def test_folder_named_as_a_picture(tmp_path: Path) -> None:
    """A folder whose name ends as a picture's is no picture, but may hold some."""
    (tmp_path / "album.jpg").mkdir()
    (tmp_path / "album.jpg" / "a.png").touch()
    assert find_images([str(tmp_path)]) == [tmp_path / "album.jpg" / "a.png"]


@pytest.mark.parametrize("target", ["server", "model"])
def test_more_labels_than_there_are(live: Server, folder: Path, target: str) -> None:
    """Of a model with fewer labels than are asked for, CSV has as many columns as it has labels."""
    where = live.url if target == "server" else MODEL
    done = run(where, folder / "a.png", "--format", "csv", "--top-k", 1000)
    assert done.returncode == 0, done.stderr
    header, row = csv.reader(done.stdout.splitlines())
    assert header[-3:] == ["label_10", "score_10", "error"]
    assert len(row) == len(header)
    assert "" not in row[:-1]


@pytest.mark.parametrize("target", ["server", "model"])
def test_bad_image(live: Server, folder: Path, target: str) -> None:
    """A bad image is a row with its error, the others are classified, and the exit code is 1."""
    where = live.url if target == "server" else MODEL
    done = run(where, folder / "notes.txt", folder / "a.png", "--format", "jsonl")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"mixer-classify: 1 of 2 images failed, the first {folder}/notes.txt: ")
    found = by_name(done.stdout)
    assert "not a JPEG" in str(found["notes.txt"]["error"])
    assert "error" not in found["a.png"]


@pytest.mark.parametrize("output_format", ["jsonl", "csv"])
def test_resume(live: Server, folder: Path, output_format: str) -> None:
    """A run goes on where it stopped: rows that are there stay, failures and a cut-off line go."""
    file = folder / "out"
    options = ["--format", output_format, "-o", file, "--top-k", 1]
    run(live.url, folder / "a.png", folder / "notes.txt", *options)
    first = file.read_text().splitlines()
    with file.open("a") as stream:
        stream.write('{"path": "half a li' if output_format == "jsonl" else '"half a')
    done = run(live.url, folder, *options)
    assert done.returncode == 0, done.stderr
    lines = file.read_text().splitlines()
    header = 0 if output_format == "jsonl" else 1
    kept = [line for line in first if "a.png" in line]
    assert kept[0] in lines
    assert len(lines) == header + 4
    assert "notes.txt" not in file.read_text()
    assert "half" not in file.read_text()
    before = file.read_text()
    assert run(live.url, folder, *options).returncode == 0
    assert file.read_text() == before


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_output_that_is_no_file(flags: list[str], folder: Path, tmp_path: Path) -> None:
    """An output that is a pipe or a device is refused, and not replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    done = run(MODEL, folder, "--format", "jsonl", "-o", tmp_path / "pipe", *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pipe: expected a file of its own" in done.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_output_with_a_name_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    """An output that the system does not even look for is told in one line."""
    done = run(MODEL, folder, "--format", "jsonl", "-o", tmp_path / ("a" * 300))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "File name too long" in done.stderr


def test_results_among_the_images(folder: Path) -> None:
    """A run that is given again does not take its own results for an image."""
    command = (MODEL, folder / "*", "--format", "jsonl", "-o", folder / "labels.jsonl")
    (folder / "notes.txt").unlink()
    assert run(*command).returncode == 0
    lines = (folder / "labels.jsonl").read_text()
    assert run(*command).returncode == 0
    assert (folder / "labels.jsonl").read_text() == lines


def test_file_larger_than_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that memory has no room for fails alone."""
    read = Path.read_bytes
    (folder / "huge.png").write_bytes(b"")

    def read_bytes(path: Path) -> bytes:
        if path.name == "huge.png":
            raise MemoryError
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert main([str(MODEL), str(folder), "--format", "jsonl", "--quiet"]) == 1
    found = by_name(capsys.readouterr().out)
    assert found["huge.png"]["error"] == "The file is larger than what memory is left."
    assert sum("predictions" in line for line in found.values()) >= 2


@pytest.mark.parametrize(
    ("output_format", "content", "said"),
    [
        ("jsonl", "path,model,label_1,score_1,error\n", "holds no results in jsonl"),
        ("jsonl", "[]\n", "holds no results in jsonl"),
        ("csv", '{"path": "x"}\n', "holds no results in csv"),
        ("csv", "path,model,label_1,score_1,label_2,score_2,error\n", "another --top-k"),
        ("jsonl", '{"path": "x", "model": "MODEL", "predictions": []}\n', "another --top-k"),
        ("table", "something dear\n", "is there already"),
        ("csv", "something dear", "holds no results in csv"),
        ("jsonl", '{"path":"dear"}', "holds no results in jsonl"),
    ],
)
def test_file_of_something_else(
    live: Server, folder: Path, output_format: str, content: str, said: str
) -> None:
    """A file that holds anything but these results is left as it is, with one line that says so."""
    card = httpx2.get(f"{live.url}/model").json()
    file = folder / "out"
    file.write_text(content.replace("MODEL", f"{card['name']}@{card['version']}"))
    before = file.read_text()
    done = run(live.url, folder, "--format", output_format, "-o", file, "--top-k", 1)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert file.read_text() == before


@pytest.mark.parametrize("output_format", ["jsonl", "csv"])
def test_resume_of_odd_lines(live: Server, folder: Path, output_format: str) -> None:
    """Names with line ends, blank lines and a row cut off in such a name are no hindrance."""
    (folder / "a.png").rename(folder / "re\rturn.png")
    (folder / "b.PNG").rename(folder / "line\nfeed.png")
    (folder / "target").touch()
    file = folder / "out"
    file.symlink_to(folder / "target")
    options = [live.url, folder, "--format", output_format, "-o", file]
    assert run(*options).returncode == 0
    whole = file.read_text()
    with file.open("a") as stream:
        stream.write("\n" + ('"cut\noff' if output_format == "csv" else ""))
    again = run(*options)
    assert again.returncode == 0, again.stderr
    assert file.read_text() == whole
    assert file.is_symlink()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_names_that_are_no_text(live: Server, folder: Path, encoding: str) -> None:
    """Any file name goes through table and CSV as it is, whatever the terminal's encoding."""
    (folder / "b.PNG").rename(folder / "é→.png")
    os.rename(folder / "a.png", os.fsencode(folder) + b"/\xe9.png")  # noqa: PTH104 - bytes
    for output_format in ("table", "csv"):
        command = [sys.executable, "-m", MODULE, live.url, str(folder)]
        done = subprocess.run(
            [*command, "--format", output_format],
            cwd=ROOT,
            env=buffered(PYTHONIOENCODING=f"{encoding}:strict"),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert b"/\xe9.png" in done.stdout
        assert "/é→.png".encode() in done.stdout


def test_link_to_nowhere(live: Server, folder: Path) -> None:
    """A link that leads nowhere fails alone, by name and by pattern."""
    (folder / "lost.png").symlink_to("nowhere")
    for named in (folder / "lost.png", folder / "*.png"):
        done = run(live.url, named, "--format", "jsonl")
        assert done.returncode == 1
        assert "No such file" in str(by_name(done.stdout)["lost.png"]["error"])


def test_resume_needs_the_same_model(live: Server, folder: Path) -> None:
    """Results of another model are not mixed in, unless the file is to begin anew."""
    file = folder / "out.jsonl"
    row = {"path": "x", "model": "other@1", "predictions": []}
    file.write_text(json.dumps(row) + "\n")
    options = [live.url, folder, "--format", "jsonl", "-o", file]
    done = run(*options)
    assert done.returncode == 2
    assert "other@1" in done.stderr
    assert run(*options, "--overwrite").returncode == 0
    assert len(file.read_text().splitlines()) == 4


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl+C leaves whole lines behind, and the next run does only the rest."""
    for number in range(40):
        Image.new("RGB", (32, 32), (number * 6, 0, 0)).save(tmp_path / f"{number:02}.png")
    file = tmp_path / "out.jsonl"
    with busy_server(delay_s=0.1) as (url, asked):
        options = [url, tmp_path, "--format", "jsonl", "-o", file, "--concurrency", 2]
        command = [sys.executable, "-m", MODULE, *map(str, options)]
        # A test run in the background ignores Ctrl+C, and its children would inherit that.
        process = subprocess.Popen(
            command, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        )
        give_up = time.monotonic() + 30
        while not (file.exists() and file.read_text().count("\n") >= 4):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        done = file.read_text().count("\n")
        assert 4 <= done < 40
        asked.clear()
        assert run(*options).returncode == 0
        assert len(asked) == 40 - done
    assert len(by_name(file.read_text())) == 40


@pytest.mark.parametrize("output_format", ["table", "jsonl", "csv", "help"])
def test_reader_that_has_seen_enough(live: Server, folder: Path, output_format: str) -> None:
    """A closed pipe behind the command (`| head -0`) ends it without a word."""
    done = run_into_closed_pipe("-m", MODULE, *to_stdout(live, folder, output_format))
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("output_format", ["table", "jsonl", "csv", "help"])
def test_full_output(live: Server, folder: Path, output_format: str) -> None:
    """A standard output without room is one line."""
    done = run_into_full_disk("-m", MODULE, *to_stdout(live, folder, output_format))
    assert done.returncode == (1 if output_format == "help" else 2)
    assert done.stderr.startswith("mixer-classify: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", CLOSED)
def test_closed_streams(live: Server, folder: Path, closed: str) -> None:
    """Results go to their file, and what is shown to nobody, whichever streams are closed."""
    file = folder / "out.csv"
    command = ("-m", MODULE, live.url, str(folder / "a.png"))
    done = run_closed(closed, *command, "--format", "csv", "-o", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(file.read_text().splitlines()) == 2
    shown = run_closed(closed, *command)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert run_closed(closed, "-m", MODULE, "--help").returncode == 0
    assert run_closed(closed, "-m", MODULE, live.url, "nowhere").returncode == 2


def to_stdout(live: Server, folder: Path, output_format: str) -> list[str]:
    """Return arguments with which the command writes to standard output."""
    if output_format == "help":
        return ["--help"]
    return [live.url, str(folder), "--format", output_format]


def test_busy_server(tmp_path: Path) -> None:
    """A server that answers 429 is asked again, not before its Retry-After."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with busy_server(refusals=2) as (url, asked):
        done = run(url, tmp_path, "--format", "jsonl")
    assert done.returncode == 0, done.stderr
    assert len(asked) == 3
    assert asked[1] - asked[0] >= 1
    assert asked[2] - asked[1] >= 1


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> AsyncMock:
    """Return what is asked to sleep, and does not."""
    sleep = AsyncMock()
    monkeypatch.setattr("app.client.remote.asyncio", Mock(sleep=sleep))
    return sleep


def ask(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx2.Request], httpx2.Response]
) -> None:
    """Ask a server that answers so for its model, ten times at most."""
    client = partial(httpx2.AsyncClient, transport=httpx2.MockTransport(answer))
    monkeypatch.setattr(httpx2, "AsyncClient", client)
    asyncio.run(RemoteClassifier("http://server", 1, 1, 9, None).__aenter__())


@pytest.mark.parametrize(
    "failure",
    [
        {"side_effect": httpx2.ConnectError("gone")},
        {"return_value": httpx2.Response(502)},
        {"return_value": httpx2.Response(503)},
    ],
)
def test_waits_for_a_server_to_start(
    monkeypatch: pytest.MonkeyPatch, slept: AsyncMock, failure: dict[str, object]
) -> None:
    """Each wait for a server, or for that behind its balancer, is twice the last one, to 30 s."""
    with pytest.raises((ServerError, ImageError)):
        ask(monkeypatch, Mock(**failure))
    waits = [call.args[0] for call in slept.await_args_list]
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.parametrize(
    ("asked", "wait_s"),
    [("7", 7), ("0", 0.5), ("3600", 30), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.5), ("-1", 0.5)],
)
def test_waits_for_a_busy_server(
    monkeypatch: pytest.MonkeyPatch, slept: AsyncMock, asked: str, wait_s: float
) -> None:
    """A busy server is given the seconds that it asks for, but no more than half a minute."""
    card = {"name": "x", "version": "1", "labels": ["x"]}
    busy = httpx2.Response(503, headers={"Retry-After": asked})
    ask(monkeypatch, Mock(side_effect=[busy, httpx2.Response(200, json=card)]))
    slept.assert_awaited_once_with(wait_s)


def test_waits_where_many_come_back(monkeypatch: pytest.MonkeyPatch, slept: AsyncMock) -> None:
    """A server that stays busy is asked less and less often, but every four seconds at least."""
    busy = httpx2.Response(429, headers={"Retry-After": "1"})
    with pytest.raises(ServerError):
        ask(monkeypatch, Mock(return_value=busy))
    waits = [call.args[0] for call in slept.await_args_list]
    assert waits == [1, 1, 2, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("retries", [0, 1])
def test_patience_ends(tmp_path: Path, retries: int) -> None:
    """After its retries an image that found no place is a row with the reason."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with busy_server(refusals=99) as (url, asked):
        done = run(url, tmp_path, "--format", "jsonl", "--retries", retries)
    assert done.returncode == 1
    assert "busy" in done.stdout
    assert len(asked) == 1 + retries


def test_concurrency_is_bounded(tmp_path: Path) -> None:
    """As many requests are under way as `--concurrency` says, and no more."""
    for number in range(12):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    under_way: list[int] = []
    with busy_server(delay_s=0.2, under_way=under_way) as (url, _):
        run(url, tmp_path, "--concurrency", 3)
    assert len(under_way) == 12
    assert max(under_way) == 3


def test_api_key(folder: Path, tmp_path: Path) -> None:
    """The key comes from a file; without one, the server's wish is one plain line."""
    keys = tmp_path / "keys"
    keys.write_text("open sesame\n")
    with serving(tmp_path / "log", "--api-keys-file", str(keys)) as server:
        without = run(server.url, folder)
        assert without.returncode == 2
        assert "--api-key-file" in without.stderr
        assert run(server.url, folder, "--api-key-file", keys).returncode == 0
        guarded = server.url.replace("//", "//bob:s3cret@")  # for a proxy in front
        assert run(guarded, folder, "--api-key-file", keys).returncode == 0
    stopped = run(guarded, folder, "--api-key-file", keys, "--retries", "0")
    assert stopped.returncode == 2
    assert stopped.stderr.startswith(f"mixer-classify: {server.url}: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\ufeff# rotated\nschl\u00fcssel\nanother\n".encode(), None),
        (b"wrong\n", "the server does not know this API key"),
        (b"# none\n\n", "the file holds no key"),
        (b"\xe9\n", "it is not UTF-8"),
        (b"se\x00cret\n", "no request can be sent"),
    ],
)
def test_api_key_files(content: bytes, said: str | None, folder: Path, tmp_path: Path) -> None:
    """A file of keys is read as the server reads it, and what cannot be one is told, not shown."""
    (tmp_path / "known").write_text("schl\u00fcssel\n")
    (tmp_path / "keys").write_bytes(content)
    with serving(tmp_path / "log", "--api-keys-file", str(tmp_path / "known")) as server:
        done = run(server.url, folder / "a.png", "--api-key-file", tmp_path / "keys")
    assert done.returncode == (0 if said is None else 2), done.stderr
    if said is not None:
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert "cret" not in done.stderr


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"{}",
        b'{"predictions": [{"label": "x", "index": 0, "score": 1}]}',
        b'{"model": {"name": "busy", "version": "1"}, "predictions": [1]}',
        b"null",
        b"[" * 100_000,
        BUSY_ANSWER.replace(b'"x"', b"1"),
        BUSY_ANSWER.replace(b"1.0", b"NaN"),
        BUSY_ANSWER.replace(b'"x"', b'"\\ud800"'),
    ],
)
def test_answer_of_somebody_else(answer: bytes, folder: Path) -> None:
    """A 200 that is none of ours is the image's error, and the run goes on."""
    with busy_server(answer=answer) as (url, asked):
        done = run(url, folder, "--format", "jsonl", "--concurrency", 1)
    assert done.returncode == 1
    assert len(asked) == 4
    found = by_name(done.stdout).values()
    assert all("no Mixer Serve's" in str(row["error"]) for row in found)


def test_server_that_changes_its_model(folder: Path) -> None:
    """Where another model answers than at first, no result of it gets the first one's name."""
    with busy_server(answer=BUSY_ANSWER.replace(b'"1"', b'"2"')) as (url, _):
        done = run(url, folder, "--format", "jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert "busy@2 is served there now, and the results are those of busy@1" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("retries", [0, 4])
def test_image_that_is_too_large(live: Server, folder: Path, retries: int) -> None:
    """An upload that the server breaks off fails alone, and is not sent for minutes."""
    (folder / "large.png").write_bytes(bytes(60_000_000))
    done = run(live.url, folder, "--format", "jsonl", "--retries", retries)
    assert done.returncode == 1, done.stderr
    found = by_name(done.stdout)
    assert len(found) == 5
    assert "60000000 bytes are sent: they may be too many" in str(found["large.png"]["error"])
    assert [name for name, row in found.items() if "error" in row] == ["large.png"]


def test_labels_do_not_steer_a_terminal(folder: Path) -> None:
    """What a stranger's server calls an image stays one line, without control characters."""
    one = {"label": "\x1b[2Jcat\n/etc/passwd  dog 100%\u202e", "index": 0, "score": 1.0}
    answer = json.loads(BUSY_ANSWER) | {"predictions": [one]}
    with busy_server(answer=json.dumps(answer).encode()) as (url, _):
        done = run(url, folder / "a.png")
    assert done.stdout.count("\n") == 1
    assert "\ufffd[2Jcat\ufffd/etc/passwd  dog 100%\ufffd" in done.stdout


def test_answer_of_a_later_version(folder: Path) -> None:
    """Members that a later server may add are passed over."""
    one = {"label": "x", "index": 0, "score": 1.0, "more": []}
    answer = json.loads(BUSY_ANSWER) | {"predictions": [one], "more": {}}
    with busy_server(answer=json.dumps(answer).encode()) as (url, _):
        done = run(url, folder / "a.png", "--format", "jsonl")
    assert done.returncode == 0
    assert by_name(done.stdout)["a.png"]["predictions"] == [
        {"label": "x", "index": 0, "score": 1.0}
    ]


def test_proxy_that_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment that cannot be used is one line."""
    monkeypatch.setenv("HTTP_PROXY", "foo://x")
    done = run("http://127.0.0.1:9", folder)
    assert done.returncode == 2
    assert "a proxy in the environment cannot be used" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["absent.pem", "a.png"])
def test_certificates_that_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Certificates that are absent, or none, are one line that says what could not be read."""
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / name))
    done = run("http://127.0.0.1:9", folder)
    assert done.returncode == 2
    assert "the certificates of SSL_CERT_FILE" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("http://127.0.0.1:9", "FOLDER", "--retries", "1"), "127.0.0.1:9"),
        (("no-such-model.onnx", "FOLDER"), "no such file"),
        (("127.0.0.1:8000", "FOLDER"), "the address of a server begins with http://"),
        ((MODEL, "nowhere"), "no image there"),
        ((MODEL, "nowhere/*.jpg"), "no image there"),
        (("http://host:port", "FOLDER"), "no address of a server"),
        (("http://127.0.0.1:99999", "FOLDER"), "no address of a server"),
        (("http://127.0.0.1:9?x=1", "FOLDER"), "it has a query"),
        (("http://", "FOLDER"), "it names no host"),
        ((MODEL, "FOLDER", "--top-k", "abc"), "'abc' is not a number from 1"),
    ],
)
def test_useless(folder: Path, arguments: tuple[str, ...], word: str) -> None:
    """What makes a run impossible is one plain line and exit code 2."""
    done = run(*(str(folder) if one == "FOLDER" else one for one in arguments))
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.count("\n") == 1


@contextmanager
def busy_server(
    refusals: int = 0,
    delay_s: float = 0.0,
    under_way: list[int] | None = None,
    answer: bytes = BUSY_ANSWER,
) -> Iterator[tuple[str, list[float]]]:
    """Serve `answer`, the first so many times 429; yield address and request times.

    For each request `under_way` gets how many had come and were not yet answered.
    """
    asked: list[float] = []
    answered: list[None] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, b'{"name": "busy", "version": "1", "labels": ["x"]}')

        def do_POST(self) -> None:
            asked.append(time.monotonic())
            self.rfile.read(int(self.headers["Content-Length"]))
            if len(asked) <= refusals:
                self._answer(429, b'{"detail": "busy"}')
                return
            if under_way is not None:
                under_way.append(len(asked) - len(answered))
            time.sleep(delay_s)
            answered.append(None)  # before the client can know it and ask again
            self._answer(200, answer)

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_model_file_where_nothing_can_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes that decode, a model file is of no use, and the reason is told."""
    no_process = Mock(side_effect=BlockingIOError(11, "no process"))
    monkeypatch.setattr(nursery(), "new_link", no_process)
    with pytest.raises(ServerError, match="no process"):
        asyncio.run(LocalClassifier(Path(MODEL), 5).__aenter__())


def test_model_file_for_a_larger_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without room for a full batch is told in one line, not a setting to change."""
    golden = OnnxEngine.run

    def run(engine: OnnxEngine, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        if len(patches) > 4:
            raise RuntimeError("out of memory")
        return golden(engine, patches)

    monkeypatch.setattr(OnnxEngine, "run", run)
    with pytest.raises(ServerError, match=r"cannot run so many .*memory\); ask a mixer-serve"):
        asyncio.run(LocalClassifier(Path(MODEL), 5).__aenter__())


def test_largest_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that no decoder has room for is a row with the reason, and the others are done."""
    monkeypatch.setattr("app.client.local.LARGEST_BYTES", 2000)

    async def run() -> list[Prediction]:
        async with LocalClassifier(Path(MODEL), 5) as classifier:
            with pytest.raises(ImageError, match="larger than 2000 bytes"):
                await classifier.classify(bytes(2001))
            return await classifier.classify(make_image())

    assert len(asyncio.run(run())) == 5
