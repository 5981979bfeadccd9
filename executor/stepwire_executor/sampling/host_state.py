"""Sampling parameters of every slot in host memory, gathered by index for a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from stepwire.executor.v1.executor_pb2 import Admission, SamplingParams
from torch import Tensor

from stepwire_executor.kernels.interface import SamplingBatch
from stepwire_executor.sampling.adjustments import RowAdjustments
from stepwire_executor.sampling.checks import check_sampling_params, is_penalised
from stepwire_executor.step_work import BoolArray, Int64Array

NO_LOGPROBS = -1


class TokenCounts:
    """Distinct tokens of one sequence and how often each was generated; grows in place."""

    def __init__(self, token_ids: Int64Array, num_prompt_tokens: int) -> None:
        """Count token_ids [num_tokens], of which the first num_prompt_tokens are the prompt."""
        distinct, inverse = np.unique(token_ids, return_inverse=True)
        generated = np.bincount(inverse[num_prompt_tokens:], minlength=distinct.size)
        self._num_seen = distinct.size
        self._ids = np.zeros(2 * distinct.size + 64, np.int64)
        self._counts = np.zeros(self._ids.size, np.float32)
        self._ids[: distinct.size] = distinct
        self._counts[: distinct.size] = generated
        self._row_of = {token_id: row for row, token_id in enumerate(distinct.tolist())}

    def with_drafts(self, drafts: Int64Array) -> tuple[Tensor, Tensor]:
        """seen_token_ids and output_counts as if drafts, [num_drafts], had been generated too."""
        if not drafts.size:
            return self.seen_token_ids, self.output_counts
        distinct, generated = np.unique(drafts, return_counts=True)
        rows = np.array([self._row_of.get(token_id, -1) for token_id in distinct.tolist()])
        is_new = rows < 0
        ids = np.concatenate((self._ids[: self._num_seen], distinct[is_new]))
        counts = np.zeros(ids.size, np.float32)
        counts[: self._num_seen] = self._counts[: self._num_seen]
        counts[self._num_seen :] = generated[is_new]
        counts[rows[~is_new]] += generated[~is_new].astype(np.float32)
        return torch.from_numpy(ids), torch.from_numpy(counts)

    def add(self, token_id: int) -> None:
        """Count one generated token."""
        row = self._row_of.setdefault(token_id, self._num_seen)
        if row == self._num_seen:
            if row == self._ids.size:
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[row] = token_id
            self._num_seen += 1
        self._counts[row] += 1

    @property
    def seen_token_ids(self) -> Tensor:
        """[num_seen] int64, distinct; a view that the next add may change."""
        return torch.from_numpy(self._ids[: self._num_seen])

    @property
    def output_counts(self) -> Tensor:
        """[num_seen] float32; a view that the next add may change."""
        return torch.from_numpy(self._counts[: self._num_seen])


class _Adjusted:
    """What a slot whose logits are adjusted needs beside its row of the arrays."""

    def __init__(self, params: SamplingParams, counts: TokenCounts | None) -> None:
        self.counts = counts
        self.min_tokens = params.min_tokens
        self.repetition_penalty = params.repetition_penalty
        self.presence_penalty = params.presence_penalty
        self.frequency_penalty = params.frequency_penalty
        bias = params.logit_bias
        self.bias_token_ids = torch.tensor(list(bias.keys()), dtype=torch.int64) if bias else None
        self.bias_values = torch.tensor(list(bias.values()), dtype=torch.float32) if bias else None
        suppressed = list(params.suppressed_token_ids) if params.min_tokens else []
        self.suppressed = torch.tensor(suppressed, dtype=torch.int64) if suppressed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSamplingBatch:
    """How to sample the rows of a step."""

    parameters: SamplingBatch
    num_logprobs: Int64Array
    """[num_rows], how many likeliest tokens a row wants beside the sampled one; NO_LOGPROBS: none
    at all."""
    rows_with_logprobs: Int64Array
    """The rows that want any."""
    adjustments: tuple[RowAdjustments, ...]
    """Only of rows that have any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gathered:
    """The part of a batch that only admissions change, one entry a row."""

    slots: Int64Array
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    streams: Tensor
    num_logprobs: Int64Array
    rows_with_logprobs: Int64Array


