"""Drives the real planner without an executor: every sample is the same token, at once."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from stepwire_scheduler.plan import StepOutcome, StepPlan
from stepwire_scheduler.planner import Planner, PlannerConfig
from stepwire_scheduler.sequence import Request, SamplingParams

from benchmarks.mixes import Lengths

VOCAB_SIZE = 49_152
SAMPLED_TOKEN_ID = 7


def make_planner(config: PlannerConfig) -> Planner:
    """A planner as the scheduler's process makes it, but for the secret."""
    return Planner(config, prefix_key=b"benchmark")


def make_requests(mix: Sequence[Lengths], *, seed: int) -> list[Request]:
    """Requests of random prompts that end after exactly output_len tokens."""
    generator = random.Random(seed)
    return [
        Request(
            request_id=f"request-{index}",
            prompt_token_ids=array(
                "I", (generator.randrange(VOCAB_SIZE) for _ in range(lengths.prompt_len))
            ),
            sampling_params=SamplingParams(max_tokens=lengths.output_len, ignore_eos=True),
        )
        for index, lengths in enumerate(mix)
    ]


def outcome_of(plan: StepPlan) -> StepOutcome:
    """What an executor would answer."""
    return StepOutcome(
        step_id=plan.step_id,
        sampled_token_ids=[SAMPLED_TOKEN_ID] * len(plan.sampled_sequences),
        logprobs=[],
        failures={},
    )


def fill_pipeline(planner: Planner) -> None:
    """Plan as many steps ahead as may be in flight."""
    while planner.plan(0.0) is not None:
        pass


def commit_oldest(planner: Planner) -> int:
    """Answer the oldest plan in flight; returns the number of sequences that ended."""
    updates = planner.commit(outcome_of(next(iter(planner.inflight.values()))))
    return sum(update.sequence.finish_reason is not None for update in updates)
