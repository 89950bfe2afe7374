"""Damaged and hostile checkpoints: refused in one line, with nothing executed or written."""

import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model_export import tensors
from model_export.errors import ExportError

from .conftest import FIXTURES

WEIGHTS = {
    "weights.npz": FIXTURES / "google_tiny.npz",
    "weights.safetensors": FIXTURES / "timm_mixer_tiny" / "model.safetensors",
    "weights.bin": FIXTURES / "timm_mixer_tiny" / "pytorch_model.bin",
}
KINDS = pytest.mark.parametrize("kind", WEIGHTS)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        """Make the unpickler call os.mkdir."""
        return os.mkdir, (str(self.path),)


@KINDS
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file_is_refused(kind: str, share: float, tmp_path: Path) -> None:
    """A file cut anywhere is refused, naming the file."""
    content = WEIGHTS[kind].read_bytes()
    (tmp_path / kind).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ExportError, match=kind):
        tensors.read(tmp_path / kind)


@KINDS
def test_flipped_bytes_never_escape(kind: str, tmp_path: Path) -> None:
    """Whatever byte of the structure is damaged, reading ends in tensors or in a refusal."""
    content = WEIGHTS[kind].read_bytes()
    rng = np.random.default_rng(0)
    # Headers lie at the start, zip directories at the end.
    places = [*rng.integers(0, 400, 20), *(len(content) - rng.integers(1, 400, 20))]
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        (tmp_path / kind).write_bytes(damaged)
        try:
            tensors.read(tmp_path / kind)
        except ExportError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_bomb_is_not_executed(protocol: int, tmp_path: Path) -> None:
    """A plain pickle that would run code is refused, and the code does not run."""
    source, trace = tmp_path / "bomb.pth", tmp_path / "trace"
    source.write_bytes(pickle.dumps({"stem.proj.weight": Payload(trace)}, protocol))
    with pytest.raises(ExportError, match=r"bomb\.pth"):
        tensors.read(source)
    assert not trace.exists()


def test_pickle_bomb_in_a_torch_file_is_not_executed(tmp_path: Path) -> None:
    """A torch file whose pickle would run code is refused, and the code does not run."""
    source, trace = tmp_path / "bomb.bin", tmp_path / "trace"
    torch.save({"stem.proj.weight": Payload(trace)}, source)
    said = r"holds more than tensors; save the model's state_dict\(\) alone"
    with pytest.raises(ExportError, match=said):
        tensors.read(source)
    assert not trace.exists()


def test_pickle_bomb_in_an_npz_is_not_executed(tmp_path: Path) -> None:
    """An npz member of objects is refused, and the code does not run."""
    source, trace = tmp_path / "bomb.npz", tmp_path / "trace"
    np.savez(source, kernel=np.array([Payload(trace)], dtype=object))
    with pytest.raises(ExportError, match="kernel holds pickled Python objects"):
        tensors.read(source)
    assert not trace.exists()


def peak_bytes() -> int:
    """Return the most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_zip_bomb_is_refused_unopened(suffix: str, tmp_path: Path) -> None:
    """An archive that would expand a thousandfold is refused without taking the memory."""
    source = tmp_path / f"bomb{suffix}"
    size = 1 << 30
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (size // 4,)}
        )
        with archive.open("stem/kernel.npy", "w", force_zip64=True) as member:
            member.write(header.getvalue())
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
    before = peak_bytes()
    with pytest.raises(ExportError, match=r"bytes declare \d+ bytes of content"):
        tensors.read(source)
    assert peak_bytes() - before < size // 4


def test_absurd_shape_in_an_npz_is_refused(tmp_path: Path) -> None:
    """A header that declares more than its member holds is refused before allocating."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 10)}
    )
    with zipfile.ZipFile(tmp_path / "absurd.npz", "w") as archive:
        archive.writestr("head/bias.npy", header.getvalue() + bytes(28))
    with pytest.raises(ExportError, match=r"head/bias declares shape \(1099511627776, 1024\)"):
        tensors.read(tmp_path / "absurd.npz")


