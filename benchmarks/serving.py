"""`stepwire bench` against a fresh local cluster: closed loops, and requests at random moments.

Run: python -m benchmarks.serving [--rounds N] [--request-rate N]

Latencies are as clients see them, defined as in vLLM's benchmark; the result file keeps the JSON
of every run under its field names. Prompts of a round are new to the cluster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cluster import DEFAULT_MODEL, local_cluster
from benchmarks.common import Figures, finish, markdown_table, show, spread

CLAIM = "Latency and throughput over gRPC at 1, 8 and 32 requests at a time and under Poisson load."
MEDIANS = (
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "median_e2el_ms",
    "p99_e2el_ms",
)


def loads(request_rate: float) -> dict[str, list[str]]:
    """Flags of `stepwire bench` by the name of the load."""
    closed = {"1 at a time": (1, 4), "8 at a time": (8, 16), "32 at a time": (32, 64)}
    flags = {
        name: ["--max-concurrency", str(concurrency), "--num-prompts", str(num_prompts)]
        for name, (concurrency, num_prompts) in closed.items()
    }
    flags[f"Poisson, {request_rate:g} a second"] = [
        *("--request-rate", str(request_rate)),
        *("--num-prompts", str(max(8, round(15 * request_rate)))),
    ]
    return flags


def bench(address: str, flags: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Run the command once; returns what it saves."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "stepwire_client.cli", "bench", "--address", address]
        done = subprocess.run(
            [*command, *flags, "--seed", str(seed), "--save-result", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"stepwire bench failed: {done.stderr.strip()[-300:]}")
        result: dict[str, Any] = json.loads(file.read_text())
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} requests failed: {result['errors'][:1]}")
    return result


def summarise(runs: Sequence[dict[str, Any]]) -> Figures:
    """Over the rounds of one load."""
    names = ("output_throughput", "request_throughput", *MEDIANS)
    return {name: spread([run[name] for run in runs]) for name in names} | {"runs": list(runs)}


def measure(address: str, *, request_rate: float, num_rounds: int) -> Figures:
    """Interleave the loads."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in loads(request_rate)}
    for number in range(num_rounds):
        for index, (name, flags) in enumerate(loads(request_rate).items()):
            result = bench(address, flags, seed=100 * number + index)
            runs[name].append(result)
            print(f"round {number + 1}, {name}: {result['output_throughput']:.1f} output tokens/s")
    return {
        "dtype": next(iter(runs.values()))[0]["dtype"],
        "by_load": {name: summarise(of_load) for name, of_load in runs.items()},
    }


def markdown(figures: Figures) -> str:
    """Throughput and latencies by load."""
    rows = []
    for name, measured in figures["by_load"].items():
        latencies = [
            f"{measured[f'median_{latency}_ms']['median']:,.0f} / "
            f"{measured[f'p99_{latency}_ms']['median']:,.0f}"
            for latency in ("ttft", "tpot", "itl", "e2el")
        ]
        rows.append((name, show(measured["output_throughput"]), *latencies))
    header = (
        *("requests", "output tokens/s", "TTFT, ms p50 / p99"),
        *("TPOT", "ITL", "E2EL"),
    )
    runs = [run for measured in figures["by_load"].values() for run in measured["runs"]]
    lengths = [
        statistics.fmean(run[f"total_{n}_tokens"] / run["completed"] for run in runs)
        for n in ("input", "output")
    ]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{lengths[0]:.0f} random tokens in, {lengths[1]:.0f} out, {figures['dtype']}; medians "
        "over the rounds."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--request-rate", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    with local_cluster(options.model) as (cluster, _):
        figures = measure(
            cluster.address, request_rate=options.request_rate, num_rounds=options.rounds
        )
    finish("serving", parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
