"""What a run tells of itself: curves, confusion matrix and a model card."""

import io
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from model_export import recipe
from model_export.decoded import Skipped
from model_export.evaluate import draw_confusion
from model_export.export import variant
from model_export.run_folder import RunFolder
from model_export.timm import FAMILIES
from model_export.trainer import Measured, Trainer

_NAMED = 20  # classes in the table; all of them follow below it


@dataclass(frozen=True)
class About:
    """What a run was trained on."""

    data: str  # name of the folder or tar, not its path
    classes: tuple[str, ...]
    train: int  # pictures
    test: int
    skipped: list[Skipped]
    val_split: float | None  # the share set aside to test on, where the data had no such split


def write(trainer: Trainer, measured: Measured, folder: RunFolder, about: About) -> None:
    """Write curves.png, confusion.png and model_card.md."""
    draw_curves(trainer.history, folder)
    title = f"{folder.path.resolve().name}: {measured.accuracy:.2%}"
    folder.write("confusion.png", _png(draw_confusion(measured.confusion, about.classes, title)))
    folder.write("model_card.md", _card(trainer, measured, folder, about))


def draw_curves(history: list[dict[str, float]], folder: RunFolder) -> None:
    """Draw loss and accuracy over the epochs into curves.png."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "test"):
            values = [epoch[f"{split}_{what}"] for epoch in history]
            axes.plot([epoch["epoch"] for epoch in history], values, ".-", label=split)
        axes.set(xlabel="epoch", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend()
    folder.write("curves.png", _png(figure))


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _card(trainer: Trainer, measured: Measured, folder: RunFolder, about: About) -> str:
    model, rules = trainer.model, trainer.recipe
    family = FAMILIES[type(model)]
    name = folder.path.resolve().name
    parameters = sum(p.numel() for p in model.parameters())
    counts = measured.confusion.sum(axis=1)
    shares = measured.confusion.diagonal() / np.maximum(counts, 1)
    least = min(range(len(shares)), key=lambda i: (counts[i] == 0, shares[i]))
    start = f"fine-tuned from {rules.init}" if rules.init else "trained from scratch"
    rows = "\n".join(
        f"| {label} | {f'{share:.2%}' if count else 'none'} | {count:,} |"
        for label, share, count in zip(about.classes, shares, counts, strict=True)
    )
    skipped = f", {len(about.skipped)} files skipped as unreadable" if about.skipped else ""
    share = "" if about.val_split is None else f" --val-split {about.val_split:g}"
    shown = ", ".join(about.classes[:_NAMED]) + (", …" if len(about.classes) > _NAMED else "")
    fed = trainer.preprocessing
    return f"""# {name}

A {family} ({variant(family, model.config)}; {parameters:,} parameters), {start}.

| | |
|---|---|
| classes | {len(about.classes)}: {shown} |
| data | {about.data}: {about.train:,} pictures to train on, {about.test:,} to test on{skipped} |
| input | RGB, {fed.image_size} px, patches of {fed.patch_size}, {fed.resize}, {fed.interpolation} |
| progress | {trainer.epoch} of {rules.epochs} epochs |
| accuracy | **{measured.accuracy:.2%}** on the test pictures (loss {measured.loss:.4f}) |

Accuracy is that of float32 weights, on pictures read by the server's own image pipeline.

![Curves](curves.png)

Training figures are of augmented, mixed images, so they may lie below the test figures.

## Per class

| class | accuracy | test pictures |
|---|---:|---:|
{rows}

![Confusion matrix](confusion.png)

## Recipe

`mixer-train DATA -o run --config recipe.toml{share}` repeats the run.

```toml
{recipe.to_toml(rules)}```

## Limits

- It knows its {len(about.classes)} classes and answers with one of them whatever it is shown.
- It is weakest on {about.classes[least]} ({shares[least]:.2%}).
- The weights kept are the averaged ones of the last step; no test accuracy chose them.
- Pictures unlike those in {about.data} (other framing, other cameras) will do worse.
"""
