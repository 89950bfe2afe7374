"""Pour a checkpoint's tensors into a model, each checked for name, shape, type and NaN."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_export.errors import ExportError
from model_export.mixer import Mixer, MixerConfig
from model_export.recipe import LARGEST_IMAGE
from model_export.stored import Tensors

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Naming:
    """How one family of checkpoints names and lays out our parameters."""

    rules: tuple[tuple[str, str], ...]  # regular expressions that turn our names into theirs
    their_shape: Callable[[str, Shape, MixerConfig], Shape]  # our name and shape -> their shape
    to_ours: Callable[[str, Tensor], Tensor]  # our name, their tensor -> our order of elements

    def theirs(self, name: str) -> str:
        """Translate one of our parameter names."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name

    def dimensions(self, tensors: Tensors, ours: str, axes: str) -> Shape:
        """Return the shape of their tensor for `ours`; `axes` names its axes, as "(P, P, 3, C)".

        Raises:
            ExportError: it is missing or has another number of axes.
        """
        name = self.theirs(ours)
        if name not in tensors:
            first = next(((n, tuple(t.shape)) for n, t in tensors.items()), "nothing")
            raise ExportError(
                f"not a Mixer: tensor {name} is missing, expected {axes}; it holds {first}. "
                "A Mixer whose tensors have other names must take timm's or Google's first"
            )
        shape = tuple(tensors[name].shape)
        if len(shape) != axes.count(",") + 1 or 0 in shape:
            raise ExportError(f"tensor {name} has shape {shape}, expected {axes}")
        return shape

    def image_size(self, ours: str, shape: Shape, tokens: int, patch_size: int) -> int:
        """Return the side in pixels of the square image that `tokens` patches make up.

        Raises:
            ExportError: `tokens` is not a square number, or the image absurdly large.
        """
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ExportError(
                f"tensor {self.theirs(ours)} has shape {shape}: {tokens} tokens, "
                "expected a square number of them"
            )
        if side * patch_size > LARGEST_IMAGE:
            raise ExportError(
                f"tensor {self.theirs(ours)} has shape {shape}: images of {side * patch_size} px, "
                f"expected at most {LARGEST_IMAGE}"
            )
        return side * patch_size

    def has_head(self, tensors: Tensors) -> bool:
        """Tell whether `tensors` have any part of a head; timm's with num_classes 0 have none."""
        return not tensors.keys().isdisjoint(map(self.theirs, ("head.weight", "head.bias")))

    def classes(self, tensors: Tensors, axes: str) -> int:
        """Count the classes of the head; one where there is no head.

        Raises:
            ExportError: half of the head is missing or has another number of axes.
        """
        if not self.has_head(tensors):
            return 1
        shape = self.dimensions(tensors, "head.weight", axes)
        return shape[axes.strip("()").split(", ").index("classes")]

    def blocks(self, tensors: Tensors) -> int:
        """Count the blocks that `tensors` have any part of."""
        marker = re.escape(self.theirs("blocks.999.norm1.bias")).split("999")[0]
        return len({m[1] for name in tensors if (m := re.match(marker + r"(\d+)\W", name))})


def pour(kind: type[Mixer], config: MixerConfig, tensors: Tensors, naming: Naming) -> Mixer:
    """Build a `kind` of `config` from `tensors`; every tensor must be used, in its exact shape.

    A head that they lack altogether is one of zeros.

    Raises:
        ExportError: a tensor is missing, foreign, of another shape or type, or not finite.
    """
    with torch.device("meta"):
        model = kind(config)
    rest = dict(tensors)
    if not naming.has_head(tensors):
        for name, parameter in model.head.named_parameters(prefix="head"):
            shape = naming.their_shape(name, tuple(parameter.shape), config)
            rest[naming.theirs(name)] = torch.zeros(shape)
    state = {}
    for name, parameter in model.named_parameters():
        theirs = naming.theirs(name)
        expected = naming.their_shape(name, tuple(parameter.shape), config)
        if theirs not in rest:
            raise ExportError(f"tensor {theirs} is missing, expected shape {expected}")
        tensor = rest.pop(theirs)
        _check(theirs, tensor, expected)
        state[name] = naming.to_ours(name, tensor.float()).reshape(parameter.shape).contiguous()
    for name, tensor in rest.items():
        raise ExportError(
            f"foreign tensor {name} of shape {tuple(tensor.shape)}: "
            f"expected none of that name in a {kind.__name__} of {config.blocks} blocks"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check(name: str, tensor: Tensor, expected: Shape) -> None:
    shape = tuple(tensor.shape)
    if shape != expected:
        raise ExportError(f"tensor {name} has shape {shape}, expected {expected}")
    if not tensor.is_floating_point():
        raise ExportError(f"tensor {name} {shape} is {tensor.dtype}, expected floating point")
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch cannot ask eight bits
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise ExportError(
            f"tensor {name} {shape} holds {bad} values that are NaN or infinite, expected none"
        )
