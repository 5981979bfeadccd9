"""Plans in, tokens out: the delta protocol against a decoder that reads its pages back."""

from __future__ import annotations

import math

import pytest
import torch
from stepwire.executor.v1.executor_pb2 import StepResult
from stepwire_executor.errors import PlanError, PlanOrderError
from support.executor_fakes import (
    ENGINES,
    POISON_TOKEN,
    VOCAB_SIZE,
    EngineName,
    FakeExecutor,
    admission,
    expected_continuation,
    expected_token,
    make_executor,
    sampling_params,
    step,
)

PROMPT = [5, 9, 2, 7, 1, 3]


@pytest.fixture(params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    return name


@pytest.fixture
def executor(engine_name: EngineName) -> FakeExecutor:
    executor = make_executor(engine_name=engine_name)
    executor.runner.open_epoch(1)
    return executor


def tokens_of(result: StepResult) -> dict[int, int]:
    assert list(result.num_sampled_tokens) == [1] * len(result.sampled_slots)
    return dict(zip(result.sampled_slots, result.sampled_token_ids, strict=True))


def decode(executor: FakeExecutor, slot: int, first_step: int, num_steps: int) -> list[int]:
    return [
        tokens_of(executor.runner.execute(step(1, first_step + i, {slot: 1})))[slot]
        for i in range(num_steps)
    ]


def test_a_prompt_is_sent_once_and_decode_feeds_the_executors_own_tokens(
    executor: FakeExecutor,
) -> None:
    joined = step(1, 1, {2: 6}, admissions=[admission(2, PROMPT, [7, 3])])
    first = tokens_of(executor.runner.execute(joined))[2]
    second = tokens_of(executor.runner.execute(step(1, 2, {2: 1})))[2]
    third = tokens_of(executor.runner.execute(step(1, 3, {2: 1})))[2]
    fourth = tokens_of(executor.runner.execute(step(1, 4, {2: 1}, appended=[(2, 11)])))[2]
    assert [first, second, third, fourth] == expected_continuation(PROMPT, 4)


@pytest.mark.parametrize("chunks", [[6], [1, 5], [4, 2], [2, 2, 2], [1] * 6])
def test_chunks_of_a_prompt_sample_only_at_its_end_and_change_nothing(
    executor: FakeExecutor, chunks: list[int]
) -> None:
    for index, chunk in enumerate(chunks, start=1):
        admissions = [admission(0, PROMPT, [9, 4])] if index == 1 else []
        result = executor.runner.execute(step(1, index, {0: chunk}, admissions=admissions))
        if index < len(chunks):
            assert tokens_of(result) == {}
    assert tokens_of(result) == {0: expected_continuation(PROMPT, 1)[0]}


def test_prefill_and_decode_share_a_step_and_results_keep_the_work_lists_order(
    executor: FakeExecutor,
) -> None:
    executor.runner.execute(step(1, 1, {1: 6}, admissions=[admission(1, PROMPT, [0, 1])]))
    other = [8, 8, 4]
    result = executor.runner.execute(
        step(1, 2, {3: 3, 1: 1}, admissions=[admission(3, other, [2])])
    )
    assert list(result.sampled_slots) == [3, 1]
    assert tokens_of(result) == {
        3: expected_continuation(other, 1)[0],
        1: expected_continuation(PROMPT, 2)[1],
    }


def test_a_slot_released_by_a_plan_can_be_taken_by_the_same_plan(executor: FakeExecutor) -> None:
    params = sampling_params(presence_penalty=1.0, temperature=0.5, num_logprobs=1)
    executor.runner.execute(
        step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1], params=params)])
    )
    other = [4, 4]
    result = executor.runner.execute(
        step(1, 2, {0: 2}, released=[0], admissions=[admission(0, other, [1])])
    )
    assert tokens_of(result) == {0: expected_continuation(other, 1)[0]}
    batch = executor.sampler.batches[-1]
    assert batch.temperature[0] == 0.0
    assert sorted(set(executor.sampler.logits[-1][0].tolist())) == [-10.0, 10.0]
    assert not result.logprobs


