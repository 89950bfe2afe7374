"""The models that are served: the embedded one, and Mixers of real size with random weights."""

from pathlib import Path

import onnx
import torch

from app.model_card import Golden, ModelCard, Preprocessing, read_metadata, write_metadata
from app.settings import EMBEDDED_MODEL
from model_export import graph
from model_export.mixer import VARIANTS, Mixer
from model_export.samples import photo_like
from model_export.verify import torch_outputs

NAMES = ("embedded", "S/32", "B/16")
TOLERANCE = 1e-3  # of the golden sample, as a share of its largest logit


def model_file(name: str, folder: Path) -> Path:
    """Return the file of a model, written into `folder` on first use."""
    if name == "embedded":
        return EMBEDDED_MODEL
    path = folder / f"mixer-{name.lower().replace('/', '-')}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(name, path)
    return path


def preprocessing_of(path: Path) -> Preprocessing:
    """Return what a model file says of its input."""
    properties = onnx.load(path, load_external_data=False).metadata_props
    card, _ = read_metadata({entry.key: entry.value for entry in properties})
    return card.preprocessing


def _write(name: str, path: Path) -> None:
    """Export a Mixer of random weights; speed does not depend on their values."""
    torch.manual_seed(0)
    model = Mixer(VARIANTS[name]).eval()
    config = model.config
    preprocessing = Preprocessing(image_size=config.image_size, patch_size=config.patch_size)
    card = ModelCard(
        name=path.stem,
        version="0" * 12,
        variant=name,
        parameters=sum(p.numel() for p in model.parameters()),
        preprocessing=preprocessing,
        labels=tuple(f"class {index}" for index in range(config.classes)),
        source="random weights",
        checksum="0" * 64,
    )
    sample = photo_like(1, preprocessing, seed=0)
    logits, _ = torch_outputs(model, preprocessing, sample)
    proto = graph.to_onnx(model, preprocessing)
    golden = Golden.of(sample, logits, TOLERANCE * float(abs(logits).max()))
    onnx.helper.set_model_props(proto, write_metadata(card, golden))
    draft = path.with_suffix(".draft")
    onnx.save(proto, draft)
    draft.rename(path)