class HostSampling:
    """Sampling parameters by slot."""

    def __init__(self, *, max_num_seqs: int, vocab_size: int) -> None:
        """Make a state of empty slots."""
        self._vocab_size = vocab_size
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._streams = np.zeros(max_num_seqs, np.int64)
        self._num_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self._adjusted: dict[int, _Adjusted] = {}
        self._gathered: _Gathered | None = None
        """Of the step before, which the next one mostly asks for again."""

    def clear(self) -> None:
        """Forget every slot."""
        self._adjusted.clear()

    def release(self, slots: Int64Array) -> None:
        """Forget slots."""
        if self._adjusted:
            for slot in slots.tolist():
                self._adjusted.pop(slot, None)

    def admit(self, admission: Admission, token_ids: Int64Array) -> None:
        """Take the parameters of a sequence; token_ids: [num_tokens], prompt and output.

        Raises PlanError for parameters that no scheduler sends.
        """
        slot, params = admission.slot, admission.sampling_params
        check_sampling_params(admission, self._vocab_size)
        self._gathered = None
        self._temperature[slot] = params.temperature
        self._top_k[slot] = min(params.top_k, self._vocab_size)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = params.seed
        self._streams[slot] = params.stream
        asked = params.HasField("num_logprobs")
        self._num_logprobs[slot] = params.num_logprobs if asked else NO_LOGPROBS
        counts = None
        if is_penalised(params):
            counts = TokenCounts(token_ids, admission.num_prompt_tokens)
        is_suppressed = params.min_tokens and params.suppressed_token_ids
        if counts is not None or params.logit_bias or is_suppressed:
            self._adjusted[slot] = _Adjusted(params, counts)

    def gather(
        self,
        slots: Int64Array,
        positions: Int64Array,
        num_generated: Int64Array,
        drafts_before: Callable[[int], Int64Array],
    ) -> HostSamplingBatch:
        """Make the batch that samples slots, each of them once or more; arrays are [num_rows].

        positions: of the token to sample; num_generated: tokens generated before it, drafts that
        stand before it included. drafts_before: those of a row.
        """
        adjustments: list[RowAdjustments] = []
        if self._adjusted:
            for row, slot in enumerate(slots.tolist()):
                adjusted = self._adjusted.get(slot)
                if adjusted is not None:
                    adjustments.append(
                        _row_adjustments(row, adjusted, int(num_generated[row]), drafts_before(row))
                    )
        gathered = self._of_slots(slots)
        return HostSamplingBatch(
            parameters=SamplingBatch(
                temperature=gathered.temperature,
                top_k=gathered.top_k,
                top_p=gathered.top_p,
                min_p=gathered.min_p,
                seeds=gathered.seeds,
                positions=torch.from_numpy(positions),
                streams=gathered.streams,
            ),
            num_logprobs=gathered.num_logprobs,
            rows_with_logprobs=gathered.rows_with_logprobs,
            adjustments=tuple(adjustments),
        )

    def _of_slots(self, slots: Int64Array) -> _Gathered:
        """What admissions said of slots, [num_rows], a slot a row; nobody changes its arrays."""
        gathered = self._gathered
        if gathered is None or not np.array_equal(gathered.slots, slots):
            num_logprobs = self._num_logprobs[slots]
            gathered = self._gathered = _Gathered(
                slots=slots.copy(),
                temperature=torch.from_numpy(self._temperature[slots]),
                top_k=torch.from_numpy(self._top_k[slots]),
                top_p=torch.from_numpy(self._top_p[slots]),
                min_p=torch.from_numpy(self._min_p[slots]),
                seeds=torch.from_numpy(self._seeds[slots].view(np.int64)),
                streams=torch.from_numpy(self._streams[slots]),
                num_logprobs=num_logprobs,
                rows_with_logprobs=np.flatnonzero(num_logprobs >= 0),
            )
        return gathered

    def count(self, slots: Int64Array, token_ids: Int64Array, is_kept: BoolArray) -> None:
        """Take what was generated, all [num_rows]: the tokens of the rows that are kept."""
        if self._adjusted:
            kept = zip(slots[is_kept].tolist(), token_ids[is_kept].tolist(), strict=True)
            for slot, token_id in kept:
                adjusted = self._adjusted.get(slot)
                if adjusted is not None and adjusted.counts is not None:
                    adjusted.counts.add(token_id)


def _row_adjustments(
    row: int, adjusted: _Adjusted, num_generated: int, drafts: Int64Array
) -> RowAdjustments:
    seen_token_ids, output_counts = None, None
    if adjusted.counts is not None:
        seen_token_ids, output_counts = adjusted.counts.with_drafts(drafts)
    return RowAdjustments(
        row=row,
        bias_token_ids=adjusted.bias_token_ids,
        bias_values=adjusted.bias_values,
        repetition_penalty=adjusted.repetition_penalty,
        presence_penalty=adjusted.presence_penalty,
        frequency_penalty=adjusted.frequency_penalty,
        seen_token_ids=seen_token_ids,
        output_counts=output_counts,
        suppressed_token_ids=adjusted.suppressed if num_generated < adjusted.min_tokens else None,
    )
