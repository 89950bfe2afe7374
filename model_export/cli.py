"""The command `mixer-export`: a trained Mixer goes in, a self-describing ONNX file comes out."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from pydantic import ValidationError
from tqdm import tqdm

from app.model_card import Interpolation, Preprocessing
from model_export import checkpoints, labels
from model_export.errors import ExportError
from model_export.export import Report, export

_STEPS = 5


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ExportError, OSError) as error:
        print(f"mixer-export: {error}", file=sys.stderr)
        return 1
    return 0


def convert(options: argparse.Namespace) -> None:
    """Convert a checkpoint and print a short report."""
    output = Path(options.output)
    with tqdm(
        total=_STEPS, leave=False, disable=None, bar_format="{desc} {bar} {n}/{total}"
    ) as bar:

        def step(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        step("reading")
        checkpoint = checkpoints.load(options.source)
        preprocessing = override(checkpoint.preprocessing, options)
        report = export(
            checkpoint,
            output,
            name=options.name or output.stem,
            labels=labels.load(options.labels, checkpoint.model.config.classes),
            preprocessing=preprocessing,
            step=step,
        )
    print(_summary(report, checkpoint))


def override(published: Preprocessing, options: argparse.Namespace) -> Preprocessing:
    """Return the checkpoint's preprocessing with what the command line sets instead.

    Raises:
        ExportError: a value is out of range.
    """
    changes = {
        "resize": "squash" if options.squash else None,
        "crop_fraction": options.crop_pct,
        "interpolation": options.interpolation,
    }
    merged = published.model_dump() | {k: v for k, v in changes.items() if v is not None}
    try:
        return Preprocessing.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        raise ExportError(f"{first['loc'][0]} {first['input']}: {first['msg']}") from error


def _summary(report: Report, checkpoint: checkpoints.Checkpoint) -> str:
    card, shown = report.card, report.card.preprocessing
    resize = "squash" if shown.resize == "squash" else f"crop {shown.crop_fraction:g}"
    agreement = report.agreement
    lines = [
        f"{report.path}: {report.file_bytes / 1e6:.1f} MB, {card.precision}",
        f"  model      {card.name}: {card.family} {card.variant}, {card.parameters:,} parameters, "
        f"{len(card.labels)} classes",
        f"  source     {card.source}, SHA-256 {card.checksum}",
        f"  input      {shown.image_size} px, {resize}, {shown.interpolation}, "
        f"mean {shown.mean}, std {shown.std}",
        f"  verified   {agreement.pictures} pictures, torch against onnxruntime: "
        f"max |Δlogit| {agreement.logits:.2g} (allowed {agreement.limit:.2g})",
    ]
    if checkpoint.left_aside:
        lines.append(f"  left aside {checkpoint.left_aside} tensors of training state")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixer-export", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("convert", help="turn a checkpoint into a model file")
    command.set_defaults(run=convert)
    command.add_argument("source", metavar="SOURCE", help="a Google checkpoint (.npz)")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the .onnx to write")
    command.add_argument(
        "--labels", required=True, metavar="FILE", help="class names: text, one a line, or JSON"
    )
    command.add_argument("--name", help="the model's name (default: the output file's)")
    resize = command.add_mutually_exclusive_group()
    resize.add_argument("--squash", action="store_true", help="resize without keeping the aspect")
    resize.add_argument("--crop-pct", type=float, help="fraction of the short side that is kept")
    command.add_argument("--interpolation", choices=get_args(Interpolation), help="of the resize")
    return parser


if __name__ == "__main__":
    sys.exit(main())
