"""Training on a real GPU; skipped where torch is not installed beside the GPU build."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch in .venv-gpu: pip install torch")

from model_export import train_model, update  # noqa: E402 - they need torch
from model_export.recipe import Recipe  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_captured_steps_are_plain_steps(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven steps replayed from a CUDA graph lower the loss as plain ones do."""
    recipe = Recipe.model_validate({"optimizer": optimizer, "lr": 1e-3, "stochastic_depth": 0.0})
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(64, 64, 48, generator=generator).to(device)
    targets = torch.eye(10).repeat(7, 1)[:64].to(device)
    kept = torch.ones(8, 64, device=device)

    def losses(plain_steps: int) -> list[float]:
        monkeypatch.setattr(update, "_PLAIN", plain_steps)
        model, _ = train_model.build(recipe, 10)
        mine = update.Update(model.to(device), recipe, device, compiles=False)
        found = [float(mine.take(patches, targets, kept, 1e-3)[0]) for _ in range(10)]
        assert (mine._graph is None) == (plain_steps == 10)
        return found

    np.testing.assert_allclose(losses(3), losses(10), rtol=0.02)
