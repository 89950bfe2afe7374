"""Labels from a text file, a JSON list, and ImageNet's from packages."""

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from model_export import labels
from model_export.errors import ExportError


def test_text_has_one_label_a_line(tmp_path: Path) -> None:
    """Lines are labels; a byte order mark, outer spaces and trailing empty lines are none."""
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffant\n bee, wild \n\n".encode())
    assert labels.load(str(path), 2) == ("ant", "bee, wild")


def test_separators_within_a_label(tmp_path: Path) -> None:
    """Only the end of a line ends a label, on any system."""
    path = tmp_path / "labels.txt"
    path.write_bytes("ant\r\nbee\u2028wild\x0b!\r\n".encode())
    assert labels.load(str(path), 2) == ("ant", "bee\u2028wild\x0b!")


@pytest.mark.parametrize("names", [["ant", "bee"], {"1": "bee", "0": "ant"}])
def test_json_is_a_list_or_by_index(tmp_path: Path, names: object) -> None:
    """A .json file holds a list of strings, or strings by their index."""
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(names))
    assert labels.load(str(path), 2) == ("ant", "bee")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gist.txt", "{0: 'ant',\n 1: 'bee, \"wild\"'}\n"),
        ("list.txt", '[\n"ant",\n"bee, \\"wild\\""\n]\n'),
        ("list", "['ant',\n 'bee, \"wild\"']"),
        ("L.JSON", '["ant", "bee, \\"wild\\""]'),
    ],
)
def test_lists_under_any_name(tmp_path: Path, name: str, content: str) -> None:
    """JSON, or a list or dictionary that Python has printed, is read as that in a text file too."""
    (tmp_path / name).write_text(content)
    assert labels.load(str(tmp_path / name), 2) == ("ant", 'bee, "wild"')


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"{0: 'ant',\n1: 'bee',", "not JSON"),
        ("a.txt", b"[ant]\n[bee]", "one label a line whose first does not begin with"),
        ("a.txt", b"{0: 'ant', 2: 'bee'}", "expected a JSON list of strings"),
        ("a.txt", b"[" * 100_000, "not JSON"),
        ("a.csv", b"0,ant\n1,bee\n", "is a table, expected one label a line; save its column"),
        ("a.TSV", b"0\tant\n1\tbee\n", "is a table, expected one label a line; save its column"),
        ("a.json", b'{"0": "ant", "2": "bee"}', "expected a JSON list of strings"),
        ("a.json", b"[1, 2]", "expected a JSON list of strings"),
        ("a.json", b"[", "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.txt", b"ant\n\nbee\n", "label 2 is empty"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as text"),
        ("a.txt", b"ant\n", "1 labels, but the head has 2 classes"),
    ],
)
def test_malformed_labels_are_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    """A label file that does not hold is refused with the reason."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ExportError, match=said):
        labels.load(str(tmp_path / name), 2)


def test_imagenet_1k_comes_from_its_package() -> None:
    """The thousand names stand in the order of the published heads."""
    names = labels.load("imagenet-1k", 1000)
    assert names[0].startswith("tench")
    assert names[281].startswith("tabby")
    assert names[999].startswith("toilet tissue")


def test_imagenet_1k_needs_a_thousand_classes() -> None:
    """A head of another size is refused."""
    with pytest.raises(ExportError, match="1000 labels, but the head has 10 classes"):
        labels.load("imagenet-1k", 10)


@pytest.mark.parametrize(
    ("classes", "file"),
    [
        (21843, "imagenet21k_goog_synsets.txt"),
        (21841, "imagenet22k_synsets.txt"),
        (11221, "imagenet21k_miil_synsets.txt"),
    ],
)
def test_imagenet_21k_comes_from_timm_s_lists(
    classes: int, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list for that many classes is read out of an installed timm, without importing it."""
    info = tmp_path / "data" / "_info"
    info.mkdir(parents=True)
    synsets = [f"n{i:08}" for i in range(classes)]
    (info / file).write_text("\n".join(synsets) + "\n")
    rows = "".join(f"{synset}\tname {synset}, other\n" for synset in synsets)
    (info / "imagenet_synset_to_lemma.txt").write_text(rows)
    spec = ModuleSpec("timm", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    names = labels.load("imagenet-21k", classes)
    assert names[-1] == f"name n{classes - 1:08}, other"


def test_imagenet_21k_without_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm the line says how to get its lists alone."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install --no-deps timm"):
        labels.load("imagenet-21k", 11221)


def test_imagenet_21k_of_another_size_is_refused() -> None:
    """A head that fits none of the published lists is refused with their sizes."""
    with pytest.raises(ExportError, match="has 21000 classes, not 11221, 21841, 21843"):
        labels.load("imagenet-21k", 21000)
