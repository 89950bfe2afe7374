"""A server that stops so that nobody notices: balancers first, then the listener, then the end."""

import asyncio
import contextlib
import ctypes
import logging
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from contextvars import Context
from types import FrameType

import uvicorn
from fastapi import FastAPI

from app.protocol import bounded
from app.settings import Settings

logger = logging.getLogger(__name__)

# Those who have connected before the listener closes are accepted within a few milliseconds; this
# only bounds it.
LAST_ACCEPT_S = 2.0
SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python does not name it


class DrainingServer(uvicorn.Server):
    """A server that fails its readiness first, serves on for a while, and only then stops.

    A balancer notices a stopping replica by its readiness probe. Until then it sends requests, and
    uvicorn alone would have closed its listener on them.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded(settings, app),
                ws="none",
                lifespan="on",
                log_config=None,
                log_level=settings.log_level,
                access_log=False,  # access.py writes a line of ours
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type] # a float does
                timeout_graceful_shutdown=settings.grace_s,  # type: ignore[arg-type] # likewise
            )
        )
        self._app = app
        self._drain_delay_s = settings.drain_delay_s
        self._stop_at = math.inf  # time.monotonic() seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends the process at once."""
        if self._stop_at < math.inf:
            os._exit(128 + sig)  # as a shell reports it; threads and clients are given up
        if self.started:
            self._app.state.service.draining = True
        # Ctrl+C comes from a person at a terminal: no balancer is to be waited for.
        delay_s = 0.0 if sig == signal.SIGINT else self._drain_delay_s
        self._stop_at = time.monotonic() + delay_s
        # Whatever request the signal came upon has nothing to do with it.
        Context().run(logger.info, "draining for %g s, then stopping", delay_s)

    async def on_tick(self, counter: int) -> bool:
        """Stop when the drain delay is over; uvicorn asks ten times a second."""
        if self._stop_at < math.inf:  # the signal may have come as the service began
            self._app.state.service.draining = True
        self.should_exit = self.should_exit or time.monotonic() >= self._stop_at
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take in whoever has connected already, then close."""
        listeners = sockets or []
        waiting = select.poll()  # select() takes no descriptor above 1023
        for listener in listeners:
            _drop_newcomers(listener)
            waiting.register(listener, select.POLLIN)
        give_up = time.monotonic() + LAST_ACCEPT_S
        while waiting.poll(0) and time.monotonic() < give_up:  # noqa: ASYNC110 - no event says that nobody waits
            await asyncio.sleep(0.01)  # the event loop accepts them
        await super().shutdown(sockets)
        # Whoever does not read its answer would hold up the end for as long as it may not read.
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # they are told, and with them what waits to write


def _drop_newcomers(listener: socket.socket) -> None:
    """Have the kernel ignore new connections, which closing the listener alone would reset.

    Closing resets whatever waits to be accepted: clients that are connected, for all they know, and
    have sent a request. One whose first packet is ignored tries again and finds the port closed.
    """
    if sys.platform == "linux":
        # A socket filter (Linux, socket(7)) of one instruction, BPF_RET | BPF_K 0: drop it.
        drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
        program = struct.pack("HP", 1, ctypes.addressof(drop))
        # A sandbox may forbid it; then the close alone resets a newcomer, and its balancer retries.
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
