"""Which weights each optimizer moves, and how."""

import pytest
import torch

from model_export import optimizer
from model_export.muon import MOMENTUM, Muon
from model_export.recipe import Recipe
from model_export.train_model import TrainingLoss, build
from model_export.update import Update, multiplies_bfloat16

CPU = torch.device("cpu")
SMALL = {
    "image_size": 16,
    "patch": 4,
    "hidden": 12,
    "blocks": 2,
    "token_mlp": 10,
    "channel_mlp": 20,
}


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_every_weight_moves_once_and_the_loss_falls(name: str) -> None:
    """Each optimizer owns each weight exactly once, and a few steps on one batch lower its loss."""
    rules = Recipe.model_validate(SMALL | {"optimizer": name, "lr": 1e-2})
    model, _ = build(rules, 3)
    optimizers = optimizer.build(model, rules, CPU)
    owned = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    patches = torch.randn(6, 16, 48, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(3).repeat(2, 1)
    loss_of, losses = TrainingLoss(model), []
    for _ in range(12):
        loss, _ = loss_of(patches, targets, torch.ones(2, 6))
        losses.append(float(loss.detach()))
        loss.backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_norms_and_biases_do_not_decay() -> None:
    """Weight decay is on matrices alone, whichever optimizer moves them."""
    for name in ("adam", "adamw", "muon"):
        rules = Recipe.model_validate(SMALL | {"optimizer": name})
        model, _ = build(rules, 3)
        for one in optimizer.build(model, rules, CPU):
            for group in one.param_groups:
                matrices = {p.dim() > 1 for p in group["params"]}
                assert matrices in ({group["weight_decay"] > 0}, set())


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_recipe_sets_decay_rate_and_longest_gradient(name: str) -> None:
    """Adam's second decay rate is the recipe's, and no gradient is longer than its clip_norm."""
    rules = Recipe.model_validate(SMALL | {"optimizer": name, "beta2": 0.5, "clip_norm": 1e-3})
    model, _ = build(rules, 3)
    update = Update(model, rules, CPU, compiles=False)
    assert {group["betas"] for group in update.optimizers[-1].param_groups} == {(0.9, 0.5)}
    patches = torch.randn(6, 16, 48, generator=torch.Generator().manual_seed(0))
    update.take(patches, torch.eye(3).repeat(2, 1), torch.ones(2, 6), 0.0)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-2)


def test_steps_of_muon_are_orthogonal() -> None:
    """Muon moves a block's matrix about as far in every direction, however lopsided its gradient.

    Its five Newton-Schulz iterations leave singular values between 0.7 and 1.2 of each other.
    """
    rules = Recipe.model_validate(SMALL | {"optimizer": "muon", "weight_decay": 0.0, "lr": 1.0})
    model, _ = build(rules, 3)
    weight = model.get_parameter("blocks.0.token_mixing.fc1.weight")
    before = weight.detach().clone()
    scale = torch.logspace(0, -1, weight.shape[1])
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * scale
    optimizer.build(model, rules, CPU)[0].step()
    moved = torch.linalg.svdvals((weight - before).detach())
    assert moved.max() / moved.min() < 3


def test_muon_takes_the_steps_of_torch() -> None:
    """Matrices taken together move as torch.optim.Muon moves each, up to bfloat16's digits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (20, 12), (12, 20), (8, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    mine: torch.optim.Optimizer = Muon(ours, 0.02, 0.1)
    library: torch.optim.Optimizer = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        library.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_bfloat16_where_there_are_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bfloat16 instructions trains in float32; a GPU in bfloat16."""
    for capabilities, expected in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert multiplies_bfloat16(torch.device("cpu")) is expected
    assert multiplies_bfloat16(torch.device("cuda"))
