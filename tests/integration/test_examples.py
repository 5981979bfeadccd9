"""Every example runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stepwire_client import LocalCluster

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE, NPM = shutil.which("node"), shutil.which("npm")


def output_of(*command: str, cwd: Path | None = None) -> str:
    finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_python_client(smollm2_cluster: LocalCluster) -> None:
    out = output_of(sys.executable, str(EXAMPLES / "python_client.py"), smollm2_cluster.address)
    assert out.startswith("The capital of France is Paris.\n[")


def test_asyncio_client(smollm2_cluster: LocalCluster) -> None:
    out = output_of(sys.executable, str(EXAMPLES / "asyncio_client.py"), smollm2_cluster.address)
    assert out.splitlines()[0].endswith("The capital of France is Paris.")
    assert len(out.splitlines()) >= 3


def test_offline_llm(smollm2_dir: Path) -> None:
    out = output_of(sys.executable, str(EXAMPLES / "offline_llm.py"), str(smollm2_dir))
    assert [line.partition(" -> ")[0] for line in out.splitlines()] == [
        "'The capital of France is'",
        "'One, two, three,'",
        "'The opposite of hot is'",
    ]


@pytest.mark.skipif(NODE is None or NPM is None, reason="needs node and npm")
def test_node_client(smollm2_cluster: LocalCluster) -> None:
    assert NODE is not None
    assert NPM is not None
    folder = EXAMPLES / "node_client"
    if not (folder / "node_modules").is_dir():
        output_of(NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder)
    out = output_of(NODE, "client.mjs", smollm2_cluster.address, cwd=folder)
    assert out.startswith("The capital of France is Paris.\n[")
