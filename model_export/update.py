"""One step's change of the weights: loss, gradients, clipping, optimizers.

On a GPU all of it is one CUDA graph. A small Mixer's step is a thousand operations of microseconds
each; issued one by one they leave the GPU idle for nine tenths of the time.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model_export import optimizer
from model_export.mixer import Mixer
from model_export.recipe import Recipe
from model_export.train_model import TrainingLoss, compiled

_PLAIN = 3  # first steps on a GPU: they compile, and make the optimizers' state


class Update:
    """Takes steps on the weights of `model`, in place."""

    def __init__(
        self, model: Mixer, recipe: Recipe, device: torch.device, *, compiles: bool
    ) -> None:
        self.optimizers = optimizer.build(model, recipe, device)
        self.bfloat16 = multiplies_bfloat16(device)
        loss = TrainingLoss(model)
        self._loss: nn.Module = compiled(loss) if compiles else loss
        self._model, self._recipe, self._device = model, recipe, device
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._rate = torch.zeros((), device=device)

    def take(
        self, patches: Tensor, targets: Tensor, kept: Tensor, rate: float
    ) -> tuple[Tensor, Tensor]:
        """Take a step at learning rate `rate`; the other arguments are TrainingLoss's.

        Returns:
            loss float [] and logits float [batch, classes]; on a GPU the next step overwrites them.
        """
        if self._device.type != "cuda":
            self._set_rate(rate)
            return self._learn(patches, targets, kept)
        self._rate.fill_(rate)
        self._taken += 1
        if self._taken <= _PLAIN:
            self._set_rate(self._rate)
            return self._aside(patches, targets, kept)
        if self._graph is None:
            self._capture(patches, targets, kept)
        for mine, given in zip(self._inputs, (patches, targets, kept), strict=True):
            mine.copy_(given)
        assert self._graph is not None and self._outputs is not None  # noqa: PT018 - for mypy: captured above
        self._graph.replay()
        return self._outputs

    def state(self) -> list[dict[str, Any]]:
        """Return what `restore` takes: the state of each optimizer."""
        return [one.state_dict() for one in self.optimizers]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Go on from a `state`, before the first step."""
        for one, kept in zip(self.optimizers, state, strict=True):
            one.load_state_dict(kept)
            for group in one.param_groups:
                group["capturable"] = self._device.type == "cuda"  # the state's may be another's

    def _set_rate(self, rate: float | Tensor) -> None:
        for one in self.optimizers:
            for group in one.param_groups:
                group["lr"] = rate

    def _learn(self, patches: Tensor, targets: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        for one in self.optimizers:
            one.zero_grad(set_to_none=True)
        # Each weight is used once a step: a cache of their bfloat16 copies would only hold memory.
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False
        ):
            loss, logits = self._loss(patches, targets, kept)
        loss.backward()
        if self._recipe.clip_norm:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe.clip_norm)
        for one in self.optimizers:
            one.step()
        return loss.detach(), logits.detach()

    def _aside(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Learn on another stream, as torch wants it before a capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._learn(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _capture(self, *inputs: Tensor) -> None:
        """Record a step without taking it."""
        self._inputs = [given.clone() for given in inputs]
        for one in self.optimizers:
            one.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self._learn(*self._inputs)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether `device` has instructions for bfloat16: elsewhere it is slower than float32.

    On a CPU with them (AVX-512 BF16, AMX) matrix products run 2 to 3.7 times as fast.
    """
    if device.type == "cuda":
        return True
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
