"""What is taken for the pictures and classes of a data set, however it is laid out."""

import io
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from model_export import dataset
from model_export.errors import ExportError


def lay(root: Path, *names: str) -> Path:
    """Write files of these names, each holding its own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode(errors="replace"))
    return root


def add(
    tar: tarfile.TarFile, name: str, data: bytes = b"", link: str = "", kind: bytes = b"0"
) -> None:
    """Put one member into a tar, a link if `link` says to what."""
    member = tarfile.TarInfo(name)
    member.size, member.linkname, member.type = len(data), link, kind
    tar.addfile(member, io.BytesIO(data))


def test_loose_pictures_are_no_split(tmp_path: Path) -> None:
    """A test/ without class folders is left alone, and val/ beside it is measured on."""
    listing = dataset.find(
        lay(tmp_path, "train/a/1", "train/b/2", "val/a/3", "val/b/4", "test/5", "test/6")
    )
    assert listing.test == (("val/a/3", 0), ("val/b/4", 1))


def test_class_may_be_named_train(tmp_path: Path) -> None:
    """A class named train among others is a class."""
    assert dataset.find(lay(tmp_path, "bus/1", "car/2", "train/3")).classes == (
        "bus",
        "car",
        "train",
    )


def test_splits_without_classes_are_refused(tmp_path: Path) -> None:
    """train/ and test/ of loose pictures are not taken for two classes."""
    with pytest.raises(ExportError, match="two or more classes, found none"):
        dataset.find(lay(tmp_path, "train/1", "train/2", "test/3"))


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    """Folders that are links belong to the data set; a link round in a circle ends nowhere."""
    lay(tmp_path / "elsewhere", "a/1", "a/2", "b/3")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "a" / "round").symlink_to(tmp_path / "elsewhere")
    listing = dataset.find(data)
    assert ("train/a/1", 0) in listing.train
    assert len(listing.train) < 20


def test_tar_counts_as_unpacked(tmp_path: Path) -> None:
    """Of a name that a tar holds twice the last one counts, once; a link stands for its file."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a/1", b"old")
        add(tar, "b/1", b"b")
        add(tar, "./a/1", b"new")
        add(tar, "a/hard", link="b/1", kind=tarfile.LNKTYPE)
        add(tar, "a/soft", link="../b/1", kind=tarfile.SYMTYPE)
        add(tar, "a/lost", link="nowhere", kind=tarfile.SYMTYPE)
    listing = dataset.find(path)
    names = [name for name, _ in listing.train]
    assert names == ["a/1", "a/hard", "a/soft", "b/1"]
    assert dict(dataset.read(path, names)) == {
        "a/1": b"new",
        "b/1": b"b",
        "a/hard": b"b",
        "a/soft": b"b",
    }
    assert len(list(dataset.read(path, names))) == 4


def test_links_may_come_first(tmp_path: Path) -> None:
    """A tar's links stand for files and folders that come later, also by way of other links."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "train/a/0", link="1", kind=tarfile.SYMTYPE)
        add(tar, "train/a/1", link="2", kind=tarfile.SYMTYPE)
        add(tar, "train/a/2", link="../../all/1", kind=tarfile.SYMTYPE)
        add(tar, "train/b", link="../all", kind=tarfile.SYMTYPE)
        add(tar, "train/b2/round", link="../b2", kind=tarfile.SYMTYPE)
        add(tar, "train/b2/3", b"3")
        add(tar, "all/1", b"1")
        add(tar, "all/inside/4", b"4")
    listing = dataset.find(path)
    names = [name for name, _ in listing.train]
    assert listing.classes == ("a", "b", "b2")
    assert names[:3] == ["train/a/0", "train/a/1", "train/a/2"]
    assert names[3:] == ["train/b/1", "train/b/inside/4", "train/b2/3"]
    contents = [b"1", b"1", b"1", b"1", b"4", b"3"]
    assert dict(dataset.read(path, names)) == dict(zip(names, contents, strict=True))


def test_link_that_is_replaced(tmp_path: Path) -> None:
    """Of a file and a link of one name the later one counts, as in unpacking."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a/1", link="../b/1", kind=tarfile.SYMTYPE)
        add(tar, "a/1", b"file")
        add(tar, "a/2", b"file")
        add(tar, "a/2", link="../b/1", kind=tarfile.SYMTYPE)
        add(tar, "a/3", b"file")
        add(tar, "a/3", link="nowhere", kind=tarfile.SYMTYPE)
        add(tar, "b/1", b"old")
        add(tar, "a/4", link="b/1", kind=tarfile.LNKTYPE)  # to what it is by now
        add(tar, "b/1", b"linked")
    contents = {"a/1": b"file", "a/2": b"linked", "a/4": b"old", "b/1": b"linked"}
    assert [name for name, _ in dataset.find(path).train] == list(contents)
    assert dict(dataset.read(path, list(contents))) == contents