def test_copied_pages_hold_what_their_sources_held(executor: FakeExecutor) -> None:
    executor.runner.execute(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
    # A second sequence shares block 0 and continues in a copy of block 1.
    fork = [*PROMPT, 60]
    result = executor.runner.execute(
        step(
            1,
            2,
            {1: 1, 0: 1},
            admissions=[admission(1, fork, [0, 5], num_computed_tokens=6)],
            copies=[(1, 5)],
        )
    )
    assert tokens_of(result) == {
        1: expected_continuation(fork, 1)[0],
        0: expected_continuation(PROMPT, 2)[1],
    }


def test_a_cached_prefix_is_not_computed_again(executor: FakeExecutor) -> None:
    executor.runner.execute(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
    result = executor.runner.execute(
        step(1, 2, {1: 2}, admissions=[admission(1, PROMPT, [0, 8], num_computed_tokens=4)])
    )
    assert tokens_of(result) == {1: expected_continuation(PROMPT, 1)[0]}


def test_a_readmitted_sequence_goes_on_with_the_same_tokens(executor: FakeExecutor) -> None:
    executor.runner.execute(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
    generated = [expected_continuation(PROMPT, 1)[0], *decode(executor, 0, 2, 2)]
    executor.runner.execute(step(1, 5 - 1, released=[0]))
    again = admission(3, [*PROMPT, *generated], [9, 8, 7, 6], num_prompt_tokens=6)
    result = executor.runner.execute(step(1, 5, {3: 9}, admissions=[again]))
    continued = [tokens_of(result)[3], *decode(executor, 3, 6, 4)]
    assert generated + continued == expected_continuation(PROMPT, 8)


def test_noise_is_keyed_by_the_tokens_place_whatever_the_way_there(executor: FakeExecutor) -> None:
    params = sampling_params(seed=2**64 - 3, stream=5, temperature=0.5)
    executor.runner.execute(
        step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1], params=params)])
    )
    decode(executor, 0, 2, 1)
    tokens = [*PROMPT, *expected_continuation(PROMPT, 1)]
    executor.runner.execute(
        step(
            1,
            3,
            {1: 7},
            admissions=[admission(1, tokens, [2, 3], num_prompt_tokens=6, params=params)],
        )
    )
    prefill, decoded, readmitted = executor.sampler.batches
    assert prefill.positions[0] == 6
    assert decoded.positions[0] == readmitted.positions[0] == 7
    for batch in executor.sampler.batches:
        assert batch.seeds[0] == -3
        assert batch.streams[0] == 5
        assert batch.temperature[0] == 0.5


def test_a_row_gets_its_own_slots_parameters(executor: FakeExecutor) -> None:
    result = executor.runner.execute(
        step(
            1,
            1,
            {2: 1, 0: 1},
            admissions=[
                admission(0, [1], [0], params=sampling_params(top_k=3, num_logprobs=2)),
                admission(2, [2], [1], params=sampling_params(min_p=0.25)),
            ],
        )
    )
    (batch,) = executor.sampler.batches
    assert batch.top_k[:2].tolist() == [0, 3]
    assert batch.min_p[:2].tolist() == [0.25, 0.0]
    (logprobs,) = result.logprobs
    assert logprobs.token_id == tokens_of(result)[0]
    assert len(logprobs.top_token_ids) == len(logprobs.top_logprobs) == 2


