"""Read a torch checkpoint, from strangers too: its pickle may build tensors and nothing more."""

import argparse
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from model_export.errors import ExportError
from model_export.stored import Weights, check_expansion, damage_as_refusal

# What training scripts keep under other names: averaged weights first, as timm and deit do.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
_STATES = (*_AVERAGES, "state_dict", "model_state_dict", "model")
_INSIDE = ("module", "state_dict")  # of an average that is kept with its decay
# Modules may share their tensors, each then there under two names or three.
_MAX_SHARING = 4
# Pairs of pairs of pairs, each taken twice: to hash the outermost takes so many steps. Groups of an
# optimizer's parameters share a tuple, too, but nothing is made of it.
_MAX_STEPS = 2**20
# A file of torch's old kind begins with as many pickles: magic, protocol, system, object, keys.
_LEGACY_PICKLES = 5
_ZIP_MAGIC = b"PK\x03\x04"
# What a zip ends with: where its directory lies, in 64 bits, and where that is said; then in 32.
_ZIP64_END = struct.Struct("<4s44xQ4sIQI")  # signature, offset; signature, -, offset of the first
_ZIP_END = struct.Struct("<4s12xIH")  # signature, offset, length of a comment


def read_torch(path: Path) -> Weights:
    """Read a torch state dict with `weights_only`, so that its pickle can build tensors alone."""
    size = path.stat().st_size
    saved = _load_torch(path)
    with damage_as_refusal(path, "a torch checkpoint"):
        if not isinstance(saved, Mapping):
            raise ExportError(f"{path.name}: holds a {type(saved).__name__}, not a state dict")
        saved = {**saved, **_unwrapped(saved)}
        known = [key for key in _STATES if isinstance(saved.get(key), Mapping)]
        # An average may also be kept as numbers and a list, which say nothing of names.
        whole = [key for key in known if _is_state(saved[key])]
        unknown = [name for name, found in saved.items() if name not in known and _is_state(found)]
        is_state = any(isinstance(found, Tensor) for found in saved.values())
        if not whole and not is_state and len(unknown) == 1:  # whatever people call it
            whole = unknown
        taken = next(iter(whole or known), "")
        others = [key for key in known if key != taken and saved[key]]
        state = saved[taken] if taken else saved
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise ExportError(
                    f"{path.name}: {name} is no tensor: {type(tensor).__name__}; "
                    "save the model's state_dict() alone"
                )
        # A tensor may repeat its storage through zero strides: small in the file, huge as a copy.
        if sum(tensor.nbytes for tensor in state.values()) > _MAX_SHARING * size:
            raise ExportError(f"{path.name}: its tensors' shapes hold more bytes than the file")
        return Weights(
            {str(name): tensor for name, tensor in state.items()},
            state=_told(str(taken), others),
            arguments=_arguments(saved.get("args")),
        )


def _unwrapped(saved: Mapping[object, object]) -> dict[object, object]:
    """Return the averages of which the state is one of several things that are kept."""
    return {
        name: found[inside]
        for name in _AVERAGES
        for inside in _INSIDE
        if isinstance(found := saved.get(name), Mapping) and _is_state(found.get(inside))
    }


def _told(taken: str, others: list[str]) -> str:
    """Return what the report says of the state that was taken, where that is not plain."""
    if others:
        return f"{taken}; left aside: {', '.join(others)}"
    return "" if taken in _STATES else taken


def _is_state(found: object) -> bool:
    if not isinstance(found, Mapping) or not found:
        return False
    return all(isinstance(tensor, Tensor) for tensor in found.values())


def _arguments(found: object) -> Mapping[str, object]:
    """Return a script's arguments that are plain values."""
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    items = dict.items(found) if isinstance(found, dict) else ()
    plain = (str, int, float, list, tuple, type(None))
    return {str(name): value for name, value in items if isinstance(value, plain)}


def _load_torch(path: Path) -> object:
    with damage_as_refusal(path, "a torch checkpoint"):
        with path.open("rb") as file:
            begin = file.read(len(_ZIP_MAGIC))
        zipped = begin == _ZIP_MAGIC  # as torch itself tells
        if not zipped and begin[:1] != pickle.PROTO:
            raise ExportError(
                f"{path.name}: cannot be read as a torch checkpoint: it is neither zip nor pickle"
            )
        if zipped:
            with zipfile.ZipFile(path) as archive:  # torch stores its members uncompressed
                _check_directory(path, archive.start_dir)
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise ExportError(
                        f"{path.name}: is TorchScript; save the model's state_dict() instead"
                    )
                check_expansion(path, sum(m.file_size for m in archive.infolist()), times=1)
        _check_pickles(path, zipped)
        # timm's training files keep their arguments in one: a bag of attributes, nothing more.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state: object = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _check_pickles(path: Path, zipped: bool) -> None:
    """Refuse a pickle that allocates at a number's word: torch lets a bytearray of any size be."""
    if zipped:  # by torch's own reader, to which DATA.PKL is the same name
        with path.open("rb") as file:
            _check_pickle(path, torch._C.PyTorchFileReader(file).get_record("data.pkl"))
        return
    with path.open("rb") as file, suppress(ValueError):  # what is no pickle is torch's to refuse
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(path, file)


def _check_directory(path: Path, found: int) -> None:
    """Refuse a zip whose directory zipfile `found` elsewhere than where torch will look for it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _ZIP64_END.size - _ZIP_END.size))
        start, tail = file.tell(), file.read()
    signature, offset, comment = _ZIP_END.unpack(tail[-_ZIP_END.size :])
    if len(tail) == _ZIP64_END.size + _ZIP_END.size:
        first, wide, second, _, place, _ = _ZIP64_END.unpack_from(tail)
        if second == b"PK\x06\x07":
            offset = wide if (first, place) == (b"PK\x06\x06", start) else None
    if signature != b"PK\x05\x06" or comment or offset != found:
        raise ExportError(f"{path.name}: refused, its zip directory is not where it is said to be")


def _check_pickle(path: Path, data: bytes | IO[bytes]) -> None:
    before = ""
    kept: dict[object, int] = {}  # place -> number of the tuple that waits there to be taken again
    uses: list[int] = []  # of each such tuple
    steps = 1  # the product of all uses
    for operation, argument, _ in pickletools.genops(data):
        if isinstance(argument, str) and argument.rpartition(" ")[2] == "bytearray":
            raise ExportError(f"{path.name}: refused, its pickle asks for memory of any size")
        if "PUT" in operation.name and before.startswith("TUPLE"):
            kept[argument] = len(uses)  # another one may have been there
            uses.append(1)
        if "GET" in operation.name and argument in kept:
            number = kept[argument]
            steps = steps // uses[number] * (uses[number] + 1)
            uses[number] += 1
            if steps > _MAX_STEPS:
                raise ExportError(f"{path.name}: refused, its pickle asks for time without end")
        before = operation.name
