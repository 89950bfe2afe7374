"""From a torch model to an ONNX graph: normalisation folded in, deterministic to the byte."""

import copy
import logging
import warnings

import onnx
import torch
from torch import Tensor, nn

from app.model_card import Preprocessing
from model_export.mixer import Mixer, Mlp

OPSET = 20  # the first with Gelu as one operator
_TRACED_BATCH = 2  # torch.export would take a batch of one for a constant


class FlatMlp(nn.Module):
    """An MLP over the rows of one matrix.

    ONNX Runtime makes one operator of a matrix product and its bias, on a CPU, and none of a
    batch's: a model of 64 tokens takes 4 to 8 % less. Half precision is for GPUs, where it makes
    one of bias and GELU instead, and would have the matrix transposed first.
    """

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.gelu, self.fc2 = mlp.fc1, mlp.gelu, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        """Map float [batch, rows, width] to float [batch, rows, width], as the MLP does."""
        y = x.flatten(0, 1)  # [batch·rows, width]
        # Not as linear layers: those the exporter writes as what CUDA cannot take apart again.
        y = self.gelu(y @ self.fc1.weight.mT + self.fc1.bias)  # [batch·rows, hidden]
        y = y @ self.fc2.weight.mT + self.fc2.bias  # [batch·rows, width]
        z: Tensor = y.view(-1, *x.shape[1:])
        return z


class PatchClassifier(nn.Module):
    """A Mixer whose stem takes raw bytes: (x / 255 - mean) / std is folded into its weights.

    In half precision the pooling, the head and (by the operator's own definition) the statistics
    of LayerNorm stay float32.
    """

    def __init__(
        self, model: Mixer, preprocessing: Preprocessing, *, with_features: bool, half: bool
    ) -> None:
        super().__init__()
        # Half has 11 bits: around zero the bytes' products keep them, around 128 they would not.
        self.offset = 128 if half else 0
        self.dtype = torch.float16 if half else torch.float32
        self.stem = fold_normalisation(model.stem, preprocessing, self.offset).to(self.dtype)
        self.blocks = copy.deepcopy(model.blocks).to(self.dtype)
        if not half:
            _flatten(self.blocks)
        self.norm = copy.deepcopy(model.norm).to(self.dtype)
        self.head = model.head
        self.with_features = with_features

    def forward(self, patches: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map uint8 [batch, S, P·P·3] to logits [batch, classes] (and features [batch, C])."""
        x = patches.to(self.dtype)  # [batch, S, P·P·3]
        if self.offset:
            x = x - self.offset
        x = self.norm(self.blocks(self.stem(x)))  # [batch, S, C]
        features = x.float().mean(dim=1)  # [batch, C]
        logits: Tensor = self.head(features)  # [batch, classes]
        return (logits, features) if self.with_features else logits


def _flatten(blocks: nn.Module) -> None:
    """Put a FlatMlp in the place of each Mlp."""
    for block in blocks.children():
        for name, part in list(block.named_children()):
            if isinstance(part, Mlp):
                setattr(block, name, FlatMlp(part))


def fold_normalisation(stem: nn.Linear, preprocessing: Preprocessing, offset: int) -> nn.Linear:
    """Return a stem that does on bytes less `offset` what `stem` does on normalised pixels.

    W·((x/255 - mean)/std) + b = V·(x - offset) + (b - W·(mean/std) + V·offset), where
    V = W/(255·std); computed in float64.
    """
    pixels = preprocessing.patch_size**2
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64).repeat(pixels)  # [P·P·3]
    std = torch.tensor(preprocessing.std, dtype=torch.float64).repeat(pixels)  # [P·P·3]
    weight = stem.weight.detach().double()  # [C, P·P·3]
    scaled = weight / (255 * std)  # [C, P·P·3]
    bias = stem.bias.detach().double() - weight @ (mean / std) + scaled.sum(dim=1) * offset  # [C]
    folded = nn.Linear(stem.in_features, stem.out_features, device="meta")
    folded.weight, folded.bias = nn.Parameter(scaled.float()), nn.Parameter(bias.float())
    return folded


def to_onnx(
    model: Mixer, preprocessing: Preprocessing, *, with_features: bool = False, half: bool = False
) -> onnx.ModelProto:
    """Trace `model` into a graph: patches uint8 [batch, S, P·P·3] to logits, features float32."""
    classifier = PatchClassifier(model, preprocessing, with_features=with_features, half=half)
    classifier.eval()
    shape = (_TRACED_BATCH, preprocessing.tokens, preprocessing.patch_bytes)
    # The exporter reports that torchvision's operators are missing; no Mixer needs them.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # torch 2.13 uses parts of itself that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            classifier,
            (torch.zeros(shape, dtype=torch.uint8),),
            input_names=["patches"],
            output_names=["logits", "features"] if with_features else ["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is only where dynamo=False
    return _tidy(program.model_proto)


def _tidy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Strip what names the exporting machine, and inferred shapes, which quantising outdates."""
    proto.producer_name, proto.producer_version, proto.doc_string = "mixer-export", "", ""
    del proto.metadata_props[:]
    graph = proto.graph
    graph.name = "mixer"
    del graph.value_info[:]
    parts = [graph, *graph.node, *graph.input, *graph.output, *graph.initializer]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    return proto
