"""timm's checkpoints: names and layout of its Mixer, gMixer, ResMLP and gMLP, and its config.json.

Source: timm/models/mlp_mixer.py and timm/data/config.py. Linear weights are torch's [out, in], the
stem's is a convolution's [C, 3, P, P].
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from app.model_card import Preprocessing
from model_export import labels
from model_export.errors import ExportError
from model_export.mixer import Mixer, MixerConfig
from model_export.relatives import GMixer, GMlp, ResMlp
from model_export.stored import Tensors
from model_export.weights import Naming, Shape, pour

FAMILIES: dict[type[Mixer], str] = {
    Mixer: "mixer",
    GMixer: "gmixer",
    ResMlp: "resmlp",
    GMlp: "gmlp",
}
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What config.json may say of the architecture without changing more than the tensors' shapes show.
_HARMLESS_ARGUMENTS = {
    "img_size", "patch_size", "num_blocks", "embed_dim", "mlp_ratio", "num_classes", "in_chans",
    "drop_rate", "proj_drop_rate", "drop_path_rate", "nlhb", "global_pool",
}  # fmt: skip


# What train.py is told, or None, of how images are fed.
_FEEDING = ("crop_pct", "interpolation", "mean", "std")
# The input of timm's mixer_b16_224.miil_*, the ones that differ from their family's.
_MIIL = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}


@dataclass(frozen=True)
class Published:
    """What a config.json says beside the weights."""

    preprocessing: Preprocessing
    labels: tuple[str, ...] | None


def model(tensors: Tensors) -> Mixer:
    """Build the Mixer, gMixer, ResMLP or gMLP that `tensors` hold; GELU is the erf form.

    Raises:
        ExportError: the tensors are not those of any of them.
    """
    if "blocks.0.gamma_1" in tensors:
        tensors = _from_facebook(tensors)
    kind = _kind(tensors)
    return pour(kind, _config(kind, tensors), tensors, _NAMING)


def to_tensors(model: Mixer) -> Tensors:
    """Return the weights of `model` as timm names and shapes them; `model()` reads them back."""
    patch, hidden = model.config.patch_size, model.config.hidden
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name == "stem.weight":
            tensor = tensor.reshape(hidden, patch, patch, 3).permute(0, 3, 1, 2)
        shape = _their_shape(name, tuple(parameter.shape), model.config)
        tensors[_NAMING.theirs(name)] = tensor.reshape(shape).contiguous()
    return tensors


def default_preprocessing(model: Mixer) -> Preprocessing:
    """Return timm's default for the family: what bare weights were most probably trained with."""
    imagenet = isinstance(model, GMixer | ResMlp)
    return Preprocessing(
        image_size=model.config.image_size,
        patch_size=model.config.patch_size,
        crop_fraction=0.875,
        interpolation="bicubic",
        mean=_IMAGENET_MEAN if imagenet else _HALF,
        std=_IMAGENET_STD if imagenet else _HALF,
    )


def as_trained(arguments: Mapping[str, Any], model: Mixer) -> Preprocessing | None:
    """Return how timm's train.py fed `model`, by its arguments, or None if they do not say.

    Raises:
        ExportError: they say what is not supported.
    """
    # As timm/data/config.py: what is None or empty is left to the default of the model's name.
    if not arguments.keys() >= set(_FEEDING):  # of another script, which feeds otherwise
        return None
    told = dict(_MIIL) if "_miil" in str(arguments.get("model")).replace(".", "_") else {}
    told |= {name: arguments[name] for name in _FEEDING if arguments.get(name)}
    for name in {"mean", "std"} & told.keys():
        if isinstance(told[name], list | tuple) and len(told[name]) == 1:
            told[name] = 3 * tuple(told[name])
    return _preprocessing(told, model, "the checkpoint's args") if told else None


