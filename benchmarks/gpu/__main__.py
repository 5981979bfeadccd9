"""Checks and times the kernels and the whole system on a GPU; `make gpu-check` runs it.

Run: python -m benchmarks.gpu [--only SECTION ...] [--list] [--rehearse]

On a machine that keeps nothing: python3 -m benchmarks.gpu --results FOLDER, and bring the folder's
file to benchmarks/results; `python -m benchmarks.tables` then writes it into docs/performance.md.

Needs torch, triton, numpy, grpcio and protobuf; the end-to-end section also what the scheduler
needs. Writes benchmarks/results/gpu_<device>.json when every section was asked for. The exit
status is 1 where a result is wrong or a section failed; a missed speed target only reads "short".
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.gpu import device, results
from benchmarks.gpu.report import exit_status, text_table
from benchmarks.gpu.sections import CEILINGS, SECTIONS, Section
from benchmarks.gpu.supervisor import Supervisor

BUDGET_S = 460.0
LEFT_OUT = (
    "bfloat16 products (float16 stands in), CUDA graphs, flash attention (torch's plain one "
    "stands in), counts of device memory, addresses past 2^31 elements"
)
"""What a rehearsal cannot run."""
_MAX_WORKERS = 6
"""Checks side by side, each of some gigabytes."""
_USAGE_STATUS = 2


def chosen(names: Sequence[str]) -> list[Section]:
    """The sections to run, in their order; raises ValueError for a name that is none.

    Benchmarks of the whole system bring the ceilings along that they are compared with.
    """
    known = {section.name for section in SECTIONS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no section is called {', '.join(unknown)}: see --list")
    wanted = set(names) or known
    if any(section.kind == "cluster" and section.name in wanted for section in SECTIONS):
        wanted.add(CEILINGS)
    return [section for section in SECTIONS if section.name in wanted]


def listing() -> str:
    """Name, kind and module of every section."""
    width = max(len(section.name) for section in SECTIONS)
    return "\n".join(f"  {s.name:{width}}  {s.kind:9}  {s.module}" for s in SECTIONS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="see --list")
    parser.add_argument("--list", action="store_true", help="list the sections")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run every section at tiny shapes under Triton's interpreter, without a GPU",
    )
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for all sections")
    parser.add_argument("--workers", type=int, default=None, help="checks side by side")
    parser.add_argument("--seed", type=int, default=None, help="of all inputs; default: fresh")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    try:
        sections = chosen(options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return _USAGE_STATUS
    described = None
    if not options.rehearse:
        try:
            described = device.ask()
        except RuntimeError as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return _USAGE_STATUS
        if described is None:
            print("gpu-check: skipped, torch sees no CUDA device")
            return 0
    seed = random.SystemRandom().randrange(1 << 20) if options.seed is None else options.seed
    cores = os.cpu_count() or 1
    title = "rehearsal: not figures" if described is None else described["name"]
    print(f"gpu-check: {title}, {len(sections)} sections, seed {seed}", flush=True)
    supervisor = Supervisor(
        sections,
        budget_s=options.budget_s,
        num_workers=options.workers or max(1, min(_MAX_WORKERS, cores // 2)),
        is_rehearsal=options.rehearse,
        seed=seed,
        say=lambda line: print(line, flush=True),
    )
    outcomes = supervisor.run()
    elapsed_s = supervisor.elapsed_s
    if described is not None and not options.only:
        file = results.write(
            outcomes,
            device=described,
            command=shlex.join(["python", "-m", "benchmarks.gpu", *_shown(arguments)]),
            parameters={"seed": seed, "budget_s": options.budget_s, "elapsed_s": elapsed_s},
            directory=options.results,
        )
        print(f"written: {file.name}")
    rows = [row for outcome in outcomes.values() for row in outcome.rows]
    if options.rehearse:
        print(f"left out: {LEFT_OUT}")
        rows = [dataclasses.replace(row, verdict="report") if row.key else row for row in rows]
    print(f"\n{title}, {elapsed_s:.0f} s, seed {seed}\n")
    print(text_table(rows))
    status = exit_status(outcomes.values())
    num_short = sum(row.verdict == "short" for row in rows)
    num_wrong = sum(row.verdict == "FAIL" for row in rows)
    num_skipped = sum(row.verdict == "skipped" for row in rows)
    print(f"\ngpu-check: {num_wrong} wrong, {num_short} short, {num_skipped} skipped")
    return status


def _shown(arguments: Sequence[str] | None) -> list[str]:
    """Arguments without the folder of the results, which tells of a machine's paths."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--results" in given:
        place = given.index("--results")
        del given[place : place + 2]
    return [each for each in given if not each.startswith("--results=")]


if __name__ == "__main__":
    sys.exit(main())
