"""The network between processes is cut, in either direction and in both; see partitions.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.partitions import SCENARIOS

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
SHORT = {"executor-lost"}
_PROBE = "ip link set lo up && iptables -A OUTPUT -p tcp --dport 1 -j DROP"


@pytest.fixture(scope="module")
def namespace() -> list[str]:
    """A command that runs another in a network namespace of its own."""
    for tool in ("unshare", "ip", "iptables"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: the network cannot be cut without it")
    command = ["unshare", "--net", "--"]
    done = subprocess.run([*command, "sh", "-c", _PROBE], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"no network namespace with rules can be made here, root can: {reason}")
    return command


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in SCENARIOS],
)
def test_a_cut_network_loses_nothing(namespace: list[str], scenario: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "tests.faults.partitions", scenario, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
