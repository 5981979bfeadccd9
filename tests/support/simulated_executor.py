"""An executor in a few lines: follows plans exactly and samples by a pure function.

It holds what a real one holds (tokens, block tables, which token's KV each cell of each page
has) and fails where a real one would read wrong KV, so it is the oracle for the planner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from stepwire_scheduler.plan import StepOutcome, StepPlan

SampleFunction = Callable[[list[int], int], int]


def hashed_sample(vocab_size: int) -> SampleFunction:
    """Next token as a hash of all tokens so far and the stream: any wrong token shows."""

    def sample(token_ids: list[int], stream: int) -> int:
        digest = hashlib.blake2b(repr((token_ids, stream)).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") % vocab_size

    return sample


@dataclass
class _Slot:
    token_ids: list[int]
    num_computed: int
    block_ids: list[int]
    stream: int


@dataclass
class SimulatedExecutor:
    """Applies plans in order and checks each against what an executor can do."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    sample: SampleFunction
    slots: dict[int, _Slot] = field(default_factory=dict)
    pages: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """(block, offset) to the tokens that its KV was computed from, its own last."""
    last_step_id: int = 0

    def execute(self, plan: StepPlan) -> StepOutcome:
        assert plan.step_id == self.last_step_id + 1
        self.last_step_id = plan.step_id
        for slot in plan.released_slots:
            del self.slots[slot]
        for admission in plan.admissions:
            assert admission.slot not in self.slots
            assert 0 <= admission.slot < self.max_num_seqs
            self.slots[admission.slot] = _Slot(
                token_ids=list(admission.token_ids),
                num_computed=admission.num_computed_tokens,
                block_ids=list(admission.block_ids),
                stream=admission.stream,
            )
        for slot, block_id in zip(plan.appended_slots, plan.appended_block_ids, strict=True):
            self.slots[slot].block_ids.append(block_id)
        assert len(set(plan.work_slots)) == len(plan.work_slots)
        assert 0 < sum(plan.work_num_tokens) <= self.max_num_batched_tokens
        sampled: list[int] = []
        for slot, num_tokens in zip(plan.work_slots, plan.work_num_tokens, strict=True):
            state = self.slots[slot]
            assert 0 < num_tokens <= len(state.token_ids) - state.num_computed
            self._compute(state, num_tokens)
            if state.num_computed == len(state.token_ids):
                token_id = self.sample(state.token_ids, state.stream)
                state.token_ids.append(token_id)
                sampled.append(token_id)
        return StepOutcome(
            step_id=plan.step_id, sampled_token_ids=sampled, logprobs=[], failures={}
        )

    def _compute(self, state: _Slot, num_tokens: int) -> None:
        end = state.num_computed + num_tokens
        assert end <= len(state.block_ids) * self.block_size, "no block for a token"
        for position in range(state.num_computed, end):
            self.pages[self._cell(state, position)] = tuple(state.token_ids[: position + 1])
        for position in range(end):
            held = self.pages.get(self._cell(state, position))
            assert held == tuple(state.token_ids[: position + 1]), "read another prompt's KV"
        state.num_computed = end

    def _cell(self, state: _Slot, position: int) -> tuple[int, int]:
        block_id = state.block_ids[position // self.block_size]
        assert 0 <= block_id < self.num_blocks
        return block_id, position % self.block_size
