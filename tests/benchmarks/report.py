"""From figures to one table in markdown and to plots as SVG."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.benchmarks.measure import FAILURES_ALLOWED, OBJECTIVE_MS
from tests.benchmarks.peers import OURS

Figures = dict[str, Any]

mpl.rcParams["svg.hashsalt"] = "mixer-serve"  # the same figures give the same file


def write(results: Figures, folder: Path) -> str:
    """Write table.md and the plots into `folder`; return the table."""
    table = _table(results)
    (folder / "table.md").write_text(table)
    _plot_open_loop(results, folder / "latency.svg")
    _plot_efficiency(results, folder / "efficiency.svg")
    return table


def _table(results: Figures) -> str:
    lines = [_conditions(results["conditions"]), ""]
    for name, reason in results["left_out"].items():
        lines += [f"Left out, from where it broke: {name} ({reason}).", ""]
    for model, measured in results["models"].items():
        lines += [f"### {model}", "", *_closed(measured), ""]
    lines += ["### Open loop, size", "", *_others(results), ""]
    lines += ["### Front end, fixed-latency engine", "", *_front_end(results["front_end"]), ""]
    return "\n".join(lines)


def _conditions(found: Figures) -> str:
    return (
        f"{found['cpus']} CPUs (load average {found['load_average']:.1f} over 15 minutes), Python "
        f"{found['python']}, onnxruntime {found['onnxruntime']} with {found['threads']} threads, "
        f"batches of at most {found['max_batch']}; peers decode with "
        f"{'our code' if found['decoding'] == 'ours' else 'plain Pillow'}; "
        f"{found['photos']} photos ({found['photos_from']}, {found['photo_bytes'] / 1000:.0f} kB "
        f"on average); medians of {found['rounds']} rounds of {found['seconds']:g} s."
    )


def _closed(measured: Figures) -> list[str]:
    bare, servers = measured["bare"], measured["servers"]
    peers = [s["closed"] for name, s in servers.items() if name != OURS.name]
    best = {n: max((p[n]["per_s"] for p in peers), default=0.0) for n in ("16", "64")}
    lines = [
        f"Bare work: {bare['batched']['cpu_ms']:.2f} ms of CPU an image at batch "
        f"{bare['best_batch']:g}, {bare['single']['p50_ms']:.2f} ms alone; the model by itself "
        f"{_rate(bare['model']['per_s'])} images/s.",
        "",
        "| server | CPU ms/request | ÷ bare | requests/s at 16 | ÷ best peer | at 64 | ÷ best peer "
        "| p50 ms at 1 | − bare ms | p99 ms at 64 | failed | memory (PSS) MB "
        "| start to first answer s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, figures in servers.items():
        one, sixteen, many = (figures["closed"][n] for n in ("1", "16", "64"))
        cells = [
            f"{sixteen['cpu_ms']:.2f}",
            f"{sixteen['cpu_ms'] / bare['batched']['cpu_ms']:.2f}",
            _rate(sixteen["per_s"]),
            _ratio(sixteen["per_s"], best["16"]),
            _rate(many["per_s"]),
            _ratio(many["per_s"], best["64"]),
            f"{one['p50_ms']:.2f}",
            f"{one['p50_ms'] - bare['single']['p50_ms']:.2f}",
            f"{many['p99_ms']:.0f}",
            f"{one['failed'] + sixteen['failed'] + many['failed']:.0f}",
            f"{figures['pss_bytes'] / 1e6:.0f}",
            f"{figures['ready_s']:.1f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if OURS.name in servers:
        ours = servers[OURS.name]["closed"]
        shares = [f"{ours[n]['per_s'] / bare['model']['per_s']:.2f}" for n in ("16", "64")]
        lines += ["", "{} ÷ the model by itself: {} at 16, {} at 64.".format(OURS.name, *shares)]
        lines += [f"Its batches at 64: {ours['64']['mean_batch']:.1f} images on average."]
    return lines


def _rate(per_s: float) -> str:
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.1f}"


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}" if base else "-"


def _others(results: Figures) -> list[str]:
    lines = [
        f"| server | goodput/s (p99 ≤ {OBJECTIVE_MS:.0f} ms) | installed MB |",
        "|---|---:|---:|",
    ]
    for name, found in results["open"].items():
        installed_mb = results["installed_bytes"][name] / 1e6
        lines.append(f"| {name} | {_rate(found['goodput_per_s'])} | {installed_mb:.0f} |")
    return lines


def _front_end(found: Figures) -> list[str]:
    lines = [
        "| decoded for | cores | requests/s | decoding alone/s | ÷ | per CPU second "
        "| decoding alone | ÷ | failed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model, measured in found.items():
        for cores, figures in measured.items():
            served, decode = figures["served"], figures["decode"]
            per_cpu_s, bare_per_cpu_s = 1000 / served["cpu_ms"], 1000 / decode["cpu_ms"]
            lines.append(
                f"| {model} | {cores} | {served['per_s']:.0f} | {decode['per_s']:.0f} | "
                f"{served['per_s'] / decode['per_s']:.2f} | {per_cpu_s:.0f} | "
                f"{bare_per_cpu_s:.0f} | {per_cpu_s / bare_per_cpu_s:.2f} | "
                f"{served['failed']:.0f} |"
            )
    return lines


def _plot_open_loop(results: Figures, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, found in results["open"].items():
        rates = [float(rate) for rate in found["rates"]]
        loads = list(found["rates"].values())
        [line] = axes.plot(
            rates,
            [figures["p99_ms"] for figures in loads],
            marker="o",
            linewidth=2.5 if name == OURS.name else 1.2,
            label=name,
        )
        failing = [
            (rate, figures["p99_ms"])
            for rate, figures in zip(rates, loads, strict=True)
            if figures["failed"] > FAILURES_ALLOWED * figures["answered"]
        ]
        axes.plot(*zip(*failing, strict=True), "x", color=line.get_color(), markersize=11)
    axes.axhline(OBJECTIVE_MS, color="grey", linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="offered rate, requests/s", ylabel="p99 latency, ms")
    axes.legend(frameon=False)
    _save(figure, path)


def _plot_efficiency(results: Figures, path: Path) -> None:
    measured = next(iter(results["models"].values()))
    bare_ms = measured["bare"]["batched"]["cpu_ms"]
    servers = measured["servers"]
    figure = Figure(figsize=(7, 0.5 * len(servers) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(servers)[::-1]
    values = [servers[name]["closed"]["16"]["cpu_ms"] for name in names]
    bars = axes.barh(names, values)
    axes.bar_label(bars, [f"{value / bare_ms:.2f} ×" for value in values], padding=3)
    axes.axvline(bare_ms, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="server CPU per request, ms (dotted: the bare work)")
    axes.margins(x=0.12)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