def test_penalties_count_the_prompt_as_seen_and_the_output_as_generated(
    executor: FakeExecutor,
) -> None:
    params = sampling_params(presence_penalty=0.5, frequency_penalty=0.25)
    params.repetition_penalty = 1.5
    # As after preemption: two prompt tokens, then 7 and 7 generated.
    tokens = [3, 7, 7, 7]
    executor.runner.execute(
        step(
            1,
            1,
            {0: 4, 1: 1},
            admissions=[
                admission(0, tokens, [0, 1], num_prompt_tokens=2, params=params),
                admission(1, [9], [2]),
            ],
        )
    )
    executor.runner.execute(step(1, 2, {1: 1, 0: 1}))
    before, after = executor.sampler.logits
    first = expected_token(tokens)
    second = expected_token([*tokens, first])

    def penalised(likeliest: int, generated: dict[int, int], token_id: int) -> float:
        value = 10.0 if token_id == likeliest else -10.0
        if token_id in {3, *generated}:
            value = value / 1.5 if value > 0 else value * 1.5
        count = generated.get(token_id, 0)
        return value - 0.25 * count - (0.5 if count else 0.0)

    for token_id in range(VOCAB_SIZE):
        expected = penalised(first, {7: 2}, token_id)
        assert float(before[0, token_id]) == pytest.approx(expected, rel=1e-6)
    for token_id in range(VOCAB_SIZE):
        expected = penalised(second, {7: 2, first: 1}, token_id)
        assert float(after[1, token_id]) == pytest.approx(expected, rel=1e-6)
    unpenalised = {-10.0, 10.0}
    assert set(before[1].tolist()) == set(after[0].tolist()) == unpenalised


def test_bias_and_suppression_apply_to_their_slot_until_min_tokens(executor: FakeExecutor) -> None:
    params = sampling_params(logit_bias={4: 1.5}, min_tokens=2, suppressed_token_ids=[90, 5])
    executor.runner.execute(
        step(
            1,
            1,
            {1: 2, 0: 6},
            admissions=[
                admission(0, PROMPT, [0, 1, 2], params=params),
                admission(1, [8, 8], [3]),
            ],
        )
    )
    decode(executor, 0, 2, 2)
    first, *others = executor.sampler.logits
    assert set(first[0].tolist()) == {-10.0, 10.0}
    for index, row in enumerate((first[1], *(logits[0] for logits in others))):
        assert float(row[4]) in (-8.5, 11.5)
        suppressed = [token for token in range(VOCAB_SIZE) if row[token] == -torch.inf]
        assert suppressed == ([5, 90] if index < 2 else [])


def test_logprobs_are_those_of_the_logits_before_adjustment(executor: FakeExecutor) -> None:
    likeliest = expected_token(PROMPT)
    params = sampling_params(logit_bias={60: 50.0}, num_logprobs=2)
    result = executor.runner.execute(
        step(
            1,
            1,
            {1: 2, 0: 6},
            admissions=[
                admission(0, PROMPT, [0, 1, 2], params=params),
                admission(1, [8, 8], [3]),
            ],
        )
    )
    assert likeliest != 60
    (logprobs,) = result.logprobs
    assert (logprobs.token_id, logprobs.rank) == (60, 62 if likeliest > 60 else 61)
    assert list(logprobs.top_token_ids) == [likeliest, 0 if likeliest else 1]
    total = math.log(math.exp(10) + (VOCAB_SIZE - 1) * math.exp(-10))
    assert logprobs.logprob == pytest.approx(-10 - total, rel=1e-6)
    assert logprobs.top_logprobs == pytest.approx([10 - total, -10 - total], rel=1e-6)


def test_a_failed_slot_leaves_its_neighbours_alone_and_stays_failed_until_released(
    executor: FakeExecutor,
) -> None:
    bad = [POISON_TOKEN, 1]
    result = executor.runner.execute(
        step(
            1,
            1,
            {0: 6, 1: 2},
            admissions=[admission(0, PROMPT, [0, 1]), admission(1, bad, [2])],
        )
    )
    expected = expected_continuation(PROMPT, 2)
    assert tokens_of(result) == {0: expected[0]}
    assert [failure.slot for failure in result.failures] == [1]
    # Already sent before the failure was known, as a pipelining scheduler does.
    result = executor.runner.execute(step(1, 2, {1: 1, 0: 1}))
    assert tokens_of(result) == {0: expected[1]}
    assert [failure.slot for failure in result.failures] == [1]
    result = executor.runner.execute(
        step(1, 3, {1: 1}, released=[1], admissions=[admission(1, [6], [2])])
    )
    assert tokens_of(result) == {1: expected_continuation([6], 1)[0]}


