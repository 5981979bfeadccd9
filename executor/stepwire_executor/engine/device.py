"""The engine of a device: slot tables there, steps in flight, decode steps replayed from graphs.

A sampled token goes from one step to the next on the device. The host learns it later, so the
work of a step is queued while the step before runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.engine.device_queue import DeviceQueue, Mark
from stepwire_executor.engine.graphs import GraphCapture, Replay, capture_sizes
from stepwire_executor.engine.interface import Decoder, SampledRows, StepTimes
from stepwire_executor.engine.layout import StepLayout, lay_out
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
from stepwire_executor.slots import SlotTable
from stepwire_executor.speculation.draft_source import DraftSource
from stepwire_executor.speculation.interface import (
    NO_DRAFT,
    DraftProposer,
    DraftRows,
    Drafts,
    DrawnTokens,
    VerificationRule,
)
from stepwire_executor.speculation.verification import SampledVerification
from stepwire_executor.step_work import AppliedPlan, Int64Array, SampledRowPlaces, StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outputs:
    """Tensors on their way to the host."""

    sampled: Tensor
    """[2, num_rows] int64: token ids, and 1 where a row is finite."""
    num_accepted: Tensor | None
    """[num_sampled] int64; None where there are no drafts."""
    logprobs: LogprobTensors | None
    special: SpecialRows | None


class QueuedStep:
    """A step in a device's queue."""

    def __init__(
        self,
        *,
        outputs: _Outputs | None,
        work: StepWork,
        prepare_ms: float,
        before: Mark | None,
        started: Mark,
        forwarded: Mark,
        ended: Mark,
    ) -> None:
        """Keep the marks; before is the end of the step before."""
        self.work = work
        self._outputs = outputs
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
        places = self.work.rows
        token_ids, is_finite = self._outputs.sampled[:, : places.slots.size].numpy()
        num_accepted = np.zeros(places.num_rows.size, np.int64)
        if self._outputs.num_accepted is not None:
            num_accepted = self._outputs.num_accepted.numpy()
        special, described = self._outputs.special, self._outputs.logprobs
        logprobs = {}
        if special is not None and described is not None:
            is_kept = places.kept(num_accepted)
            rows = zip(special.wanted, described.rows(special.num_top), strict=True)
            logprobs = {row: each for row, each in rows if is_kept[row]}
        return SampledRows(
            token_ids=token_ids,
            is_finite=is_finite != 0,
            num_accepted=num_accepted,
            logprobs=logprobs,
            times=times,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ToVerify:
    """Drafts of a step on the device."""

    rows: DraftRows
    draft_token_ids: Tensor
    """[num_drafts] int64, in the order of the work list."""
    slots: Tensor
    """[num_sampled] int64."""
    num_drafts_before: Tensor
    """[num_rows] int64."""
    sequences: Tensor
    """[num_rows] int64, to which of slots each row belongs."""


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
        rule: VerificationRule | None = None,
        proposer: DraftProposer | None = None,
    ) -> None:
        """Join the parts; rule: `sampled` unless told, proposer: the draft model.

        Every decode step is launched eagerly until capture, and ever after where it has drafts.
        """
        self._decoder = decoder
        self._sample = sample
        self._rule = rule or SampledVerification(sample)
        self._draft_source = DraftSource(proposer)
        self._cache = cache
        self._queue = queue
        self._max_num_seqs = slots.max_num_seqs
        self._sampling = DeviceSampling(
            queue, max_num_seqs=slots.max_num_seqs, vocab_size=slots.vocab_size
        )
        num_seqs = _next_power_of_two(slots.max_num_seqs)
        num_tokens = max(slots.max_num_batched_tokens, slots.max_num_seqs)
        self._inputs = StepInputs(queue, StepShape(num_tokens, num_seqs, max(num_tokens, num_seqs)))
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
        self._draft_source.clear()

    @torch.inference_mode()
    def launch(self, applied: AppliedPlan, slots: SlotTable) -> QueuedStep:
        """See StepEngine."""
        started_s = time.perf_counter()
        self._take(applied, slots)
        drafts, is_proposed = self._draft_source.drafts(applied, slots, partial(self._draw, slots))
        work = applied.work.with_num_drafts(drafts.num_tokens)
        if not work.slots.size:
            return self._queued(None, work, started_s, self._queue.mark(), self._queue.mark())
        layout = lay_out(slots, work)
        num_seqs, num_rows = work.slots.size, layout.logit_rows.size
        graph = None
        if layout.max_query_len == 1 and num_rows == num_seqs:
            graph = next((g for g in self._graphs if g.shape.num_seqs >= num_seqs), None)
        shape = StepShape(layout.positions.size, _next_power_of_two(num_seqs), num_rows)
        if graph is not None:
            shape = graph.shape
        special = self._special_rows(layout.rows, slots)
        arrays = self._inputs.fill(shape, step_values(layout, work, slots))
        to_verify = None
        if layout.draft_rows.size:
            to_verify = self._put_drafts(arrays, layout, drafts, is_proposed)
        started = self._queue.mark()
        if graph is not None:
            graph.replay_hidden()
            hidden = graph.hidden
        else:
            hidden = self._hidden_states(arrays, max_query_len=layout.max_query_len)
        forwarded = self._queue.mark()
        outputs = None
        if num_rows:
            num_accepted = None
            if graph is not None and special is None:
                graph.replay_sample()
                sampled, described = graph.sampled, None
            elif to_verify is not None:
                sampled, num_accepted, described = self._verify_rows(
                    hidden, arrays, special, to_verify
                )
            else:
                sampled, described = self._sample_rows(hidden, arrays, special)
            outputs = _Outputs(
                sampled=sampled.to("cpu", non_blocking=True, copy=True),
                num_accepted=None
                if num_accepted is None
                else num_accepted.to("cpu", non_blocking=True),
                logprobs=None if described is None else described.to_host(),
                special=special,
            )
        return self._queued(outputs, work, started_s, started, forwarded)

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

    def _special_rows(self, rows: SampledRowPlaces, slots: SlotTable) -> SpecialRows | None:
        num_generated = rows.positions - slots.num_prompt_tokens[rows.slots]
        return self._sampling.special_rows(
            rows.slots, num_generated, rows.draft_starts, rows.num_drafts_before
        )

    def _put_drafts(
        self, arrays: StepArrays, layout: StepLayout, drafts: Drafts, is_proposed: bool
    ) -> _ToVerify:
        """Put a step's drafts into its tokens and among its rows."""
        upload, rows = self._queue.upload, layout.rows
        token_ids = drafts.token_ids if is_proposed else upload(drafts.token_ids.numpy())
        arrays.token_ids.index_copy_(0, upload(layout.draft_rows), token_ids)
        next_drafts = upload(np.full(rows.slots.size, NO_DRAFT, np.int64))
        next_drafts.index_copy_(0, upload(np.flatnonzero(rows.has_next_draft)), token_ids)
        return _ToVerify(
            rows=DraftRows(
                first_rows=upload(rows.first_rows),
                next_drafts=next_drafts,
                probabilities=drafts.probabilities,
            ),
            draft_token_ids=token_ids,
            slots=upload(rows.slots[rows.first_rows]),
            num_drafts_before=upload(rows.num_drafts_before),
            sequences=upload(np.repeat(np.arange(rows.num_rows.size), rows.num_rows)),
        )

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
        """Sample and remember the tokens of a step without drafts.

        Returns [2, num_rows] int64 as in _Outputs.
        """
        logits = self._decoder.logits(hidden)
        parameters = self._sampling.gather(arrays.sampled_slots, arrays.sampled_positions)
        unadjusted = None
        if special is not None:
            if special.logprob_rows is not None:
                unadjusted = logits.index_select(0, special.logprob_rows)
            self._sampling.adjust(logits, special, None)
        output = self._sample(logits, parameters)
        described = None
        if special is not None:
            self._sampling.count(output.token_ids, special, None)
            if unadjusted is not None and special.logprob_rows is not None:
                chosen = output.token_ids.index_select(0, special.logprob_rows)
                described = describe_rows(unadjusted, chosen, max(special.num_top))
        self._last_tokens.index_copy_(0, arrays.sampled_slots, output.token_ids)
        return torch.stack((output.token_ids, output.is_finite.long())), described

    def _verify_rows(
        self, hidden: Tensor, arrays: StepArrays, special: SpecialRows | None, given: _ToVerify
    ) -> tuple[Tensor, Tensor, LogprobTensors | None]:
        """As _sample_rows, of a step with drafts; also returns how many were accepted."""
        logits = self._decoder.logits(hidden)
        parameters = self._sampling.gather(arrays.sampled_slots, arrays.sampled_positions)
        unadjusted = None
        if special is not None:
            if special.logprob_rows is not None:
                unadjusted = logits.index_select(0, special.logprob_rows)
            self._sampling.adjust(logits, special, given.draft_token_ids)
        verified = self._rule.verify(logits, parameters, given.rows)
        described = None
        if special is not None:
            kept = given.num_drafts_before <= verified.num_accepted[given.sequences]
            self._sampling.count(verified.token_ids, special, kept)
            if unadjusted is not None and special.logprob_rows is not None:
                chosen = verified.token_ids.index_select(0, special.logprob_rows)
                described = describe_rows(unadjusted, chosen, max(special.num_top))
        last_rows = given.rows.first_rows + verified.num_accepted
        self._last_tokens.index_copy_(0, given.slots, verified.token_ids[last_rows])
        sampled = torch.stack((verified.token_ids, verified.is_finite.long()))
        return sampled, verified.num_accepted, described

    def _draw(
        self, table: SlotTable, logits: Tensor, slots: Int64Array, drafts: Tensor
    ) -> DrawnTokens:
        """See DraftSample; table: as the plan left it."""
        num_rows, num_before = drafts.shape
        positions = table.num_tokens[slots] + num_before
        special = self._sampling.special_rows(
            slots,
            positions - table.num_prompt_tokens[slots],
            num_before * np.arange(num_rows),
            np.full(num_rows, num_before),
        )
        if special is not None:
            self._sampling.adjust(logits, special, drafts.reshape(-1))
        upload = self._queue.upload
        return self._rule.draw(logits, self._sampling.gather(upload(slots), upload(positions)))

    def _queued(
        self,
        outputs: _Outputs | None,
        work: StepWork,
        started_s: float,
        started: Mark,
        forwarded: Mark,
    ) -> QueuedStep:
        before, ended = self._before, self._queue.mark()
        self._before = ended
        return QueuedStep(
            outputs=outputs,
            work=work,
            prepare_ms=1e3 * (time.perf_counter() - started_s),
            before=before,
            started=started,
            forwarded=forwarded,
            ended=ended,
        )


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
