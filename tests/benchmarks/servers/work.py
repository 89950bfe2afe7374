"""What every server here does for an image: the same model, preprocessing and answer.

Runs in the peers' virtual environments too, so it imports no more than they all have.
"""

import importlib.util
import io
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

if importlib.util.find_spec("fastapi") is None:
    # The image pipeline's errors name a response class that only a FastAPI server answers with. A
    # peer without FastAPI need not carry its memory for that.
    for name in ("fastapi", "fastapi.responses"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fastapi.responses"].JSONResponse = object  # type: ignore[attr-defined] # a stand-in

from app.geometry import geometry
from app.images import decode, patchify
from app.model_card import Preprocessing, read_metadata

PORT = int(os.environ.get("BENCH_PORT", "8000"))
MAX_BATCH = int(os.environ.get("BENCH_MAX_BATCH", "16"))
MAX_PIXELS = 50_000_000


class Preparation:
    """Decodes images as the model in `BENCH_PREPROCESSING` wants them, by `BENCH_DECODING`."""

    def __init__(self) -> None:
        self._preprocessing = Preprocessing.model_validate_json(os.environ["BENCH_PREPROCESSING"])
        self._is_plain = os.environ.get("BENCH_DECODING") == "plain"

    def prepare(self, data: bytes) -> NDArray[np.uint8]:
        """Decode an image file into patches uint8 [tokens, P·P·3]."""
        if self._is_plain:
            return _decode_plainly(data, self._preprocessing)
        return decode(data, self._preprocessing, MAX_PIXELS).patches


def _decode_plainly(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode with Pillow as tutorials do: the whole picture, then resize, then crop."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    crop = geometry(*image.size, preprocessing)
    kernel = Image.Resampling[preprocessing.interpolation.upper()]
    column, row = crop.offset
    side = preprocessing.image_size
    scaled = image.resize(crop.scaled, kernel)
    square = scaled.crop((column, row, column + side, row + side))
    return patchify(square, preprocessing.patch_size)


class Work(Preparation):
    """Preparation and model; `BENCH_MODEL` and `BENCH_THREADS` say which."""

    def __init__(self) -> None:
        super().__init__()
        import onnxruntime  # here, so that a process that only decodes does without

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        card, _ = read_metadata(self._session.get_modelmeta().custom_metadata_map)
        self._labels = card.labels

    def infer(self, patches: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for patches uint8 [tokens, P·P·3] each."""
        logits: NDArray[np.float32] = self._session.run(["logits"], {"patches": np.stack(patches)})[
            0
        ]
        return logits

    def answer(self, logits: NDArray[np.float32]) -> dict[str, Any]:
        """Return the five best labels of logits float32 [classes], as the service does."""
        scores = np.exp(logits.astype(np.float64) - logits.max())
        scores /= scores.sum()
        labels = self._labels
        return {
            "predictions": [
                {"label": labels[index], "index": int(index), "score": float(scores[index])}
                for index in np.argsort(-scores, kind="stable")[:5]
            ]
        }
