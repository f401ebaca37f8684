"""One picture for each section, from its figures."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Section = dict[str, Any]
_MARKERS = "oxs+^d"


def draw(name: str, section: Section, environment: dict[str, Any], path: Path) -> None:
    """Writes the picture of a section to a file, in the format of its name."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    figure = _DRAWN[name](pyplot, section)
    device = environment.get("device", environment["processor"])
    versions = [f"{key} {environment[key]}" for key in ("cupybn", "NumPy", "CuPy", "PyTorch")
                if environment.get(key)]  # fmt: skip
    title = f"{device}; {', '.join(versions)}; {environment['date'][:10]}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _roofline(pyplot: Any, section: Section) -> Any:
    """Time over the bytes that have to move, a panel a kind of data, the copy rate as a line."""
    rates = section.get("copy rate") or {"0": section["copy rate before"]}
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in section["cases"]:
        key = (record.get("threads", 0), record["dtype"], record["layout"])
        panels.setdefault(key, []).append(record)
    names = list(dict.fromkeys(n for record in section["cases"] for n in record["paths"]))
    wide = min(4, max(1, len(panels)))
    figure, axes = pyplot.subplots(
        -(-len(panels) // wide) or 1, wide, squeeze=False, sharex=True, sharey=True,
        figsize=(3.4 * wide, 3.2 * (-(-len(panels) // wide) or 1)), layout="constrained",
    )  # fmt: skip
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    for panel, ((threads, dtype, layout), members) in zip(axes.flat, panels.items(), strict=False):
        title = f"{dtype}, {layout}" + (f", {threads} thread(s)" if threads else "")
        panel.set_title(title, fontsize=9)
        for name, marker in zip(names, _MARKERS, strict=False):
            points = [
                (8 * r["bytes"] / 1e6, r["paths"][name]["both us"] / 1e3)
                for r in members
                if "both us" in r["paths"].get(name, {})
            ]
            if points:
                panel.loglog(*zip(*points, strict=True), marker, label=name, markersize=5)
        sizes = [8 * record["bytes"] for record in members]
        ends = [min(sizes) / 1.5, max(sizes) * 1.5]
        rate = rates[str(threads)]
        panel.loglog(
            [size / 1e6 for size in ends], [size / rate * 1e3 for size in ends], "k-", lw=0.8,
            label="copy rate",
        )  # fmt: skip
        panel.grid(True, which="major", linewidth=0.3)
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("MB to move: 3 B forward + 5 B backward", fontsize=9)
    figure.supylabel("forward + backward, ms", fontsize=9)
    return figure


def _messages(pyplot: Any, section: Section) -> Any:
    """Measured latencies by number of ranks; and the model's, for each network."""
    networks = section["model"]["networks"]
    figure, axes = pyplot.subplots(
        1, 1 + len(networks), figsize=(4 * (1 + len(networks)), 3.6), layout="constrained"
    )  # fmt: skip
    panel = axes[0]
    panel.set_title("measured, forward; fastest fifth of the blocks", fontsize=9)
    channels = sorted({m["channels"] for run in section["runs"] for m in run["messages"]})
    colours = {c: f"C{i}" for i, c in enumerate(channels)}
    styles = {"allreduce": ":", "cupybn": "-", "gather": "--"}
    for c in channels:
        for name, style in styles.items():
            points = [
                (run["ranks"], m["fastest fifth us"][name])
                for run in section["runs"]
                for m in run["messages"]
                if (m["channels"], m["direction"]) == (c, "forward")
            ]
            line = [*zip(*points, strict=True)]
            panel.plot(*line, style, marker=".", color=colours[c], label=f"{name}, C = {c}")
    panel.set_xticks([run["ranks"] for run in section["runs"]])
    panel.set_yscale("log")
    for panel, network in zip(axes[1:], networks, strict=True):
        panel.set_title(f"model, network {network['name']}", fontsize=9)
        for c in channels:
            rows = [row for row in network["rows"] if row["channels"] == c]
            for key, style in (("allreduce us", "-"), ("all_gather us", "--")):
                points = [(row["ranks"], row[key]) for row in rows]
                line = [*zip(*points, strict=True)]
                panel.loglog(*line, style, color=colours[c], label=f"{key[:-3]}, C = {c}")
    for panel in axes:
        panel.set_xlabel("ranks")
        panel.grid(True, which="major", linewidth=0.3)
        panel.legend(fontsize=6)
    axes[0].set_ylabel("us")
    return figure


def _bars(pyplot: Any, groups: dict[str, dict[str, float]], label: str) -> Any:
    """Horizontal bars, a panel a group."""
    longest = max(map(len, groups.values()))
    figure, axes = pyplot.subplots(
        1, len(groups), squeeze=False, figsize=(8 * len(groups), 1 + 0.32 * longest),
        layout="constrained",
    )  # fmt: skip
    for panel, (title, bars) in zip(axes[0], groups.items(), strict=True):
        drawn = panel.barh(range(len(bars)), list(bars.values()), height=0.7)
        panel.bar_label(drawn, fmt="%.4g", fontsize=7, padding=2)
        panel.set_yticks(range(len(bars)), list(bars), fontsize=7)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(label, fontsize=9)
        panel.margins(x=0.12)
    return figure


def _overhead(pyplot: Any, section: Section) -> Any:
    groups = {f"a call on {device}": found["us"] for device, found in section.items()}
    for device, found in section.items():
        entries = found["profile"]["functions"]
        shares = {entry["function"]: 100 * entry["share"] for entry in entries}
        groups[f"% of a forward + backward on {device}, by cProfile"] = shares
    return _bars(pyplot, groups, "us, or %")


def _memory(pyplot: Any, section: Section) -> Any:
    groups: dict[str, dict[str, float]] = {}
    for device, records in section.items():
        bars = groups.setdefault(f"above x + y, or x + dy + dx, on {device}", {})
        for record in records:
            case = record["case"]
            shape = "x".join(map(str, case["shape"]))
            what = f"{shape} {case['dtype']} {case['layout']} {record['variant']}".strip()
            for way in ("forward", "backward"):
                bars[f"{what}, {way}"] = record[f"{way} extra"] / 1e6
    return _bars(pyplot, groups, "MB")


_DRAWN: dict[str, Callable[[Any, Section], Any]] = {
    "cpu": _roofline,
    "gpu": _roofline,
    "comm": _messages,
    "overhead": _overhead,
    "memory": _memory,
}
