"""Google's Mixer checkpoints: the naming of vit_jax and big_vision, and the one before Flax linen.

Sources: google-research/vision_transformer vit_jax/models_mixer.py, google-research/big_vision
models/mlp_mixer.py. Dense kernels are [in, out], the stem's is [P, P, 3, C] (HWIO).
"""

from collections.abc import Iterable

from torch import Tensor

from model_export.errors import ExportError
from model_export.mixer import Mixer, MixerConfig
from model_export.stored import Tensors
from model_export.weights import Naming, Shape, pour

# A training checkpoint of big_vision keeps the model under params/, one of vit_jax under
# opt/target/; what else it holds (optimizer moments, step counters) is no part of the model.
_ROOTS = ("params/", "opt/target/", "optimizer/target/")
_TRAINING_STATE = ("opt/", "optimizer/", "extra/", "step")


def mixer(tensors: Tensors) -> tuple[Mixer, tuple[str, ...]]:
    """Build the Mixer that `tensors` hold; also return which tensors of training state it left.

    Raises:
        ExportError: the tensors are not those of a Mixer.
    """
    names = _without_training_state(tensors)
    model = {ours: tensors[name] for name, ours in names.items()}
    naming = _PRELINEN if "embedding/kernel" in model else _CURRENT
    left_aside = tuple(name for name in tensors if name not in names)
    return pour(Mixer, _config(model, naming), model, naming), left_aside


def _without_training_state(names: Iterable[str]) -> dict[str, str]:
    """Return the model's names, each with what it is below its root."""
    for root in _ROOTS:
        model = {name: name.removeprefix(root) for name in names if name.startswith(root)}
        if model:
            return model
    return {name: name for name in names if not name.startswith(_TRAINING_STATE)}


def _config(tensors: Tensors, naming: Naming) -> MixerConfig:
    stem = naming.dimensions(tensors, "stem.weight", "(P, P, 3, C)")
    patch_size, hidden = stem[0], stem[3]
    if stem[:3] != (patch_size, patch_size, 3):
        raise ExportError(
            f"tensor {naming.theirs('stem.weight')} has shape {stem}, "
            "expected (P, P, 3, C): square patches of RGB"
        )
    axes = "(1, {})" if naming is _PRELINEN else "({})"
    fc1 = "blocks.0.token_mixing.fc1.weight"
    token = naming.dimensions(tensors, fc1, axes.format("S, D_S"))
    channel = naming.dimensions(
        tensors, "blocks.0.channel_mixing.fc1.weight", axes.format("C, D_C")
    )
    return MixerConfig(
        image_size=naming.image_size(fc1, token, token[-2], patch_size),
        patch_size=patch_size,
        blocks=naming.blocks(tensors),
        hidden=hidden,
        token_mlp=token[-1],
        channel_mlp=channel[-1],
        classes=naming.classes(tensors, "(C, classes)"),
        gelu="tanh",
    )


def _current_shape(ours: str, shape: Shape, config: MixerConfig) -> Shape:
    if ours == "stem.weight":
        return (config.patch_size, config.patch_size, 3, config.hidden)
    return shape[::-1]


def _prelinen_shape(ours: str, shape: Shape, config: MixerConfig) -> Shape:
    expected = _current_shape(ours, shape, config)
    return (1, *expected) if "_mixing." in ours else expected


def _to_ours(ours: str, tensor: Tensor) -> Tensor:
    """Turn a kernel [..., in, out] into torch's [out, in]; vectors stay as they are."""
    if ours.endswith("bias") or "norm" in ours:
        return tensor
    return tensor.reshape(-1, tensor.shape[-1]).T


_CURRENT = Naming(
    rules=(
        (r"^blocks\.(\d+)\.", r"MixerBlock_\1/"),
        (r"^norm\.", "pre_head_layer_norm/"),
        (r"norm1\.", "LayerNorm_0/"),
        (r"norm2\.", "LayerNorm_1/"),
        (r"(norm|Norm_\d)/weight", r"\1/scale"),
        (r"\.fc1\.", "/Dense_0/"),
        (r"\.fc2\.", "/Dense_1/"),
        (r"[./]weight$", "/kernel"),
        (r"\.", "/"),
    ),
    their_shape=_current_shape,
    to_ours=_to_ours,
)
_PRELINEN = Naming(
    rules=(
        (r"^stem", "embedding"),
        (r"^blocks\.(\d+)\.", r"Mixer/encoderblock_\1/"),
        (r"^norm\.", "Mixer/encoder_norm/"),
        (r"_mixing\.fc(\d)\.weight", r"_mixing_phase_0/kernel\1"),
        (r"_mixing\.fc(\d)\.bias", r"_mixing_phase_0/bias\1"),
        *_CURRENT.rules,
    ),
    their_shape=_prelinen_shape,
    to_ours=_to_ours,
)
