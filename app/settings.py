"""Settings: read once at start-up from flags and `MIXER_…` variables, then frozen.

Every setting is a flag and an environment variable of the same name; a flag wins.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from app.arguments import Arguments
from app.cpus import available_cpus
from app.cuda import GpuOptions
from app.engine import Device
from app.errors import StartupError
from app.logs import LogFormat

PREFIX = "MIXER_"
# As browsers send them (RFC 6454, section 6.2): no path, no user, a port up to 65535 that is not
# the scheme's own.
_NAME = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
_HOST = rf"({_NAME}(\.{_NAME})*|\[[0-9a-f:.]+\])"
_PORT = r"([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_ORIGIN = rf"(https://{_HOST}(:(?!443\b){_PORT})?|http://{_HOST}(:(?!80\b){_PORT})?)"
EMBEDDED_MODEL = Path(__file__).parent / "models" / "mixer-cifar10.onnx"


class Settings(BaseModel):
    """What an operator may choose; every limit's reason stands in its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", regex_engine="python-re")

    model: Path = Field(
        default=EMBEDDED_MODEL, description="ONNX file written by mixer-export convert"
    )
    device: Device = Field(
        default="auto",
        description="execution provider; cuda and tensorrt never fall back, auto tries cuda and "
        "says so when it falls back",
    )
    gpu_memory_mib: int = Field(
        default=0,
        ge=0,
        le=2**20,
        description="most GPU memory of inference's arena, where others share the GPU; CUDA's own "
        "context and the buffers of batches come on top; 0 sets no limit",
    )
    tensorrt_cache: Path | None = Field(
        default=None,
        description="folder where TensorRT keeps its engine, or each start builds it anew "
        "for minutes",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one"
    )
    threads: int = Field(
        default_factory=available_cpus,
        ge=1,
        le=1024,
        description="images inferred side by side on the CPU (default: the CPUs of this container)",
    )
    decode_threads: int = Field(
        default_factory=available_cpus,
        ge=1,
        le=1024,
        description="images decoded at once: each in a process that holds one picture "
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
    queue_budget_ms: int = Field(
        default=1000,
        ge=1,
        le=3_600_000,
        description="longest wait; from a predicted 0.7 of it on requests are refused with 429, "
        "since a client that waits a second is better off at another replica; four batches are "
        "taken however long the engine needs for them, if their decoding fits",
    )
    request_timeout_ms: int = Field(
        default=10_000,
        ge=1,
        le=3_600_000,
        description="time for one request from its whole body to its answer, then 504; "
        "X-Request-Timeout-Ms may ask for less, and counts from the headers on",
    )
    max_requests: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="requests in flight, uploads included; the next one is refused with 429",
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        le=1_000_000,
        description="open connections, idle ones included: a descriptor and some 10 kB each, "
        "192 KiB at the most",
    )
    max_upload_bytes: int = Field(
        default=20 * 2**20,
        ge=1024,
        le=2**31,
        description="bytes of one request's body: a 48-megapixel phone JPEG fits",
    )
    max_bytes_in_flight: int = Field(
        default=256 * 2**20,
        ge=1024,
        le=2**40,
        description="bytes of all bodies held at once; the next one is refused with 429",
    )
    max_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=2**31,
        description="pixels of one image, by its header: up to 12 bytes each while it is decoded; "
        "16 million of a WebP, and whatever takes over 1.9 s of CPU is refused anyway",
    )
    header_timeout_s: float = Field(
        default=10, ge=0.1, le=3600, description="time for a request's headers, then 408"
    )
    body_timeout_s: float = Field(
        default=30,
        ge=0.1,
        le=3600,
        description="time for a request's body, then 408; and for a client to read a long answer",
    )
    keep_alive_s: float = Field(
        default=75,
        ge=0.1,
        le=3600,
        description="time of a connection without a request; longer than the balancer keeps one "
        "(nginx 60 s, Google's 600), or it sends a request into one that is just being closed",
    )
    drain_delay_s: float = Field(
        default=5,
        ge=0,
        le=3600,
        description="after SIGTERM, time to go on serving while /readyz fails: a balancer's "
        "probe period and one miss",
    )
    grace_s: float = Field(
        default=20,
        ge=0.1,
        le=3600,
        description="after the drain delay, time for requests in flight; with the drain delay "
        "it must stay 8 s below the orchestrator's grace period",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="file of API keys, one a line, reread when it changes; "
        "without it everyone is served",
    )
    cors_origins: str = Field(
        default="",
        pattern=rf"^(\*|{_ORIGIN}(\s*,\s*{_ORIGIN})*)?\Z",
        json_schema_extra={
            "allowed": "origins such as https://shop.example, comma-separated, or *; in lower "
            "case, without a scheme's own port"
        },
        description="origins whose pages may call the service, comma-separated; none by default",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severity that is logged; requests are info, 500s error"
    )
    log_format: LogFormat = Field(
        default="auto", description="auto is text on a terminal, else one JSON object a line"
    )


