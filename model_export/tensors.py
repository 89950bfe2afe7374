"""Read tensors from a checkpoint file, from strangers too: nothing in it is ever executed.

Sizes are checked against the file before anything is allocated, so that a small file cannot ask
for much memory.
"""

import argparse
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import safetensors
import torch
from numpy.lib import format as npy
from torch import Tensor

from model_export.errors import ExportError

Tensors = dict[str, Tensor]
# Float weights hardly compress (1.1 times); with a head of zeros a checkpoint may by a few times.
MAX_EXPANSION = 20
_TORCH = (".pth", ".tar", ".pt", ".ckpt", ".bin")
# What training scripts keep under other names: averaged weights first, as timm and deit do.
_STATES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model"),
)
# What each of timm's Mixers has once, and Facebook's ResMLP: whatever is before it, put there by
# DistributedDataParallel, torch.compile, Lightning or AveragedModel, is before all names.
_STEMS = ("stem.proj.weight", "patch_embed.proj.weight")
# A file of torch's old kind begins with as many pickles: magic, protocol, system, object, keys.
_LEGACY_PICKLES = 5
_ZIP_MAGIC = b"PK\x03\x04"
# What a zip ends with: where its directory lies, in 64 bits, and where that is said; then in 32.
_ZIP64_END = struct.Struct("<4s44xQ4sIQI")  # signature, offset; signature, -, offset of the first
_ZIP_END = struct.Struct("<4s12xIH")  # signature, offset, length of a comment
# ml_dtypes' bfloat16 has no name in the npy format: it arrives as two raw bytes (big_vision).
_RAW_BFLOAT16 = np.dtype("V2")


class Weights(NamedTuple):
    """A model's tensors, and what the training script has saved beside them."""

    tensors: Tensors
    left_aside: int = 0  # tensors that are no part of the model
    state: str = ""  # which of several states the tensors are, and which they are not
    arguments: Mapping[str, object] = {}


def read(path: Path) -> Tensors:
    """Return the tensors of `weights`.

    Raises:
        ExportError: the file is damaged, hostile, or of another kind.
    """
    return weights(path).tensors


def weights(path: Path) -> Weights:
    """Read the tensors of an .npz, .safetensors, .pth, .pth.tar, .pt, .ckpt or .bin file.

    Where a wrapped module was saved, what it puts before the names is left out, and what else it
    holds is left aside.

    Raises:
        ExportError: the file is damaged, hostile, of another kind, or holds several models.
    """
    readers = {".npz": read_npz, ".safetensors": read_safetensors}
    readers |= dict.fromkeys(_TORCH, read_torch)
    if path.suffix.lower() not in readers:
        raise ExportError(f"{path.name}: expected a file in {', '.join(readers)}")
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    found = readers[path.suffix.lower()](path)
    prefix = _prefix(path, found.tensors)
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in found.tensors.items()
        if name.startswith(prefix)
    }
    return found._replace(tensors=own, left_aside=len(found.tensors) - len(own))


def _prefix(path: Path, names: Iterable[str]) -> str:
    found = {name.removesuffix(stem) for name in names for stem in _STEMS if name.endswith(stem)}
    prefixes = sorted(prefix for prefix in found if not prefix or prefix.endswith("."))
    if len(prefixes) > 1:
        raise ExportError(
            f"{path.name}: holds several models, whose names begin with "
            f"{' and '.join(map(repr, prefixes))}; save the one that is to be served alone"
        )
    return prefixes[0] if prefixes else ""


