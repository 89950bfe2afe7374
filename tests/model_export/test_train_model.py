"""The forward pass that is trained is the Mixer's own, only quicker."""

from pathlib import Path

import pytest
import torch

from model_export import checkpoints, recipe
from model_export.recipe import Recipe
from model_export.train_model import TrainingLoss, build, compiled
from model_export.trainer import Trainer

from .conftest import FIXTURES

SMALL = Recipe(image_size=16, patch=4, hidden=12, blocks=3, token_mlp=10, channel_mlp=20)
BATCH, CLASSES = 5, 4


def inputs(model_tokens: int = 16, patch_values: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Return patches float [5, S, P·P·3] and soft targets float [5, 4]."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(BATCH, model_tokens, patch_values, generator=generator)
    return patches, torch.randn(BATCH, CLASSES, generator=generator).softmax(dim=1)


@pytest.mark.parametrize(
    "init", [None, "timm_mixer_tiny", "timm_gmixer_tiny", "timm_resmlp_tiny", "timm_gmlp_tiny"]
)
def test_training_pass_is_the_model(init: str | None) -> None:
    """With no block skipped the logits are the model's own, a relative's too."""
    rules = SMALL if init is None else Recipe(init=str(FIXTURES / init))
    model, fed = build(rules, CLASSES)
    torch.nn.init.normal_(model.head.weight)
    patches, targets = inputs(fed.tokens, fed.patch_bytes)
    kept = torch.ones(model.config.blocks, BATCH)
    loss, logits = TrainingLoss(model)(patches, targets, kept)
    with torch.no_grad():
        expected = model(patches)
    assert torch.allclose(logits, expected, atol=2e-5)
    assert torch.allclose(loss, -(targets * expected.log_softmax(dim=1)).sum(dim=1).mean())


def test_skipped_block_does_nothing() -> None:
    """An image that skips all blocks is classified from its stem; its neighbours are not."""
    model, _ = build(SMALL, CLASSES)
    torch.nn.init.normal_(model.head.weight)
    patches, targets = inputs()
    kept = torch.ones(3, BATCH)
    kept[:, 2] = 0
    _, logits = TrainingLoss(model)(patches, targets, kept)
    with torch.no_grad():
        whole = model(patches)
        stem = model.head(model.norm(model.stem(patches)).mean(dim=1))
    assert torch.allclose(logits[2], stem[2], atol=2e-5)
    assert torch.allclose(logits[[0, 1, 3, 4]], whole[[0, 1, 3, 4]], atol=2e-5)


def test_first_loss_is_of_a_model_that_knows_nothing() -> None:
    """A new model's head is zero: it gives every class the same score."""
    model, _ = build(SMALL, CLASSES)
    assert not model(inputs()[0]).any()


@pytest.mark.slow
def test_compiled_pass_is_the_same() -> None:
    """torch.compile changes neither loss nor gradients beyond rounding."""
    model, _ = build(SMALL, CLASSES)
    torch.nn.init.normal_(model.head.weight)
    gradients = []
    for loss in (TrainingLoss(model), compiled(TrainingLoss(model))):
        model.zero_grad()
        loss(*inputs(), torch.ones(3, BATCH))[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for plain, quick in zip(*gradients, strict=True):
        assert torch.allclose(plain, quick, atol=1e-5)


def test_google_checkpoint_keeps_its_features() -> None:
    """A fine-tuned Google checkpoint starts from its weights; GELU's form and the head differ."""
    source = str(FIXTURES / "google_tiny.npz")
    model, _ = build(Recipe(init=source), CLASSES)
    known = checkpoints.load(source).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, known[name])


def test_learning_rate_rises_and_falls() -> None:
    """Linear from zero over the warm-up, then by the cosine to the lowest rate."""
    rules = Recipe(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1, decay="cosine")
    trainer = Trainer.__new__(Trainer)
    trainer.recipe, trainer.epoch_steps, trainer.steps = rules, 5, 50
    rates = []
    for trainer.step in range(51):
        rates.append(trainer.learning_rate())
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[30] == pytest.approx(0.55)
    assert rates[50] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_recipe_survives_its_file(tmp_path: Path) -> None:
    """A recipe written as TOML and read again is the same, odd characters in a path included."""
    rules = Recipe(init='a "b"\\c é.npz', lr=3e-5, flip=False)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(rules))
    assert recipe.load(tmp_path / "recipe.toml", {}) == rules


@pytest.mark.parametrize("name", ["cifar10.toml", "cifar10-further.toml", "fine-tune.toml"])
def test_committed_recipes_hold(name: str) -> None:
    """The recipes that come with the package can be read."""
    folder = Path(recipe.__file__).parent / "recipes"
    assert recipe.load(folder / name, {}).epochs > 0
