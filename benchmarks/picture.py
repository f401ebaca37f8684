"""One picture: bars of the ratios to PyTorch, with a line at 1."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from .cases import Case

_LONGEST = 3.0  # what is longer is cut there and has its number beside it
Bars = dict[str, dict[str, float]]


def draw(sections: dict[str, Any], environment: dict[str, Any], path: Path) -> bool:
    """Writes the picture, in the format of the file's name; False if nothing can be drawn."""
    panels = {name: bars for name in ("cpu", "gpu") if (bars := bars_of(sections.get(name)))}
    if not panels:
        return False
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    longest = max(sum(map(len, bars.values())) + len(bars) for bars in panels.values())
    figure, axes = pyplot.subplots(
        1, len(panels), squeeze=False, figsize=(7.5 * len(panels), 1.5 + 0.11 * longest),
        layout="constrained",
    )  # fmt: skip
    for panel, (name, bars) in zip(axes[0], panels.items(), strict=True):
        _panel(panel, bars)
        cpu = f"CPU, {environment['threads']} thread(s)"
        where = environment["device"] if name == "gpu" else cpu
        panel.set_title(f"forward + backward, {where}", fontsize=10, pad=24)
        panel.set_xlabel("time as a multiple of PyTorch's: left of the line is faster", fontsize=9)
    versions = [f"{name} {environment[name]}" for name in ("cupybn", "torch", "numba", "jax")
                if environment.get(name)]  # fmt: skip
    figure.suptitle(f"{environment['processor']}; {', '.join(versions)}", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def bars_of(section: dict[str, Any] | None) -> Bars:
    """{case: {what was compared with PyTorch: the ratio}}."""
    found: Bars = {}
    for record in (section or {}).get("cases", []):
        case = str(Case(*(record[field] for field in Case._fields)))
        ratios = {
            name.removeprefix("cupybn / ").removesuffix(" / torch"): value
            for name, value in record["ratio"].items()
            if "before" not in name
        }
        if ratios:
            found[case] = ratios
    return found


def _panel(panel: Any, bars: Bars) -> None:
    names = list(dict.fromkeys(name for ratios in bars.values() for name in ratios))
    place, ticks = 0.0, []
    for ratios in bars.values():
        ticks.append(place + (len(ratios) - 1) / 2)
        for name, value in ratios.items():
            colour = f"C{names.index(name)}"
            panel.barh(place, min(value, _LONGEST), 0.85, color=colour)
            text = panel.text(min(value, _LONGEST) + 0.02, place, f"{value:.2f}", fontsize=6)
            text.set(
                va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3}, zorder=4
            )
            place += 1
        place += 1
    panel.axvline(1, color="black", linewidth=1, zorder=3)
    panel.set_yticks(ticks, list(bars), fontsize=8)
    panel.invert_yaxis()
    panel.margins(y=0.01)
    panel.set_xlim(0, _LONGEST + 0.25)
    for i, name in enumerate(names):
        panel.barh(0, 0, color=f"C{i}", label=name)
    panel.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
