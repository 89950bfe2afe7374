"""The optimizers that a recipe can name, and which of a model's weights each of them moves."""

from collections.abc import Callable
from typing import Any

import torch

from model_export.mixer import Mixer
from model_export.recipe import Recipe


def build(model: Mixer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Build what takes the steps of `recipe`: all weights decay but biases and norms.

    Those have no scale to hold down. Muon (Jordan 2024; arXiv:2502.16982 for the rate, which is
    scaled to AdamW's) moves the matrices of the blocks, AdamW all else: stem and head map from
    pixels and to classes, where directions of the weights are no equals.
    """
    if recipe.optimizer == "muon":
        inner = [p for p in model.blocks.parameters() if p.dim() == 2]
        muon = torch.optim.Muon(
            inner,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        moved = {id(p) for p in inner}
        outer = [p for p in model.parameters() if id(p) not in moved]
        return [muon, _adam(torch.optim.AdamW, outer, recipe)]
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return [_adam(kind, list(model.parameters()), recipe)]


def _adam(
    kind: Callable[..., torch.optim.Optimizer], parameters: list[torch.nn.Parameter], recipe: Recipe
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if p.dim() > 1],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)
