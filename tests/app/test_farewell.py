"""Closing a connection so that the client still reads its answer."""

import asyncio
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from app.farewell import LINGER_BYTES, Farewell


@pytest.fixture
def transport() -> Mock:
    """Return what stands for a connection."""
    return Mock(spec=asyncio.Transport, is_closing=Mock(return_value=False))


@pytest.fixture
def farewell(transport: Mock) -> Iterator[Farewell]:
    """Return a farewell to a client whose request is still arriving."""
    loop = asyncio.new_event_loop()
    found = Farewell(transport, loop, is_unread=lambda: True)
    yield found
    found.end()
    loop.close()


def test_reads_on_behind_the_last_answer(farewell: Farewell, transport: Mock) -> None:
    """A connection that was not read from is read again, so that nothing is left to reset it."""
    farewell.pause_reading()
    farewell.close()
    assert [call[0] for call in transport.method_calls if "reading" in call[0]] == [
        "pause_reading",
        "resume_reading",
    ]
    transport.write_eof.assert_called_once()
    transport.close.assert_not_called()


def test_reads_on_for_so_much(farewell: Farewell, transport: Mock) -> None:
    """Of what comes behind the goodbye 64 KiB are thrown away, the rest is left with the client."""
    farewell.close()
    farewell.discard(bytes(LINGER_BYTES))
    transport.pause_reading.assert_not_called()
    farewell.discard(b"x")
    transport.pause_reading.assert_called_once()
