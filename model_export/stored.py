"""What a checkpoint file holds, and how its damage is told."""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from app.errors import first_line
from model_export.errors import ExportError

Tensors = dict[str, Tensor]
# Float weights hardly compress (1.1 times); with a head of zeros a checkpoint may by a few times.
MAX_EXPANSION = 20


class Weights(NamedTuple):
    """A model's tensors, and what the training script has saved beside them."""

    tensors: Tensors
    left_aside: tuple[str, ...] = ()  # tensors that are no part of the model
    state: str = ""  # which of several states the tensors are, and which they are not
    arguments: Mapping[str, object] = {}


@contextmanager
def damage_as_refusal(path: Path, kind: str) -> Iterator[None]:
    """Refuse a file that its reader stumbles over, whatever that raises.

    Raises:
        ExportError: it does; `kind` is what the file was taken for.
    """
    try:
        yield
    except ExportError:
        raise
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path.name}: refused, its pickle holds more than tensors; "
            "save the model's state_dict() alone"
        ) from error
    except Exception as error:
        # Damage makes the readers raise nearly anything: zlib.error, struct.error, KeyError,
        # UnicodeDecodeError, MemoryError, AttributeError. None of it is a fault of ours.
        reason = first_line(error)[:200]
        if " " not in reason:  # a number or a name, which tell nothing
            reason = f"{type(error).__name__} {reason}".strip()
        raise ExportError(f"{path.name}: cannot be read as {kind} ({reason})") from error


def check_expansion(path: Path, declared_bytes: int, times: int = MAX_EXPANSION) -> None:
    """Refuse a file whose content is `times` as large as itself: a bomb.

    Raises:
        ExportError: it is.
    """
    size = path.stat().st_size
    if declared_bytes > times * size:
        raise ExportError(
            f"{path.name}: refused, its {size} bytes declare {declared_bytes} bytes of content"
        )
