"""Closing a connection so that the client reads its answer, even while it still sends.

Closing a socket with unread bytes makes the kernel reset the connection, and the reset may overtake
the answer: instead of our 413 a client that was still sending its upload would see a broken pipe.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, ClassVar

# Long enough for an answer to cross the world and be read.
LINGER_S = 2.0
# Of what still comes, this much is thrown away; the rest is left with the client.
LINGER_BYTES = 64 * 1024
# A client that does not even read its last answer is not waited for any longer than this.
FLUSH_S = 10.0


_ESTABLISHED = 1  # netinet/tcp.h


def has_hung_up(transport: asyncio.Transport) -> bool:
    """Return whether the client has closed or reset its connection, without reading from it."""
    if not hasattr(socket, "TCP_INFO"):  # it is Linux's
        return False
    client = transport.get_extra_info("socket")
    try:
        return bool(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED)
    except OSError:
        return True


class Farewell(asyncio.Transport):
    """A transport whose `close` ends our side first, and the connection a little later.

    `is_unread` says whether a request is still arriving that may be waited for; without one,
    closing is just closing.
    """

    lingering: ClassVar[int] = 0  # connections of this process between goodbye and end

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        is_unread: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._is_unread = is_unread
        self._timer: asyncio.TimerHandle | None = None
        self._is_lingering = False
        self._left = LINGER_BYTES

    def close(self) -> None:
        """Send what is written, then say goodbye."""
        if self.is_closing():
            return
        if self._is_unread() and self._transport.can_write_eof():
            self._timer = self._loop.call_later(LINGER_S, self._transport.abort)
            self._is_lingering = True
            Farewell.lingering += 1
            self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._timer = self._loop.call_later(FLUSH_S, self._transport.abort)
            self._transport.close()

    def discard(self, data: bytes) -> None:
        """Throw away what comes after the goodbye, and stop reading when it is too much."""
        self._left -= len(data)
        if self._left < 0:
            self._transport.pause_reading()

    def end(self) -> None:
        """Stop the clock: the connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
        if self._is_lingering:
            self._is_lingering = False
            Farewell.lingering -= 1

    def is_closing(self) -> bool:
        """Return whether goodbye has been said."""
        return self._timer is not None or self._transport.is_closing()

    def write(self, data: Any) -> None:
        """Write, unless goodbye has been said or the client is gone."""
        if not self.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        """Drop the connection and what is not yet sent."""
        self._transport.abort()

    def pause_reading(self) -> None:
        """Leave what comes with the client."""
        if not self.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take what comes."""
        if not self.is_closing():
            self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what the socket knows."""
        return self._transport.get_extra_info(name, default)
