"""Sequences of a real model, run alone and then together with drafts: all must be the same."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import islice

from stepwire.executor.v1.executor_pb2 import SamplingParams, StepResult, TokenLogprobs
from stepwire_executor.runner import Runner
from support.executor_fakes import admission, sampling_params, step
from support.model_runner import BLOCK_SIZE, MAX_NUM_SEQS, NUM_BLOCKS, VOCAB_SIZE

BLOCKS_PER_SLOT = 7
NUM_TOKENS = 12
MAX_DRAFTS = 6

HOW_TO_DRAW: dict[str, SamplingParams] = {
    "greedy": sampling_params(),
    "seeded": sampling_params(temperature=1.0, seed=7, stream=3),
    "narrow": sampling_params(temperature=0.8, seed=8, top_k=5, top_p=0.9),
    "min_p": sampling_params(temperature=1.5, seed=9, min_p=0.1),
}
HOW_TO_ADJUST: dict[str, SamplingParams] = {
    "nothing": SamplingParams(),
    "frequency": SamplingParams(frequency_penalty=4.0),
    "presence": SamplingParams(presence_penalty=6.0),
    "repetition": SamplingParams(repetition_penalty=3.0),
    "bias": SamplingParams(logit_bias={3: 8.0, 4: 8.0, 5: -9.0}, frequency_penalty=3.0),
    # Half of the vocabulary is out until the fifth token: within a draft as outside.
    "min_tokens": SamplingParams(min_tokens=4, suppressed_token_ids=list(range(0, 101, 2))),
}


@dataclass
class Sequence:
    """One sequence's way through a runner."""

    prompt: list[int]
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        """Known tokens that are to be computed."""
        return len(self.prompt) + len(self.output) - self.num_computed

    def cut_blocks(self) -> list[int]:
        """Give up the blocks that are not needed; returns them."""
        num_blocks = -(-(len(self.prompt) + len(self.output)) // BLOCK_SIZE)
        cut = self.block_ids[num_blocks:]
        del self.block_ids[num_blocks:]
        return cut

    def take(self, num_computed: int, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        """Book what a step gave; num_computed: without accepted drafts."""
        self.num_computed += num_computed + max(0, len(tokens) - 1)
        self.output += tokens
        self.logprobs += logprobs


def params_of(how_to_draw: str, how_to_adjust: str, num_logprobs: int | None) -> SamplingParams:
    """Join two ways of the tables above."""
    params = SamplingParams()
    params.CopyFrom(HOW_TO_DRAW[how_to_draw])
    params.MergeFrom(HOW_TO_ADJUST[how_to_adjust])
    if num_logprobs is not None:
        params.num_logprobs = num_logprobs
    return params


def _take(result: StepResult, sequences: dict[int, Sequence], work: dict[int, int]) -> None:
    assert not result.failures
    token_ids, logprobs = iter(result.sampled_token_ids), iter(result.logprobs)
    counts = dict(zip(result.sampled_slots, result.num_sampled_tokens, strict=True))
    for slot, num_tokens in work.items():
        tokens = list(islice(token_ids, counts.get(slot, 0)))
        described: list[TokenLogprobs] = []
        if sequences[slot].params.HasField("num_logprobs"):
            described = list(islice(logprobs, len(tokens)))
            assert [each.token_id for each in described] == tokens
        sequences[slot].take(num_tokens, tokens, described)
    assert not list(token_ids)
    assert not list(logprobs)


def run_alone(runner: Runner, prompt: list[int], params: SamplingParams) -> Sequence:
    """Token by token, without neighbours; longer than is looked at, for drafts at the end."""
    sequence = Sequence(prompt, params)
    runner.open_epoch(1)
    step_id = 1
    joined = [admission(0, prompt, list(range(BLOCKS_PER_SLOT)), params=params)]
    while len(sequence.output) < NUM_TOKENS + MAX_DRAFTS:
        work = {0: sequence.num_left}
        plan = step(1, step_id, work, admissions=joined if step_id == 1 else [])
        _take(runner.execute(plan), {0: sequence}, work)
        step_id += 1
    return sequence


def _drafts(rng: random.Random, sequence: Sequence, alone: Sequence) -> list[int]:
    """Right, right up to a place, or wrong in one place."""
    start = len(sequence.output)
    drafts = alone.output[start : start + rng.randint(0, MAX_DRAFTS)]
    num_right = rng.choice([len(drafts), rng.randint(0, len(drafts)), 0])
    num_wrong = rng.choice([1, len(drafts)])
    # A repeated token is what penalties are about.
    wrong = rng.choice([rng.randrange(VOCAB_SIZE), *(alone.output[:start] or [0])])
    end = min(num_right + num_wrong, len(drafts))
    return drafts[:num_right] + [wrong] * (end - num_right) + drafts[end:]


def _run_together(runner: Runner, rng: random.Random, alone: list[Sequence]) -> dict[int, Sequence]:
    """In chunks and with drafts, in blocks that go from one sequence to another."""
    slots = rng.sample(range(MAX_NUM_SEQS), len(alone))
    references = dict(zip(slots, alone, strict=True))
    sequences: dict[int, Sequence] = {}
    free_blocks = list(range(NUM_BLOCKS))
    rng.shuffle(free_blocks)
    runner.open_epoch(1)
    step_id = 1
    while len(sequences) < len(slots) or any(
        len(each.output) < NUM_TOKENS for each in sequences.values()
    ):
        joined, appended = [], []
        work: dict[int, int] = {}
        drafts: dict[int, list[int]] = {}
        for slot, reference in references.items():
            if slot not in sequences:
                if rng.random() < 0.5:
                    continue
                sequences[slot] = Sequence(reference.prompt, reference.params)
                joined.append(admission(slot, reference.prompt, [], params=reference.params))
            sequence = sequences[slot]
            if len(sequence.output) >= NUM_TOKENS or rng.random() < 0.1:
                continue
            work[slot] = rng.randint(1, sequence.num_left)
            if work[slot] == sequence.num_left and rng.random() < 0.8:
                drafts[slot] = _drafts(rng, sequence, reference)
            end = sequence.num_computed + work[slot] + len(drafts.get(slot, []))
            while len(sequence.block_ids) * BLOCK_SIZE < end:
                sequence.block_ids.append(free_blocks.pop(0))
                appended.append((slot, sequence.block_ids[-1]))
        result = runner.execute(
            step(1, step_id, work, admissions=joined, appended=appended, drafts=drafts)
        )
        _take(result, sequences, work)
        for slot, drafted in drafts.items():
            free_blocks += sequences[slot].cut_blocks() if drafted else []
        for slot, sequence in sequences.items():
            held = [block for block in runner.slots.block_table[slot].tolist() if block >= 0]
            assert held == sequence.block_ids
            num_tokens = len(sequence.prompt) + len(sequence.output)
            assert runner.slots.num_tokens[slot] == num_tokens
            assert runner.slots.num_computed_tokens[slot] == sequence.num_computed
        step_id += 1
    return {slot: sequences[slot] for slot in slots}


def check_drafts_leave_no_trace(
    runner: Runner, kinds: Items[tuple[str, str, int | None]], seed: int
) -> None:
    """Run a sequence of each kind (see params_of) alone, then all together with drafts."""
    rng = random.Random(seed)
    alone: list[Sequence] = []
    for kind in kinds:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 8))]
        alone.append(run_alone(runner, prompt, params_of(*kind)))
    together = _run_together(runner, rng, alone)
    for reference, sequence in zip(alone, together.values(), strict=True):
        assert sequence.output[:NUM_TOKENS] == reference.output[:NUM_TOKENS]
        assert sequence.logprobs[:NUM_TOKENS] == reference.logprobs[:NUM_TOKENS]
