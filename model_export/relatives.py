"""timm's all-MLP relatives of the Mixer: patches in, logits out, other blocks between.

gMixer (Wightman, timm), ResMLP (Touvron et al. 2021, arXiv:2105.03404) and gMLP (Liu et al. 2021,
arXiv:2105.08050), as in timm/models/mlp_mixer.py. In their MixerConfig `token_mlp` is 0 where
tokens mix without an MLP, and `channel_mlp` is the width of the first channel layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 # torch's own documentation calls it F

from model_export.mixer import LayerNorm, Mixer, MixerConfig, Mlp


class GatedMlp(nn.Module):
    """SwiGLU: half of the hidden units, through SiLU, scale the other half."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., width] to float [..., width]."""
        value, gate = self.fc1(x).chunk(2, dim=-1)  # each [..., hidden / 2]
        y: Tensor = self.fc2(value * F.silu(gate))
        return y


class GMixerBlock(nn.Module):
    """A Mixer block whose MLPs are gated."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden)
        self.token_mixing = GatedMlp(config.tokens, config.token_mlp)
        self.norm2 = LayerNorm(config.hidden)
        self.channel_mixing = GatedMlp(config.hidden, config.channel_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [batch, S, C] to float [batch, S, C]."""
        y: Tensor = self.token_mixing(self.norm1(x).mT)  # [batch, C, S]
        x = x + y.mT  # [batch, S, C]
        y = self.channel_mixing(self.norm2(x))  # [batch, S, C]
        return x + y


class Affine(nn.Module):
    """ResMLP's stand-in for LayerNorm: a scale and a shift per channel, no statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., width] to float [..., width]."""
        return self.alpha * x + self.beta


class ResMlpBlock(nn.Module):
    """One linear layer over tokens, an MLP over channels, each scaled per channel (LayerScale)."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norm1 = Affine(config.hidden)
        self.token_mixing = nn.Linear(config.tokens, config.tokens)
        self.ls1 = nn.Parameter(torch.ones(config.hidden))
        self.norm2 = Affine(config.hidden)
        self.channel_mixing = Mlp(config.hidden, config.channel_mlp, config.gelu)
        self.ls2 = nn.Parameter(torch.ones(config.hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Map float [batch, S, C] to float [batch, S, C]."""
        y: Tensor = self.token_mixing(self.norm1(x).mT)  # [batch, C, S]
        x = x + self.ls1 * y.mT  # [batch, S, C]
        y = self.channel_mixing(self.norm2(x))  # [batch, S, C]
        return x + self.ls2 * y


class SpatialGate(nn.Module):
    """gMLP's gate: half of the channels, mixed over tokens, scale the other half."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        # timm leaves torch's default eps of 1e-5 here, unlike in its other norms.
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.proj = nn.Linear(tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [batch, S, 2·width] to float [batch, S, width]."""
        value, gate = x.chunk(2, dim=-1)  # each [batch, S, width]
        y: Tensor = self.proj(self.norm(gate).mT)  # [batch, width, S]
        return value * y.mT


class SpatialGatingMlp(nn.Module):
    """gMLP's one MLP: channels up, GELU, spatial gate, channels down."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        half = config.channel_mlp // 2
        self.fc1 = nn.Linear(config.hidden, config.channel_mlp)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.gate = SpatialGate(config.tokens, half)
        self.fc2 = nn.Linear(half, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [batch, S, C] to float [batch, S, C]."""
        y: Tensor = self.fc2(self.gate(self.gelu(self.fc1(x))))
        return y


class GMlpBlock(nn.Module):
    """The gated MLP with a skip connection: equation 1 of the gMLP paper."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.hidden)
        self.channel_mixing = SpatialGatingMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [batch, S, C] to float [batch, S, C]."""
        y: Tensor = self.channel_mixing(self.norm(x))
        return x + y


class GMixer(Mixer):
    """gMixer: `gmixer_12_224`, `gmixer_24_224`."""

    block = GMixerBlock


class ResMlp(Mixer):
    """ResMLP: `resmlp_12_224` … `resmlp_big_24_224`."""

    block = ResMlpBlock
    norm_layer = Affine


class GMlp(Mixer):
    """gMLP: `gmlp_ti16_224`, `gmlp_s16_224`, `gmlp_b16_224`."""

    block = GMlpBlock
