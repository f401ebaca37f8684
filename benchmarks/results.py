"""The results of ``tests/on_gpu.sh``: one JSON file a step, and the page that is made of them.

    python -m benchmarks.results collect FOLDER STEP    writes FOLDER/STEP.json, after a step
    python -m benchmarks.results write FOLDER           writes docs/gpu-results.md and .json

Only figures of a GPU are written. The page keeps its text below the line MARK, in which a person
says what was predicted, what came, and what was changed for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import ROOT, written

STEPS = ("first", "why", "ranks")
MARK = "<!-- Above: written by python -m benchmarks.results write. Below: by hand. -->"
_STAND_IN = "Stand-in"  # the name of the stand-in for a device


def collect(folder: Path, step: str) -> Path:
    """Writes one file with the exit codes of the parts and all their figures."""
    rows = [line.split("\t") for line in (folder / f"{step}.parts").read_text().splitlines()]
    parts = [{"part": name, "end": end, "seconds": int(took)} for end, took, name in rows]
    files = sorted(folder.glob(f"{step}-*.json"))
    figures = {file.stem.removeprefix(f"{step}-"): json.loads(file.read_text()) for file in files}
    device = folder / f"{step}-device.log"
    found = {
        "step": step,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "parts": parts,
        "nvidia-smi": device.read_text().splitlines() if device.exists() else [],
        "figures": figures,
    }
    path = folder / f"{step}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def read(folder: Path) -> dict[str, Any]:
    """The steps that were run, by name.

    Raises:
        ValueError: there are none, or the figures are not of a GPU.
    """
    files = {step: folder / f"{step}.json" for step in STEPS}
    found = {step: json.loads(file.read_text()) for step, file in files.items() if file.exists()}
    if not found:
        raise ValueError(f"{folder} has none of {', '.join(f'{step}.json' for step in STEPS)}")
    devices = {
        f["environment"].get("device") for s in found.values() for f in s["figures"].values()
    }
    if _STAND_IN in devices or not devices - {None}:
        raise ValueError(
            f"{folder} has figures of a rehearsal, or of no device: nothing is written"
        )
    return found


def page(steps: dict[str, Any]) -> str:
    """The page, without the text that is written by hand."""
    lines = ["# What a GPU showed", ""]
    for name, step in steps.items():
        lines += [f"## {name}, {step['date']}", ""]
        lines += table(
            [{"part": p["part"], "end": p["end"], "s": p["seconds"]} for p in step["parts"]]
        )
        facts = [line.strip("| ") for line in step["nvidia-smi"] if "Driver" in line]
        lines += [f"{fact}\n" for fact in facts]
        for title, figures in step["figures"].items():
            lines += [f"### {title}", ""]
            known = {key: value for key, value in figures["environment"].items() if value}
            lines += ["; ".join(f"{key} {value}" for key, value in known.items()) + ".", ""]
            for section, found in figures.items():
                if section in _TABLES:
                    for rows in _TABLES[section](found):
                        lines += table(rows)
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows with the same columns."""
    if not rows:
        return []
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(written(row.get(head)) for head in heads)} |" for row in rows]
    return [*lines, ""]


def name_of(record: dict[str, Any]) -> str:
    return f"{'x'.join(map(str, record['shape']))} {record['dtype']} {record['layout']}"


def _gpu(section: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    rate, rows = section["copy rate before"], []
    for record in section["cases"]:
        row: dict[str, Any] = {"case": name_of(record)}
        for path, us in record["us"].items():
            row |= {f"{path} forward": us["forward"], f"{path} backward": us["backward"]}
        if own := record["us"].get("cupybn"):
            for part, moved in (("forward", 3), ("backward", 5)):
                row[f"% of copy, {part}"] = 100 * moved * record["bytes"] / own[part] / rate * 1e6
        rows.append(row | record["ratio"])
    yield [{"copy rate before, TB/s": rate / 1e12, "after": section["copy rate after"] / 1e12}]
    yield sorted(rows, key=len, reverse=True)  # the first one has all columns
    yield [{"all layers": group, **figures} for group, figures in section["ResNet-50"].items()]


def _kernels(section: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    yield [
        {"case": name_of(record), "kernel": kernel, **row}
        for record in section["cases"]
        for kernel, row in record["kernels"].items()
    ]
    yield [{"variant": variant, **row} for variant, row in section["variants"].items()]


def _overhead(section: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    columns = "functions", "us", "torch us", "/ torch"
    yield [
        {"call": name, "device": device, **{column: row[column] for column in columns}}
        for device, rows in section.items()
        for name, row in rows.items()
    ]


def _comm(section: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    ranks = section["ranks"]
    yield [{"ranks": ranks, "C": m["channels"], **m["us"]} for m in section["messages"]]


_TABLES = {"gpu": _gpu, "kernels": _kernels, "overhead": _overhead, "comm": _comm}


def write(folder: Path, docs: Path) -> None:
    """Writes the page and the figures."""
    steps, path = read(folder), docs / "gpu-results.md"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    by_hand = before.partition(MARK)[2]
    path.write_text(f"{page(steps)}\n{MARK}{by_hand}\n".rstrip() + "\n", encoding="utf-8")
    figures = json.dumps(steps, indent=1) + "\n"
    (docs / "gpu-results.json").write_text(figures, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.results", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("collect", "write"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.choices["collect"].add_argument("step", choices=STEPS)
    args = parser.parse_args()
    if args.command == "collect":
        collect(args.folder, args.step)
        return
    try:
        write(args.folder, ROOT / "docs")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