def read_settings(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> Settings:
    """Read flags and `MIXER_…` variables; `--help` prints every setting and exits.

    Raises:
        StartupError: an unknown or out-of-range setting, named with its value and its range.
    """
    flags = vars(_parser().parse_args(arguments))  # first: it may be a call for help
    values: dict[str, str] = {}
    shown: dict[str, str] = {}  # how the operator spelled each setting
    for variable, value in environment.items():
        name = variable[len(PREFIX) :].lower()
        is_slip = variable.upper().startswith(PREFIX) and name in Settings.model_fields
        if variable.startswith(PREFIX) or is_slip:
            if name not in Settings.model_fields or variable != variable.upper():
                told = "…" if "KEY" in variable.upper() else value  # a slip may name the key itself
                raise StartupError(f"{variable}={told}: no such setting; see mixer-serve --help")
            values[name], shown[name] = value, f"{variable}={value}"
    for name, value in flags.items():
        values[name], shown[name] = value, f"{_flag(name)} {value}"
    for name, value in values.items():
        if not value and _allowed(Settings.model_fields[name]) == "a path":  # it would be "."
            raise StartupError(f"{shown[name]}: it must be a path")
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        allowed = _allowed(Settings.model_fields[name])
        raise StartupError(f"{shown[name]}: it must be {allowed}") from error
    if settings.max_upload_bytes > settings.max_bytes_in_flight:
        raise StartupError(
            f"{PREFIX}MAX_UPLOAD_BYTES={settings.max_upload_bytes}: it must be at most "
            f"{PREFIX}MAX_BYTES_IN_FLIGHT={settings.max_bytes_in_flight}, or such an upload could "
            "never be taken"
        )
    _check_gpu(settings, shown)
    return settings


def _check_gpu(settings: Settings, shown: Mapping[str, str]) -> None:
    """Raise StartupError where the device would pass over a setting of the GPU's."""
    gpu = GpuOptions(settings.gpu_memory_mib, settings.tensorrt_cache)
    if (name := gpu.passed_over(settings.device)) is not None:
        device = f"{PREFIX}DEVICE={settings.device}"
        raise StartupError(f"{shown[name]}: it means nothing with {device}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _allowed(field: FieldInfo) -> str:
    """Say in words which values a setting takes."""
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["allowed"])
    choices = get_args(field.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "one of " + ", ".join(choices)
    low = next((m.ge for m in field.metadata if isinstance(m, Ge)), None)
    high = next((m.le for m in field.metadata if isinstance(m, Le)), None)
    if low is not None:
        kind = "a whole number" if field.annotation is int else "a number"
        return f"{kind} from {low} to {high}"
    return "a path" if field.annotation is not str else "a text that is not empty"


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="mixer-serve",
        description="Serve a Mixer that mixer-export wrote. Every flag is also an environment "
        "variable: --max-batch is MIXER_MAX_BATCH. A flag wins. `mixer-serve tune MODEL` "
        "measures which settings suit a model on this machine.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        text, notes = str(field.description).replace("%", "%%"), []
        if not (allowed := _allowed(field)).startswith(("a path", "a text")):
            notes.append(allowed)
        if field.default_factory is None and field.default not in (None, ""):
            notes.append(f"default: {_relative(field.default)}")
        if notes:
            text += f" ({'; '.join(notes)})"
        parser.add_argument(_flag(name), metavar=name.rpartition("_")[2].upper(), help=text)
    return parser


def _relative(default: Any) -> Any:
    return "the embedded " + default.name if isinstance(default, Path) else default
