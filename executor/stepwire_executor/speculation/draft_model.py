"""Proposes tokens with a smaller model that has pages of its own.

Everything it knows follows from the slot table: where a sequence got tokens without it, it computes
them before it proposes again. Its pages hold the same tokens in the same blocks as the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stepwire_executor.batch import StepBatch
from stepwire_executor.engine.interface import Decoder
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.slots import AppliedPlan, Int64Array, SlotTable
from stepwire_executor.speculation.draft_state import DraftState


class SampleDrafts(Protocol):
    """Samples as the target will at the same places."""

    def __call__(
        self, logits: Tensor, slots: Int64Array, positions: Int64Array, drafts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return token ids, [num_rows] int64, and whether each is of finite logits.

        logits: [num_rows, vocab_size] float32, may be overwritten. positions: of the tokens to
        sample. drafts: [num_rows, num_drafts] int64, the tokens right before them, which the
        slots' state does not count yet.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Sequences of one step of the draft model: each computes positions starts to ends."""

    slots: Int64Array
    starts: Int64Array
    ends: Int64Array


class DraftModel:
    """A decoder, its pages, and how far they reach."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        cache: KVCache,
        sample: SampleDrafts,
        max_model_len: int,
        draft_vocab_size: int,
        vocab_size: int,
        max_num_batched_tokens: int,
    ) -> None:
        """Join the parts.

        max_model_len: positions that the decoder can compute; drafts end there. vocab_size: of the
        target; tokens that only one of the two has are never proposed.
        """
        self._decoder = decoder
        self._cache = cache
        self._sample = sample
        self._max_model_len = max_model_len
        self._draft_vocab_size = draft_vocab_size
        self._vocab_size = vocab_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._state = DraftState(num_blocks=cache.num_blocks, block_size=cache.block_size)

    def clear(self) -> None:
        """Forget every slot and all pages."""
        self._state.clear()

    def take(self, applied: AppliedPlan, slots: SlotTable) -> None:
        """Take a plan's changes; slots: as the plan left it, before the work is counted."""
        self._state.take(applied, slots)

    def propose(
        self, rows: Int64Array, num_drafts: Int64Array, slots: SlotTable
    ) -> list[Int64Array]:
        """Propose up to num_drafts tokens, at least 1, behind the last known token of each slot.

        rows: [num_seqs] slots, whose block tables have room for the drafts. Returns the drafts of
        each, in order: none where tokens are still to be caught up with, for which a step has
        max_num_batched_tokens, the sequences that lack fewest first.
        """
        drafts = [np.zeros(0, np.int64)] * rows.size
        known = slots.num_tokens[rows]
        # The last draft is proposed, not computed.
        limits = np.minimum(num_drafts, self._max_model_len - known + 1)
        starts = np.minimum(self._state.num_computed_tokens(rows, slots), known - 1)
        caught, behind = self._share_budget(known - starts, limits)
        order = caught[np.argsort(-limits[caught], kind="stable")]
        chosen = np.concatenate((order, behind[:, 0]))
        if not chosen.size:
            return drafts
        ends = np.concatenate((known[order], starts[behind[:, 0]] + behind[:, 1]))
        step = _Rows(slots=rows[chosen], starts=starts[chosen], ends=ends)
        hidden = self._compute(step, slots, num_sampled=order.size, last_tokens=None)
        for slot, start, end in zip(step.slots, step.starts, step.ends, strict=True):
            self._state.set_computed(int(slot), int(start), int(end), slots)
        if order.size:
            proposed = self._continue(rows[order], known[order], limits[order], hidden, slots)
            for place, token_ids in zip(order.tolist(), proposed, strict=True):
                drafts[place] = token_ids
        return drafts

    def _share_budget(self, missing: Int64Array, limits: Int64Array) -> tuple[Int64Array, Int64Array]:
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
    ) -> list[Int64Array]:
        """Sample a draft of each sequence, then compute it and sample the next.

        num_drafts: falling, so that those that go on are the first rows. hidden: of the last known
        tokens.
        """
        most = int(num_drafts[0])
        tokens = torch.zeros((rows.size, most), dtype=torch.int64, device=hidden.device)
        is_finite = torch.zeros((rows.size, most), dtype=torch.bool, device=hidden.device)
        for step in range(most):
            num_rows = int((num_drafts > step).sum())
            if step:
                at = known[:num_rows] + step - 1
                single = _Rows(slots=rows[:num_rows], starts=at, ends=at + 1)
                hidden = self._compute(
                    single, slots, num_sampled=num_rows, last_tokens=tokens[:num_rows, step - 1]
                )
            sampled, finite = self._sample(
                self._fitting(self._decoder.logits(hidden)),
                rows[:num_rows],
                known[:num_rows] + step,
                tokens[:num_rows, :step],
            )
            tokens[:num_rows, step] = sampled
            is_finite[:num_rows, step] = finite
        # What follows logits that are not finite is nothing to propose.
        num_usable = is_finite.long().cumprod(dim=1).sum(dim=1).tolist()
        proposed = []
        for row, token_ids in enumerate(tokens.cpu().numpy()):
            usable = token_ids[: num_usable[row]].copy()
            # The keys and values of the last one are not there.
            computed = usable[: int(num_drafts[row]) - 1]
            self._state.set_drafted(int(rows[row]), int(known[row]), computed, slots)
            proposed.append(usable)
        return proposed

    def _compute(
        self,
        rows: _Rows,
        slots: SlotTable,
        *,
        num_sampled: int,
        last_tokens: Tensor | None,
    ) -> Tensor:
        """Final hidden states of the last tokens of the first num_sampled sequences.

        last_tokens: the tokens to compute, one a sequence; None takes what the slots know.
        """
        lengths = rows.ends - rows.starts
        cu_seqlens_q = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=cu_seqlens_q[1:])
        places = np.repeat(rows.slots, lengths)
        positions = np.arange(cu_seqlens_q[-1]) - np.repeat(
            cu_seqlens_q[:-1] - rows.starts, lengths
        )
        if last_tokens is None:
            last_tokens = torch.from_numpy(slots.token_ids[places, positions].astype(np.int64))
        block_ids = slots.block_table[places, positions // slots.block_size].astype(np.int64)
        num_columns = -(-int(rows.ends.max()) // slots.block_size)
        batch = StepBatch(
            # A token that the draft model does not know spoils the drafts behind it, no more.
            token_ids=torch.where(last_tokens < self._draft_vocab_size, last_tokens, 0),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(
                block_ids * slots.block_size + positions % slots.block_size
            ),
            cu_seqlens_q=torch.from_numpy(cu_seqlens_q.astype(np.int32)),
            seq_lens=torch.from_numpy(rows.ends.astype(np.int32)),
            block_table=torch.from_numpy(
                np.ascontiguousarray(slots.block_table[rows.slots, :num_columns])
            ),
            logit_rows=torch.from_numpy(cu_seqlens_q[1 : num_sampled + 1] - 1),
            max_query_len=int(lengths.max()),
        )
        return self._decoder.hidden_states(batch, self._cache)

    def _fitting(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary."""
        missing = self._vocab_size - logits.shape[1]
        if missing > 0:
            return functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[:, : self._vocab_size].contiguous()
