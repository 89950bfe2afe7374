"""Muon, an optimizer for matrices whose steps go about as far in every direction.

By Jordan 2024 (https://kellerjordan.github.io/posts/muon/), with the rate scaled to AdamW's by
Moonshot (arXiv:2502.16982). torch.optim.Muon takes the same steps, which a test holds it to, but
takes each matrix alone: a thousand tiny operations a step, with the CPU asked for the rate in
between, so that a GPU waits nine tenths of its time and no CUDA graph can hold the step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: the steepest at 0 that still settle near 1
_SMALLEST = 1e-7  # of a gradient's norm: one of zeros stays zero


class Muon(torch.optim.Optimizer):
    """Moves matrices; those of one shape are taken together, as the blocks of a Mixer have them.

    `lr` may be a tensor, which is read on its device.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float | Tensor, weight_decay: float
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    # torch's closure, which computes the loss anew, is of no use to this optimizer.
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients of all matrices that have one."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault(matrix.shape, []).append(matrix)
            for matrices in alike.values():
                self._step(matrices, group)

    def _step(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        updates = []
        for matrix in matrices:
            gradient, state = matrix.grad, self.state[matrix]
            assert gradient is not None  # for mypy: only such matrices come here
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
            updates.append(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
        # As long as AdamW's steps usually are, whatever the shape (arXiv:2502.16982, section 2.2).
        rate = group["lr"] * (0.2 * max(matrices[0].shape) ** 0.5)
        steps = orthogonal(torch.stack(updates)) * rate  # [n, rows, columns]
        keep = 1 - group["lr"] * group["weight_decay"]
        for matrix, step in zip(matrices, steps, strict=True):
            matrix.mul_(keep).sub_(step)


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values of float [n, rows, columns] near 1, between about 0.7 and 1.2.

    Newton-Schulz iterations of fifth degree in bfloat16: only products of matrices, and of the
    smaller side.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
