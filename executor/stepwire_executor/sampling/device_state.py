"""Sampling parameters of every slot on a device, gathered there by the rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from stepwire.executor.v1.executor_pb2 import Admission
from torch import Tensor

from stepwire_executor.engine.device_queue import DeviceQueue
from stepwire_executor.kernels.interface import SamplingBatch
from stepwire_executor.sampling.checks import check_sampling_params, is_penalised
from stepwire_executor.slots import SlotTable
from stepwire_executor.step_work import Int64Array

_IS_PROMPT = 1 << 30
"""Bit of a token's count that says that the prompt has it."""
_COUNT = _IS_PROMPT - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cells:
    """Places in a step's logits: one row and one token each."""

    rows: Tensor
    """[num_cells] int64."""
    token_ids: Tensor
    """[num_cells] int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _CountedDrafts:
    """Drafts that count as generated where rows that stand behind them are penalised."""

    rows: Tensor
    """[num_counted] int64, places in penalised_rows."""
    places: Tensor
    """[num_counted] int64, places in the step's drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialRows:
    """What a step's sampling needs beside the parameters of every row; tensors of the device."""

    bias: _Cells | None
    bias_values: Tensor | None
    """[num_biases] float32."""
    penalised_rows: Tensor | None
    """[num_penalised] int64."""
    penalised_slots: Tensor | None
    """[num_penalised] int64."""
    counted_drafts: _CountedDrafts | None
    """Drafts that stand before penalised rows."""
    suppressed: _Cells | None
    logprob_rows: Tensor | None
    """[num_wanted] int64, rows that want log-probabilities."""
    wanted: tuple[int, ...]
    """logprob_rows, on the host."""
    num_top: tuple[int, ...]
    """How many likeliest tokens each of wanted wants."""


