"""MLP-Mixer in PyTorch, in the notation of Tolstikhin et al. 2021 (arXiv:2105.01601), section 2.

An image of H by H pixels is cut into S patches of P by P; each patch is one row of P·P·3 numbers.
The network takes such rows, so that its stem is a matrix product and not a convolution.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

Gelu = Literal["tanh", "erf"]


@dataclass(frozen=True)
class MixerConfig:
    """The numbers that fix a Mixer, named as in Table 1 of the paper."""

    image_size: int  # H, in pixels
    patch_size: int  # P, in pixels
    blocks: int
    hidden: int  # C, channels of one token
    token_mlp: int  # D_S, hidden width of the token-mixing MLP
    channel_mlp: int  # D_C, hidden width of the channel-mixing MLP
    classes: int = 1000
    gelu: Gelu = "tanh"  # Google's form; timm and torch use erf

    @property
    def tokens(self) -> int:
        """Patches per image, S in the paper."""
        return (self.image_size // self.patch_size) ** 2


# Table 1 of the paper: image, patch, blocks, C, D_S, D_C.
VARIANTS = {
    "S/32": MixerConfig(224, 32, 8, 512, 256, 2048),
    "S/16": MixerConfig(224, 16, 8, 512, 256, 2048),
    "B/32": MixerConfig(224, 32, 12, 768, 384, 3072),
    "B/16": MixerConfig(224, 16, 12, 768, 384, 3072),
    "L/32": MixerConfig(224, 32, 24, 1024, 512, 4096),
    "L/16": MixerConfig(224, 16, 24, 1024, 512, 4096),
    "H/14": MixerConfig(224, 14, 32, 1280, 640, 5120),
}


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis with the eps of Flax and timm, 1e-6, not torch's 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


class Mlp(nn.Module):
    """Two dense layers with a GELU between them, over the last axis."""

    def __init__(self, width: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.gelu = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., width] to float [..., width]."""
        y: Tensor = self.fc2(self.gelu(self.fc1(x)))
        return y


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each with a skip connection: equation 1 of the paper."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden)
        self.token_mixing = Mlp(config.tokens, config.token_mlp, config.gelu)
        self.norm2 = LayerNorm(config.hidden)
        self.channel_mixing = Mlp(config.hidden, config.channel_mlp, config.gelu)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [batch, S, C] to float [batch, S, C]."""
        y: Tensor = self.token_mixing(self.norm1(x).mT)  # [batch, C, S]
        x = x + y.mT  # [batch, S, C]
        y = self.channel_mixing(self.norm2(x))  # [batch, S, C]
        return x + y


class Mixer(nn.Module):
    """Stem, blocks, a last norm, the mean over tokens, and a linear head.

    Its relatives (relatives.py) differ in `block` and `norm_layer` alone.
    """

    block: ClassVar[type[nn.Module]] = MixerBlock
    norm_layer: ClassVar[type[nn.Module]] = LayerNorm

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Linear(config.patch_size**2 * 3, config.hidden)
        self.blocks = nn.Sequential(*(self.block(config) for _ in range(config.blocks)))
        self.norm = self.norm_layer(config.hidden)
        self.head = nn.Linear(config.hidden, config.classes)

    def features(self, patches: Tensor) -> Tensor:
        """Pool normalised `patches` float [batch, S, P·P·3] into float [batch, C]."""
        x: Tensor = self.stem(patches)  # [batch, S, C]
        x = self.norm(self.blocks(x))  # [batch, S, C]
        return x.mean(dim=1)  # [batch, C]

    def forward(self, patches: Tensor) -> Tensor:
        """Classify normalised `patches` float [batch, S, P·P·3]: logits float [batch, classes]."""
        logits: Tensor = self.head(self.features(patches))
        return logits
