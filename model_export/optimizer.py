"""The optimizers that a recipe can name, and which of a model's weights each of them moves."""

from typing import Any

import torch

from model_export.mixer import Mixer
from model_export.muon import Muon
from model_export.recipe import Recipe


def build(model: Mixer, recipe: Recipe, device: torch.device) -> list[torch.optim.Optimizer]:
    """Build what takes the steps of `recipe`: all weights decay but biases and norms.

    Those have no scale to hold down. Muon moves the matrices of the blocks, AdamW all else: stem
    and head map from pixels and to classes, where directions of the weights are no equals.
    """
    outer = list(model.parameters())
    optimizers: list[torch.optim.Optimizer] = []
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    if recipe.optimizer == "muon":
        inner = [p for p in model.blocks.parameters() if p.dim() == 2]
        optimizers.append(Muon(inner, recipe.lr, recipe.weight_decay))
        moved = {id(p) for p in inner}
        outer = [p for p in outer if id(p) not in moved]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in outer if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in outer if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers.append(
        kind(
            groups,
            lr=recipe.lr,
            betas=(0.9, recipe.beta2),
            fused=True,
            capturable=device.type == "cuda",  # within a CUDA graph
        )
    )
    return optimizers
