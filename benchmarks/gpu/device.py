"""Describes the CUDA device, in a process of its own: asking takes memory of the device.

Run: python -m benchmarks.gpu.device
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any] | None:
    """Name, size and versions of the first device; None where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "num_multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_cache_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
    }


def slug(name: str) -> str:
    """A device's name as part of a file's: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ask() -> dict[str, Any] | None:
    """As describe, from a process that is gone again; raises RuntimeError where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.device"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last_line = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"torch cannot be asked for its devices: {''.join(last_line)}")
    described: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
    return described


def _driver_version() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


if __name__ == "__main__":
    print(json.dumps(describe()))
