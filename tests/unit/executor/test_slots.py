"""Every way a plan can contradict the slot table is an error with a reason."""

from __future__ import annotations

import math

import numpy as np
import pytest
from stepwire.executor.v1.executor_pb2 import SamplingParams, StepPlan
from stepwire_executor.errors import PlanError
from stepwire_executor.sampling.host_state import TokenCounts
from support.executor_fakes import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    VOCAB_SIZE,
    FakeExecutor,
    admission,
    make_executor,
    sampling_params,
    step,
)

UINT32_MAX = 2**32 - 1


@pytest.fixture
def executor() -> FakeExecutor:
    """Slot 0 holds five tokens, of which four are computed, in two blocks."""
    executor = make_executor(max_num_batched_tokens=16)
    executor.runner.open_epoch(1)
    executor.runner.execute(step(1, 1, {0: 4}, admissions=[admission(0, [1, 2, 3, 4, 5], [0, 1])]))
    return executor


def long_list(length: int) -> list[int]:
    return [1] * length


BAD_PLANS: dict[str, tuple[StepPlan, str]] = {
    "released slot out of range": (step(1, 2, released=[MAX_NUM_SEQS]), "out of range"),
    "released slot far out of range": (step(1, 2, released=[UINT32_MAX]), "out of range"),
    "released slot empty": (step(1, 2, released=[1]), "holds no sequence"),
    "released twice": (step(1, 2, released=[0, 0]), "named twice"),
    "admitted slot out of range": (
        step(1, 2, admissions=[admission(MAX_NUM_SEQS, [1], [2])]),
        "the table has 4 slots",
    ),
    "admitted slot occupied": (step(1, 2, admissions=[admission(0, [1], [2])]), "occupied"),
    "admitted twice": (
        step(1, 2, admissions=[admission(1, [1], [2]), admission(1, [1], [3])]),
        "occupied",
    ),
    "no tokens": (step(1, 2, admissions=[admission(1, [], [2])]), "token_ids is empty"),
    "too many tokens": (
        step(1, 2, admissions=[admission(1, long_list(MAX_MODEL_LEN + 1), [2])]),
        "more than the limit of 40",
    ),
    "token id out of range": (
        step(1, 2, admissions=[admission(1, [VOCAB_SIZE], [2])]),
        "beyond the vocabulary",
    ),
    "token id far out of range": (
        step(1, 2, admissions=[admission(1, [UINT32_MAX], [2])]),
        "beyond the vocabulary",
    ),
    "no prompt": (
        step(1, 2, admissions=[admission(1, [1], [2], num_prompt_tokens=0)]),
        "num_prompt_tokens 0",
    ),
    "prompt longer than tokens": (
        step(1, 2, admissions=[admission(1, [1], [2], num_prompt_tokens=2)]),
        "num_prompt_tokens 2",
    ),
    "all tokens computed": (
        step(1, 2, admissions=[admission(1, [1], [2], num_computed_tokens=1)]),
        "leaves none",
    ),
    "computed tokens without blocks": (
        step(1, 2, admissions=[admission(1, [1, 2], [], num_computed_tokens=1)]),
        "cannot hold",
    ),
    "block out of range": (
        step(1, 2, admissions=[admission(1, [1], [NUM_BLOCKS])]),
        "block 32 is out of range",
    ),
    "too many blocks": (
        step(1, 2, admissions=[admission(1, [1], list(range(11)))]),
        "more than 10 for a sequence",
    ),
    "appended to nobody": (step(1, 2, appended=[(1, 2)]), "holds no sequence"),
    "appended out of range": (step(1, 2, appended=[(UINT32_MAX, 2)]), "holds no sequence"),
    "appended block out of range": (step(1, 2, appended=[(0, NUM_BLOCKS)]), "out of range"),
    "appended too many": (
        step(1, 2, appended=[(0, block) for block in range(2, 11)]),
        "has all 10 blocks",
    ),
    "appended arrays differ": (
        StepPlan(epoch=1, step_id=2, appended_slots=[0]),
        "differ in length",
    ),
    "copy source out of range": (step(1, 2, copies=[(NUM_BLOCKS, 0)]), "out of range"),
    "copy target out of range": (step(1, 2, copies=[(0, NUM_BLOCKS)]), "out of range"),
    "copy target twice": (step(1, 2, copies=[(0, 2), (1, 2)]), "written twice"),
    "copy arrays differ": (
        StepPlan(epoch=1, step_id=2, copy_source_block_ids=[0]),
        "differ in length",
    ),
    "work on nobody": (step(1, 2, {1: 1}), "holds no sequence"),
    "work out of range": (step(1, 2, {UINT32_MAX: 1}), "out of range"),
    "work twice": (
        StepPlan(epoch=1, step_id=2, work_slots=[0, 0], work_num_tokens=[1, 1]),
        "named twice",
    ),
    "work arrays differ": (StepPlan(epoch=1, step_id=2, work_slots=[0]), "differ in length"),
    "no work": (step(1, 2, {0: 0}), "0 tokens is no work"),
    "work beyond the tokens known": (step(1, 2, {0: 2}), "has 1 tokens to compute, not 2"),
    "work beyond the budget": (
        step(1, 2, {1: 17}, admissions=[admission(1, long_list(17), list(range(5)))]),
        "more than the budget of 16",
    ),
    "work without blocks": (
        step(1, 2, {1: 5}, admissions=[admission(1, long_list(5), [2])]),
        "too few for 5 tokens",
    ),
    "drafts before the last token": (
        step(1, 2, {1: 2}, admissions=[admission(1, [1, 2, 3], [2])], drafts={1: [7]}),
        "slot 1 has drafts, but its work does not reach",
    ),
    "drafts without blocks": (step(1, 2, {0: 1}, drafts={0: [7] * 4}), "too few for 9 tokens"),
    "draft out of range": (
        step(1, 2, {0: 1}, drafts={0: [1, VOCAB_SIZE]}),
        "draft_token_ids: token id 97 is beyond the vocabulary",
    ),
    "draft far out of range": (
        step(1, 2, {0: 1}, drafts={0: [UINT32_MAX]}),
        "beyond the vocabulary",
    ),
    "drafts beyond the context": (
        step(
            1,
            2,
            {1: 1},
            admissions=[
                admission(1, long_list(MAX_MODEL_LEN - 1), list(range(10)), num_computed_tokens=38)
            ],
            drafts={1: [1, 2]},
        ),
        "slot 1 has room for 1 drafts, not 2",
    ),
    "drafts beyond the budget": (
        step(1, 2, {0: 1}, drafts={0: [7] * 16}),
        "17 tokens are more than the budget of 16",
    ),
    "number of drafts far out of range": (
        StepPlan(
            epoch=1, step_id=2, work_slots=[0], work_num_tokens=[1], work_num_drafts=[UINT32_MAX]
        ),
        "more than the budget of 16",
    ),
    "draft numbers of more slots than there is work": (
        StepPlan(
            epoch=1,
            step_id=2,
            work_slots=[0],
            work_num_tokens=[1],
            work_num_drafts=[1, 0],
            draft_token_ids=[7],
        ),
        "work_slots and work_num_drafts differ in length",
    ),
    "draft numbers without work": (
        StepPlan(epoch=1, step_id=2, work_num_drafts=[0]),
        "work_slots and work_num_drafts differ in length",
    ),
    "more drafts than are counted": (
        StepPlan(
            epoch=1,
            step_id=2,
            work_slots=[0],
            work_num_tokens=[1],
            work_num_drafts=[1],
            draft_token_ids=[7, 8],
        ),
        "draft_token_ids has 2 tokens, where work_num_drafts counts 1",
    ),
    "drafts of nobody": (
        StepPlan(epoch=1, step_id=2, work_slots=[0], work_num_tokens=[1], draft_token_ids=[7]),
        "does not say whose they are",
    ),
    "drafts of a draft model that is not there": (
        StepPlan(epoch=1, step_id=2, work_slots=[0], work_num_tokens=[1], work_num_drafts=[2]),
        "this executor has no draft model",
    ),
    "a draft in the place of another token": (
        step(1, 2, {0: 1, 1: 1}, admissions=[admission(1, [9], [1])], drafts={0: [7]}),
        "two tokens of the step have the same place",
    ),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_plan_that_contradicts_the_table_is_refused_before_anything_runs(
    executor: FakeExecutor, name: str
) -> None:
    plan, reason = BAD_PLANS[name]
    num_forwards = executor.decoder.num_forwards
    with pytest.raises(PlanError, match=reason.replace("(", r"\(")):
        executor.runner.execute(plan)
    assert executor.decoder.num_forwards == num_forwards


BAD_PARAMS: dict[str, SamplingParams] = {
    "negative temperature": sampling_params(temperature=-1.0),
    "temperature not a number": sampling_params(temperature=math.nan),
    "infinite temperature": sampling_params(temperature=math.inf),
    "top_p 0": SamplingParams(repetition_penalty=1.0),
    "top_p over 1": sampling_params(top_p=1.5),
    "min_p over 1": sampling_params(min_p=1.5),
    "min_p not a number": sampling_params(min_p=math.nan),
    "repetition_penalty 0": SamplingParams(top_p=1.0),
    "presence_penalty not a number": sampling_params(presence_penalty=math.nan),
    "frequency_penalty infinite": sampling_params(frequency_penalty=math.inf),
    "bias not a number": sampling_params(logit_bias={1: math.nan}),
    "bias out of range": sampling_params(logit_bias={VOCAB_SIZE: 1.0}),
    "suppressed out of range": sampling_params(suppressed_token_ids=[VOCAB_SIZE]),
    "too many logprobs": sampling_params(num_logprobs=VOCAB_SIZE + 1),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_sampling_parameters_that_mean_nothing_are_refused(
    executor: FakeExecutor, name: str
) -> None:
    with pytest.raises(PlanError, match="admission to slot 1"):
        executor.runner.execute(
            step(1, 2, admissions=[admission(1, [1], [2], params=BAD_PARAMS[name])])
        )


def test_a_sequence_can_fill_its_context_and_no_more() -> None:
    executor = make_executor()
    executor.runner.open_epoch(1)
    full = admission(0, long_list(MAX_MODEL_LEN), list(range(10)))
    result = executor.runner.execute(step(1, 1, {0: MAX_MODEL_LEN}, admissions=[full]))
    assert list(result.sampled_slots) == [0]
    with pytest.raises(PlanError, match="has 0 tokens to compute"):
        executor.runner.execute(step(1, 2, {0: 1}))


def test_counts_grow_as_if_made_from_the_whole_sequence() -> None:
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 400, size=600)
    grown = TokenCounts(tokens[:20], 20)
    for token in tokens[20:].tolist():
        grown.add(token)
    made = TokenCounts(tokens, 20)

    def as_dict(counts: TokenCounts) -> dict[int, float]:
        ids, numbers = counts.seen_token_ids.tolist(), counts.output_counts.tolist()
        return dict(zip(ids, numbers, strict=True))

    assert as_dict(grown) == as_dict(made)