def read_npz(path: Path) -> Weights:
    """Read the tensors of a numpy archive; pickled objects are refused."""
    tensors = {}
    with _damage_as_refusal(path, "a numpy archive"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_expansion(path, sum(member.file_size for member in members))
        for member in members:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as stream:
                _check_npy_header(path, name, stream, member.file_size)
            with archive.open(member) as stream:
                tensors[name] = _from_numpy(npy.read_array(stream, allow_pickle=False))
    return Weights(tensors)


def read_safetensors(path: Path) -> Weights:
    """Read the tensors of a safetensors file; the library checks its header against its size."""
    with (
        _damage_as_refusal(path, "a safetensors file"),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        return Weights({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 # no mapping


def read_torch(path: Path) -> Weights:
    """Read a torch state dict with `weights_only`, so that its pickle can build tensors alone."""
    size = path.stat().st_size
    saved = _load_torch(path)
    with _damage_as_refusal(path, "a torch checkpoint"):
        if not isinstance(saved, Mapping):
            raise ExportError(f"{path.name}: holds a {type(saved).__name__}, not a state dict")
        known = [key for key in _STATES if isinstance(saved.get(key), Mapping)]
        # An average may also be kept as numbers and a list, which say nothing of names.
        whole = [key for key in known if saved[key] and _holds_tensors(saved[key])]
        taken, *others = whole or known[:1] or [""]
        state = saved[taken] if taken else saved
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise ExportError(f"{path.name}: {name} is no tensor: {type(tensor).__name__}")
        # A tensor may repeat its storage through zero strides: small in the file, huge as a copy.
        if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > size:
            raise ExportError(f"{path.name}: its tensors' shapes hold more bytes than the file")
        return Weights(
            {str(name): tensor for name, tensor in state.items()},
            state=f"{taken}; left aside: {', '.join(others)}" if others else "",
            arguments=_arguments(saved.get("args")),
        )


def _holds_tensors(state: Mapping[object, object]) -> bool:
    return all(isinstance(tensor, Tensor) for tensor in state.values())


def _arguments(found: object) -> Mapping[str, object]:
    """Return a script's arguments that are plain values."""
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    items = dict.items(found) if isinstance(found, dict) else ()
    plain = (str, int, float, list, tuple, type(None))
    return {str(name): value for name, value in items if isinstance(value, plain)}


def _load_torch(path: Path) -> object:
    with _damage_as_refusal(path, "a torch checkpoint"):
        with path.open("rb") as file:
            zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC  # as torch itself tells
        if zipped:
            with zipfile.ZipFile(path) as archive:  # torch stores its members uncompressed
                _check_directory(path, archive.start_dir)
                _check_expansion(path, sum(m.file_size for m in archive.infolist()), times=1)
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
    for _, argument, _ in pickletools.genops(data):
        if isinstance(argument, str) and argument.rpartition(" ")[2] == "bytearray":
            raise ExportError(f"{path.name}: refused, its pickle asks for memory of any size")


@contextmanager
def _damage_as_refusal(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except ExportError:
        raise
    except pickle.UnpicklingError as error:
        raise ExportError(f"{path.name}: refused, its pickle holds more than tensors") from error
    except Exception as error:
        # Damage makes the readers raise nearly anything: zlib.error, struct.error, KeyError,
        # UnicodeDecodeError, MemoryError, AttributeError. None of it is a fault of ours.
        reason = str(error).strip().split("\n", maxsplit=1)[0][:200]
        if " " not in reason:  # a number or a name, which tell nothing
            reason = f"{type(error).__name__} {reason}".strip()
        raise ExportError(f"{path.name}: cannot be read as {kind} ({reason})") from error


def _check_expansion(path: Path, declared_bytes: int, times: int = MAX_EXPANSION) -> None:
    size = path.stat().st_size
    if declared_bytes > times * size:
        raise ExportError(
            f"{path.name}: refused, its {size} bytes declare {declared_bytes} bytes of content"
        )


def _check_npy_header(path: Path, name: str, stream: IO[bytes], member_bytes: int) -> None:
    """Refuse a member whose header promises anything but its own bytes."""
    version = npy.read_magic(stream)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ExportError(f"{path.name}: {name} holds pickled Python objects, expected floats")
    if math.prod(shape) * dtype.itemsize != member_bytes - stream.tell():
        raise ExportError(
            f"{path.name}: {name} declares shape {shape}, but has {member_bytes} bytes"
        )


def _from_numpy(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    if array.dtype == _RAW_BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["W", "C"]))
