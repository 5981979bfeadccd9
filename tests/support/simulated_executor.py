"""An executor in a few lines: follows plans exactly and samples by a pure function.

It holds what a real one holds (tokens, block tables, which token's KV each cell of each page
has) and fails where a real one would read wrong KV, so it is the oracle for the planner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from stepwire_scheduler.plan import StepOutcome, StepPlan
from stepwire_scheduler.sequence import Sequence

SampleFunction = Callable[[list[int], int], int]
DraftFunction = Callable[[list[int], int, int], list[int]]
"""Of a draft model: all tokens so far, the stream, and the most tokens that it may propose."""


def hashed_sample(vocab_size: int) -> SampleFunction:
    """Next token as a hash of all tokens so far and the stream: any wrong token shows."""

    def sample(token_ids: list[int], stream: int) -> int:
        digest = hashlib.blake2b(repr((token_ids, stream)).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") % vocab_size

    return sample


def hashed_draft(sample: SampleFunction, vocab_size: int) -> DraftFunction:
    """A draft model that is right at first, then wrong, and sometimes has nothing to say."""

    def draft(token_ids: list[int], stream: int, num_tokens: int) -> list[int]:
        digest = hashlib.blake2b(repr((token_ids, stream)).encode(), digest_size=4).digest()
        num_right = digest[0] % 4
        drafts: list[int] = []
        for position in range(digest[1] % (num_tokens + 1)):
            token_id = sample(token_ids + drafts, stream)
            drafts.append(token_id if position < num_right else (token_id + 1) % vocab_size)
        return drafts

    return draft


def truth_of(sample: SampleFunction) -> Callable[[Sequence, int], list[int]]:
    """What an executor that samples so generates."""

    def truth(sequence: Sequence, num_tokens: int) -> list[int]:
        tokens = list(sequence.token_ids)
        for _ in range(num_tokens):
            tokens.append(sample(tokens, sequence.index))
        return tokens[len(sequence.token_ids) :]

    return truth


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
    draft: DraftFunction | None = None
    """Of the draft model, for plans that do not say what the drafts are."""
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
        num_drafts = plan.work_num_drafts or [0] * len(plan.work_slots)
        num_tokens = sum(plan.work_num_tokens) + sum(num_drafts)
        assert 0 < num_tokens <= self.max_num_batched_tokens
        named = iter(plan.draft_token_ids)
        outcome = StepOutcome(
            step_id=plan.step_id, sampled_token_ids=[], logprobs=[], failures={}, busy_ms=1.0
        )
        for slot, num_tokens, num_asked in zip(
            plan.work_slots, plan.work_num_tokens, num_drafts, strict=True
        ):
            state = self.slots[slot]
            assert 0 < num_tokens <= len(state.token_ids) - state.num_computed
            end = state.num_computed + num_tokens
            is_sampled = end == len(state.token_ids)
            assert is_sampled or not num_asked, "a draft behind tokens that are not computed"
            drafts: list[int] = []
            if num_asked and plan.draft_token_ids:
                drafts = [next(named) for _ in range(num_asked)]
            elif num_asked:
                assert self.draft is not None, "no draft model"
                drafts = self.draft(state.token_ids, state.stream, num_asked)
            assert end + num_asked <= len(state.block_ids) * self.block_size, "no block for a draft"
            self._compute(state, state.token_ids[:end] + drafts)
            state.num_computed = end
            if is_sampled:
                sampled = self._verify(state, drafts)
                state.token_ids += sampled
                state.num_computed += len(sampled) - 1
                outcome.sampled_token_ids.extend(sampled)
                if plan.work_num_drafts:
                    outcome.num_sampled_tokens.append(len(sampled))
                    outcome.num_draft_tokens.append(len(drafts))
            if num_asked:
                del state.block_ids[-(-len(state.token_ids) // self.block_size) :]
        assert next(named, None) is None, "drafts of nobody"
        return outcome

    def _verify(self, state: _Slot, drafts: list[int]) -> list[int]:
        """Sample behind the last token and behind each draft that was sampled before."""
        sampled: list[int] = []
        for draft in [*drafts, None]:
            sampled.append(self.sample(state.token_ids + sampled, state.stream))
            if sampled[-1] != draft:
                break
        return sampled

    def _compute(self, state: _Slot, token_ids: list[int]) -> None:
        """Write the KV of tokens that are not computed, then read that of all before them."""
        assert len(token_ids) <= len(state.block_ids) * self.block_size, "no block for a token"
        for position in range(state.num_computed, len(token_ids)):
            self.pages[self._cell(state, position)] = tuple(token_ids[: position + 1])
        for position in range(len(token_ids)):
            held = self.pages.get(self._cell(state, position))
            assert held == tuple(token_ids[: position + 1]), "read another prompt's KV"

    def _cell(self, state: _Slot, position: int) -> tuple[int, int]:
        block_id = state.block_ids[position // self.block_size]
        assert 0 <= block_id < self.num_blocks
        return block_id, position % self.block_size
