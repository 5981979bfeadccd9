"""`python -m stepwire_executor.kernels.compile_gate`: every Triton kernel, compiled without a GPU.

Each configuration that a kernel's COMPILE_CASES name is compiled for each target, and its code
must keep within shared and tensor memory, spill no register, and hold the instructions it is
expected to.
Triton's own cache makes a second run quick.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwire_executor.kernels.compile_case import (
    MAX_SHARED_BYTES,
    MAX_TENSOR_COLUMNS,
    CompileCase,
)

MODULES = tuple(
    f"stepwire_executor.kernels.{module}"
    for module in (
        "rms_norm.triton",
        "silu_and_mul.triton",
        "rope_and_write_kv.triton",
        "linear.triton",
        "linear.triton_quantized_cases",
        "sample.triton",
        "paged_attention.triton",
    )
)
"""Where COMPILE_CASES are."""
_PATTERNS = {
    "wgmma": re.compile(r"wgmma\.mma_async"),
    "tcgen05": re.compile(r"tcgen05\.mma"),
    # A load of 16 bytes or more a thread, or an asynchronous copy of 16.
    "vector_loads": re.compile(
        r"ld\.global\S*\.v(4\.[bfu]32|8\.[bfu]32|2\.[bfu]64)|cp\.async\.c[ag]\S*[^;]*, (0x10|16)\b"
        r"|cp\.async\.bulk"
    ),
    "async_copies": re.compile(r"cp\.async\.cg\S*[^;]*, (0x10|16)\b|cp\.async\.bulk"),
}
_ONLY_ON = {"wgmma": 90, "tcgen05": 100}
"""The one compute capability that has an instruction."""
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one compilation came to."""

    name: str
    """Of the case."""
    capability: int
    """Compute capability that was compiled for, as major * 10 + minor."""
    num_registers: int = 0
    """Registers a thread."""
    shared_bytes: int = 0
    """Shared memory a program."""
    local_bytes: int = 0
    """Memory that registers spill to, a thread."""
    problems: tuple[str, ...] = ()
    """Why the case fails; empty is a pass."""


def compile_case(case: CompileCase, capability: int) -> Report:
    """Compile a case for a compute capability and examine its code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=case.kernel,
        signature=case.full_signature,
        constexprs=dict(case.constexprs),
        attrs=case.attrs,
    )
    try:
        compiled: Any = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )
    except Exception as error:  # the compiler raises many kinds; each fails the case, named
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        problem = f"does not compile: {type(error).__name__}: {lines[-1]}"
        return Report(name=case.name, capability=capability, problems=(problem,))
    num_registers, local_bytes = _resources(compiled.asm["cubin"])
    shared_bytes = int(compiled.metadata.shared)
    limit = MAX_SHARED_BYTES.get(capability, min(MAX_SHARED_BYTES.values()))
    problems = []
    if shared_bytes > limit:
        problems.append(f"{shared_bytes} bytes of shared memory, of at most {limit}")
    # Above it the compiler leaves one trap in place of all code.
    num_columns = int(getattr(compiled.metadata, "tmem_size", None) or 0)
    if num_columns > MAX_TENSOR_COLUMNS:
        problems.append(f"{num_columns} columns of tensor memory, of at most {MAX_TENSOR_COLUMNS}")
    if local_bytes:
        problems.append(f"spills {local_bytes} bytes a thread")
    for name in sorted(case.expect):
        if _ONLY_ON.get(name, capability) != capability:
            continue
        if not _PATTERNS[name].search(compiled.asm["ptx"]):
            problems.append(f"no {name}")
    return Report(
        name=case.name,
        capability=capability,
        num_registers=num_registers,
        shared_bytes=shared_bytes,
        local_bytes=local_bytes,
        problems=tuple(problems),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return a kernel's registers a thread and its bytes of local memory, stack included."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(  # noqa: S603 # the compiler's own tool on a file of ours
            [str(tool), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = _RESOURCES.search(listing)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {listing[-200:]!r}")
    registers, stack, local = (int(x) for x in found.groups())
    return registers, stack + local


def _compile(module: str, index: int, capability: int) -> Report:
    """Compile one case, named by its place so that only names travel between processes."""
    cases: Sequence[CompileCase] = importlib.import_module(module).COMPILE_CASES
    return compile_case(cases[index], capability)


def run(capabilities: Sequence[int], *, name_contains: str = "", num_processes: int = 2) -> int:
    """Compile every case whose name holds a text; print one table; return the exit status."""
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
    # What launches get too; triton warns of a change to come wherever it is not said.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    jobs = [
        (module, index, capability)
        for module in MODULES
        for index, case in enumerate(importlib.import_module(module).COMPILE_CASES)
        for capability in capabilities
        if case.covers(capability) and name_contains in case.name
    ]
    if not jobs:
        _say(f"no case's name holds {name_contains!r}")
        return 1
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        reports = list(pool.map(_compile, *zip(*jobs, strict=True)))
    width = max(len(report.name) for report in reports)
    _say(f"{'kernel':{width}}  target  registers  shared bytes  result")
    for report in reports:
        _say(
            f"{report.name:{width}}  sm_{report.capability:<4} {report.num_registers:>9}  "
            f"{report.shared_bytes:>12}  {'; '.join(report.problems) or 'ok'}"
        )
    failed = [report for report in reports if report.problems]
    for report in failed:
        _say(f"failed: {report.name} for sm_{report.capability}")
    _say(
        f"{len(reports) - len(failed)} of {len(reports)} compilations passed in "
        f"{time.monotonic() - began:.0f} s with triton {importlib.metadata.version('triton')}; at "
        f"most {max(report.num_registers for report in reports)} registers, "
        f"{max(report.shared_bytes for report in reports)} bytes of shared memory, "
        f"{max(report.local_bytes for report in reports)} bytes spilled"
    )
    return 1 if failed else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _target(text: str) -> int:
    number = text.removeprefix("sm_")
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"must be like sm_90, not {text!r}")
    return int(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments, compile, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stepwire_executor.kernels.compile_gate",
        description="Compiles every Triton kernel and checks its code, without a GPU.",
    )
    parser.add_argument("--target", type=_target, action="append", metavar="sm_90")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    arguments = parser.parse_args(argv)
    return run(
        arguments.target or sorted(MAX_SHARED_BYTES),
        name_contains=arguments.only,
        num_processes=arguments.processes,
    )


if __name__ == "__main__":
    sys.exit(main())
