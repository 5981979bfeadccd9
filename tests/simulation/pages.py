"""A model in a few lines: KV in pages, and a token that is a function of what was read there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from stepwire.executor.v1 import executor_pb2 as pb
from stepwire_scheduler.sequence import Sequence

VOCAB_SIZE = 61
EOS = 7
_UNWRITTEN = -1


def next_cell(cells: tuple[int, ...], token_id: int) -> int:
    """The KV of a token after those in cells, as one number."""
    return hash((cells[-1] if cells else 0, token_id, len(cells)))


@lru_cache(maxsize=100_000)
def sample(cells: tuple[int, ...], stream: int) -> int:
    """The token after cells: one wrong cell anywhere changes it, most likely."""
    return (hash((cells, stream)) >> 7) % VOCAB_SIZE


class UndisturbedRun:
    """What one sequence generates where nothing goes wrong."""

    def __init__(self, prompt: tuple[int, ...], stream: int) -> None:
        self._stream = stream
        self._cells: tuple[int, ...] = ()
        for token_id in prompt:
            self._push(token_id)

    def next_token(self) -> int:
        """Generate one more."""
        token_id = sample(self._cells, self._stream)
        self._push(token_id)
        return token_id

    def _push(self, token_id: int) -> None:
        self._cells += (next_cell(self._cells, token_id),)


def true_continuation(sequence: Sequence, num_tokens: int) -> list[int]:
    """What a sequence generates behind the tokens that it has."""
    run = UndisturbedRun(tuple(sequence.token_ids), sequence.index)
    return [run.next_token() for _ in range(num_tokens)]


@dataclass(slots=True)
class _Slot:
    token_ids: list[int]
    num_computed: int
    block_ids: list[int]
    stream: int
    has_failed: bool = False


class BrokenPlanError(AssertionError):
    """A plan asks for what an executor cannot do."""


class PagedModel:
    """The slot table and pages of one rank; every read and write goes through a block table."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        # Pages outlive epochs, as memory does: what an epoch before left there is wrong now.
        self._pages = [[_UNWRITTEN] * block_size for _ in range(num_blocks)]
        self._slots: dict[int, _Slot] = {}
        self._last_step_id = 0

    def open_epoch(self) -> None:
        """Empty every slot."""
        self._slots.clear()
        self._last_step_id = 0

    def execute(self, plan: pb.StepPlan, failing_slots: frozenset[int]) -> pb.StepResult:
        """Run a step; sequences of failing_slots cannot go on. Raises BrokenPlanError."""
        slots = self._slots
        _require(plan.step_id == self._last_step_id + 1, plan, "is out of order")
        self._last_step_id = plan.step_id
        for slot in plan.released_slots:
            _require(slots.pop(slot, None) is not None, plan, f"releases the empty slot {slot}")
        for admission in plan.admissions:
            is_free = admission.slot not in slots and admission.slot < self._max_num_seqs
            _require(is_free, plan, f"admits to slot {admission.slot}, which is not free")
            slots[admission.slot] = _Slot(
                list(admission.token_ids),
                admission.num_computed_tokens,
                list(admission.block_ids),
                admission.sampling_params.stream,
            )
        for slot, block_id in zip(plan.appended_slots, plan.appended_block_ids, strict=True):
            slots[slot].block_ids.append(block_id)
        _require(len(set(plan.work_slots)) == len(plan.work_slots), plan, "names a slot twice")
        num_drafts = list(plan.work_num_drafts) or [0] * len(plan.work_slots)
        num_tokens = sum(plan.work_num_tokens) + sum(num_drafts)
        _require(0 < num_tokens <= self._max_num_batched_tokens, plan, f"has {num_tokens} tokens")
        result = pb.StepResult(epoch=plan.epoch, step_id=plan.step_id)
        num_read = 0
        for slot, count, num_asked in zip(
            plan.work_slots, plan.work_num_tokens, num_drafts, strict=True
        ):
            state = slots[slot]
            known = len(state.token_ids)
            _require(0 < count <= known - state.num_computed, plan, f"overruns slot {slot}")
            drafts = list(plan.draft_token_ids[num_read : num_read + num_asked])
            num_read += num_asked
            if num_asked and not plan.draft_token_ids:
                drafts = _propose(state, num_asked)
            sampled = self._compute(state, count, drafts, plan)
            _require(bool(sampled) or not num_asked, plan, "has drafts of what is not known")
            if not sampled:
                continue
            state.token_ids += sampled
            state.num_computed += len(sampled) - 1
            if num_asked:
                del state.block_ids[-(-len(state.token_ids) // self._block_size) :]
            state.has_failed |= slot in failing_slots
            if state.has_failed:
                result.failures.add(slot=slot, reason="planted")
            else:
                result.sampled_slots.append(slot)
                result.num_sampled_tokens.append(len(sampled))
                result.sampled_token_ids.extend(sampled)
                if plan.work_num_drafts:
                    result.num_draft_tokens.append(len(drafts))
        result.slot_table_checksum = hash(
            tuple((slot, len(s.token_ids), s.num_computed) for slot, s in sorted(slots.items()))
        ) % (1 << 64)
        return result

    def _compute(self, state: _Slot, count: int, drafts: list[int], plan: pb.StepPlan) -> list[int]:
        """Write the KV of the next tokens and drafts; the tokens sampled behind the last known."""
        size, pages, block_ids = self._block_size, self._pages, state.block_ids
        start, end = state.num_computed, state.num_computed + count
        last = end + len(drafts)
        _require(last <= len(block_ids) * size, plan, "has no block for a token")
        read: list[int] = []
        for block_id in block_ids[: -(-last // size)]:
            read += pages[block_id]
        cells = tuple(read[:start])
        for position, token_id in enumerate(state.token_ids[start:end] + drafts, start):
            cell = next_cell(cells, token_id)
            pages[block_ids[position // size]][position % size] = cell
            cells += (cell,)
        state.num_computed = end
        sampled: list[int] = []
        if end == len(state.token_ids):
            for draft in [*drafts, None]:
                sampled.append(sample(cells[: end + len(sampled)], state.stream))
                if sampled[-1] != draft:
                    break
        return sampled


def _propose(state: _Slot, num_tokens: int) -> list[int]:
    """What the draft model makes of a sequence: right for a while, or nothing."""
    run = UndisturbedRun(tuple(state.token_ids), state.stream)
    chance = hash(tuple(state.token_ids)) >> 5
    drafts = [run.next_token() for _ in range(chance % (num_tokens + 1))]
    if chance % 3 == 0 and drafts:
        drafts[chance % len(drafts)] ^= 1
    return drafts


def _require(condition: bool, plan: pb.StepPlan, problem: str) -> None:
    if not condition:
        raise BrokenPlanError(f"step {plan.step_id} of epoch {plan.epoch} {problem}")
