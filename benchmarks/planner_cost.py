"""What a step costs the scheduler: plan, serialise, parse and commit, by running sequences.

Run: python -m benchmarks.planner_cost [--sizes N ...] [--steps N] [--profile N]

Steady decode with churn: outputs are 50 to 150 tokens, so that about 1% of the sequences end at
every step and as many are admitted, with prompts of 32 tokens. Two plans are in flight, as in
the scheduler's process. No executor: results are made outside of the measured time.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import math
import pstats
import random
import statistics
import time
from collections.abc import Sequence

from stepwire.executor.v1 import executor_pb2
from stepwire_scheduler import garbage
from stepwire_scheduler.plan import StepPlan
from stepwire_scheduler.plan_messages import parse_result, serialize_plan
from stepwire_scheduler.planner import Planner, PlannerConfig

from benchmarks.common import Figures, finish, markdown_table, percentile
from benchmarks.mixes import Lengths
from benchmarks.simulation import SAMPLED_TOKEN_ID, make_planner, make_requests

CLAIM = "Planning takes at most 1 ms a step at 256 running sequences."
SIZES = (16, 64, 256, 1024, 4096)
PROMPT_LEN = 32
OUTPUT_LENS = (50, 150)
BLOCK_SIZE = 16
EPOCH = 1
PARTS = ("plan", "commit", "serialise", "parse")


class SteadyDecode:
    """A planner with so many sequences that decode, some of which end at every step."""

    def __init__(self, num_sequences: int, seed: int = 0) -> None:
        self.num_sequences = num_sequences
        self._generator = random.Random(seed)
        blocks_each = -(-(PROMPT_LEN + OUTPUT_LENS[1]) // BLOCK_SIZE)
        self.planner: Planner = make_planner(
            PlannerConfig(
                num_blocks=(num_sequences + 64) * blocks_each * 2,
                block_size=BLOCK_SIZE,
                max_num_seqs=num_sequences,
                max_num_batched_tokens=num_sequences * (PROMPT_LEN + 1),
                max_num_prefill_tokens=num_sequences * PROMPT_LEN,
                max_inflight_steps=2,
            )
        )
        self._num_seeds = itertools.count()
        # The first ones are at any point of their life, as in a steady state.
        self._add([self._generator.randint(2, OUTPUT_LENS[1]) for _ in range(num_sequences)])
        self.num_ended = 0
        self.num_scheduled = 0
        self.num_request_bytes = 0

    def _add(self, output_lens: Sequence[int]) -> None:
        mix = [Lengths(prompt_len=PROMPT_LEN, output_len=length) for length in output_lens]
        for request in make_requests(mix, seed=next(self._num_seeds)):
            self.planner.add(request)

    def step(self) -> dict[str, float]:
        """Run one step; returns the milliseconds of each part."""
        clock = time.perf_counter
        started = clock()
        plan = self.planner.plan(0.0)
        planned = clock()
        assert plan is not None
        request = serialize_plan(EPOCH, plan)
        serialised = clock()
        self.num_request_bytes += len(request)
        self.num_scheduled += len(plan.work_slots)
        times = {
            "plan": (planned - started) * 1e3,
            "serialise": (serialised - planned) * 1e3,
            "parse": 0.0,
            "commit": 0.0,
        }
        if len(self.planner.inflight) < self.planner.config.max_inflight_steps:
            return times
        oldest = next(iter(self.planner.inflight.values()))
        response = encode_result(oldest)
        started = clock()
        outcome = parse_result(
            oldest, executor_pb2.ExecuteResponse.FromString(response).step_result
        )
        parsed = clock()
        updates = self.planner.commit(outcome)
        committed = clock()
        times["parse"] = (parsed - started) * 1e3
        times["commit"] = (committed - parsed) * 1e3
        num_ended = sum(update.sequence.finish_reason is not None for update in updates)
        self.num_ended += num_ended
        self._add([self._generator.randint(*OUTPUT_LENS) for _ in range(num_ended)])
        return times


def encode_result(plan: StepPlan) -> bytes:
    """The bytes that an executor would send for a plan."""
    slot_of = dict(zip(map(id, plan.work_sequences), plan.work_slots, strict=True))
    num_samples = len(plan.sampled_sequences)
    return executor_pb2.ExecuteResponse(
        step_result=executor_pb2.StepResult(
            epoch=EPOCH,
            step_id=plan.step_id,
            sampled_slots=[slot_of[id(sequence)] for sequence in plan.sampled_sequences],
            num_sampled_tokens=[1] * num_samples,
            sampled_token_ids=[SAMPLED_TOKEN_ID] * num_samples,
        )
    ).SerializeToString()


def measure(num_sequences: int, num_steps: int) -> Figures:
    """Times of num_steps steps, after as many as it takes to be steady."""
    garbage.settle()  # as the scheduler's process does before its first request
    steady = SteadyDecode(num_sequences)
    for _ in range(OUTPUT_LENS[1] // 2):
        steady.step()
    steady.num_ended = steady.num_scheduled = steady.num_request_bytes = 0
    samples = [steady.step() for _ in range(num_steps)]
    totals = [sample["plan"] + sample["commit"] for sample in samples]
    return {
        "num_steps": num_steps,
        "num_scheduled_per_step": steady.num_scheduled / num_steps,
        "num_ended_per_step": steady.num_ended / num_steps,
        "plan_bytes_per_step": steady.num_request_bytes / num_steps,
        "plan_and_commit_ms": _percentiles(totals),
        **{f"{part}_ms": _percentiles([sample[part] for sample in samples]) for part in PARTS},
    }


def growth_exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Slope of log time over log size, by least squares; 1 is linear."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in times])[
        0
    ]


def profile(num_sequences: int, num_steps: int) -> None:
    """Print where the time of a step goes."""
    steady = SteadyDecode(num_sequences)
    for _ in range(OUTPUT_LENS[1] // 2):
        steady.step()
    with cProfile.Profile() as profiler:
        for _ in range(num_steps):
            steady.step()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)


def markdown(figures: Figures) -> str:
    """Milliseconds a step by running sequences."""
    rows = []
    for size, figure in figures["by_sequences"].items():
        parts = [
            f"{figure[f'{name}_ms']['p50']:.3f} / {figure[f'{name}_ms']['p99']:.3f}"
            for name in ("plan_and_commit", "serialise", "parse")
        ]
        rows.append(
            (
                f"{int(size):,}",
                *parts,
                f"{figure['num_ended_per_step']:.1f}",
                f"{figure['plan_bytes_per_step']:,.0f}",
            )
        )
    header = (
        "running",
        "plan + commit, ms p50 / p99",
        "serialise",
        "parse",
        "ended and admitted a step",
        "plan, bytes",
    )
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"Growth exponent of plan + commit (1 is linear): {figures['growth_exponent']:.2f}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner_cost")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--profile", type=int, metavar="N", help="profile N sequences instead")
    options = parser.parse_args(arguments)
    if options.profile is not None:
        profile(options.profile, options.steps)
        return
    by_sequences = {str(size): measure(size, options.steps) for size in options.sizes}
    figures: Figures = {"by_sequences": by_sequences}
    figures["growth_exponent"] = growth_exponent(
        options.sizes, [f["plan_and_commit_ms"]["p50"] for f in by_sequences.values()]
    )
    finish("planner_cost", parameters=vars(options), figures=figures, table=markdown(figures))


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), **{f"p{p}": percentile(values, p) for p in (50, 99)}}


if __name__ == "__main__":
    main()
