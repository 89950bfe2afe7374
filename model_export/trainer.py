"""The training loop: steps, epochs, evaluation, and a state from which it goes on bit for bit.

Whatever is random in a step is drawn from a generator that is seeded by the recipe's seed and the
number of the step. So a step needs no memory of how the run came there, and a resumed run repeats
what the uninterrupted one would have done.
"""

import copy
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from app.model_card import Preprocessing
from model_export import augment, optimizer
from model_export.decoded import Pictures
from model_export.mixer import Mixer
from model_export.randaugment import randaugment
from model_export.recipe import Recipe
from model_export.train_model import TrainingLoss, compiled

_ORDER, _STEP = 0, 1  # two independent streams of random numbers
_EVALUATION_BATCH = 256  # no gradients are kept, so a large one fits


@dataclass
class Running:
    """Sums over the epoch in progress."""

    images: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Measured:
    """How the kept weights do on the test pictures."""

    confusion: NDArray[np.int64]  # [classes, classes]: row the true class, column the answer
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of pictures whose best class is the true one."""
        return float(np.trace(self.confusion)) / max(1, int(self.confusion.sum()))


@dataclass
class Trainer:
    """One run in progress: model, optimizer, averaged weights, and where in the run it is."""

    recipe: Recipe
    model: Mixer
    preprocessing: Preprocessing
    train: Pictures
    test: Pictures
    device: torch.device
    compile: bool
    step: int = 0
    running: Running = field(default_factory=Running)
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(requires_grad=False)
        self.optimizers = optimizer.build(self.model, self.recipe)
        loss = TrainingLoss(self.model)
        self.loss: nn.Module = compiled(loss) if self.compile else loss
        self.batch = min(self.recipe.batch_size, len(self.train))
        self.epoch_steps = len(self.train) // self.batch
        self.steps = self.epoch_steps * self.recipe.epochs
        self.classes = self.model.config.classes
        self.bfloat16 = multiplies_bfloat16(self.device)
        self._order = (-1, np.empty(0, np.int64))

    @property
    def epoch(self) -> int:
        """Count the finished epochs."""
        return self.step // self.epoch_steps

    def take_step(self) -> None:
        """Train on one batch."""
        start = time.perf_counter()
        rng = np.random.default_rng([self.recipe.seed, _STEP, self.step])
        patches, targets, labels = self._batch(rng)
        kept = self._kept(rng)
        for one in self.optimizers:
            for group in one.param_groups:
                group["lr"] = self.learning_rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss, logits = self.loss(patches, targets, kept)
        loss.backward()
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        for one in self.optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
        self._follow()
        self.step += 1
        self.running.images += len(labels)
        self.running.loss += float(loss.detach()) * len(labels)
        self.running.correct += float((logits.argmax(dim=1) == labels).sum())
        self.running.seconds += time.perf_counter() - start

    def finish_epoch(self) -> None:
        """Measure the averaged weights and append the epoch to the history."""
        measured = self.measure()
        running = self.running
        self.history.append(
            {
                "epoch": self.epoch,
                "learning_rate": self.learning_rate(),
                "train_loss": running.loss / running.images,
                "train_accuracy": running.correct / running.images,
                "test_loss": measured.loss,
                "test_accuracy": measured.accuracy,
                "images_per_second": running.images / running.seconds,
                "seconds": running.seconds,
            }
        )
        self.running = Running()

    def learning_rate(self) -> float:
        """Return this step's: a linear warm-up, then a cosine or a line down to the lowest."""
        recipe = self.recipe
        tenth = recipe.epochs / 10
        epochs = tenth if recipe.warmup_epochs is None else recipe.warmup_epochs
        warmup = round(epochs * self.epoch_steps)
        if self.step < warmup:
            return recipe.lr * (self.step + 1) / warmup
        done = min(1.0, (self.step - warmup) / max(1, self.steps - warmup))
        left = 1 - done if recipe.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return recipe.min_lr + (recipe.lr - recipe.min_lr) * left

    @torch.inference_mode()
    def measure(self) -> Measured:
        """Classify all test pictures with the averaged weights, as the server would."""
        confusion = np.zeros((self.classes, self.classes), np.int64)
        total = 0.0
        model = self.average.eval()
        for start in range(0, len(self.test), _EVALUATION_BATCH):
            part = slice(start, start + _EVALUATION_BATCH)
            pixels = torch.from_numpy(self.test.pixels[part]).to(self.device)
            patches = augment.to_patches(pixels.permute(0, 3, 1, 2).float(), self.preprocessing)
            labels = torch.from_numpy(self.test.labels[part]).to(self.device)
            logits = model(patches)  # [batch, classes]
            total += float(functional.cross_entropy(logits, labels, reduction="sum"))
            np.add.at(confusion, (self.test.labels[part], logits.argmax(dim=1).cpu().numpy()), 1)
        return Measured(confusion, total / max(1, len(self.test)))

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and plain values."""
        return {
            "step": self.step,
            "running": vars(self.running),
            "history": self.history,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step = state["step"]
        self.running = Running(**state["running"])
        self.history = state["history"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for one, kept in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(kept)

    def _batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return patches float [b, S, P·P·3], soft targets [b, classes] and labels int64 [b]."""
        epoch, place = divmod(self.step, self.epoch_steps)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.recipe.seed, _ORDER, epoch])
            self._order = (epoch, order.permutation(len(self.train)))
        rows = self._order[1][place * self.batch : (place + 1) * self.batch]
        pixels = torch.from_numpy(self.train.pixels[rows]).to(self.device)  # [b, H, H, 3]
        labels = torch.from_numpy(self.train.labels[rows]).to(self.device)
        images = augment.crop(pixels, self.preprocessing.image_size, self.recipe, rng)
        images = randaugment(images, self.recipe, rng)
        targets = augment.soft_targets(labels, self.classes, self.recipe.label_smoothing)
        images, targets = augment.mix(images, targets, self.recipe, rng)
        return augment.to_patches(images, self.preprocessing), targets, labels

    def _kept(self, rng: np.random.Generator) -> Tensor:
        """Draw which images skip which blocks: float32 [blocks, batch]."""
        blocks = self.model.config.blocks
        chance = np.linspace(0, self.recipe.stochastic_depth, blocks)[:, None]  # [blocks, 1]
        kept = (rng.random((blocks, self.batch)) >= chance) / (1 - chance)
        return torch.from_numpy(kept.astype(np.float32)).to(self.device)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averaged weights towards the model's; early on they follow quickly."""
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        for kept, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
            kept.lerp_(now, 1 - decay)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether `device` has instructions for bfloat16: elsewhere it is slower than float32.

    On a CPU with them (AVX-512 BF16, AMX) matrix products run 2 to 3.7 times as fast.
    """
    if device.type == "cuda":
        return True
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
