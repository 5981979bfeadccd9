"""The result file of a device, and the tables that are made of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, commit, machine, markdown_table, versions
from benchmarks.gpu.device import slug
from benchmarks.gpu.report import Outcome, Row
from benchmarks.gpu.targets import TARGETS

NOT_MEASURED = "not yet measured"
PATTERN = "gpu_*.json"


def write(
    outcomes: Mapping[str, Outcome],
    *,
    device: Mapping[str, Any],
    command: str,
    parameters: Mapping[str, Any],
    directory: Path = RESULTS,
) -> Path:
    """Write DIRECTORY/gpu_<device>.json."""
    found = versions()
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    found |= {name: device[name] for name in ("driver", "cuda") if device.get(name)}
    name = f"gpu_{slug(device['name'])}"
    result = {
        "name": name,
        "command": command,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        "device": dict(device),
        "machine": machine(),
        "versions": found,
        "parameters": dict(parameters),
        "sections": {section: outcome.to_json() for section, outcome in outcomes.items()},
    }
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{name}.json"
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def markdown(results: Path = RESULTS) -> str:
    """The table of targets, and for each device measured what it reached and all else."""
    files = sorted(results.glob(PATTERN))
    if not files:
        rows = [(t.what, NOT_MEASURED, t.text) for t in TARGETS.values()]
        return markdown_table(("what", "figure", "target"), rows)
    return "\n\n".join(_device(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def _device(result: Mapping[str, Any]) -> str:
    rows = [Row(**row) for section in result["sections"].values() for row in section["rows"]]
    by_key = {row.key: row for row in rows if row.key is not None}
    targets: list[Sequence[str]] = []
    for key, target in TARGETS.items():
        row = by_key.get(key)
        if row is None:
            targets.append((target.what, NOT_MEASURED, target.text, "", ""))
        else:
            targets.append((target.what, row.figure, target.text, row.denominator, row.verdict))
    others = [
        (row.what, row.figure, row.target, row.denominator, row.verdict)
        for row in rows
        if row.key is None
    ]
    header = ("what", "figure", "target", "denominator", "verdict")
    return "\n\n".join(
        [
            _caption(result),
            markdown_table(header, targets),
            "Correctness, bits and further figures of the same run:",
            markdown_table(header, others),
        ]
    )


def _caption(result: Mapping[str, Any]) -> str:
    device = result["device"]
    parts = [
        device["name"],
        f"{device['memory_gib']} GiB",
        *(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    parts += [f"commit {result['commit']}"] if result.get("commit") else []
    parts.append(result["date"])
    return f"`{result['command']}` on {', '.join(parts)}."