def test_a_failed_slot_stays_failed_when_its_logits_recover(executor: FakeExecutor) -> None:
    executor.decoder.num_poisoned_forwards = 1
    result = executor.runner.execute(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
    assert [failure.slot for failure in result.failures] == [0]
    result = executor.runner.execute(step(1, 2, {0: 1}))
    assert [failure.slot for failure in result.failures] == [0]
    assert not result.sampled_token_ids


def test_penalties_forget_the_sequence_that_had_the_slot_before(executor: FakeExecutor) -> None:
    params = sampling_params(presence_penalty=0.5, repetition_penalty=2.0)
    executor.runner.execute(
        step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1], params=params)])
    )
    other = [50, 51]
    executor.runner.execute(
        step(1, 2, {0: 2}, released=[0], admissions=[admission(0, other, [0], params=params)])
    )
    logits = executor.sampler.logits[-1][0]
    likeliest = expected_token(other)
    for token_id in range(VOCAB_SIZE):
        expected = 10.0 if token_id == likeliest else -10.0
        if token_id in other:
            expected *= 2.0
        assert float(logits[token_id]) == expected


def test_a_plan_without_work_runs_no_model(executor: FakeExecutor) -> None:
    result = executor.runner.execute(step(1, 1, admissions=[admission(0, PROMPT, [0, 1])]))
    assert (result.epoch, result.step_id) == (1, 1)
    assert executor.decoder.num_forwards == 0


def test_the_checksum_follows_every_change_of_progress(executor: FakeExecutor) -> None:
    plans = [
        step(1, 1),
        step(1, 2, admissions=[admission(0, PROMPT, [0, 1, 2])]),
        step(1, 3, {0: 2}),
        step(1, 4, {0: 4}),
        step(1, 5, {0: 1}),
        step(1, 6, admissions=[admission(1, PROMPT, [3, 4])]),
        step(1, 7, released=[0]),
    ]
    checksums = [executor.runner.execute(plan).slot_table_checksum for plan in plans]
    assert len(set(checksums)) == len(checksums)
    twin = make_executor()
    twin.runner.open_epoch(1)
    assert [twin.runner.execute(plan).slot_table_checksum for plan in plans] == checksums


def test_an_epoch_starts_from_empty_slots_and_step_one(executor: FakeExecutor) -> None:
    params = sampling_params(presence_penalty=1.0)
    executor.runner.execute(
        step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1], params=params)])
    )
    executor.runner.open_epoch(2)
    result = executor.runner.execute(step(2, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
    assert tokens_of(result) == {0: expected_continuation(PROMPT, 1)[0]}
    assert set(executor.sampler.logits[-1][0].tolist()) == {-10.0, 10.0}


@pytest.mark.parametrize(("epoch", "step_id"), [(1, 3), (1, 1), (1, 0), (0, 2), (2, 2)])
def test_a_plan_out_of_order_is_refused(executor: FakeExecutor, epoch: int, step_id: int) -> None:
    executor.runner.execute(step(1, 1))
    with pytest.raises(PlanOrderError):
        executor.runner.execute(step(epoch, step_id))


def test_no_plan_runs_before_an_epoch_is_open() -> None:
    with pytest.raises(PlanOrderError, match="no epoch is open"):
        make_executor().runner.execute(step(0, 1))


def test_after_an_error_the_epoch_is_over(executor: FakeExecutor) -> None:
    with pytest.raises(PlanError):
        executor.runner.execute(step(1, 1, released=[0]))
    with pytest.raises(PlanOrderError, match="no epoch is open"):
        executor.runner.execute(step(1, 2))


def test_two_sequences_cannot_write_one_page(executor: FakeExecutor) -> None:
    clash = [admission(0, [1, 2], [3]), admission(1, [4], [3])]
    with pytest.raises(PlanError, match="same place"):
        executor.runner.execute(step(1, 1, {0: 2, 1: 1}, admissions=clash))
    assert executor.decoder.num_forwards == 0


def test_timings_are_filled(executor: FakeExecutor) -> None:
    result = executor.runner.execute(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
    assert min(result.timings.prepare_ms, result.timings.forward_ms, result.timings.sample_ms) > 0
    assert result.timings.idle_ms >= 0
