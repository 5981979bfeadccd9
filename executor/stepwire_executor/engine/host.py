"""The engine of a CPU: the slot table itself feeds the model, and a step has run once launched."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.engine.interface import Decoder, SampledRows, StepTimes
from stepwire_executor.engine.layout import StepLayout, lay_out
from stepwire_executor.kernels.interface import Sample, SamplingBatch
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.sampling.adjustments import apply_adjustments
from stepwire_executor.sampling.host_state import HostSampling
from stepwire_executor.sampling.logprobs import RowLogprobs, describe_rows
from stepwire_executor.slots import SlotTable
from stepwire_executor.speculation.draft_source import DraftSource
from stepwire_executor.speculation.interface import (
    NO_DRAFT,
    DraftProposer,
    DraftRows,
    Drafts,
    DrawnTokens,
    VerificationRule,
    VerifiedRows,
)
from stepwire_executor.speculation.verification import SampledVerification
from stepwire_executor.step_work import AppliedPlan, Int64Array, SampledRowPlaces, StepWork


class FinishedStep:
    """A step that ran before its launch returned."""

    is_done = True

    def __init__(self, rows: SampledRows, work: StepWork) -> None:
        """Keep what it made."""
        self._rows = rows
        self.work = work

    def wait(self) -> None:
        """Return at once."""

    def collect(self) -> SampledRows:
        """Return what the step made."""
        return self._rows


class HostEngine:
    """Steps a model whose tensors lie in host memory."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        sample: Sample,
        cache: KVCache,
        max_num_seqs: int,
        vocab_size: int,
        rule: VerificationRule | None = None,
        proposer: DraftProposer | None = None,
    ) -> None:
        """Join the parts; rule: `sampled` unless told, proposer: the draft model."""
        self._decoder = decoder
        self._sample = sample
        self._rule = rule or SampledVerification(sample)
        self._draft_source = DraftSource(proposer)
        self._cache = cache
        self._sampling = HostSampling(max_num_seqs=max_num_seqs, vocab_size=vocab_size)
        self._ended_s: float | None = None

    def check(self) -> None:
        """See StepEngine; a CPU that runs this works."""

    def clear(self) -> None:
        """See StepEngine."""
        self._sampling.clear()
        self._draft_source.clear()

    def launch(self, applied: AppliedPlan, slots: SlotTable) -> FinishedStep:
        """See StepEngine."""
        started_s = time.perf_counter()
        self._sampling.release(applied.released_slots)
        for admission in applied.admissions:
            num_tokens = len(admission.token_ids)
            self._sampling.admit(
                admission, slots.token_ids[admission.slot, :num_tokens].astype(np.int64)
            )
        drafts, _ = self._draft_source.drafts(applied, slots, partial(self._draw, slots))
        work = applied.work.with_num_drafts(drafts.num_tokens)
        layout = lay_out(slots, work) if work.slots.size else None
        batch = None if layout is None else build_batch(slots, work, layout, drafts.token_ids)
        if applied.copy_targets.size:
            self._cache.copy_blocks(
                torch.from_numpy(applied.copy_sources), torch.from_numpy(applied.copy_targets)
            )
        prepared_s = forwarded_s = time.perf_counter()
        rows = SampledRows()
        if layout is not None and batch is not None:
            hidden = self._decoder.hidden_states(batch, self._cache)
            forwarded_s = time.perf_counter()
            if layout.logit_rows.size:
                logits = self._decoder.logits(hidden)
                rows = self._sample_rows(layout.rows, logits, slots, drafts)
        ended_s = time.perf_counter()
        times = StepTimes(
            prepare_ms=1e3 * (prepared_s - started_s),
            forward_ms=1e3 * (forwarded_s - prepared_s),
            sample_ms=1e3 * (ended_s - forwarded_s),
            idle_ms=0.0 if self._ended_s is None else 1e3 * (prepared_s - self._ended_s),
        )
        self._ended_s = ended_s
        return FinishedStep(
            SampledRows(
                token_ids=rows.token_ids,
                is_finite=rows.is_finite,
                num_accepted=rows.num_accepted,
                logprobs=rows.logprobs,
                times=times,
            ),
            work,
        )

    def _sample_rows(
        self, rows: SampledRowPlaces, logits: Tensor, slots: SlotTable, drafts: Drafts
    ) -> SampledRows:
        draft_ids = drafts.token_ids.numpy()
        has_drafts = draft_ids.size > 0

        def drafts_before(row: int) -> Int64Array:
            start = rows.draft_starts[row]
            return draft_ids[start : start + rows.num_drafts_before[row]]

        # The token's own index in its sequence keys its noise.
        num_generated = rows.positions - slots.num_prompt_tokens[rows.slots]
        batch = self._sampling.gather(rows.slots, rows.positions, num_generated, drafts_before)
        wanted = batch.rows_with_logprobs
        unadjusted = logits[torch.from_numpy(wanted)] if wanted.size else None
        apply_adjustments(logits, batch.adjustments)
        if has_drafts:
            verified = self._verify(logits, batch.parameters, rows, drafts)
            token_ids, is_finite = verified.token_ids.numpy(), verified.is_finite.numpy()
            num_accepted = verified.num_accepted.numpy()
        else:  # no rule has anything to decide
            output = self._sample(logits, batch.parameters)
            token_ids, is_finite = output.token_ids.numpy(), output.is_finite.numpy()
            num_accepted = np.zeros(rows.slots.size, np.int64)
        is_kept = rows.kept(num_accepted)
        logprobs: dict[int, RowLogprobs] = {}
        if unadjusted is not None:
            places = np.flatnonzero(is_kept[wanted])
            if places.size < wanted.size:
                unadjusted, wanted = unadjusted[torch.from_numpy(places)], wanted[places]
            num_top = batch.num_logprobs[wanted].tolist()
            chosen = torch.from_numpy(token_ids[wanted])
            described = describe_rows(unadjusted, chosen, max(num_top))
            logprobs = dict(zip(wanted.tolist(), described.rows(num_top), strict=True))
        self._sampling.count(rows.slots, token_ids, is_kept & is_finite)
        return SampledRows(
            token_ids=token_ids, is_finite=is_finite, num_accepted=num_accepted, logprobs=logprobs
        )

    def _verify(
        self, logits: Tensor, parameters: SamplingBatch, rows: SampledRowPlaces, drafts: Drafts
    ) -> VerifiedRows:
        next_drafts = np.full(rows.slots.size, NO_DRAFT, np.int64)
        next_drafts[rows.has_next_draft] = drafts.token_ids.numpy()
        draft_rows = DraftRows(
            first_rows=torch.from_numpy(rows.first_rows),
            next_drafts=torch.from_numpy(next_drafts),
            probabilities=drafts.probabilities,
        )
        return self._rule.verify(logits, parameters, draft_rows)

    def _draw(
        self, table: SlotTable, logits: Tensor, slots: Int64Array, drafts: Tensor
    ) -> DrawnTokens:
        """See DraftSample; table: as the plan left it."""
        before = drafts.numpy()
        positions = table.num_tokens[slots] + before.shape[1]
        num_generated = positions - table.num_prompt_tokens[slots]
        batch = self._sampling.gather(slots, positions, num_generated, lambda row: before[row])
        apply_adjustments(logits, batch.adjustments)
        return self._rule.draw(logits, batch.parameters)


def build_batch(
    slots: SlotTable, work: StepWork, layout: StepLayout, draft_token_ids: Tensor
) -> StepBatch:
    """Make the tensors of a step in host memory; draft_token_ids: [num_drafts] int64."""
    token_ids = slots.token_ids[layout.slots, layout.positions].astype(np.int64)
    if layout.draft_rows.size:
        token_ids[layout.draft_rows] = draft_token_ids.numpy()
    ends = work.ends
    max_blocks = -(-int(ends.max()) // slots.block_size)
    return StepBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(layout.positions),
        slot_mapping=torch.from_numpy(layout.slot_mapping),
        cu_seqlens_q=torch.from_numpy(layout.cu_seqlens_q.astype(np.int32)),
        seq_lens=torch.from_numpy(ends.astype(np.int32)),
        block_table=torch.from_numpy(
            np.ascontiguousarray(slots.block_table[work.slots, :max_blocks])
        ),
        logit_rows=torch.from_numpy(layout.logit_rows),
        max_query_len=layout.max_query_len,
    )
