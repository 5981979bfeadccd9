"""Lists the benchmarks, and runs those that are named, each in a process of its own.

Run: python -m benchmarks [NAME ... | all]
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

BENCHMARKS = (
    "continuous_batching",
    "kv_waste",
    "planner_cost",
    "journal_cost",
    "pipelining",
    "transformers_static",
    "peers",
    "batch_invariance",
    "context_length",
    "time_to_first_token",
    "serving",
    "speculation",
    "fp8_kv",
    "quantization",
    "kernels_cpu",
    "overload",
    "cancel_leak",
    "kills",
)
"""In the order in which all run."""


def listing() -> str:
    """Each name beside the first sentence of its module."""
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:{width}}  {_first_line(name)}" for name in BENCHMARKS]
    return "\n".join(
        [
            "python -m benchmarks NAME ...  runs these; all runs every one:",
            *lines,
            "python -m benchmarks.NAME --help  shows the options of one",
            "python -m benchmarks.tables  writes the results into docs/performance.md",
        ]
    )


def chosen(names: Sequence[str]) -> list[str]:
    """The benchmarks to run; raises ValueError for a name that is none."""
    if list(names) == ["all"]:
        return list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ValueError(
            f"no benchmark is called {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}, "
            "and all on its own"
        )
    return list(names)


def main(arguments: Sequence[str]) -> NoReturn:
    """Exit 0 where all ran, 1 where one failed, 2 for a wrong name."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        sys.exit(0)
    try:
        names = chosen(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    failed: list[str] = []
    for name in names:
        print(f"\n== {name}: {_first_line(name)}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _first_line(name: str) -> str:
    # Parsed, not imported: a list need not wait for torch.
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or name).splitlines()[0]


if __name__ == "__main__":
    main(sys.argv[1:])