def test_class_without_a_writable_name_is_refused(tmp_path: Path) -> None:
    """A folder whose name is no UTF-8 is refused before anything is trained."""
    (tmp_path / "a").mkdir()
    name = b"caf\xe9".decode(errors="surrogateescape")
    lay(tmp_path, "a/1", f"{name}/2")
    with pytest.raises(ExportError, match="no name that can be written"):
        dataset.find(tmp_path)


def test_truncated_archive_is_refused(tmp_path: Path) -> None:
    """An archive that is damaged inside is one line, not a traceback."""
    path = tmp_path / "set.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for number in range(50):
            add(tar, f"a/{number}", np.random.default_rng(number).bytes(100_000))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)
    with pytest.raises(ExportError, match="not a readable folder or tar"):
        dataset.find(path)


@pytest.mark.parametrize("fill", [0x00, 0x55, 0xFF])
def test_damaged_gzip_is_refused(tmp_path: Path, fill: int) -> None:
    """A compressed tar whose middle is damaged is not taken for a smaller one."""
    path = tmp_path / "set.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for number in range(80):
            add(tar, f"{'ab'[number % 2]}/{number}", np.random.default_rng(number).bytes(2000))
    whole = path.read_bytes()
    assert len(dataset.find(path).train) == 80
    third = len(whole) // 3
    path.write_bytes(whole[:third] + bytes([fill]) * 3000 + whole[third + 3000 :])
    with pytest.raises(ExportError, match=r"damaged|not a readable folder or tar"):
        dataset.find(path)


@pytest.mark.parametrize("kind", ["", ":gz", ":bz2", ":xz"])
def test_tar_without_its_end(tmp_path: Path, kind: str) -> None:
    """A tar that lacks its end is refused, though all of its pictures are there."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, f"w{kind}") as tar:  # type: ignore[call-overload] # one of its modes
        add(tar, "a/1", bytes(100))
        add(tar, "b/1", bytes(100))
    assert len(dataset.find(path).train) == 2
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] if kind else whole[:2048])  # a plain tar ends in a mark alone
    with pytest.raises(ExportError, match=r"damaged|not a readable folder or tar"):
        dataset.find(path)


@pytest.mark.parametrize("split", ["test", "val", "valid", "validation"])
def test_split_to_measure_on(tmp_path: Path, split: str) -> None:
    """The pictures beside those to train on are measured, whatever their split is called."""
    lay(tmp_path, "train/x/1", "train/y/2", f"{split}/x/3", f"{split}/y/4")
    measured = [PurePosixPath(f"{split}/x/3"), PurePosixPath(f"{split}/y/4")]
    assert list(dataset.measured(tmp_path)[1]) == measured
    assert [name for name, _ in dataset.find(tmp_path).test] == [str(name) for name in measured]


def test_splits_without_one_to_train_on(tmp_path: Path) -> None:
    """Two splits to measure on are no two classes: the first is measured, and none trained on."""
    lay(tmp_path, "test/x/1", "test/y/2", "val/x/3", "val/y/4")
    assert set(dataset.measured(tmp_path)[1].values()) == {"x", "y"}
    assert all(name.parts[0] == "test" for name in dataset.measured(tmp_path)[1])
    with pytest.raises(ExportError, match="found none"):
        dataset.find(tmp_path)


def test_measured_pictures_have_the_class_that_training_gives_them(tmp_path: Path) -> None:
    """Pictures in folders inside a class are measured as that class."""
    lay(tmp_path, "train/x/1", "train/y/2", "test/x/s/3", "test/y/4")
    assert dataset.measured(tmp_path)[1] == {
        PurePosixPath("test/x/s/3"): "x",
        PurePosixPath("test/y/4"): "y",
    }


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("training", "validation"), ("TRAINING", "Testing")]
)
def test_splits_in_other_words(tmp_path: Path, train: str, test: str) -> None:
    """Splits are told by their names in any case of letters, whatever is beside them."""
    lay(tmp_path, f"{train}/x/1", f"{train}/y/2", f"{test}/x/3", f"{test}/y/4", "extra/z/5")
    listing = dataset.find(tmp_path)
    assert listing.classes == ("x", "y")
    assert listing.train == ((f"{train}/x/1", 0), (f"{train}/y/2", 1))
    assert listing.test == ((f"{test}/x/3", 0), (f"{test}/y/4", 1))
    assert dataset.measured(tmp_path)[0] == test


def test_splits_of_loose_pictures_are_no_classes(tmp_path: Path) -> None:
    """Pictures that lie in Train/ and Test/ themselves have no classes."""
    with pytest.raises(ExportError, match="two or more classes, found none"):
        dataset.find(lay(tmp_path, "Train/1", "Train/2", "Test/3"))


@pytest.mark.parametrize("name", ["Train", "training"])
def test_class_with_folders_may_be_named_as_a_split(tmp_path: Path, name: str) -> None:
    """Without a split to test on beside it, Train is a class among others."""
    lay(tmp_path, "Bus/a/1", f"{name}/a/2", f"{name}/b/3")
    assert dataset.find(tmp_path).classes == ("Bus", name)
