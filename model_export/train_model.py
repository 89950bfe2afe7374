"""The model while it is trained: its first weights, and a forward pass that is quick to train.

Parameters are those of the Mixer itself; only the way through them differs.
"""

import math
import sys
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.errors import first_line
from app.model_card import Preprocessing
from model_export import checkpoints
from model_export.mixer import VARIANTS, Mixer, MixerBlock, MixerConfig, Mlp
from model_export.recipe import Recipe


def build(recipe: Recipe, classes: int) -> tuple[Mixer, Preprocessing]:
    """Build the model that `recipe` asks for, with first weights fixed by its seed.

    Raises:
        ExportError: the checkpoint to fine-tune cannot be read.
    """
    torch.manual_seed(recipe.seed)
    if recipe.init is not None:
        return _fine_tuned(recipe.init, classes)
    if recipe.variant is not None:
        config = replace(VARIANTS[recipe.variant], classes=classes, gelu="erf")
    else:
        config = MixerConfig(
            recipe.image_size,
            recipe.patch,
            recipe.blocks,
            recipe.hidden,
            recipe.token_mlp,
            recipe.channel_mlp,
            classes,
            gelu="erf",
        )
    model = Mixer(config)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            # Flax's default, LeCun normal: the variance of what comes in is kept.
            nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(model.head.weight)  # as in the paper's code: the first loss is log(classes)
    return model, Preprocessing(
        image_size=config.image_size,
        patch_size=config.patch_size,
        crop_fraction=1.0,  # training saw pictures up to their edges
        interpolation="bicubic",
    )


def _fine_tuned(source: str, classes: int) -> tuple[Mixer, Preprocessing]:
    """Load a checkpoint and give it a head of zeros for `classes`.

    A run is kept with timm's names, which stand for the erf form of GELU: a checkpoint with the
    tanh form (Google's) goes on with erf. The two are at most 5e-4 apart, and training adapts.
    """
    checkpoint = checkpoints.load(source, allow_zero_head=True)
    checkpoints.check_pixels(checkpoint.preprocessing)
    model = checkpoint.model
    model.head = nn.Linear(model.head.in_features, classes)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    for layer in model.modules():
        if isinstance(layer, nn.GELU):
            layer.approximate = "none"
    model.config = replace(model.config, classes=classes, gelu="erf")
    return model.train(), checkpoint.preprocessing


class TrainingLoss(nn.Module):
    """From patches and soft targets to the loss, with stochastic depth (arXiv:1603.09382)."""

    def __init__(self, model: Mixer) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, targets: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean cross entropy.

        Args:
            patches: float [batch, S, P·P·3], normalised.
            targets: float [batch, classes], shares that sum to 1.
            kept: float [blocks, batch]: 0 where an image skips a block, else 1 / (1 - chance).

        Returns:
            loss float [] and logits float [batch, classes].
        """
        model = self.model
        x: Tensor = model.stem(patches)  # [batch, S, C]
        for block, scale in zip(model.blocks, kept, strict=True):
            scale = scale[:, None, None].to(x.dtype)  # [batch, 1, 1]
            if isinstance(block, MixerBlock):
                x = x + scale * mix_tokens(block.token_mixing, block.norm1(x))  # [batch, S, C]
                x = x + scale * block.channel_mixing(block.norm2(x))  # [batch, S, C]
            else:  # a relative, with another way to mix
                x = x + scale * (block(x) - x)  # [batch, S, C]
        logits: Tensor = model.head(model.norm(x).mean(dim=1)).float()  # [batch, classes]
        return functional.cross_entropy(logits, targets), logits


def mix_tokens(mlp: Mlp, x: Tensor) -> Tensor:
    """Apply `mlp` over the tokens of [batch, S, C], weights on the left: no transposed copies."""
    hidden = mlp.gelu(mlp.fc1.weight @ x + mlp.fc1.bias[:, None])  # [batch, D_S, C]
    y: Tensor = mlp.fc2.weight @ hidden + mlp.fc2.bias[:, None]  # [batch, S, C]
    return y


def compiled(loss: TrainingLoss) -> nn.Module:
    """Compile with torch.compile; where that does not work here, say so and go on without."""
    try:
        torch.compile(lambda x: torch.nn.functional.gelu(x) + 1)(torch.zeros(8))
    except Exception as error:  # missing compiler, missing headers, a full disk: each its own class
        sys.stderr.write(
            "mixer-train: torch.compile does not work here, so training takes about twice as long "
            f"({first_line(error)}); a C++ compiler with Python's headers is what it mostly lacks\n"
        )
        return loss
    return cast(nn.Module, torch.compile(loss, dynamic=False))
