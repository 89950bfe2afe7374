"""mixer-train: a folder of pictures goes in, a Mixer of one's own comes out.

mixer-train DATA_DIR -o run/ trains or fine-tunes; mixer-train adapt MODEL DATA_DIR -o new.onnx
gives an exported model other classes from a few pictures of each, within seconds.
"""

import argparse
import re
import signal
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from app.arguments import UNREAD, Arguments, drop_output, standard_output
from app.cpus import available_cpus
from model_export.errors import ExportError
from model_export.recipe import Recipe

# torch's words for it, on a CPU and on a GPU.
_NO_MEMORY = re.compile("allocate memory|out of memory")
_SIGNALLED = 128  # a shell's exit code for a signal is this plus its number


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given[:1] == ["adapt"]:
            return _adapt(_adapt_parser().parse_args(given[1:]))
        return _train(_train_parser().parse_args(given))
    except BrokenPipeError:  # nobody reads how far it is
        drop_output()
        return UNREAD
    except (ExportError, OSError) as error:
        drop_output()
        sys.stderr.write(f"mixer-train: {error}\n")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        sys.stderr.write(
            "mixer-train: there is too little memory; a smaller --batch-size or model needs less\n"
        )
        return 1
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"mixer-train: {str(stop) or 'stopped before anything was trained'}\n")
        return _SIGNALLED + signal.SIGINT


def _train(options: argparse.Namespace) -> int:
    from model_export import train_run  # torch takes seconds to import

    flags = {name: value for name, value in vars(options).items() if name in Recipe.model_fields}
    flags = {name: value for name, value in flags.items() if value is not None}
    caught = train_run.train(
        train_run.Request(
            data=Path(options.data),
            output=Path(options.output),
            config=None if options.config is None else Path(options.config),
            flags=flags,
            val_split=options.val_split,
            resume=options.resume,
            threads=options.threads,
            compile=options.compile,
        )
    )
    return 0 if caught is None else _SIGNALLED + caught


def _adapt(options: argparse.Namespace) -> int:
    from model_export import adapt

    report = adapt.adapt(options.model, Path(options.data), Path(options.output), options.name)
    with standard_output("mixer-train"):
        sys.stdout.write(f"{report}\n")
    return 0


def _train_parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="mixer-train", description=__doc__)
    parser.add_argument(
        "data",
        metavar="DATA_DIR",
        help="train/<class>/… and test/ or val/, or <class>/… with --val-split; or a tar of that",
    )
    parser.add_argument("-o", "--output", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--config", metavar="RECIPE", help="a recipe in TOML; flags win over it")
    parser.add_argument(
        "--val-split", type=float, metavar="SHARE", help="share of each class to measure on"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in RUN, exactly as it was"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cpus(),
        help="of the CPU (default: all that this container has); part of what makes a resumed run "
        "exact",
    )
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="do without torch.compile: starts sooner, trains slower",
    )
    group = parser.add_argument_group("recipe")
    for name, field in Recipe.model_fields.items():
        _add_field(group, name, field)
    return parser


def _add_field(group: Any, name: str, field: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    default = "" if field.default is None else f" (default: {field.default})"
    text = f"{field.description}{default}".replace("%", "%%")
    if field.annotation is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = [
        choice
        for part in (field.annotation, *get_args(field.annotation))
        for choice in get_args(part)
        if isinstance(choice, str)
    ]
    kinds = {field.annotation, *get_args(field.annotation)}
    kind = next((kind for kind in (int, float) if kind in kinds), str)
    if choices:
        group.add_argument(flag, choices=choices, help=text)
    else:
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)


def _adapt_parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="mixer-train adapt",
        description="Give a model other classes: a new head on its frozen features, solved in "
        "closed form from a few pictures of each class.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an .onnx from mixer-export convert, best --with-features; or a checkpoint",
    )
    parser.add_argument("data", metavar="DATA_DIR", help="one folder of pictures per class")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .onnx to write")
    parser.add_argument("--name", help="the model's name (default: the output file's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
