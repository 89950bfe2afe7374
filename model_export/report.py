"""What the commands print: short texts for people, facts first."""

from app.model_card import ModelCard, Preprocessing
from model_export.checkpoints import Checkpoint
from model_export.evaluate import Evaluation
from model_export.export import Report
from model_export.summary import Summary


def conversion(report: Report, checkpoint: Checkpoint) -> str:
    """Describe a finished conversion: what was written, from what, and how it was proven."""
    card, agreement = report.card, report.agreement
    lines = [
        f"{report.path}: {report.file_bytes / 1e6:.1f} MB, {card.precision}",
        f"  model      {card.name}: {card.family} {card.variant}, {card.parameters:,} parameters, "
        f"{len(card.labels)} classes",
        f"  source     {card.source}, SHA-256 {card.checksum}",
        f"  input      {_preprocessing(card.preprocessing)}",
        f"  labels     {_labels(card)}",
    ]
    lines += [
        f"  override   {name} {was} -> {now}"
        for name, was, now in _changes(checkpoint.preprocessing, card.preprocessing)
    ]
    if checkpoint.is_assumed:
        lines.append(
            f"  assumed    timm's usual input for a {card.family}: no config.json nor "
            "arguments of a training say how these weights were fed"
        )
    if checkpoint.state:
        lines.append(f"  weights    {checkpoint.state}")
    if checkpoint.left_aside:
        names = checkpoint.left_aside
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        lines.append(f"  left aside {len(names)} tensors that are no part of the model: {shown}")
    features = "" if agreement.features is None else f", max |Δfeature| {agreement.features:.2g}"
    lines.append(
        f"  verified   {agreement.pictures} pictures, float32 in onnxruntime against torch: "
        f"max |Δlogit| {agreement.logits:.2g}{features} (allowed {agreement.limit:.2g})"
    )
    if report.shrunk is not None:
        shrunk, loss = report.shrunk, report.shrunk.loss
        kept = ", ".join(shrunk.kept_float) or "none"
        lines += [
            "",
            f"  over {loss.pictures} pictures      {'float32':>10} {card.precision:>10}",
            f"  file size               {shrunk.float_bytes / 1e6:>7.1f} MB "
            f"{report.file_bytes / 1e6:>7.1f} MB",
            f"  max |Δlogit|            {0:>10} {loss.logits:>10.3g}",
            f"  top-1 agreement         {1:>10.2%} {loss.agreement:>10.2%}",
            f"  latency, this CPU       {1:>10.2f} {shrunk.latency_ratio:>10.2f}",
            f"  parts kept in float     {'all':>10} {kept:>10}",
        ]
    return "\n".join(lines)


def inspection(summary: Summary) -> str:
    """Describe a model file."""
    card = summary.card
    operators = ", ".join(f"{name} {n}" for name, n in summary.operators.most_common())
    cuda = f"no (lacks {', '.join(summary.cpu_only)})" if summary.cpu_only else "yes"
    return "\n".join(
        [
            f"{card.name} (version {card.version}): {card.family} {card.variant}, {card.precision}",
            f"  parameters {card.parameters:,}",
            f"  cost       {summary.gmacs:.3f} GMACs per image",
            f"  file size  {summary.file_bytes / 1e6:.1f} MB",
            f"  input      {_preprocessing(card.preprocessing)}",
            f"  outputs    {', '.join(summary.outputs)}",
            f"  labels     {len(card.labels)}: {_labels(card)}",
            f"  source     {card.source}, SHA-256 {card.checksum}",
            f"  operators  {operators}",
            f"  providers  CPU: yes; CUDA: {cuda}",
        ]
    )


def evaluation(result: Evaluation) -> str:
    """Describe what a model got right."""
    origin = f" of {result.split}/" if result.split else ""
    lines = [
        f"{result.card.name} ({result.card.precision}) on {result.pictures:,} pictures{origin}",
        f"  top-1      {result.top1:.2%}",
    ]
    if result.top5 is not None:
        lines.append(f"  top-5      {result.top5:.2%}")
    lines.append(f"  throughput {result.pictures / result.seconds:.0f} images/s, decoding included")
    if result.refused:
        lines.append(
            f"  refused    {len(result.refused)} pictures that cannot be decoded, "
            f"{result.refused[0]} the first; they count nowhere"
        )
    if result.left_out:
        lines.append(
            f"  left out   {len(result.left_out)} files without the name of a picture, "
            f"{result.left_out[0]} the first"
        )
    if result.by_order:
        lines.append("  classes    matched by order: no folder bears the name of a label")
    lines.append("  per class")
    width = max(map(len, result.card.labels))
    lines += [
        f"    {result.card.labels[index]:<{width}} {share:8.2%} of {count:,}"
        for index, (share, count) in result.per_class.items()
    ]
    return "\n".join(lines)


def _labels(card: ModelCard) -> str:
    return ", ".join(card.labels[:5]) + (", …" if len(card.labels) > 5 else "")


def _preprocessing(shown: Preprocessing) -> str:
    resize = "squash" if shown.resize == "squash" else f"crop {shown.crop_fraction:g}"
    mean, std = (", ".join(f"{v:g}" for v in triple) for triple in (shown.mean, shown.std))
    return (
        f"{shown.image_size} px, patches of {shown.patch_size}, {resize}, {shown.interpolation}, "
        f"mean {mean}, std {std}"
    )


def _changes(was: Preprocessing, now: Preprocessing) -> list[tuple[str, object, object]]:
    before, after = was.model_dump(), now.model_dump()
    return [(name, before[name], after[name]) for name in before if before[name] != after[name]]
