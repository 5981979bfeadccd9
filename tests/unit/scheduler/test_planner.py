"""What a plan must look like in the situations that engines get wrong."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Sequence_

import pytest
from stepwire_scheduler.plan import StepOutcome, StepPlan
from stepwire_scheduler.planner import Planner, PlannerConfig
from stepwire_scheduler.running_set import RunningSet
from stepwire_scheduler.sequence import (
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    SequenceStatus,
)


def make_planner(**changes: object) -> Planner:
    settings: dict[str, object] = {
        "num_blocks": 100,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_num_prefill_tokens": 8,
        "max_inflight_steps": 1,
        "eos_token_ids": frozenset({0}),
    }
    return Planner(PlannerConfig(**(settings | changes)), prefix_key=b"k")  # type: ignore[arg-type]


def submit(
    planner: Planner,
    prompt: Sequence_[int],
    *,
    request_id: str = "r",
    priority: int = 0,
    deadline_ms: float = float("inf"),
    **params: object,
) -> list[Sequence]:
    return planner.add(
        Request(
            request_id=request_id,
            prompt_token_ids=array("I", prompt),
            sampling_params=SamplingParams(**({"max_tokens": 16} | params)),  # type: ignore[arg-type]
            priority=priority,
            deadline_ms=deadline_ms,
        )
    )


def answer(planner: Planner, plan: StepPlan | None, token_id: int = 1) -> StepPlan:
    """Commit a plan whose every sample is token_id."""
    assert plan is not None
    planner.commit(
        StepOutcome(
            step_id=plan.step_id,
            sampled_token_ids=[token_id] * len(plan.sampled_sequences),
            logprobs=[],
            failures={},
        )
    )
    return plan


def step(planner: Planner, token_id: int = 1) -> StepPlan:
    return answer(planner, planner.plan(0.0), token_id)


def test_prefill_is_chunked_and_mixed_with_decodes() -> None:
    planner = make_planner()
    first = submit(planner, range(1, 5))[0]
    step(planner)
    long = submit(planner, range(1, 30), request_id="long")[0]
    plan = step(planner)
    assert plan.work_sequences == [first, long]
    assert plan.work_num_tokens == [1, 8], "the cap on prefill holds while another decodes"
    assert plan.sampled_sequences == [first]


def test_prefill_takes_the_whole_budget_when_nothing_decodes() -> None:
    planner = make_planner()
    submit(planner, range(1, 100))
    assert step(planner).work_num_tokens == [32]


def test_a_prompt_is_sent_once_and_a_decode_costs_no_more_than_its_slot() -> None:
    planner = make_planner()
    submit(planner, range(1, 30))
    assert len(step(planner).admissions[0].token_ids) == 29
    for _ in range(3):
        plan = step(planner)
        assert not plan.admissions
        assert plan.work_num_tokens == [1]
        assert len(plan.appended_block_ids) <= 1


def test_plans_run_ahead_of_results_up_to_the_limit() -> None:
    planner = make_planner(max_inflight_steps=2)
    sequence = submit(planner, range(1, 5))[0]
    first, second = planner.plan(0.0), planner.plan(0.0)
    assert first is not None
    assert second is not None
    assert second.work_sequences == [sequence]
    assert planner.plan(0.0) is None
    answer(planner, first, token_id=0)  # end of sequence, while the second is in flight
    assert sequence.finish_reason is FinishReason.STOP
    assert planner.block_pool.num_leased > 0
    answer(planner, second, token_id=7)
    assert list(sequence.token_ids[4:]) == [0], "the late token is dropped"
    assert planner.block_pool.num_free == 100


def test_nothing_is_planned_beyond_max_tokens() -> None:
    planner = make_planner(max_inflight_steps=2)
    submit(planner, range(1, 5), max_tokens=1)
    assert planner.plan(0.0) is not None
    assert planner.plan(0.0) is None


def test_a_later_request_shares_the_prefix_of_an_earlier_one() -> None:
    planner = make_planner()
    submit(planner, range(1, 14), max_tokens=1)
    step(planner)
    second = submit(planner, [*range(1, 13), 99], request_id="b")[0]
    plan = step(planner)
    assert second.num_cached_tokens == 12
    assert plan.work_num_tokens == [1]
    assert plan.admissions[0].num_computed_tokens == 12


def test_a_prompt_that_is_cached_whole_still_computes_its_last_block() -> None:
    planner = make_planner()
    for request_id in "ab":
        sequence = submit(planner, range(1, 9), request_id=request_id, max_tokens=1)[0]
        step(planner)
    assert sequence.num_cached_tokens == 4


def test_sequences_of_one_request_share_their_prompt() -> None:
    planner = make_planner()
    sequences = submit(planner, range(1, 14), n=3)
    step(planner)
    plan = step(planner)
    assert [admission.stream for admission in plan.admissions] == [1, 2]
    assert all(admission.num_computed_tokens == 12 for admission in plan.admissions)
    shared = {tuple(sequence.block_ids[:3]) for sequence in sequences}
    assert len(shared) == 1


def test_the_later_of_two_gives_way_when_blocks_run_out() -> None:
    planner = make_planner(num_blocks=6, enable_prefix_caching=False)
    early = submit(planner, range(1, 9), request_id="a", max_tokens=15)[0]
    late = submit(planner, range(1, 6), request_id="b", max_tokens=15)[0]
    while early.status is not SequenceStatus.FINISHED:
        step(planner)
    assert early.num_preemptions == 0
    assert late.num_preemptions > 0
    while late.status is not SequenceStatus.FINISHED:
        step(planner)
    assert late.num_output_tokens == 15


def test_an_earlier_one_that_is_not_in_the_step_keeps_its_blocks() -> None:
    planner = make_planner(num_blocks=4, max_inflight_steps=2, max_num_prefill_tokens=32)
    params = ({"max_tokens": 1}, {}, {})
    first, second, third = (
        submit(planner, range(i, i + 4), request_id=f"r{i}", **each)[0]
        for i, each in zip((1, 11, 21), params, strict=True)
    )
    planner.plan(0.0)
    assert planner.running == [first, second, third]
    plan = planner.plan(0.0)  # the last token of the first is on its way
    assert plan is not None
    assert plan.work_sequences == [second]
    assert third.slot not in plan.work_slots, "there was a block for one of them"
    assert first.status is SequenceStatus.RUNNING


def test_preempting_the_earliest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def earliest(running: RunningSet, sequence: Sequence, plan: StepPlan) -> Sequence | None:
        others = [other for other in running.sequences if other.last_step_id != plan.step_id]
        return next((other for other in others if other is not sequence), None)

    monkeypatch.setattr(RunningSet, "_choose_victim", earliest)
    with pytest.raises(AssertionError):
        test_an_earlier_one_that_is_not_in_the_step_keeps_its_blocks()


def test_priority_runs_first_and_keeps_its_blocks() -> None:
    planner = make_planner(scheduling_policy="priority", max_num_seqs=1)
    submit(planner, range(1, 5), request_id="low", priority=5)
    high = submit(planner, range(1, 5), request_id="high", priority=-5)[0]
    assert step(planner).work_sequences == [high]


def test_fcfs_ignores_priority() -> None:
    planner = make_planner(max_num_seqs=1)
    first = submit(planner, range(1, 5), request_id="low", priority=5)[0]
    submit(planner, range(1, 5), request_id="high", priority=-5)
    assert step(planner).work_sequences == [first]


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    planner = make_planner(num_blocks=10, enable_prefix_caching=False)
    submit(planner, range(1, 17), request_id="running")
    step(planner)
    large = submit(planner, range(1, 33), request_id="large", max_tokens=4)[0]
    small = submit(planner, range(1, 3), request_id="small")[0]
    step(planner)
    assert large.status is SequenceStatus.WAITING
    assert small.status is SequenceStatus.WAITING


@pytest.mark.parametrize("is_running", [False, True])
def test_a_deadline_ends_a_request_queued_or_running(is_running: bool) -> None:
    planner = make_planner()
    sequence = submit(planner, range(1, 5), deadline_ms=10.0)[0]
    if is_running:
        step(planner)
    assert planner.expire(9.9) == []
    assert [update.sequence for update in planner.expire(10.0)] == [sequence]
    assert sequence.finish_reason is FinishReason.DEADLINE
    assert planner.block_pool.num_free == 100
    assert planner.plan(11.0) is None


def test_a_failed_slot_ends_its_sequence_only() -> None:
    planner = make_planner()
    bad, good = (submit(planner, range(1, 5), request_id=name)[0] for name in "ab")
    plan = planner.plan(0.0)
    assert plan is not None
    updates = planner.commit(
        StepOutcome(
            step_id=plan.step_id,
            sampled_token_ids=[0, 3],
            logprobs=[],
            failures={plan.work_slots[0]: "no token could be sampled"},
        )
    )
    assert bad.finish_reason is FinishReason.ERROR
    assert list(good.token_ids[4:]) == [3]
    assert [update.error for update in updates if update.sequence is bad] == [
        "no token could be sampled"
    ]


def test_a_lost_epoch_readmits_what_ran_with_its_tokens() -> None:
    planner = make_planner(max_inflight_steps=2, max_resumes=1)
    sequence = submit(planner, range(1, 5))[0]
    step(planner, token_id=9)
    planner.plan(0.0)
    assert planner.reset_epoch() == []
    assert planner.block_pool.num_free == 100
    plan = planner.plan(0.0)
    assert plan is not None
    assert plan.step_id == 1
    assert list(plan.admissions[0].token_ids) == [1, 2, 3, 4, 9]
    assert plan.admissions[0].num_prompt_tokens == 4
    assert plan.admissions[0].num_computed_tokens == 0
    lost_again = planner.reset_epoch()
    assert [update.sequence for update in lost_again] == [sequence]
    assert sequence.finish_reason is FinishReason.ERROR


def test_stop_tokens_are_suppressed_until_min_tokens() -> None:
    planner = make_planner()
    submit(planner, range(1, 5), min_tokens=2, stop_token_ids=frozenset({5}))
    assert step(planner).admissions[0].suppressed_token_ids == (0, 5)


def test_a_block_that_is_not_full_is_not_shared() -> None:
    planner = make_planner(max_num_batched_tokens=6)
    first = submit(planner, range(1, 13))[0]
    step(planner)  # six tokens: one block and a half
    planner.finish(first, FinishReason.CANCELLED)
    second = submit(planner, range(1, 13), request_id="b")[0]
    step(planner)
    assert second.num_cached_tokens == 4


def test_a_block_that_lacks_its_last_token_is_not_shared() -> None:
    planner = make_planner()
    first = submit(planner, [1, 2, 3])[0]
    step(planner, token_id=7)  # the block's fourth token is known, its KV is not
    planner.finish(first, FinishReason.CANCELLED)
    second = submit(planner, [1, 2, 3, 7, 9], request_id="b")[0]
    step(planner)
    assert second.num_cached_tokens == 0


def test_interrupted_streams_are_recomputed_oldest_first_and_a_capped_part_at_a_time() -> None:
    planner = make_planner(max_num_batched_tokens=32, max_num_prefill_tokens=8)
    sequences = [submit(planner, range(1, 9), request_id=str(i))[0] for i in range(4)]
    while any(sequence.num_output_tokens == 0 for sequence in sequences):
        step(planner, token_id=9)
    planner.reset_epoch()
    resumed: list[Sequence] = []
    before = {id(each): len(each.token_ids) for each in sequences}
    for _ in range(20):
        plan = planner.plan(0.0)
        assert plan is not None
        num_prefill = sum(num for num in plan.work_num_tokens if num > 1)
        assert num_prefill <= 8, "streams that have begun wait for one large step"
        answer(planner, plan, token_id=9)
        resumed += [s for s in sequences if len(s.token_ids) > before[id(s)] and s not in resumed]
        if len(resumed) == len(sequences):
            break
    assert resumed == sequences


def test_new_prompts_are_not_capped_while_no_stream_has_begun() -> None:
    planner = make_planner(max_num_batched_tokens=32, max_num_prefill_tokens=8)
    submit(planner, range(1, 40))
    assert step(planner).work_num_tokens == [32]


@pytest.mark.parametrize("leader_ends", [False, True])
def test_sequences_of_one_prompt_are_recomputed_with_the_prompt_once(leader_ends: bool) -> None:
    planner = make_planner(max_num_prefill_tokens=32)
    sequences = submit(planner, range(1, 14), n=4)
    while any(sequence.num_output_tokens == 0 for sequence in sequences):
        step(planner, token_id=9)
    if leader_ends:
        planner.finish(sequences[0], FinishReason.CANCELLED)
    planner.reset_epoch()
    num_computed = 0
    while planner.waiting or any(s.num_output_tokens < 3 for s in planner.running):
        num_computed += sum(step(planner, token_id=9).work_num_tokens)
    # Twelve tokens of the prompt fill blocks; what follows is each sequence's own.
    num_left = 3 if leader_ends else 4
    assert num_computed < 12 + num_left * 8


def test_a_handover_counts_no_resume() -> None:
    planner = make_planner(max_resumes=0)
    sequence = submit(planner, range(1, 5))[0]
    step(planner, token_id=9)
    assert planner.reset_epoch(is_handover=True) == []
    assert sequence.num_resumes == 0
    plan = step(planner, token_id=8)
    assert list(plan.admissions[0].token_ids) == [1, 2, 3, 4, 9]
    assert list(sequence.token_ids) == [1, 2, 3, 4, 9, 8]