class DeviceSampling:
    """Sampling parameters by slot, one slot more for padding."""

    def __init__(self, queue: DeviceQueue, *, max_num_seqs: int, vocab_size: int) -> None:
        """Make a state of empty, greedy slots; takes 4 bytes a slot and token for penalties."""
        self._queue = queue
        self._vocab_size = vocab_size
        num_slots = max_num_seqs + 1

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=queue.device)

        # Rows: temperature, top-p, min-p; then the three penalties.
        self._floats = zeros(3, num_slots, dtype=torch.float32)
        self._penalties = zeros(3, num_slots, dtype=torch.float32)
        self._top_k = zeros(num_slots, dtype=torch.int32)
        # Rows: seed, stream.
        self._keys = zeros(2, num_slots, dtype=torch.int64)
        self._counts = zeros(num_slots, vocab_size, dtype=torch.int32)
        self._num_logprobs = np.full(max_num_seqs, -1, np.int64)
        self._is_penalised = np.zeros(max_num_seqs, np.bool_)
        self._biases: dict[int, tuple[Int64Array, np.ndarray]] = {}
        self._suppressed: dict[int, tuple[Int64Array, int]] = {}

    def clear(self) -> None:
        """Forget every slot."""
        self._num_logprobs[:] = -1
        self._is_penalised[:] = False
        self._biases.clear()
        self._suppressed.clear()

    def release(self, slots: Int64Array) -> None:
        """Forget slots."""
        self._num_logprobs[slots] = -1
        self._is_penalised[slots] = False
        for slot in slots.tolist():
            self._biases.pop(slot, None)
            self._suppressed.pop(slot, None)

    def admit(self, admissions: Sequence[Admission], slots: SlotTable) -> None:
        """Take the parameters of sequences; raises PlanError for what no scheduler sends."""
        if not admissions:
            return
        for admission in admissions:
            check_sampling_params(admission, self._vocab_size)
        all_params = [admission.sampling_params for admission in admissions]
        places = self._queue.upload(np.array([a.slot for a in admissions], np.int64))
        floats = [
            [p.temperature for p in all_params],
            [p.top_p for p in all_params],
            [p.min_p for p in all_params],
        ]
        keys = np.array([[p.seed for p in all_params], [p.stream for p in all_params]], np.uint64)
        top_k = np.array([min(p.top_k, self._vocab_size) for p in all_params], np.int32)
        upload = self._queue.upload
        self._floats.index_copy_(1, places, upload(np.array(floats, np.float32)))
        self._keys.index_copy_(1, places, upload(keys.view(np.int64)))
        self._top_k.index_copy_(0, places, upload(top_k))
        for admission in admissions:
            self._admit_special(admission, slots)

    def gather(self, slots: Tensor, positions: Tensor) -> SamplingBatch:
        """Parameters of rows; slots, positions: [num_rows] int64 on the device."""
        temperature, top_p, min_p = self._floats.index_select(1, slots).unbind()
        seeds, streams = self._keys.index_select(1, slots).unbind()
        return SamplingBatch(
            temperature=temperature,
            top_k=self._top_k.index_select(0, slots),
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=positions,
            streams=streams,
        )

    def special_rows(
        self,
        slots: Int64Array,
        num_generated: Int64Array,
        draft_starts: Int64Array,
        num_drafts_before: Int64Array,
    ) -> SpecialRows | None:
        """What the rows of a step need beside parameters; None where none needs anything.

        slots, num_generated: [num_rows], tokens generated before the one to sample, drafts that
        stand before it included. draft_starts, num_drafts_before: [num_rows], where in the
        step's drafts those are.
        """
        wanted = np.flatnonzero(self._num_logprobs[slots] >= 0)
        penalised = np.flatnonzero(self._is_penalised[slots])
        biased = [row for row, slot in enumerate(slots.tolist()) if slot in self._biases]
        suppressed = [
            row
            for row, slot in enumerate(slots.tolist())
            if slot in self._suppressed and num_generated[row] < self._suppressed[slot][1]
        ]
        if not (wanted.size or penalised.size or biased or suppressed):
            return None
        upload = self._queue.upload
        biases = [self._biases[int(slots[row])] for row in biased]
        return SpecialRows(
            bias=self._cells(biased, [ids for ids, _ in biases]),
            bias_values=upload(np.concatenate([v for _, v in biases])) if biases else None,
            penalised_rows=upload(penalised) if penalised.size else None,
            penalised_slots=upload(slots[penalised]) if penalised.size else None,
            counted_drafts=self._counted_drafts(
                draft_starts[penalised], num_drafts_before[penalised]
            ),
            suppressed=self._cells(
                suppressed, [self._suppressed[int(slots[row])][0] for row in suppressed]
            ),
            logprob_rows=upload(wanted) if wanted.size else None,
            wanted=tuple(wanted.tolist()),
            num_top=tuple(self._num_logprobs[slots[wanted]].tolist()),
        )

    def adjust(self, logits: Tensor, special: SpecialRows, drafts: Tensor | None) -> None:
        """Change logits, [num_rows, vocab_size] float32, as sampling.adjustments defines it.

        drafts: the step's, [num_drafts] int64; None: there are none.
        """
        if special.bias is not None and special.bias_values is not None:
            cells = (special.bias.rows, special.bias.token_ids)
            logits[cells] += special.bias_values
        if special.penalised_rows is not None and special.penalised_slots is not None:
            counts = self._counts.index_select(0, special.penalised_slots)
            if special.counted_drafts is not None and drafts is not None:
                places = special.counted_drafts.rows, drafts[special.counted_drafts.places]
                counts.index_put_(places, counts.new_ones(()), accumulate=True)
            self._penalise(logits, special.penalised_rows, special.penalised_slots, counts)
        if special.suppressed is not None:
            logits[special.suppressed.rows, special.suppressed.token_ids] = -torch.inf

    def count(self, token_ids: Tensor, special: SpecialRows, is_kept: Tensor | None) -> None:
        """Count the tokens of penalised rows; token_ids: [num_rows] int64.

        is_kept: [num_rows] bool, which of them stay; None: all do.
        """
        if special.penalised_rows is not None and special.penalised_slots is not None:
            cells = special.penalised_slots * self._vocab_size + token_ids[special.penalised_rows]
            ones = torch.ones_like(cells, dtype=torch.int32)
            if is_kept is not None:
                ones = is_kept[special.penalised_rows].int()
            self._counts.view(-1).index_add_(0, cells, ones)

    def _penalise(self, logits: Tensor, rows: Tensor, slots: Tensor, counts: Tensor) -> None:
        generated = (counts & _COUNT).float()
        repetition, presence, frequency = self._penalties.index_select(1, slots).unsqueeze(2)
        values = logits.index_select(0, rows)
        divided = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(counts != 0, divided, values)
        values = values - frequency * generated
        values = values - presence * (generated > 0)
        logits.index_copy_(0, rows, values)

    def _admit_special(self, admission: Admission, slots: SlotTable) -> None:
        slot, params = admission.slot, admission.sampling_params
        if params.HasField("num_logprobs"):
            self._num_logprobs[slot] = params.num_logprobs
        if params.logit_bias:
            self._biases[slot] = (
                np.fromiter(params.logit_bias.keys(), np.int64),
                np.fromiter(params.logit_bias.values(), np.float32),
            )
        if params.min_tokens and params.suppressed_token_ids:
            token_ids = np.fromiter(params.suppressed_token_ids, np.int64)
            self._suppressed[slot] = (np.unique(token_ids), params.min_tokens)
        if is_penalised(params):
            self._is_penalised[slot] = True
            num_prompt = admission.num_prompt_tokens
            token_ids = slots.token_ids[slot, : len(admission.token_ids)].astype(np.int64)
            penalties = [
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            ]
            self._penalties[:, slot] = self._queue.upload(np.array(penalties, np.float32))
            counts = self._counts[slot]
            counts.zero_()
            generated = self._queue.upload(token_ids[num_prompt:])
            counts.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
            prompt = self._queue.upload(np.unique(token_ids[:num_prompt]))
            counts.index_add_(0, prompt, torch.full_like(prompt, _IS_PROMPT, dtype=torch.int32))

    def _counted_drafts(
        self, draft_starts: Int64Array, num_drafts_before: Int64Array
    ) -> _CountedDrafts | None:
        num_drafts = int(num_drafts_before.sum())
        if num_drafts == 0:
            return None
        ends = np.cumsum(num_drafts_before)
        starts = np.repeat(draft_starts - (ends - num_drafts_before), num_drafts_before)
        rows = np.repeat(np.arange(num_drafts_before.size), num_drafts_before)
        return _CountedDrafts(
            rows=self._queue.upload(rows),
            places=self._queue.upload(np.arange(num_drafts) + starts),
        )

    def _cells(self, rows: Sequence[int], token_ids: Sequence[Int64Array]) -> _Cells | None:
        if not rows:
            return None
        sizes = [ids.size for ids in token_ids]
        return _Cells(
            rows=self._queue.upload(np.repeat(np.array(rows, np.int64), sizes)),
            token_ids=self._queue.upload(np.concatenate(token_ids)),
        )
