"""The compile gate passes good kernels and names what is wrong with bad ones."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from stepwire_executor.kernels.compile_gate import main
from stepwire_executor.kernels.launch import configuration, next_power_of_two

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)

BAD_CASES = """
import dataclasses
from stepwire_executor.kernels import compile_gate
from stepwire_executor.kernels.linear import triton as linear, triton_quantized_cases
from stepwire_executor.kernels.silu_and_mul import triton as silu

good = silu.COMPILE_CASES[0]
tile = next(case for case in linear.COMPILE_CASES if "fp16 to fp16 128x128" in case.name)
columns = next(
    case
    for case in triton_quantized_cases.COMPILE_CASES
    if "minimums, fp16 to fp16 64x64" in case.name and case.covers(100)
)
for case in (
    good,
    dataclasses.replace(good, expect=frozenset({"wgmma", "async_copies"})),
    dataclasses.replace(good, signature={**good.signature, "x_ptr": "fp32"}),
    dataclasses.replace(tile, num_warps=2, expect=frozenset()),
    dataclasses.replace(tile, num_stages=9),
):
    print(*compile_gate.compile_case(case, 90).problems or ["passes"], sep="; ")
twice = dataclasses.replace(columns, constexprs={**columns.constexprs, "BLOCK_OUTPUTS": 128})
print(*compile_gate.compile_case(twice, 100).problems, sep="; ")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python as an operator would: compiled, not interpreted."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environ, capture_output=True, text=True, check=False
    )


def test_a_good_kernel_passes_with_one_line_a_target() -> None:
    done = run("-m", "stepwire_executor.kernels.compile_gate", "--only", "silu_and_mul fp16")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[2] for line in lines[1:-1]] == ["sm_80", "sm_90", "sm_100"]
    assert lines[-1].startswith("3 of 3 compilations passed in ")
    assert lines[-1].endswith(" 0 bytes spilled")


def test_what_is_wrong_is_named() -> None:
    done = run("-c", BAD_CASES)
    good, instruction, argument, registers, shared, columns = done.stdout.splitlines()
    assert good == "passes"
    assert instruction == "no async_copies; no wgmma"
    assert argument.startswith("does not compile: ")
    assert "spills " in registers
    assert "bytes of shared memory, of at most 232448" in shared
    assert columns == "576 columns of tensor memory, of at most 512; no tcgen05"


def test_a_name_that_no_case_has_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--target", "hopper"])
    assert "must be like sm_90" in capsys.readouterr().err
    done = run("-m", "stepwire_executor.kernels.compile_gate", "--only", "no such kernel")
    assert done.returncode == 1
    assert "no such kernel" in done.stdout


def test_a_device_that_no_table_names_gets_the_default() -> None:
    assert configuration({0: "default", 90: "hopper"}, 90) == "hopper"
    assert configuration({0: "default", 90: "hopper"}, 120) == "default"


def test_powers_of_two_are_the_next() -> None:
    assert [next_power_of_two(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [
        1, 2, 4, 4, 8, 1024, 2048
    ]  # fmt: skip
