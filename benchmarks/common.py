"""What every benchmark shares: the machine, spreads, tables and result files."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("stepwire", "torch", "transformers", "grpcio", "protobuf", "tokenizers", "uvloop")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

Figures = dict[str, Any]
"""What a benchmark measured, as JSON holds it."""


def machine() -> dict[str, Any]:
    """What the figures depend on, without names that tell where the machine stands."""
    described: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "num_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "operating_system": platform.system(),
    }
    try:
        cpuinfo = _fields(Path("/proc/cpuinfo").read_text())
        memory_kib = int(_fields(Path("/proc/meminfo").read_text())["MemTotal"].split()[0])
    except (OSError, KeyError, ValueError):
        return described
    described["processor"] = cpuinfo.get("model name", described["processor"])
    flags = cpuinfo.get("flags", "").split()
    described["instruction_sets"] = [name for name in INSTRUCTION_SETS if name in flags]
    described["memory_gib"] = round(memory_kib / 2**20, 1)
    return described


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that was measured, with "+changes" where files differ; None outside git."""
    root = Path(__file__).parents[1]
    described: list[str] = []
    for command in (
        ("git", "rev-parse", "--short=12", "HEAD"),
        ("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"),
    ):
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        described.append(done.stdout.strip())
    return described[0] + ("+changes" if described[1] else "")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the values themselves; the values must not be empty."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """Spread of the quotients, each of two values of the same round."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def show(measured: Mapping[str, Any], digits: int = 1, unit: str = "") -> str:
    """A spread in a cell: the median, and the extremes in brackets."""
    low, high = f"{measured['min']:,.{digits}f}", f"{measured['max']:,.{digits}f}"
    return f"{measured['median']:,.{digits}f}{unit} ({low} to {high})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_result(
    name: str, *, parameters: Mapping[str, Any], figures: Figures, directory: Path = RESULTS
) -> Path:
    """Write DIRECTORY/NAME.json with all that is needed to read the figures later."""
    script = Path(sys.argv[0])
    is_benchmark = script.parent == Path(__file__).parent
    command = [script.stem, *map(_portable, sys.argv[1:])] if is_benchmark else [name]
    result = {
        "name": name,
        "command": f"python -m benchmarks.{shlex.join(command)}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "parameters": dict(parameters),
        "figures": figures,
    }
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{name}.json"
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def finish(name: str, *, parameters: Mapping[str, Any], figures: Figures, table: str) -> None:
    """Print the table and write the result."""
    print(table)
    file = write_result(name, parameters=parameters, figures=figures)
    print(f"\nwritten: benchmarks/results/{file.name}")


def _portable(argument: str) -> str:
    """An argument as a result file may show it: of a path on this machine the last part only."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _fields(text: str) -> dict[str, str]:
    """Of the first block of a file of `name: value` lines."""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
