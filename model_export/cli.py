"""mixer-export: a trained Mixer goes in, a self-describing ONNX file comes out."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import get_args

from pydantic import ValidationError
from tqdm import tqdm

from app.arguments import Arguments, number_within, standard_output
from app.cpus import available_cpus
from app.model_card import Interpolation, Preprocessing
from model_export import checkpoints, labels, pictures, report, summary
from model_export.errors import ExportError
from model_export.evaluate import MAX_DRAWN, evaluate, plot_confusion
from model_export.export import Precision, Request, export

_STOPPED = 128 + signal.SIGINT  # as a shell reports it


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ExportError, OSError) as error:
        print(f"mixer-export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mixer-export: stopped", file=sys.stderr)
        return _STOPPED
    return 0


def _convert(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if output.suffix.lower() != ".onnx":  # else a slip would overwrite the checkpoint itself
        raise ExportError(f"-o {options.output}: expected a file that ends in .onnx")
    if options.calibration is not None and options.precision == "fp32":
        raise ExportError(
            f"--calibration {options.calibration}: --precision fp32 has nothing to calibrate or to "
            "compare; add --precision int8 or fp16"
        )
    steps = 4 if options.precision == "fp32" else 7
    name = output.stem if options.name is None else options.name
    labels.check_name(name)
    with tqdm(total=steps, leave=False, disable=None, bar_format="{desc} {bar} {n}/{total}") as bar:

        def step(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        step("reading")
        checkpoint = checkpoints.load(
            options.source,
            sha256=options.sha256,
            allow_zero_head=options.allow_zero_head,
            is_mean_given=None not in (options.mean, options.std),
        )
        preprocessing = _override(checkpoint.preprocessing, options)
        request = Request(
            name=name,
            labels=_labels(checkpoint, options.labels),
            preprocessing=preprocessing,
            precision=options.precision,
            min_agreement=options.min_agreement,
            with_features=options.with_features,
            calibration=None
            if options.calibration is None
            else pictures.calibration(Path(options.calibration), preprocessing),
        )
        done = export(checkpoint, request, output, step)
    _print(report.conversion(done, checkpoint))


def _inspect(options: argparse.Namespace) -> None:
    _print(report.inspection(summary.inspect(Path(options.model))))


def _evaluate(options: argparse.Namespace) -> None:
    model = Path(options.model)
    drawn = Path(options.confusion or f"{model.stem}-confusion.png")
    if drawn.is_dir() or not os.access(drawn.parent, os.W_OK):  # known now, not after the work
        raise ExportError(f"--confusion {drawn}: no file can be written there")
    result = evaluate(model, Path(options.data), available_cpus())
    _print(report.evaluation(result))
    if len(result.card.labels) > MAX_DRAWN:
        _print(
            f"  confusion  not drawn: of more than {MAX_DRAWN:,} classes nothing would be legible"
        )
        return
    plot_confusion(result, drawn)
    _print(f"  confusion  {drawn}")


def _print(text: str) -> None:
    with standard_output("mixer-export"):
        print(text)


def _labels(checkpoint: checkpoints.Checkpoint, source: str | None) -> tuple[str, ...]:
    classes = checkpoint.model.config.classes
    if source is not None:
        return labels.load(source, classes)
    if checkpoint.labels is None:
        raise ExportError(f"{checkpoint.source} names no classes: give its {classes} by --labels")
    if len(checkpoint.labels) != classes:
        raise ExportError(
            f"{checkpoint.source}: config.json has {len(checkpoint.labels)} label_names, "
            f"but the head has {classes} classes"
        )
    return checkpoint.labels


def _override(published: Preprocessing, options: argparse.Namespace) -> Preprocessing:
    """Return the checkpoint's preprocessing with what the command line sets instead."""
    changes = {
        "resize": "squash" if options.squash else None,
        "crop_fraction": options.crop_pct,
        "interpolation": options.interpolation,
        "mean": options.mean,
        "std": options.std,
    }
    if options.crop_pct is not None:
        changes["resize"] = "crop"
    if options.std is not None and min(options.std) <= 0:
        raise ExportError(f"--std {options.std}: expected three numbers above 0")
    merged = published.model_dump() | {k: v for k, v in changes.items() if v is not None}
    try:
        asked = Preprocessing.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        raise ExportError(f"{first['loc'][0]} {first['input']}: {first['msg']}") from error
    checkpoints.check_pixels(asked)
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="mixer-export", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="turn a checkpoint into a model file"))

    inspect = commands.add_parser("inspect", help="show what a model file holds")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("model", metavar="MODEL", help="an .onnx from mixer-export convert")

    measure = commands.add_parser(
        "evaluate", help="measure accuracy and speed through the serving pipeline"
    )
    measure.set_defaults(run=_evaluate)
    measure.add_argument("model", metavar="MODEL", help="an .onnx from mixer-export convert")
    measure.add_argument(
        "data",
        metavar="DATA_DIR",
        help="pictures in one folder per class, or a tar of that; where it has a test or val "
        "split, that is used",
    )
    measure.add_argument(
        "--confusion",
        metavar="PNG",
        help="where to draw the confusion matrix (default: MODEL's name + -confusion.png, here)",
    )
    return parser


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_convert)
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a Google .npz, a timm model folder, a .safetensors, .pth, .ckpt or .bin, "
        "or hf-hub:owner/name[@revision]",
    )
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the .onnx to write")
    command.add_argument(
        "--labels",
        metavar="FILE",
        help="class names: a text file, one a line; a JSON list, or object by index; imagenet-1k; "
        "imagenet-21k (default: those in the checkpoint's config.json, if any)",
    )
    command.add_argument("--name", help="the model's name (default: the output file's)")
    command.add_argument("--sha256", metavar="HEX", help="refuse any other file of weights")
    command.add_argument(
        "--allow-zero-head",
        action="store_true",
        help="export a checkpoint without a trained head, for its features",
    )
    command.add_argument(
        "--with-features",
        action="store_true",
        help="add the output features: the pooled vector before the head",
    )
    smaller = command.add_argument_group("precision")
    smaller.add_argument(
        "--precision", choices=get_args(Precision), default="fp32", help="(default: fp32)"
    )
    smaller.add_argument(
        "--calibration",
        metavar="DIR",
        help="photos to fix int8's activation ranges with, and to measure agreement on "
        "(default: ranges from each batch, agreement on synthetic pictures)",
    )
    smaller.add_argument(
        "--min-agreement",
        type=number_within(float, 0, 1),
        default=0.99,
        metavar="SHARE",
        help="write nothing if fewer answers are float32's own (default: 0.99)",
    )
    fed = command.add_argument_group("preprocessing (default: as the checkpoint was published)")
    resize = fed.add_mutually_exclusive_group()
    resize.add_argument("--squash", action="store_true", help="resize without keeping the aspect")
    resize.add_argument(
        "--crop-pct", type=float, metavar="SHARE", help="share of the short side that is kept"
    )
    fed.add_argument("--interpolation", choices=get_args(Interpolation), help="of the resize")
    for name in ("--mean", "--std"):
        fed.add_argument(
            name, nargs=3, type=float, metavar=("R", "G", "B"), help="of pixels in [0, 1]"
        )


if __name__ == "__main__":
    sys.exit(main())
