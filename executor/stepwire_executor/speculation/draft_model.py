"""Proposes tokens with a smaller model that has pages of its own.

Everything it knows follows from the slot table: where a sequence got tokens without it, it computes
them before it proposes again. Its pages hold the same tokens in the same blocks as the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stepwire_executor.batch import StepBatch
from stepwire_executor.config import blocks_for
from stepwire_executor.engine.device_queue import DeviceQueue
from stepwire_executor.engine.interface import Decoder
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.slots import SlotTable
from stepwire_executor.speculation.draft_state import DraftState
from stepwire_executor.speculation.interface import Drafts, DraftSample, DrawnTokens
from stepwire_executor.step_work import AppliedPlan, Int64Array, StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Sequences of one step of the draft model: each computes positions starts to ends."""

    slots: Int64Array
    starts: Int64Array
    ends: Int64Array


class DraftModel:
    """A DraftProposer: a decoder, its pages, and how far they reach."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        cache: KVCache,
        queue: DeviceQueue,
        max_model_len: int,
        draft_vocab_size: int,
        vocab_size: int,
        max_num_batched_tokens: int,
        trims_block_tables: bool,
    ) -> None:
        """Join the parts.

        max_model_len: positions that the decoder can compute; drafts end there. vocab_size: of the
        target; tokens that only one of the two has are never proposed. trims_block_tables: whether
        batches have only the columns that they need; as the engine does it, as on a device bits
        may depend on it.
        """
        self._decoder = decoder
        self._cache = cache
        self._queue = queue
        self._max_model_len = max_model_len
        self._draft_vocab_size = draft_vocab_size
        self._vocab_size = vocab_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._trims_block_tables = trims_block_tables
        self._state = DraftState(num_blocks=cache.num_blocks, block_size=cache.block_size)

    def clear(self) -> None:
        """See DraftProposer."""
        self._state.clear()

    @torch.inference_mode()
    def run_padding(self, lengths: Sequence[int], slots: SlotTable) -> None:
        """Run a step of nothing real, to compile its kernels or to see what memory it takes.

        lengths: tokens of each sequence; what is beyond the draft model's context is left out.
        """
        sizes = np.minimum(np.array(lengths, np.int64), self._max_model_len)
        ends = np.cumsum(sizes)
        num_tokens = int(ends[-1])
        upload = self._queue.upload
        batch = StepBatch(
            token_ids=upload(np.zeros(num_tokens, np.int64)),
            positions=upload(np.arange(num_tokens) - np.repeat(ends - sizes, sizes)),
            slot_mapping=upload(np.full(num_tokens, -1)),
            cu_seqlens_q=upload(np.concatenate(([0], ends)).astype(np.int32)),
            seq_lens=upload(sizes.astype(np.int32)),
            block_table=upload(np.zeros((sizes.size, slots.max_blocks_per_seq), np.int32)),
            logit_rows=upload(ends - 1),
            max_query_len=int(sizes.max()),
        )
        self._fitting(self._decoder.logits(self._decoder.hidden_states(batch, self._cache)))
        self._queue.mark().wait()

    def take(self, applied: AppliedPlan, slots: SlotTable) -> None:
        """See DraftProposer."""
        self._state.take(applied, slots)

    def propose(self, work: StepWork, slots: SlotTable, sample: DraftSample) -> Drafts:
        """See DraftProposer.

        A sequence of which the draft model lacks tokens has none until it caught up with them, for
        which a step has max_num_batched_tokens; those that lack fewest come first.
        """
        places = np.flatnonzero(work.num_drafts)
        rows = work.slots[places]
        known = slots.num_tokens[rows]
        # The last draft is proposed, not computed.
        limits = np.minimum(work.num_drafts[places], self._max_model_len - known + 1)
        starts = np.minimum(self._state.num_computed_tokens(rows, slots), known - 1)
        caught, behind = self._share_budget(known - starts, limits)
        # Those with most drafts first: the rows of every further step are then the first ones.
        order = caught[np.argsort(-limits[caught], kind="stable")]
        chosen = np.concatenate((order, behind[:, 0]))
        num_drafts = np.zeros_like(work.num_drafts)
        if not chosen.size:
            return self._no_drafts(num_drafts)
        ends = np.concatenate((known[order], starts[behind[:, 0]] + behind[:, 1]))
        step = _Rows(slots=rows[chosen], starts=starts[chosen], ends=ends)
        hidden = self._compute(step, slots, num_sampled=order.size, token_ids=None)
        for slot, start, end in zip(step.slots, step.starts, step.ends, strict=True):
            self._state.set_computed(int(slot), int(start), int(end), slots)
        if not order.size:
            return self._no_drafts(num_drafts)
        num_drafts[places[order]] = limits[order]
        drawn = self._continue(rows[order], known[order], limits[order], hidden, slots, sample)
        return self._in_order_of(places[order], num_drafts, drawn)

    def _no_drafts(self, num_drafts: Int64Array) -> Drafts:
        none = torch.zeros(0, dtype=torch.int64, device=self._queue.device)
        return Drafts(num_tokens=num_drafts, token_ids=none)

    def _share_budget(
        self, missing: Int64Array, limits: Int64Array
    ) -> tuple[Int64Array, Int64Array]:
        """Who computes all it lacks in this step, and who a part.

        Returns places, and [num_behind, 2] places and numbers of tokens.
        """
        left = self._max_num_batched_tokens
        caught, behind = [], []
        for place in np.argsort(missing, kind="stable").tolist():
            if limits[place] < 1 or not left:
                continue
            num_tokens = min(left, int(missing[place]))
            left -= num_tokens
            if num_tokens == missing[place]:
                caught.append(place)
            else:
                behind.append((place, num_tokens))
        return np.array(caught, np.int64), np.array(behind, np.int64).reshape(-1, 2)

    def _continue(
        self,
        rows: Int64Array,
        known: Int64Array,
        num_drafts: Int64Array,
        hidden: Tensor,
        slots: SlotTable,
        sample: DraftSample,
    ) -> list[DrawnTokens]:
        """Draw a draft of each sequence, then compute it and draw the next.

        num_drafts: falling, so that those that go on are the first rows. hidden: of the last known
        tokens. Returns what was drawn in each step, for the sequences that it was drawn for.
        """
        most = int(num_drafts[0])
        tokens = torch.zeros((rows.size, most), dtype=torch.int64, device=hidden.device)
        drawn: list[DrawnTokens] = []
        for step in range(most):
            num_rows = int((num_drafts > step).sum())
            if step:
                at = known[:num_rows] + step - 1
                single = _Rows(slots=rows[:num_rows], starts=at, ends=at + 1)
                hidden = self._compute(
                    single, slots, num_sampled=num_rows, token_ids=tokens[:num_rows, step - 1]
                )
            logits = self._fitting(self._decoder.logits(hidden))
            drawn.append(sample(logits, rows[:num_rows], tokens[:num_rows, :step]))
            tokens[:num_rows, step] = drawn[-1].token_ids
        for slot, start, num in zip(rows, known, num_drafts, strict=True):
            # The last draft was drawn, and never computed.
            self._state.set_drafted(int(slot), int(start), int(num) - 1)
        return drawn

    def _compute(
        self,
        rows: _Rows,
        slots: SlotTable,
        *,
        num_sampled: int,
        token_ids: Tensor | None,
    ) -> Tensor:
        """Final hidden states of the last tokens of the first num_sampled sequences.

        token_ids: to compute, one a sequence; None takes what the slots know.
        """
        lengths = rows.ends - rows.starts
        cu_seqlens_q = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=cu_seqlens_q[1:])
        places = np.repeat(rows.slots, lengths)
        positions = np.arange(cu_seqlens_q[-1]) - np.repeat(
            cu_seqlens_q[:-1] - rows.starts, lengths
        )
        block_ids = slots.block_table[places, positions // slots.block_size].astype(np.int64)
        slot_mapping = block_ids * slots.block_size + positions % slots.block_size
        num_columns = slots.max_blocks_per_seq
        if self._trims_block_tables:
            num_columns = blocks_for(int(rows.ends.max()), slots.block_size)
        upload = self._queue.upload
        if token_ids is None:
            token_ids = upload(slots.token_ids[places, positions].astype(np.int64))
        batch = StepBatch(
            # A token that the draft model does not know spoils the drafts behind it, no more.
            token_ids=torch.where(token_ids < self._draft_vocab_size, token_ids, 0),
            positions=upload(positions),
            slot_mapping=upload(slot_mapping),
            cu_seqlens_q=upload(cu_seqlens_q.astype(np.int32)),
            seq_lens=upload(rows.ends.astype(np.int32)),
            block_table=upload(np.ascontiguousarray(slots.block_table[rows.slots, :num_columns])),
            logit_rows=upload(cu_seqlens_q[1 : num_sampled + 1] - 1),
            max_query_len=int(lengths.max()),
        )
        return self._decoder.hidden_states(batch, self._cache)

    def _fitting(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary."""
        missing = self._vocab_size - logits.shape[1]
        if missing > 0:
            return functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[:, : self._vocab_size].contiguous()

    def _in_order_of(
        self, places: Int64Array, num_drafts: Int64Array, drawn: list[DrawnTokens]
    ) -> Drafts:
        """Lay drafts out sequence by sequence.

        places: [num_rows], of the sequences that draw in the work list; the rows of each of drawn
        are the first of them. num_drafts: [num_seqs], of the whole work list.
        """
        first_drafts = np.cumsum(num_drafts) - num_drafts
        targets = np.concatenate(
            [
                first_drafts[places[: each.token_ids.shape[0]]] + step
                for step, each in enumerate(drawn)
            ]
        )
        sources = self._queue.upload(np.argsort(targets))
        probabilities = [each.probabilities for each in drawn if each.probabilities is not None]
        return Drafts(
            num_tokens=num_drafts,
            token_ids=torch.cat([each.token_ids for each in drawn])[sources],
            probabilities=torch.cat(probabilities)[sources] if probabilities else None,
        )
