"""A model's tokens and log-probabilities with drafts are those without, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire.executor.v1.executor_pb2 import SamplingParams, StepResult, TokenLogprobs
from stepwire_executor.runner import Runner
from support.executor_fakes import admission, sampling_params, step
from support.model_runner import (
    BLOCK_SIZE,
    BUILDERS,
    MAX_NUM_SEQS,
    VOCAB_SIZE,
    make_model_runner,
    save_model,
)

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

    @property
    def num_left(self) -> int:
        """Known tokens that are to be computed."""
        return len(self.prompt) + len(self.output) - self.num_computed

    def take(self, num_computed: int, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        """Book what a step gave; num_computed: without accepted drafts."""
        self.num_computed += num_computed + max(0, len(tokens) - 1)
        self.output += tokens
        self.logprobs += logprobs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    yield path
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=BUILDERS)
def runner(request: pytest.FixtureRequest, directory: Path) -> Runner:
    return make_model_runner(directory, request.param)


class _Epochs:
    number = 0

    @classmethod
    def open(cls, runner: Runner) -> int:
        cls.number += 1
        runner.open_epoch(cls.number)
        return cls.number


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


def _run_alone(runner: Runner, prompt: list[int], params: SamplingParams) -> Sequence:
    """Token by token, without neighbours; longer than is looked at, for drafts at the end."""
    sequence = Sequence(prompt, params)
    epoch, step_id = _Epochs.open(runner), 1
    joined = [admission(0, prompt, list(range(BLOCKS_PER_SLOT)), params=params)]
    while len(sequence.output) < NUM_TOKENS + MAX_DRAFTS:
        work = {0: sequence.num_left}
        plan = step(epoch, step_id, work, admissions=joined if step_id == 1 else [])
        _take(runner.execute(plan), {0: sequence}, work)
        step_id += 1
    return sequence


def _drafts(rng: random.Random, sequence: Sequence, alone: Sequence) -> list[int]:
    """Right, wrong or right up to a place."""
    start = len(sequence.output)
    drafts = alone.output[start : start + rng.randint(0, MAX_DRAFTS)]
    num_right = rng.choice([len(drafts), rng.randint(0, len(drafts)), 0])
    # A repeated token is what penalties are about.
    wrong = rng.choice([rng.randrange(VOCAB_SIZE), *(alone.output[:start] or [0])])
    return drafts[:num_right] + [wrong] * (len(drafts) - num_right)


def _run_together(
    runner: Runner, rng: random.Random, alone: list[Sequence]
) -> dict[int, Sequence]:
    """In chunks and with drafts."""
    slots = rng.sample(range(MAX_NUM_SEQS), len(alone))
    references = dict(zip(slots, alone, strict=True))
    sequences: dict[int, Sequence] = {}
    num_blocks: dict[int, int] = {}
    epoch, step_id = _Epochs.open(runner), 1
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
                num_blocks[slot] = 0
                joined.append(admission(slot, reference.prompt, [], params=reference.params))
            sequence = sequences[slot]
            if len(sequence.output) >= NUM_TOKENS or rng.random() < 0.1:
                continue
            work[slot] = rng.randint(1, sequence.num_left)
            if work[slot] == sequence.num_left and rng.random() < 0.8:
                drafts[slot] = _drafts(rng, sequence, reference)
            end = sequence.num_computed + work[slot] + len(drafts.get(slot, []))
            for index in range(num_blocks[slot], -(-end // BLOCK_SIZE)):
                appended.append((slot, slot * BLOCKS_PER_SLOT + index))
                num_blocks[slot] += 1
        result = runner.execute(
            step(epoch, step_id, work, admissions=joined, appended=appended, drafts=drafts)
        )
        _take(result, sequences, work)
        for slot in drafts:
            if drafts[slot]:
                num_tokens = len(sequences[slot].prompt) + len(sequences[slot].output)
                num_blocks[slot] = min(num_blocks[slot], -(-num_tokens // BLOCK_SIZE))
        step_id += 1
    return {slot: sequences[slot] for slot in slots}


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(
            st.sampled_from(sorted(HOW_TO_DRAW)),
            st.sampled_from(sorted(HOW_TO_ADJUST)),
            st.sampled_from([None, 0, 3]),
        ),
        min_size=1,
        max_size=MAX_NUM_SEQS,
    ),
    seed=st.integers(0, 2**32),
)
def test_tokens_and_logprobs_do_not_know_that_there_were_drafts(
    runner: Runner, kinds: list[tuple[str, str, int | None]], seed: int
) -> None:
    rng = random.Random(seed)
    alone: list[Sequence] = []
    for how_to_draw, how_to_adjust, num_logprobs in kinds:
        params = SamplingParams()
        params.CopyFrom(HOW_TO_DRAW[how_to_draw])
        params.MergeFrom(HOW_TO_ADJUST[how_to_adjust])
        if num_logprobs is not None:
            params.num_logprobs = num_logprobs
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 8))]
        alone.append(_run_alone(runner, prompt, params))
    together = _run_together(runner, rng, alone)
    for reference, sequence in zip(alone, together.values(), strict=True):
        assert sequence.output[:NUM_TOKENS] == reference.output[:NUM_TOKENS]
        assert sequence.logprobs[:NUM_TOKENS] == reference.logprobs[:NUM_TOKENS]


@pytest.mark.parametrize("how_to_adjust", HOW_TO_ADJUST)
@pytest.mark.parametrize("how_to_draw", HOW_TO_DRAW)
@pytest.mark.parametrize("num_right", range(MAX_DRAFTS + 1))
def test_right_drafts_are_accepted_up_to_the_first_wrong_one(
    runner: Runner, how_to_draw: str, how_to_adjust: str, num_right: int
) -> None:
    params = SamplingParams()
    params.CopyFrom(HOW_TO_DRAW[how_to_draw])
    params.MergeFrom(HOW_TO_ADJUST[how_to_adjust])
    prompt = [5, 17, 3]
    alone = _run_alone(runner, prompt, params).output
    epoch = _Epochs.open(runner)
    joined = admission(1, prompt, list(range(BLOCKS_PER_SLOT)), params=params)
    drafts = alone[:MAX_DRAFTS]
    if num_right < MAX_DRAFTS:
        drafts[num_right:] = [(drafts[num_right] + 1) % VOCAB_SIZE] * (MAX_DRAFTS - num_right)
    result = runner.execute(step(epoch, 1, {1: 3}, admissions=[joined], drafts={1: drafts}))
    assert list(result.num_draft_tokens) == [MAX_DRAFTS]
    assert list(result.num_sampled_tokens) == [num_right + 1]
    assert list(result.sampled_token_ids) == alone[: num_right + 1]
