"""The engine of a CPU: the slot table itself feeds the model, and a step has run once launched."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.engine.interface import Decoder, SampledRows, StepTimes
from stepwire_executor.engine.layout import lay_out
from stepwire_executor.kernels.interface import Sample
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.sampling.adjustments import apply_adjustments
from stepwire_executor.sampling.host_state import HostSampling
from stepwire_executor.sampling.logprobs import RowLogprobs, describe_rows
from stepwire_executor.slots import AppliedPlan, SlotTable, StepWork


class FinishedStep:
    """A step that ran before its launch returned."""

    is_done = True

    def __init__(self, rows: SampledRows) -> None:
        """Keep what it made."""
        self._rows = rows

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
    ) -> None:
        """Join the parts."""
        self._decoder = decoder
        self._sample = sample
        self._cache = cache
        self._sampling = HostSampling(max_num_seqs=max_num_seqs, vocab_size=vocab_size)
        self._ended_s: float | None = None

    def check(self) -> None:
        """See StepEngine; a CPU that runs this works."""

    def clear(self) -> None:
        """See StepEngine."""
        self._sampling.clear()

    def launch(self, applied: AppliedPlan, slots: SlotTable) -> FinishedStep:
        """See StepEngine."""
        started_s = time.perf_counter()
        self._sampling.release(applied.released_slots)
        for admission in applied.admissions:
            num_tokens = len(admission.token_ids)
            self._sampling.admit(
                admission, slots.token_ids[admission.slot, :num_tokens].astype(np.int64)
            )
        work = applied.work
        batch = build_batch(slots, work) if work.slots.size else None
        if applied.copy_targets.size:
            self._cache.copy_blocks(
                torch.from_numpy(applied.copy_sources), torch.from_numpy(applied.copy_targets)
            )
        prepared_s = forwarded_s = time.perf_counter()
        rows = SampledRows()
        if batch is not None:
            hidden = self._decoder.hidden_states(batch, self._cache)
            forwarded_s = time.perf_counter()
            if work.is_sampled.any():
                rows = self._sample_rows(work, self._decoder.logits(hidden), slots)
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
                logprobs=rows.logprobs,
                times=times,
            )
        )

    def _sample_rows(self, work: StepWork, logits: Tensor, slots: SlotTable) -> SampledRows:
        sampled = work.sampled_slots
        # The token's own index in its sequence keys its noise.
        positions = work.ends[work.is_sampled]
        num_generated = positions - slots.num_prompt_tokens[sampled]
        batch = self._sampling.gather(sampled, positions, num_generated)
        wanted = [row for row, num in enumerate(batch.num_logprobs) if num >= 0]
        unadjusted = logits[wanted] if wanted else None
        apply_adjustments(logits, batch.adjustments)
        output = self._sample(logits, batch.parameters)
        logprobs: dict[int, RowLogprobs] = {}
        if unadjusted is not None:
            num_top = [batch.num_logprobs[row] for row in wanted]
            described = describe_rows(unadjusted, output.token_ids[wanted], max(num_top))
            logprobs = dict(zip(wanted, described.rows(num_top), strict=True))
        token_ids, is_finite = output.token_ids.numpy(), output.is_finite.numpy()
        self._sampling.count(sampled[is_finite].tolist(), token_ids[is_finite].tolist())
        return SampledRows(token_ids=token_ids, is_finite=is_finite, logprobs=logprobs)


def build_batch(slots: SlotTable, work: StepWork) -> StepBatch:
    """Lay out the work's tensors in host memory.

    Raises PlanError where two tokens of the step would be stored in one place.
    """
    layout = lay_out(slots, work)
    token_ids = slots.token_ids[layout.slots, layout.positions].astype(np.int64)
    max_blocks = -(-int(work.ends.max()) // slots.block_size)
    return StepBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(layout.positions),
        slot_mapping=torch.from_numpy(layout.slot_mapping),
        cu_seqlens_q=torch.from_numpy(layout.cu_seqlens_q.astype(np.int32)),
        seq_lens=torch.from_numpy(work.ends.astype(np.int32)),
        block_table=torch.from_numpy(
            np.ascontiguousarray(slots.block_table[work.slots, :max_blocks])
        ),
        logit_rows=torch.from_numpy(layout.logit_rows),
        max_query_len=layout.max_query_len,
    )
