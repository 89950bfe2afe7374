"""API keys: when their file is read again."""

import os
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from app.keys import ApiKeys


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file of one key, looked at with every request."""
    monkeypatch.setattr("app.keys.RELOAD_PERIOD_S", 0.0)
    path = tmp_path / "keys"
    path.write_text("first\n")
    return path


def allows(keys: ApiKeys, key: str) -> bool:
    """Return whether a request with that key is let in."""
    return keys.allow(Headers({"x-api-key": key}))


def test_read_once_for_each_change(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file is read again when it has changed, and only then."""
    caplog.set_level("INFO")
    keys = ApiKeys(file)
    assert allows(keys, "first")
    assert caplog.messages == []
    file.write_text("second\nthird\n")
    for _ in range(3):
        assert allows(keys, "second")
    assert caplog.messages == ["API keys reread: 2"]


def test_slip_is_told_until_it_is_mended(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that cannot be read is tried again each time, its last keys kept."""
    keys = ApiKeys(file)
    file.write_text("# none\n")
    for count in (1, 2):
        assert allows(keys, "first")
        assert len(caplog.messages) == count


def test_another_file_of_the_same_size_and_time(file: Path) -> None:
    """A file that takes the old one's place counts, even if neither size nor time tell."""
    keys = ApiKeys(file)
    before = file.stat()
    other = file.with_suffix(".new")
    other.write_text("other\n")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert allows(keys, "other")
    assert not allows(keys, "first")