def test_absurd_shape_in_safetensors_is_refused(tmp_path: Path) -> None:
    """A safetensors header that declares more than the file holds is refused."""
    header = json.dumps(
        {"head.bias": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(28))
    with pytest.raises(ExportError, match=r"cannot be read as a safetensors file"):
        tensors.read(tmp_path / "a.safetensors")


def test_expanded_tensor_is_refused(tmp_path: Path) -> None:
    """A torch tensor that repeats one number a billion times through its strides is refused."""
    torch.save({"head.weight": torch.zeros(1).expand(1 << 30)}, tmp_path / "wide.pth")
    with pytest.raises(ExportError, match="shapes hold more bytes than the file"):
        tensors.read(tmp_path / "wide.pth")
    torch.save({"head.weight": torch.zeros(1, 2**16).expand(5, 2**16)}, tmp_path / "wide.pth")
    with pytest.raises(ExportError, match="shapes hold more bytes than the file"):
        tensors.read(tmp_path / "wide.pth")


def test_other_kind_of_file_is_refused(tmp_path: Path) -> None:
    """A file of an unknown suffix is refused with those that are known."""
    (tmp_path / "model.h5").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"expected a file in \.npz, \.safetensors, \.pth"):
        tensors.read(tmp_path / "model.h5")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("page.pth", b"<!doctype html><title>Not found</title>", "as a torch checkpoint"),
        (
            "w.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is git-lfs's pointer, not the file: git lfs pull",
        ),
    ],
)
def test_what_a_download_leaves_instead(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    """A web page and git-lfs's pointer under a checkpoint's name are told as what they are."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ExportError, match=said) as raised:
        tensors.read(tmp_path / name)
    assert "more than tensors" not in str(raised.value)


@pytest.mark.parametrize("places", [45, 1])
def test_pairs_of_pairs_are_refused(tmp_path: Path, places: int) -> None:
    """A pickle whose key would take a trillion steps to hash is refused within a moment."""
    numbers = [number % places for number in range(45)]
    pairs = b"".join(b"q%ch%c\x86" % (number, number) for number in numbers)  # put, get, pair
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02})" + pairs + b"K\x01s.")
        archive.writestr("archive/version", b"3\n")
    with pytest.raises(ExportError, match="asks for time without end"):
        tensors.read(tmp_path / "bomb.pth")


def test_many_tuples_cost_no_time(tmp_path: Path) -> None:
    """A pickle of a hundred thousand tuples, each kept and one taken as often, is read at once."""
    kept = b"".join(b"))\x86r%b" % number.to_bytes(4, "little") for number in range(100_000))
    with zipfile.ZipFile(tmp_path / "wide.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02(" + kept + b"h\x00" * 100_000 + b"l.")
        archive.writestr("archive/version", b"3\n")
    start = time.process_time()
    with pytest.raises(ExportError):  # it holds no tensors
        tensors.read(tmp_path / "wide.pth")
    assert time.process_time() - start < 30  # an hour where each taking goes through all


def test_many_groups_of_an_optimizer(tmp_path: Path) -> None:
    """A training checkpoint whose optimizer has a group for each layer is no such pickle."""
    layers = [torch.nn.Linear(2, 2) for _ in range(60)]
    optimizer = torch.optim.AdamW([{"params": layer.parameters()} for layer in layers])
    model = dict(layers[0].named_parameters())
    torch.save({"state_dict": model, "optimizer": optimizer.state_dict()}, tmp_path / "a.pth.tar")
    found = tensors.read(tmp_path / "a.pth.tar")
    assert {"weight", "bias"} <= {name.rpartition(".")[2] for name in found}


def test_torchscript(tmp_path: Path) -> None:
    """A compiled model is told as one, with what to save instead."""
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("script/data.pkl", "script/code/__torch__.py", "script/constants.pkl"):
            archive.writestr(name, "content")
    with pytest.raises(ExportError, match=r"is TorchScript; save the model's state_dict\(\)"):
        tensors.read(tmp_path / "script.pt")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_memory_of_any_size_is_not_asked_for(is_zip: bool, protocol: int, tmp_path: Path) -> None:
    """A pickle that asks for a bytearray is refused before torch gives it one."""

    class Bomb:
        def __reduce__(self) -> tuple[type, tuple[int]]:
            return bytearray, (3_000_000_000,)

    path = tmp_path / "bomb.pth"
    torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ExportError, match="asks for memory of any size"):
        tensors.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000


def with_two_directories(content: bytes) -> bytes:
    """Return a torch file with a second directory, which zipfile finds, and torch does not."""
    end = content.rindex(b"PK\x05\x06")
    size, start = struct.unpack("<II", content[end + 12 : end + 20])
    decoy = content[start : start + size].replace(b"data.pkl", b"data.bin")
    return content[: start + size] + decoy + content[end:]


def test_renamed_pickle_is_checked(tmp_path: Path) -> None:
    """A bytearray is refused in a pickle whose name has capitals, which torch reads, too."""
    path = tmp_path / "bomb.pth"
    torch.save({"a": bytearray(64)}, path)
    path.write_bytes(path.read_bytes().replace(b"data.pkl", b"DATA.PKL"))
    with pytest.raises(ExportError, match="memory of any size"):
        tensors.read(path)


def test_second_zip_directory_is_refused(tmp_path: Path) -> None:
    """Where zipfile sees other members than torch, their sizes cannot be checked: refused."""
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(3)}, path)
    assert tensors.read(path)["a"].shape == (3,)
    path.write_bytes(with_two_directories(path.read_bytes()))
    with pytest.raises(ExportError, match="not where it is said to be"):
        tensors.read(path)
