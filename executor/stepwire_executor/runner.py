"""Runs step plans: slot table to tensors, through the model and the sampler, and back."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch
from stepwire.executor.v1.executor_pb2 import (
    SlotFailure,
    StepPlan,
    StepResult,
    StepTimings,
    TokenLogprobs,
)
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.errors import PlanError, PlanOrderError
from stepwire_executor.kernels.interface import RowLogprobs, Sample, SampleOutput
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.sampling_state import SamplingState
from stepwire_executor.slots import SlotTable, StepWork

NON_FINITE_REASON = "the model's logits are not finite or leave no token to sample"


class Decoder(Protocol):
    """The part of a model that a step needs."""

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Write the step's KV and return float32 logits [num_logit_rows, vocab_size]."""
        ...


class Runner:
    """One model, its KV pages and its slot table; used from one thread."""

    def __init__(
        self, *, decoder: Decoder, sample: Sample, cache: KVCache, slots: SlotTable
    ) -> None:
        """Join the parts; no epoch is open."""
        self._decoder = decoder
        self._sample = sample
        self._cache = cache
        self._slots = slots
        self._sampling = SamplingState(max_num_seqs=slots.max_num_seqs, vocab_size=slots.vocab_size)
        self._epoch: int | None = None
        self._next_step_id = 1

    def open_epoch(self, epoch: int) -> None:
        """Empty every slot; the next plan is step 1 of epoch."""
        self._slots.clear()
        self._sampling.clear()
        self._epoch = epoch
        self._next_step_id = 1

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Apply a plan and run its work.

        Any error ends the epoch: slots are undefined until the next open_epoch. Raises
        PlanOrderError for a plan of another epoch or out of sequence, PlanError for one that
        contradicts the slot table.
        """
        if self._epoch is None or plan.epoch != self._epoch:
            raise PlanOrderError(
                f"step {plan.step_id} is of epoch {plan.epoch}, but "
                + ("no epoch is open" if self._epoch is None else f"{self._epoch} is open")
            )
        if plan.step_id != self._next_step_id:
            raise PlanOrderError(
                f"step {plan.step_id} came where step {self._next_step_id} was expected"
            )
        epoch, self._epoch = self._epoch, None
        result = self._run(plan)
        self._epoch = epoch
        self._next_step_id += 1
        return result

    def _run(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        applied = self._slots.apply(plan)
        self._sampling.release(applied.released_slots)
        for admission in applied.admissions:
            num_tokens = len(admission.token_ids)
            self._sampling.admit(
                admission, self._slots.token_ids[admission.slot, :num_tokens].astype(np.int64)
            )
        work = applied.work
        batch = build_batch(self._slots, work) if work.slots.size else None
        if applied.copy_targets.size:
            self._cache.copy_blocks(
                torch.from_numpy(applied.copy_sources), torch.from_numpy(applied.copy_targets)
            )
        prepared = forwarded = time.perf_counter()
        output = None
        if batch is not None:
            logits = self._decoder.forward(batch, self._cache)
            forwarded = time.perf_counter()
            output = self._sample_rows(work, logits)
        result = self._book(work, output)
        result.epoch = plan.epoch
        result.step_id = plan.step_id
        result.slot_table_checksum = self._slots.checksum()
        result.timings.CopyFrom(
            StepTimings(
                prepare_ms=1e3 * (prepared - started),
                forward_ms=1e3 * (forwarded - prepared),
                sample_ms=1e3 * (time.perf_counter() - forwarded),
            )
        )
        return result

    def _sample_rows(self, work: StepWork, logits: Tensor) -> SampleOutput | None:
        slots = work.slots[work.is_sampled]
        if not slots.size:
            return None
        # The token's own index in its sequence keys its noise.
        positions = work.ends[work.is_sampled]
        num_generated = positions - self._slots.num_prompt_tokens[slots]
        return self._sample(logits, self._sampling.gather(slots, positions, num_generated))

    def _book(self, work: StepWork, output: SampleOutput | None) -> StepResult:
        failed = work.failed_slots.tolist()
        if output is None:
            none = np.zeros(0, np.int64)
            self._slots.complete(work, none, none.astype(np.bool_))
            return StepResult(failures=_failures(failed))
        sampled = work.slots[work.is_sampled]
        token_ids = output.token_ids.cpu().numpy()
        is_valid = output.is_finite.cpu().numpy()
        self._slots.complete(work, token_ids, is_valid)
        good_slots, good_tokens = sampled[is_valid].tolist(), token_ids[is_valid].tolist()
        self._sampling.count(good_slots, good_tokens)
        return StepResult(
            sampled_slots=good_slots,
            num_sampled_tokens=[1] * len(good_slots),
            sampled_token_ids=good_tokens,
            logprobs=[
                _logprobs_message(token_id, logprobs)
                for token_id, logprobs, valid in zip(
                    token_ids.tolist(), output.logprobs, is_valid.tolist(), strict=True
                )
                if valid and logprobs is not None
            ],
            failures=_failures(failed + sampled[~is_valid].tolist()),
        )


def build_batch(slots: SlotTable, work: StepWork) -> StepBatch:
    """Lay out the work's tensors.

    Raises PlanError where two tokens of the step would be stored in one place.
    """
    lengths = work.ends - work.starts
    cu_seqlens_q = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=cu_seqlens_q[1:])
    rows = np.repeat(work.slots, lengths)
    positions = np.arange(cu_seqlens_q[-1]) - np.repeat(cu_seqlens_q[:-1] - work.starts, lengths)
    block_size = slots.block_size
    block_ids = slots.block_table[rows, positions // block_size].astype(np.int64)
    slot_mapping = block_ids * block_size + positions % block_size
    if np.unique(slot_mapping).size != slot_mapping.size:
        raise PlanError("work_slots: two tokens of the step have the same place in the KV cache")
    max_blocks = -(-int(work.ends.max()) // block_size)
    return StepBatch(
        token_ids=torch.from_numpy(slots.token_ids[rows, positions].astype(np.int64)),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slot_mapping),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q.astype(np.int32)),
        seq_lens=torch.from_numpy(work.ends.astype(np.int32)),
        block_table=torch.from_numpy(
            np.ascontiguousarray(slots.block_table[work.slots, :max_blocks])
        ),
        logit_rows=torch.from_numpy(cu_seqlens_q[1:][work.is_sampled] - 1),
    )


def _failures(slots: list[int]) -> list[SlotFailure]:
    return [SlotFailure(slot=slot, reason=NON_FINITE_REASON) for slot in slots]


def _logprobs_message(token_id: int, logprobs: RowLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )
