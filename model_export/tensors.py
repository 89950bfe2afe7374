"""Read tensors from a checkpoint file, from strangers too: nothing in it is ever executed.

Sizes are checked against the file before anything is allocated, so that a small file cannot ask
for much memory.
"""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import safetensors
import torch
from numpy.lib import format as npy
from torch import Tensor

from model_export.errors import ExportError
from model_export.stored import Tensors, Weights, check_expansion, damage_as_refusal
from model_export.torch_file import read_torch

_LFS_POINTER = b"version https://git-lfs"
_TORCH = (".pth", ".tar", ".pt", ".ckpt", ".bin")
# What each of timm's Mixers has once, and Facebook's ResMLP: whatever is before it, put there by
# DistributedDataParallel, torch.compile, Lightning or AveragedModel, is before all names.
_STEMS = ("stem.proj.weight", "patch_embed.proj.weight")
# ml_dtypes' bfloat16 has no name in the npy format: it arrives as two raw bytes (big_vision).
_RAW_BFLOAT16 = np.dtype("V2")


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
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    readers |= dict.fromkeys(_TORCH, read_torch)
    if path.suffix.lower() not in readers:
        raise ExportError(f"{path.name}: expected a file in {', '.join(readers)}")
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ExportError(f"{path.name}: is git-lfs's pointer, not the file: git lfs pull")
    found = readers[path.suffix.lower()](path)
    prefix = _prefix(path, found.tensors)
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in found.tensors.items()
        if name.startswith(prefix)
    }
    beside = tuple(name for name in found.tensors if not name.startswith(prefix))
    return found._replace(tensors=own, left_aside=beside)


def _prefix(path: Path, names: Iterable[str]) -> str:
    found = {name.removesuffix(stem) for name in names for stem in _STEMS if name.endswith(stem)}
    prefixes = sorted(prefix for prefix in found if not prefix or prefix.endswith("."))
    if len(prefixes) > 1:
        raise ExportError(
            f"{path.name}: holds several models, whose names begin with "
            f"{' and '.join(map(repr, prefixes))}; save the one that is to be served alone"
        )
    return prefixes[0] if prefixes else ""


def _read_npz(path: Path) -> Weights:
    """Read the tensors of a numpy archive; pickled objects are refused."""
    tensors = {}
    with damage_as_refusal(path, "a numpy archive"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        check_expansion(path, sum(member.file_size for member in members))
        for member in members:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as stream:
                _check_npy_header(path, name, stream, member.file_size)
            with archive.open(member) as stream:
                tensors[name] = _from_numpy(npy.read_array(stream, allow_pickle=False))
    return Weights(tensors)


def _read_safetensors(path: Path) -> Weights:
    """Read the tensors of a safetensors file; the library checks its header against its size."""
    with (
        damage_as_refusal(path, "a safetensors file"),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        return Weights({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 # no mapping


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