def published(path: Path, model: Mixer) -> Published:
    """Read preprocessing and labels from the config.json at `path`, which came with `model`.

    Raises:
        ExportError: it is malformed, contradicts the weights, or asks for what is not supported.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        cfg = config.get("pretrained_cfg", config)  # older folders hold it flat
        arguments = config.get("model_args") or {}
        foreign = sorted(set(arguments) - _HARMLESS_ARGUMENTS)
        size = list(cfg["input_size"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ExportError(f"{path}: not a timm config.json ({error!r})") from error
    if foreign:
        raise ExportError(f"{path}: model_args {foreign[0]} is not supported")
    side = model.config.image_size
    if size != [3, side, side]:
        raise ExportError(f"{path}: input_size is {size}, but the weights take {[3, side, side]}")
    squash = cfg.get("crop_mode") == "squash" and cfg.get("crop_pct") == 1
    if cfg.get("crop_mode", "center") != "center" and not squash:
        raise ExportError(
            f"{path}: crop_mode {cfg['crop_mode']} with crop_pct {cfg.get('crop_pct')} is not "
            "supported; expected center, or squash with 1.0"
        )
    preprocessing = _preprocessing(cfg, model, str(path), squash=squash)
    names = labels.in_order(config.get("label_names") or cfg.get("label_names"))  # _hub.py's
    return Published(preprocessing, None if names is None else tuple(names))


def _preprocessing(
    told: Mapping[str, Any], model: Mixer, source: str, *, squash: bool = False
) -> Preprocessing:
    default = default_preprocessing(model)
    try:
        return Preprocessing(
            image_size=model.config.image_size,
            patch_size=model.config.patch_size,
            resize="squash" if squash else "crop",
            crop_fraction=told.get("crop_pct") or default.crop_fraction,
            interpolation=told.get("interpolation") or default.interpolation,
            mean=told.get("mean") or default.mean,
            std=told.get("std") or default.std,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ExportError(f"{source}: {first['loc'][0]}: {first['msg']}") from error


def _kind(tensors: Tensors) -> type[Mixer]:
    if "blocks.0.linear_tokens.weight" in tensors:
        return ResMlp
    if "blocks.0.mlp_channels.gate.proj.weight" in tensors:
        return GMlp
    up = _NAMING.dimensions(tensors, "blocks.0.token_mixing.fc1.weight", "(D_S, S)")
    down = _NAMING.dimensions(tensors, "blocks.0.token_mixing.fc2.weight", "(S, D_S)")
    return GMixer if down[1] * 2 == up[0] else Mixer


def _config(kind: type[Mixer], tensors: Tensors) -> MixerConfig:
    stem = _NAMING.dimensions(tensors, "stem.weight", "(C, 3, P, P)")
    hidden, patch_size = stem[0], stem[3]
    if stem[1:] != (3, patch_size, patch_size):
        raise ExportError(
            f"tensor {_NAMING.theirs('stem.weight')} has shape {stem}, "
            "expected (C, 3, P, P): square patches of RGB"
        )
    mixes_by_mlp = kind in (Mixer, GMixer)
    leaf = {ResMlp: "token_mixing.weight", GMlp: "channel_mixing.gate.proj.weight"}
    token_name = f"blocks.0.{leaf.get(kind, 'token_mixing.fc1.weight')}"
    token = _NAMING.dimensions(tensors, token_name, "(D_S, S)" if mixes_by_mlp else "(S, S)")
    fc1 = _NAMING.dimensions(tensors, "blocks.0.channel_mixing.fc1.weight", "(D_C, C)")
    return MixerConfig(
        image_size=_NAMING.image_size(token_name, token, token[1], patch_size),
        patch_size=patch_size,
        blocks=_NAMING.blocks(tensors),
        hidden=hidden,
        token_mlp=token[0] if mixes_by_mlp else 0,
        channel_mlp=fc1[0],
        classes=_NAMING.classes(tensors, "(classes, C)"),
        gelu="erf",
    )


def _their_shape(ours: str, shape: Shape, config: MixerConfig) -> Shape:
    if ours == "stem.weight":
        return (config.hidden, 3, config.patch_size, config.patch_size)
    return (1, 1, *shape) if ours.endswith((".alpha", ".beta")) else shape


def _to_ours(ours: str, tensor: Tensor) -> Tensor:
    """Reorder the stem from color, row, column to row, column, color."""
    return tensor.permute(0, 2, 3, 1) if ours == "stem.weight" else tensor


def _from_facebook(tensors: Tensors) -> Tensors:
    """Rename the tensors of Facebook's own ResMLP checkpoints as timm does."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in (
            ("patch_embed.", "stem."),
            ("attn.", "linear_tokens."),
            ("mlp.", "mlp_channels."),
            ("gamma_", "ls"),
        ):
            name = name.replace(theirs, ours)  # the rules apply one after another
        affine = name.endswith((".alpha", ".beta")) and tensor.dim() == 1
        renamed[name] = tensor[None, None] if affine else tensor
    return renamed


_NAMING = Naming(
    rules=(
        (r"^stem\.", "stem.proj."),
        (r"token_mixing\.(weight|bias)$", r"linear_tokens.\1"),
        (r"token_mixing\.", "mlp_tokens."),
        (r"channel_mixing\.", "mlp_channels."),
    ),
    their_shape=_their_shape,
    to_ours=_to_ours,
)
