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
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from app.model_card import Preprocessing
from model_export import augment
from model_export.decoded import MEMORY_BYTES, Pictures
from model_export.errors import ExportError
from model_export.mixer import Mixer
from model_export.randaugment import randaugment
from model_export.recipe import Recipe
from model_export.update import Update

_ORDER, _STEP = 0, 1  # two independent streams of random numbers
# Tokens in one batch of the evaluation: no gradients are kept, so a large one fits, and a GPU is
# kept busy only by a large one. H/14 takes 5 GiB for as many.
_EVALUATION_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 18}


@dataclass
class Running:
    """Sums over the epoch in progress."""

    sums: Tensor  # float64 [2]: of the losses, of the right answers
    images: int = 0
    seconds: float = 0.0

    def means(self) -> tuple[float, float]:
        """Return loss and accuracy so far; on a GPU this waits for all steps given to it."""
        start = time.perf_counter()
        loss, correct = self.sums.tolist()
        self.seconds += time.perf_counter() - start
        return loss / max(1, self.images), correct / max(1, self.images)


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
    running: Running = field(init=False)
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(requires_grad=False)
        self.update = Update(self.model, self.recipe, self.device, compiles=self.compile)
        self.batch = min(self.recipe.batch_size, len(self.train))
        self.epoch_steps = len(self.train) // self.batch
        self.steps = self.epoch_steps * self.recipe.epochs
        self.classes = self.model.config.classes
        self._order = (-1, np.empty(0, np.int64))
        self._pixels: Tensor | None = None
        if self.device.type == "cuda" and self.train.pixels.nbytes <= MEMORY_BYTES:
            self._pixels = augment.put(self.train.pixels, self.device)  # uint8 [n, H, H, 3]
        self.running = self._nothing()

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
        loss, logits = self.update.take(patches, targets, kept, self.learning_rate())
        self._follow()
        self.step += 1
        self.running.images += len(labels)
        correct = (logits.argmax(dim=1) == labels).sum()
        self.running.sums += torch.stack([loss.double() * len(labels), correct.double()])
        self.running.seconds += time.perf_counter() - start

    def finish_epoch(self) -> None:
        """Measure the averaged weights and append the epoch to the history.

        Raises:
            ExportError: the loss is no number any more.
        """
        running = self.running
        loss, accuracy = running.means()
        measured = self.measure()
        if not math.isfinite(loss + measured.loss):
            raise self._diverged(f"epoch {self.epoch} ends with a loss of {loss:g}")
        self.history.append(
            {
                "epoch": self.epoch,
                "learning_rate": self.learning_rate(),
                "train_loss": loss,
                "train_accuracy": accuracy,
                "test_loss": measured.loss,
                "test_accuracy": measured.accuracy,
                "images_per_second": running.images / running.seconds,
                "seconds": running.seconds,
            }
        )
        self.running = self._nothing()

    def check_weights(self) -> None:
        """Stop before weights are saved that are no numbers any more.

        Raises:
            ExportError: one is not.
        """
        if not all(weight.isfinite().all() for weight in self.average.parameters()):
            raise self._diverged(f"after step {self.step} the weights are no numbers")

    def _diverged(self, how: str) -> ExportError:
        return ExportError(
            f"{how}: the run has diverged, and keeps what it had before; "
            f"start another with less than --lr {self.recipe.lr:g}"
        )

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
        batch = max(1, _EVALUATION_TOKENS[self.device.type] // self.preprocessing.tokens)
        for start in range(0, len(self.test), batch):
            part = slice(start, start + batch)
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
            "optimizers": self.update.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step = state["step"]
        self.running = Running(**state["running"])
        self.running.sums = self.running.sums.to(self.device)
        self.history = state["history"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.update.restore(state["optimizers"])

    def _batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return patches float [b, S, P·P·3], soft targets [b, classes] and labels int64 [b]."""
        epoch, place = divmod(self.step, self.epoch_steps)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.recipe.seed, _ORDER, epoch])
            self._order = (epoch, order.permutation(len(self.train)))
        rows = self._order[1][place * self.batch : (place + 1) * self.batch]
        if self._pixels is None:
            pixels = augment.put(self.train.pixels[rows], self.device)  # [b, H, H, 3]
        else:
            pixels = self._pixels[augment.put(rows, self.device)]
        labels = augment.put(self.train.labels[rows], self.device)
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
        return augment.put(kept.astype(np.float32), self.device)

    def _follow(self) -> None:
        """Move the averaged weights towards the model's; early on they follow quickly."""
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch has no types
        follow(list(self.average.parameters()), list(self.model.parameters()), 0)

    def _nothing(self) -> Running:
        """Return sums of nothing yet, where the steps can add to them without waiting."""
        return Running(sums=torch.zeros(2, dtype=torch.float64, device=self.device))
