"""Read the names of the classes, one for each logit."""

import json
from pathlib import Path

from model_export.errors import ExportError


def load(source: str, classes: int) -> tuple[str, ...]:
    """Read labels from a text file (one a line) or a JSON list; `classes` of them are expected.

    Raises:
        ExportError: the file is missing or malformed, or has another number of labels.
    """
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--labels {source}: cannot be read as text ({error})") from error
    labels = _from_json(path, text) if path.suffix == ".json" else text.splitlines()
    labels = [label.strip() for label in labels]
    while labels and not labels[-1]:
        labels.pop()
    for number, label in enumerate(labels, 1):
        if not label:
            raise ExportError(f"--labels {source}: label {number} is empty")
    if len(labels) != classes:
        raise ExportError(
            f"--labels {source}: {len(labels)} labels, but the head has {classes} classes"
        )
    return tuple(labels)


def _from_json(path: Path, text: str) -> list[str]:
    try:
        labels = json.loads(text)
    except ValueError as error:
        raise ExportError(f"--labels {path}: not JSON ({error})") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ExportError(f"--labels {path}: expected a JSON list of strings")
    return labels
