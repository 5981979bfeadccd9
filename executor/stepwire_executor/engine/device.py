"""The engine of a device: slot tables there, steps in flight, decode steps replayed from graphs.

A sampled token goes from one step to the next on the device. The host learns it later, so the
work of a step is queued while the step before runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.engine.device_queue import DeviceQueue, Mark
from stepwire_executor.engine.graphs import GraphCapture, Replay, capture_sizes
from stepwire_executor.engine.interface import Decoder, SampledRows, StepTimes
from stepwire_executor.engine.layout import lay_out
from stepwire_executor.engine.step_inputs import (
    StepArrays,
    StepInputs,
    StepShape,
    padding_values,
    step_values,
)
from stepwire_executor.kernels.interface import Sample
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.sampling.device_state import DeviceSampling, SpecialRows
from stepwire_executor.sampling.logprobs import LogprobTensors, describe_rows
from stepwire_executor.slots import AppliedPlan, SlotTable, StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outputs:
    """Tensors on their way to the host."""

    sampled: Tensor
    """[2, num_rows] int64: token ids, and 1 where a row is finite."""
    logprobs: LogprobTensors | None
    special: SpecialRows | None


class QueuedStep:
    """A step in a device's queue."""

    def __init__(
        self,
        *,
        outputs: _Outputs | None,
        num_rows: int,
        prepare_ms: float,
        before: Mark | None,
        started: Mark,
        forwarded: Mark,
        ended: Mark,
    ) -> None:
        """Keep the marks; before is the end of the step before."""
        self._outputs = outputs
        self._num_rows = num_rows
        self._prepare_ms = prepare_ms
        self._before = before
        self._started = started
        self._forwarded = forwarded
        self._ended = ended

    @property
    def is_done(self) -> bool:
        """See LaunchedStep."""
        return self._ended.is_reached

    def wait(self) -> None:
        """See LaunchedStep."""
        self._ended.wait()

    def collect(self) -> SampledRows:
        """See LaunchedStep."""
        self._ended.wait()
        times = StepTimes(
            prepare_ms=self._prepare_ms,
            forward_ms=self._forwarded.ms_since(self._started),
            sample_ms=self._ended.ms_since(self._forwarded),
            idle_ms=0.0 if self._before is None else self._started.ms_since(self._before),
        )
        if self._outputs is None:
            return SampledRows(times=times)
        token_ids, is_finite = self._outputs.sampled[:, : self._num_rows].numpy()
        special, described = self._outputs.special, self._outputs.logprobs
        logprobs = {}
        if special is not None and described is not None:
            rows = described.rows(special.num_top)
            logprobs = dict(zip(special.wanted, rows, strict=True))
        return SampledRows(
            token_ids=token_ids, is_finite=is_finite != 0, logprobs=logprobs, times=times
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodeGraph:
    """A decode step of one padded size, in two parts between which logits can be looked at."""

    shape: StepShape
    replay_hidden: Replay
    hidden: Tensor
    """[num_rows, hidden_size], rewritten by replay_hidden."""
    replay_sample: Replay
    sampled: Tensor
    """[2, num_rows], rewritten by replay_sample."""


class DeviceEngine:
    """Steps a model whose tensors lie on a device."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        sample: Sample,
        cache: KVCache,
        slots: SlotTable,
        queue: DeviceQueue,
    ) -> None:
        """Join the parts; every decode step is launched eagerly until capture."""
        self._decoder = decoder
        self._sample = sample
        self._cache = cache
        self._queue = queue
        self._max_num_seqs = slots.max_num_seqs
        self._sampling = DeviceSampling(
            queue, max_num_seqs=slots.max_num_seqs, vocab_size=slots.vocab_size
        )
        num_seqs = _next_power_of_two(slots.max_num_seqs)
        num_tokens = max(slots.max_num_batched_tokens, slots.max_num_seqs)
        self._inputs = StepInputs(queue, StepShape(num_tokens, num_seqs, num_seqs))
        num_slots = slots.max_num_seqs + 1
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=queue.device)
        self._block_table = torch.zeros(
            (num_slots, slots.max_blocks_per_seq), dtype=torch.int32, device=queue.device
        )
        self._graphs: tuple[_DecodeGraph, ...] = ()
        self._before: Mark | None = None

    @torch.inference_mode()
    def capture(self, graphs: GraphCapture) -> None:
        """Capture the decode step of every batch size, the largest first.

        Slots must be empty. The largest graph's memory serves the others.
        """
        captured = []
        for size in reversed(capture_sizes(self._max_num_seqs)):
            shape = StepShape(size, size, size)
            arrays = self._inputs.fill(shape, padding_values([], self._max_num_seqs))
            # Kernels are compiled here, outside the capture.
            self._sample_rows(self._hidden_states(arrays, max_query_len=1), arrays, None)

            def forward(arrays: StepArrays = arrays) -> Tensor:
                return self._hidden_states(arrays, max_query_len=1)

            replay_hidden, hidden = graphs.capture(forward)

            def sample(hidden: Tensor = hidden, arrays: StepArrays = arrays) -> Tensor:
                return self._sample_rows(hidden, arrays, None)[0]

            replay_sample, sampled = graphs.capture(sample)
            captured.append(
                _DecodeGraph(
                    shape=shape,
                    replay_hidden=replay_hidden,
                    hidden=hidden,
                    replay_sample=replay_sample,
                    sampled=sampled,
                )
            )
        self._graphs = tuple(reversed(captured))

    @torch.inference_mode()
    def run_padding(self, lengths: Sequence[int]) -> None:
        """Run a step of nothing real, to compile its kernels or to see what memory it takes.

        lengths: query tokens of each sequence, at least one; nothing is stored or kept.
        """
        shape = StepShape(sum(lengths), _next_power_of_two(len(lengths)), len(lengths))
        arrays = self._inputs.fill(shape, padding_values(lengths, self._max_num_seqs))
        hidden = self._hidden_states(arrays, max_query_len=max(lengths))
        self._sample_rows(hidden, arrays, None)
        self._queue.mark().wait()

    def check(self) -> None:
        """See StepEngine; after an illegal access CUDA refuses everything, for good."""
        self._queue.mark().wait()

    def clear(self) -> None:
        """See StepEngine."""
        self._sampling.clear()

    @torch.inference_mode()
    def launch(self, applied: AppliedPlan, slots: SlotTable) -> QueuedStep:
        """See StepEngine."""
        started_s = time.perf_counter()
        self._take(applied, slots)
        work = applied.work
        if not work.slots.size:
            return self._queued(None, 0, started_s, self._queue.mark(), self._queue.mark())
        layout = lay_out(slots, work)
        num_seqs, num_rows = work.slots.size, work.sampled_slots.size
        graph = None
        if layout.max_query_len == 1 and num_rows == num_seqs:
            graph = next((g for g in self._graphs if g.shape.num_seqs >= num_seqs), None)
        shape = StepShape(layout.positions.size, _next_power_of_two(num_seqs), num_rows)
        if graph is not None:
            shape = graph.shape
        special = self._special_rows(work, slots)
        arrays = self._inputs.fill(shape, step_values(layout, work, slots))
        started = self._queue.mark()
        if graph is not None:
            graph.replay_hidden()
            hidden = graph.hidden
        else:
            hidden = self._hidden_states(arrays, max_query_len=layout.max_query_len)
        forwarded = self._queue.mark()
        outputs = None
        if num_rows:
            if graph is not None and special is None:
                graph.replay_sample()
                sampled, described = graph.sampled, None
            else:
                sampled, described = self._sample_rows(hidden, arrays, special)
            outputs = _Outputs(
                sampled=sampled.to("cpu", non_blocking=True, copy=True),
                logprobs=None if described is None else described.to_host(),
                special=special,
            )
        return self._queued(outputs, num_rows, started_s, started, forwarded)

    def _take(self, applied: AppliedPlan, slots: SlotTable) -> None:
        """Bring a plan's changes to the device's tables and pages."""
        upload = self._queue.upload
        self._sampling.release(applied.released_slots)
        self._sampling.admit(applied.admissions, slots)
        if applied.table_places.size:
            self._block_table.view(-1).index_copy_(
                0,
                upload(applied.table_places),
                upload(slots.block_table.reshape(-1)[applied.table_places]),
            )
        if applied.copy_targets.size:
            self._cache.copy_blocks(upload(applied.copy_sources), upload(applied.copy_targets))

    def _special_rows(self, work: StepWork, slots: SlotTable) -> SpecialRows | None:
        sampled = work.sampled_slots
        num_generated = work.ends[work.is_sampled] - slots.num_prompt_tokens[sampled]
        return self._sampling.special_rows(sampled, num_generated)

    def _hidden_states(self, arrays: StepArrays, *, max_query_len: int) -> Tensor:
        """Final hidden states of the rows that sample; works on the device's tables alone."""
        sampled_before = self._last_tokens.index_select(0, (-1 - arrays.token_ids).clamp(min=0))
        batch = StepBatch(
            token_ids=torch.where(arrays.token_ids < 0, sampled_before, arrays.token_ids),
            positions=arrays.positions,
            slot_mapping=arrays.slot_mapping,
            cu_seqlens_q=arrays.cu_seqlens_q,
            seq_lens=arrays.seq_lens,
            block_table=self._block_table.index_select(0, arrays.slots),
            logit_rows=arrays.logit_rows,
            max_query_len=max_query_len,
        )
        return self._decoder.hidden_states(batch, self._cache)

    def _sample_rows(
        self, hidden: Tensor, arrays: StepArrays, special: SpecialRows | None
    ) -> tuple[Tensor, LogprobTensors | None]:
        """Sample and remember the tokens; returns [2, num_rows] int64 as in _Outputs."""
        logits = self._decoder.logits(hidden)
        parameters = self._sampling.gather(arrays.sampled_slots, arrays.sampled_positions)
        unadjusted = None
        if special is not None:
            if special.logprob_rows is not None:
                unadjusted = logits.index_select(0, special.logprob_rows)
            self._sampling.adjust(logits, special)
        output = self._sample(logits, parameters)
        described = None
        if special is not None:
            self._sampling.count(output.token_ids, special)
            if unadjusted is not None and special.logprob_rows is not None:
                chosen = output.token_ids.index_select(0, special.logprob_rows)
                described = describe_rows(unadjusted, chosen, max(special.num_top))
        self._last_tokens.index_copy_(0, arrays.sampled_slots, output.token_ids)
        return torch.stack((output.token_ids, output.is_finite.long())), described

    def _queued(
        self,
        outputs: _Outputs | None,
        num_rows: int,
        started_s: float,
        started: Mark,
        forwarded: Mark,
    ) -> QueuedStep:
        before, ended = self._before, self._queue.mark()
        self._before = ended
        return QueuedStep(
            outputs=outputs,
            num_rows=num_rows,
            prepare_ms=1e3 * (time.perf_counter() - started_s),
            before=before,
            started=started,
            forwarded=forwarded,
            ended=ended,
        )


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
