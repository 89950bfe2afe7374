"""The Mixer itself: its variants' sizes, its two GELU forms, its order of patches."""

import dataclasses

import pytest
import torch

from model_export import export
from model_export.mixer import VARIANTS, Mixer, MixerConfig

TINY = MixerConfig(8, 4, blocks=1, hidden=6, token_mlp=5, channel_mlp=7, classes=3)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("S/32", 19_104_624),
        ("S/16", 18_528_264),
        ("B/32", 60_293_428),
        ("B/16", 59_880_472),
        ("L/32", 206_939_264),
        ("L/16", 208_196_168),
        ("H/14", 432_350_952),
    ],
)
def test_variant_has_the_published_number_of_parameters(variant: str, parameters: int) -> None:
    """Each variant of Table 1, with 1000 classes, has exactly its number of parameters."""
    with torch.device("meta"):
        model = Mixer(VARIANTS[variant])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_variants_are_those_of_the_mixer() -> None:
    """A gMixer of S/16's sizes is named by its dimensions, as S/16 is another model."""
    assert export.variant("mixer", VARIANTS["S/16"]) == "S/16"
    assert export.variant("gmixer", VARIANTS["S/16"]).startswith("P 16, ")


def test_logits_have_a_row_for_each_image() -> None:
    """Patches [batch, S, P·P·3] become logits [batch, classes]."""
    assert Mixer(TINY)(torch.zeros(2, 4, 48)).shape == (2, 3)


def test_gelu_forms_differ() -> None:
    """The same weights under tanh and erf GELU give different logits."""
    torch.manual_seed(0)
    tanh = Mixer(TINY)
    erf = Mixer(dataclasses.replace(TINY, gelu="erf"))
    erf.load_state_dict(tanh.state_dict())
    patches = torch.randn(1, 4, 48)
    assert not torch.equal(tanh(patches), erf(patches))


def test_layer_norms_use_the_epsilon_of_flax() -> None:
    """Every LayerNorm has eps 1e-6."""
    norms = [m for m in Mixer(TINY).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    assert len(norms) == 3
