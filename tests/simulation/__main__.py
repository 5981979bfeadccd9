"""`python -m tests.simulation`: many seeds, or one with its trace."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.world import ViolationError, simulate

_CHUNK = 100


def run_seeds(seeds: range) -> tuple[int, list[str]]:
    """Steps that were planned in all, and what went wrong."""
    num_steps, problems = 0, []
    for seed in seeds:
        try:
            num_steps += simulate(seed).num_steps
        except ViolationError as error:
            problems.append(str(error))
    return num_steps, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--trace", action="store_true", help="print what happens, with --seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--num-seeds", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _run_one(options.seed, options.trace)
    started_s = time.monotonic()
    first, end = options.first_seed, options.first_seed + options.num_seeds
    chunks = [range(low, min(low + _CHUNK, end)) for low in range(first, end, _CHUNK)]
    num_steps, problems = 0, []
    with ProcessPoolExecutor(options.jobs) as pool:
        for steps, found in pool.map(run_seeds, chunks):
            num_steps += steps
            problems += found
    for problem in problems:
        print(problem)
    elapsed_s = time.monotonic() - started_s
    print(
        f"{options.num_seeds} seeds, {num_steps} steps, {len(problems)} failed, {elapsed_s:.0f} s"
    )
    return 1 if problems else 0


def _run_one(seed: int, is_tracing: bool) -> int:
    try:
        world = simulate(seed, is_tracing=is_tracing)
    except ViolationError as error:
        print(*error.trace, sep="\n")
        print(error)
        return 1
    if is_tracing:
        print(world.scenario)
        print(*world.trace, sep="\n")
    print(f"seed {seed}: {world.num_steps} steps, every invariant held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
