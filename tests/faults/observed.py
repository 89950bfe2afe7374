"""`python -m tests.faults.observed …`: mixer-serve, plus a view of its inside and faults to order.

`OBSERVED_BATCH_MS` puts a fake engine of that latency in the model's place, with
`OBSERVED_CLASSES`, three times some number. `GET /observed` shows what is in flight and how many
images the engine has seen; `?fault=raise`, `nan` or `none` breaks and mends the engine; with
`fork`, no decoder can be started. `?hold=1` keeps the engine from ending its batch until `?hold=0`.
With `OBSERVED_SLICE_BYTES` a turn is over after so many bytes, and `OBSERVED_HELD_BYTES` may wait.
"""

import os
import sys
import threading
import time
from typing import Any, NoReturn

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray

from app import decoder_link, images, main, protocol, serve, turns
from app.decoder import MAX_CPU_S
from app.engine import Engine, OnnxEngine
from app.nursery import nursery
from app.settings import Settings
from app.shares import Share
from tests.fakes import FakeEngine, make_card
from tests.processes import cpu_s


class ObservedEngine:
    """An engine that counts, and fails on demand."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        batch_ms = os.environ.get("OBSERVED_BATCH_MS")
        classes = os.environ.get("OBSERVED_CLASSES", "3")
        self.engine: Engine = (
            OnnxEngine(*arguments, **options)
            if batch_ms is None
            else FakeEngine(
                make_card(tuple(f"{number:060}" for number in range(int(classes)))),
                seconds=float(batch_ms) / 1000,
            )
        )
        self.card, self.provider = self.engine.card, self.engine.provider
        self.threads, self.cut = self.engine.threads, self.engine.cut
        self.stack = self.engine.stack
        self.images = 0
        self.fault = "none"
        self.slower_s = 0.0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes], as the engine does."""
        return self.engine.run(patches)

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return logits float32 [share, classes], or fail as ordered."""
        self.images += len(patches)
        time.sleep(self.slower_s)
        self.may_go_on.wait()
        if self.fault == "raise":
            raise RuntimeError("ordered to fail")
        logits = self.engine.infer(patches, share)
        return np.full_like(logits, np.nan) if self.fault == "nan" else logits


class Slowest:
    """Watches the decoders: the CPU time of the slowest image since it was asked for.

    Of a decoder that was ended over one only the limit is known, which the kernel keeps.
    """

    cpu_s = 0.0

    def __init__(self) -> None:
        self._decode = decoder_link.DecoderLink.decode

    def decode(self, decoder: decoder_link.DecoderLink, upload: bytes) -> images.Picture:
        """Decode as usual."""
        pid, start = decoder.pid, self._used_s(decoder.pid)
        try:
            return self._decode(decoder, upload)
        finally:
            took = self._used_s(pid) - start if decoder.pid == pid else MAX_CPU_S
            self.cpu_s = max(self.cpu_s, took)

    def take_us(self) -> int:
        """Return it, and forget it."""
        took_us, self.cpu_s = int(self.cpu_s * 1e6), 0.0
        return took_us

    def _used_s(self, pid: int) -> float:
        try:
            return cpu_s(pid)
        except OSError:
            return 0.0  # it has ended meanwhile


def _no_nursery() -> NoReturn:
    raise BlockingIOError("ordered to fail")


def create_observed_app(settings: Settings, engine: ObservedEngine) -> FastAPI:
    """Return the service with one more route."""
    slowest = Slowest()

    def decode(self: decoder_link.DecoderLink, upload: bytes) -> images.Picture:
        return slowest.decode(self, upload)

    decoder_link.DecoderLink.decode = decode  # type: ignore[method-assign] # the same face
    app = main.create_app(settings, engine)

    @app.get("/observed", include_in_schema=False)
    async def observed(
        fault: str = "", slower_ms: int | None = None, hold: bool | None = None
    ) -> dict[str, int]:
        engine.fault = fault or engine.fault
        vars(decoder_link)["nursery"] = _no_nursery if engine.fault == "fork" else nursery
        if slower_ms is not None:
            engine.slower_s = slower_ms / 1000
        if hold is not None:
            (engine.may_go_on.clear if hold else engine.may_go_on.set)()
        admission = app.state.service.admission
        return {
            "requests": admission.requests,
            "body_bytes": admission.body_bytes,
            "answer_images": admission.answer_images,
            "answer_bytes": admission.answer_bytes,
            "images": admission.images,
            "inferred": engine.images,
            "held_bytes": app.state.service.turns.held_bytes,
            "threads": threading.active_count(),
            "slowest_decode_us": slowest.take_us(),
        }

    return app


if __name__ == "__main__":
    serve.OnnxEngine = ObservedEngine  # type: ignore[attr-defined,assignment] # the same face
    serve.create_app = create_observed_app  # type: ignore[attr-defined,assignment] # likewise
    if slice_bytes := os.environ.get("OBSERVED_SLICE_BYTES"):
        protocol.SLICE_BYTES = int(slice_bytes)
        vars(protocol)["TURN_S"] = -1.0
    turns.MAX_HELD_BYTES = int(os.environ.get("OBSERVED_HELD_BYTES", turns.MAX_HELD_BYTES))
    sys.exit(serve.main())
