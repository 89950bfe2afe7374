"""From a torch model to an ONNX graph: normalisation folded in, deterministic to the byte."""

import logging
import warnings
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from app.model_card import Preprocessing
from model_export.mixer import Mixer

OPSET = 20  # the first with Gelu as one operator
_TRACED_BATCH = 2  # torch.export would take a batch of one for a constant


class PatchClassifier(nn.Module):
    """A Mixer whose stem takes raw bytes: (x / 255 - mean) / std is folded into its weights."""

    def __init__(self, model: Mixer, preprocessing: Preprocessing, *, with_features: bool) -> None:
        super().__init__()
        self.stem = fold_normalisation(model.stem, preprocessing)
        self.blocks = model.blocks
        self.norm = model.norm
        self.head = model.head
        self.with_features = with_features

    def forward(self, patches: Tensor) -> Any:
        """Map uint8 [batch, S, P·P·3] to logits [batch, classes] (and features [batch, C])."""
        x = self.stem(patches.float())  # [batch, S, C]
        features = self.norm(self.blocks(x)).mean(dim=1)  # [batch, C]
        logits = self.head(features)  # [batch, classes]
        return (logits, features) if self.with_features else logits


def fold_normalisation(stem: nn.Linear, preprocessing: Preprocessing) -> nn.Linear:
    """Return a stem that does on bytes what `stem` does on normalised pixels.

    W·((x/255 - mean)/std) + b = (W/(255·std))·x + (b - W·(mean/std)), computed in float64.
    """
    colors = preprocessing.patch_size**2
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64).repeat(colors)  # [P·P·3]
    std = torch.tensor(preprocessing.std, dtype=torch.float64).repeat(colors)  # [P·P·3]
    weight = stem.weight.detach().double()  # [C, P·P·3]
    folded = nn.Linear(stem.in_features, stem.out_features, device="meta")
    folded.weight = nn.Parameter((weight / (255 * std)).float())
    folded.bias = nn.Parameter((stem.bias.detach().double() - weight @ (mean / std)).float())
    return folded


def to_onnx(
    model: Mixer, preprocessing: Preprocessing, *, with_features: bool = False
) -> onnx.ModelProto:
    """Trace `model` into a float32 graph: patches uint8 [batch, S, P·P·3] to logits, features."""
    classifier = PatchClassifier(model, preprocessing, with_features=with_features).eval()
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
