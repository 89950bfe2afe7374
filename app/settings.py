"""Settings: read once at start-up from flags and `MIXER_…` variables, then frozen.

Every setting is a flag and an environment variable of the same name; a flag wins.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cpus import available_cpus
from app.errors import StartupError

PREFIX = "MIXER_"
EMBEDDED_MODEL = Path(__file__).parent / "models" / "mixer-cifar10.onnx"


class Settings(BaseModel):
    """What an operator may choose; every limit's reason stands in its description."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path = Field(default=EMBEDDED_MODEL, description="ONNX file written by mixer-export")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="execution provider; cuda never falls back, auto says so when it does",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one"
    )
    threads: int = Field(
        default_factory=available_cpus,
        ge=1,
        le=1024,
        description="threads of one inference on the CPU (default: the CPUs of this container)",
    )
    decode_threads: int = Field(
        default_factory=available_cpus,
        ge=1,
        le=1024,
        description="images decoded at once: each holds one picture in memory "
        "(default: the CPUs of this container)",
    )
    max_batch: int = Field(
        default=16, ge=1, le=4096, description="images in one inference; more gains little on a CPU"
    )
    queue_size: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="images decoding or waiting at once, 150 kB each at 224 px; "
        "also the most images in one request",
    )
    max_upload_bytes: int = Field(
        default=20 * 2**20,
        ge=1024,
        le=2**31,
        description="bytes of one request's body: a 48 MP phone JPEG",
    )
    max_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=2**31,
        description="pixels of one image, by its header: 4 bytes each while it is decoded",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severity that is logged"
    )


def read_settings(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> Settings:
    """Read flags and `MIXER_…` variables; `--help` prints every setting and exits.

    Raises:
        StartupError: an unknown or out-of-range setting, named with its value and its range.
    """
    values: dict[str, str] = {}
    shown: dict[str, str] = {}  # how the operator spelled each setting
    for variable, value in environment.items():
        if variable.startswith(PREFIX):
            name = variable.removeprefix(PREFIX).lower()
            if name not in Settings.model_fields or variable != variable.upper():
                raise StartupError(f"{variable}={value}: no such setting; see mixer-serve --help")
            values[name], shown[name] = value, f"{variable}={value}"
    for name, value in vars(_parser().parse_args(arguments)).items():
        values[name], shown[name] = value, f"{_flag(name)} {value}"
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise StartupError(f"{shown[name]}: {first['msg']}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override] # argparse's would exit itself
        raise StartupError(f"{message}; see mixer-serve --help")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mixer-serve",
        description="Serve a Mixer that mixer-export wrote. Every flag is also an environment "
        "variable: --max-batch is MIXER_MAX_BATCH. A flag wins.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        text = str(field.description).replace("%", "%%")
        if field.default_factory is None:
            text += f" (default: {field.default})"
        parser.add_argument(_flag(name), metavar=name.rpartition("_")[2].upper(), help=text)
    return parser
