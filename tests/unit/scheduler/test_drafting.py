"""Drafts in the planner: what they may take, and what is left where a sequence ends inside one."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest
from stepwire_scheduler.block_table import BlockTables
from stepwire_scheduler.plan import SequenceUpdate, StepOutcome, StepPlan
from stepwire_scheduler.planner import Planner, PlannerConfig
from stepwire_scheduler.sequence import FinishReason, Logprobs, Request, SamplingParams, Sequence
from stepwire_scheduler.speculation.config import MAX_SPECULATIVE_TOKENS
from support.scripted_speculator import DraftModelSpeculator, ScriptedSpeculator
from support.simulated_executor import SimulatedExecutor, hashed_draft, hashed_sample, truth_of

VOCAB_SIZE = 1_000
NUM_DRAFTS = 4
SAMPLE = hashed_sample(VOCAB_SIZE)
PROMPT = [1, 2, 3, 4, 5]


def undisturbed(num_tokens: int, prompt: list[int] = PROMPT, stream: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(SAMPLE(tokens, stream))
    return tokens[len(prompt) :]


class Speculating:
    """A planner with a speculator, over an executor that answers when it is told to."""

    def __init__(self, speculator: ScriptedSpeculator | None = None, **changes: object) -> None:
        self.speculator = speculator or ScriptedSpeculator(
            truth_of(SAMPLE), vocab_size=VOCAB_SIZE, max_drafts=NUM_DRAFTS, is_always_right=True
        )
        settings: dict[str, object] = {
            "num_blocks": 40,
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "max_num_prefill_tokens": 32,
            "max_inflight_steps": 2,
        }
        config = PlannerConfig(**(settings | changes))  # type: ignore[arg-type]
        self.planner = Planner(config, prefix_key=b"k", speculator=self.speculator)
        self.start_executor()

    def start_executor(self) -> None:
        config = self.planner.config
        self.executor = SimulatedExecutor(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            sample=SAMPLE,
            draft=hashed_draft(SAMPLE, VOCAB_SIZE),
        )

    def submit(
        self,
        prompt: list[int] = PROMPT,
        *,
        request_id: str = "r",
        deadline_ms: float = float("inf"),
        **params: object,
    ) -> list[Sequence]:
        return self.planner.add(
            Request(
                request_id=request_id,
                prompt_token_ids=array("I", prompt),
                sampling_params=SamplingParams(**({"max_tokens": 20} | params)),  # type: ignore[arg-type]
                deadline_ms=deadline_ms,
            )
        )

    def plan(self) -> StepPlan:
        plan = self.planner.plan(0.0)
        assert plan is not None
        return plan

    def answer(self, plan: StepPlan) -> list[SequenceUpdate]:
        return self.planner.commit(self.executor.execute(plan))

    def step(self) -> StepPlan:
        plan = self.plan()
        self.answer(plan)
        return plan

    def steps(self) -> Iterator[StepPlan]:
        while self.planner.running or self.planner.waiting:
            yield self.step()

    def run(self) -> None:
        for _ in self.steps():
            pass
        self.check_idle()

    def check_idle(self) -> None:
        assert not self.planner.inflight
        assert self.planner.block_pool.num_free == self.planner.config.num_blocks


def test_no_more_rows_are_sampled_than_executors_have_logits_for() -> None:
    world = Speculating(max_num_seqs=5, max_num_batched_tokens=64, num_blocks=80)
    for i in range(5):
        world.submit([1, 2, i, i + 1], request_id=f"r{i}")
    most = 0
    for plan in world.steps():
        most = max(most, len(plan.sampled_sequences) + sum(plan.work_num_drafts))
    assert most == 1 + MAX_SPECULATIVE_TOKENS


def test_accepted_drafts_come_with_the_step_and_one_token_more() -> None:
    world = Speculating()
    sequence = world.submit()[0]
    world.step()
    assert world.planner.last_drafts == []
    plan = world.step()
    assert plan.work_num_drafts == [NUM_DRAFTS]
    assert plan.draft_token_ids == undisturbed(5)[1:]
    assert plan.work_num_tokens == [1]
    assert plan.num_scheduled_tokens == 1 + NUM_DRAFTS
    assert sequence.num_output_tokens == 1 + NUM_DRAFTS + 1
    assert sequence.num_computed_tokens == len(sequence.token_ids) - 1
    assert world.planner.last_drafts == [(NUM_DRAFTS, NUM_DRAFTS)]
    assert (sequence.num_draft_tokens, sequence.num_accepted_tokens) == (NUM_DRAFTS, NUM_DRAFTS)
    world.run()
    assert list(sequence.token_ids[5:]) == undisturbed(20)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("cut", range(1, 12))
def test_max_tokens_ends_a_sequence_anywhere_in_a_draft(cut: int, block_size: int) -> None:
    world = Speculating(block_size=block_size)
    sequence = world.submit(max_tokens=cut)[0]
    world.run()
    assert list(sequence.token_ids[5:]) == undisturbed(cut)
    assert sequence.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("cut", range(1, 12))
def test_a_stop_token_ends_a_sequence_anywhere_in_a_draft(cut: int, block_size: int) -> None:
    world = Speculating(block_size=block_size)
    neighbour = world.submit([9, 8, 7], request_id="n", max_tokens=25)[0]
    expected = undisturbed(cut)
    sequence = world.submit(stop_token_ids=frozenset({expected[-1]}))[0]
    world.run()
    assert list(sequence.token_ids[5:]) == expected
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.stop_token_id == expected[-1]
    assert list(neighbour.token_ids[3:]) == undisturbed(25, [9, 8, 7])


@pytest.mark.parametrize("cut", range(1, 7))
def test_log_probabilities_are_cut_where_the_tokens_are(cut: int) -> None:
    world = Speculating()
    expected = undisturbed(cut)
    world.submit(stop_token_ids=frozenset({expected[-1]}), num_logprobs=0)
    told: list[tuple[int, int]] = []
    while world.planner.running or world.planner.waiting:
        outcome = world.executor.execute(world.plan())
        for token_id in outcome.sampled_token_ids:
            outcome.logprobs.append(
                Logprobs(token_id=token_id, logprob=0.0, rank=1, top_token_ids=(), top_logprobs=())
            )
        for update in world.planner.commit(outcome):
            told += zip(
                update.token_ids, (entry.token_id for entry in update.logprobs), strict=True
            )
    assert told == [(token_id, token_id) for token_id in expected]


def test_nothing_is_planned_behind_a_step_with_drafts() -> None:
    world = Speculating(max_inflight_steps=3)
    world.submit()
    first, second = world.plan(), world.plan()
    assert not first.work_num_drafts
    assert second.work_num_drafts, "it may carry drafts while the step before is out"
    assert world.planner.plan(0.0) is None
    world.answer(first)
    assert world.planner.plan(0.0) is None
    world.answer(second)
    assert world.planner.plan(0.0) is not None


def test_steps_without_drafts_run_ahead_as_before() -> None:
    world = Speculating(max_inflight_steps=3)
    world.submit(num_speculative_tokens=0)
    plans = [world.plan() for _ in range(3)]
    assert not any(plan.work_num_drafts for plan in plans)
    assert world.speculator.num_drafted == 0


def test_a_draft_begins_behind_a_pending_token() -> None:
    world = Speculating()
    sequence = world.submit()[0]
    first, second = world.plan(), world.plan()
    assert second.draft_token_ids == undisturbed(1 + NUM_DRAFTS)[1:]
    world.answer(first)
    world.answer(second)
    assert sequence.num_accepted_tokens == NUM_DRAFTS
    world.run()
    assert list(sequence.token_ids[5:]) == undisturbed(20)


def test_rejected_drafts_leave_no_blocks() -> None:
    def wrong(sequence: Sequence, num_tokens: int) -> list[int]:
        return [VOCAB_SIZE + 1] * num_tokens

    class Wrong(ScriptedSpeculator):
        def _check_acceptance(
            self, sequence: Sequence, num_drafted: int, num_accepted: int
        ) -> None:
            assert num_accepted == 0

    world = Speculating(Wrong(wrong, vocab_size=VOCAB_SIZE, max_drafts=9, is_always_right=True))
    sequence = world.submit()[0]
    world.step()
    plan = world.plan()
    num_before = len(sequence.block_ids)
    world.answer(plan)
    assert num_before == 4, "5 known, 1 sampled and 9 drafts have blocks of 4"
    assert len(sequence.block_ids) == 2, "7 tokens need 2 blocks"
    assert world.planner.block_pool.num_used == 2
    assert world.planner.block_pool.num_leased == 0
    assert world.planner.last_drafts == [(9, 0)]
    world.run()
    assert list(sequence.token_ids[5:]) == undisturbed(20)


def test_drafts_take_free_blocks_only_and_preempt_nobody() -> None:
    world = Speculating(num_blocks=5, enable_prefix_caching=False)
    first = world.submit([1, 2, 3, 4, 5, 6, 7], max_tokens=5)[0]
    second = world.submit([7, 6, 5, 4, 3, 2], request_id="s", max_tokens=5)[0]
    world.step()
    plan = world.step()
    assert len(plan.appended_block_ids) == 1, "all that is free"
    assert plan.work_num_drafts == [3, 1]
    assert plan.num_preemptions == 0
    for sequence in (first, second):
        assert sequence.num_preemptions == 0
    world.run()
    assert list(first.token_ids[7:]) == undisturbed(5, [1, 2, 3, 4, 5, 6, 7])
    assert list(second.token_ids[6:]) == undisturbed(5, [7, 6, 5, 4, 3, 2])


def test_drafts_take_what_prefills_leave_of_the_token_budget() -> None:
    world = Speculating(max_num_batched_tokens=12)
    world.submit()
    world.step()
    world.submit(list(range(9)), request_id="long")
    plan = world.step()
    assert plan.work_num_tokens == [1, 9]
    assert plan.work_num_drafts == [2, 0]
    assert plan.num_scheduled_tokens == 12


@pytest.mark.parametrize("num_asked", [0, 1, 3, 16])
def test_a_request_bounds_its_drafts(num_asked: int) -> None:
    world = Speculating()
    world.submit(num_speculative_tokens=num_asked)
    world.step()
    plan = world.step()
    assert sum(plan.work_num_drafts) == min(num_asked, NUM_DRAFTS)


def test_every_sequence_of_a_request_has_its_own_drafts() -> None:
    world = Speculating(max_num_batched_tokens=64)
    sequences = world.submit([*range(9)], n=3)
    world.run()
    for stream, sequence in enumerate(sequences):
        assert list(sequence.token_ids[9:]) == undisturbed(20, [*range(9)], stream)
        assert sequence.num_accepted_tokens > 10


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_sequence_may_end_while_its_drafts_are_out(how: str) -> None:
    world = Speculating()
    sequence = world.submit(deadline_ms=5.0)[0]
    world.step()
    plan = world.plan()
    if how == "cancel":
        world.planner.finish(sequence, FinishReason.CANCELLED)
    else:
        assert [update.sequence for update in world.planner.expire(5.0)] == [sequence]
    assert world.planner.block_pool.num_leased == 3, "the step may still touch them"
    assert world.answer(plan) == []
    world.check_idle()
    assert sequence.num_output_tokens == 1
    assert world.planner.last_drafts == [(NUM_DRAFTS, NUM_DRAFTS)]


def test_a_lost_epoch_loses_its_drafts_only() -> None:
    world = Speculating()
    sequence = world.submit()[0]
    world.step()
    world.plan()
    assert world.planner.reset_epoch() == []
    world.speculator.reset_epoch()
    world.start_executor()
    world.run()
    assert list(sequence.token_ids[5:]) == undisturbed(20)
    assert sequence.num_resumes == 1


def test_a_handover_between_steps_with_drafts_loses_nothing() -> None:
    world = Speculating()
    sequence = world.submit()[0]
    world.step()
    world.step()
    assert world.planner.reset_epoch(is_handover=True) == []
    world.start_executor()
    plan = world.step()
    assert not plan.work_num_drafts, "its tokens are recomputed first"
    assert world.step().work_num_drafts == [NUM_DRAFTS]
    world.run()
    assert list(sequence.token_ids[5:]) == undisturbed(20)
    assert sequence.num_resumes == 0


def test_drafts_of_a_draft_model_are_not_named() -> None:
    speculator = DraftModelSpeculator(
        truth_of(SAMPLE), vocab_size=VOCAB_SIZE, max_drafts=NUM_DRAFTS, is_always_right=True
    )
    world = Speculating(speculator, has_draft_model=True)
    sequence = world.submit(max_tokens=60)[0]
    num_asked = num_verified = 0
    for plan in world.steps():
        assert plan.draft_token_ids == []
        num_asked += sum(plan.work_num_drafts)
        num_verified += sum(num_drafted for num_drafted, _ in world.planner.last_drafts)
    world.check_idle()
    assert list(sequence.token_ids[5:]) == undisturbed(60)
    assert 0 < sequence.num_accepted_tokens < sequence.num_draft_tokens == num_verified < num_asked


def test_a_slot_that_fails_in_a_step_with_drafts_fails_alone() -> None:
    world = Speculating(max_num_batched_tokens=64)
    failed = world.submit(request_id="f")[0]
    other = world.submit([9, 8, 7], request_id="o")[0]
    world.step()
    plan = world.plan()
    outcome = world.executor.execute(plan)
    assert outcome.num_sampled_tokens == [NUM_DRAFTS + 1] * 2
    updates = world.planner.commit(
        StepOutcome(
            step_id=plan.step_id,
            sampled_token_ids=outcome.sampled_token_ids[NUM_DRAFTS + 1 :],
            logprobs=[],
            failures={failed.slot: "not finite"},
            num_sampled_tokens=[0, NUM_DRAFTS + 1],
            num_draft_tokens=[0, NUM_DRAFTS],
        )
    )
    assert [update.sequence for update in updates] == [failed, other]
    assert failed.finish_reason is FinishReason.ERROR
    world.run()
    assert list(other.token_ids[3:]) == undisturbed(20, [9, 8, 7])


def test_blocks_that_accepted_drafts_fill_are_shared_and_no_others() -> None:
    for max_tokens in range(8, 18):
        world = Speculating()
        first = world.submit([1, 2, 3], max_tokens=max_tokens)[0]
        world.run()
        longer = [*first.token_ids, 7]
        second = world.submit(longer, request_id="s", max_tokens=2)[0]
        world.run()
        assert second.num_cached_tokens == (len(first.token_ids) - 1) // 4 * 4
        assert list(second.token_ids[len(longer) :]) == undisturbed(2, longer)


def test_registering_the_place_of_a_rejected_draft_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def register(tables: BlockTables, sequence: Sequence, plan: StepPlan) -> None:
        tables._register([(sequence, len(sequence.token_ids))], plan.step_id)

    monkeypatch.setattr(BlockTables, "register", register)
    with pytest.raises(AssertionError, match="another prompt's KV"):
        test_blocks_that_accepted_drafts_fill_are_shared_and_no_others()


def test_the_speculator_learns_how_large_a_step_was() -> None:
    class Measuring(DraftModelSpeculator):
        sizes: list[int] = []  # noqa: RUF012 - one test's

        def note_step(
            self,
            *,
            num_tokens: int,
            busy_ms: float,
            num_drafts: int = 0,
            idle_ms: float | None = None,
        ) -> None:
            self.sizes.append(num_tokens)
            assert busy_ms == 1.0

    speculator = Measuring(truth_of(SAMPLE), vocab_size=VOCAB_SIZE, max_drafts=3)
    world = Speculating(speculator, has_draft_model=True)
    world.submit()
    for plan in world.steps():
        num_verified = sum(num_drafted for num_drafted, _ in world.planner.last_drafts)
        assert speculator.sizes[-1] == sum(plan.work_num_tokens) + num_verified
