"""Runs step plans: order and epochs, the slot table, and what its engine computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from stepwire.executor.v1.executor_pb2 import (
    SlotFailure,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

from stepwire_executor.engine import LaunchedStep, SampledRows, StepEngine
from stepwire_executor.errors import PlanOrderError
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.sampling.logprobs import RowLogprobs
from stepwire_executor.slots import SlotTable
from stepwire_executor.step_work import BoolArray

NON_FINITE_REASON = "the model's logits are not finite or leave no token to sample"


class PendingStep:
    """A launched step on its way to a result."""

    def __init__(
        self, runner: Runner, launched: LaunchedStep, *, epoch: int, step_id: int, apply_ms: float
    ) -> None:
        """Keep what the result says beside what the engine made."""
        self._runner = runner
        self._launched = launched
        self._work = launched.work
        self._result = StepResult(epoch=epoch, step_id=step_id)
        self._apply_ms = apply_ms
        self._is_booked = False
        if not self.is_speculative:
            self._result.slot_table_checksum = runner.slots.checksum()

    @property
    def is_speculative(self) -> bool:
        """Whether only the step's end tells how many tokens come of it."""
        return self._work.is_speculative

    @property
    def is_done(self) -> bool:
        """Whether finish will not wait."""
        return self._launched.is_done

    def wait(self) -> None:
        """Block until the work has run; from any thread. Raises RuntimeError where it broke."""
        self._launched.wait()

    def book(self) -> None:
        """Wait, and let the slot table know what was sampled; once is enough."""
        if self._is_booked:
            return
        rows, work, slots = self._launched.collect(), self._work, self._runner.slots
        self._is_booked = True
        if self.is_speculative:
            slots.settle(work, rows.num_accepted)
            self._result.slot_table_checksum = slots.checksum()
        is_valid = slots.book(work, rows.token_ids, rows.is_finite, rows.num_accepted)
        self._fill_result(rows, is_valid)

    def finish(self) -> StepResult:
        """Book what was sampled; steps finish in the order of their launch, on its thread."""
        self._runner.book_until(self)
        return self._result

    def _fill_result(self, rows: SampledRows, is_valid: BoolArray) -> None:
        result, times, work = self._result, rows.times, self._work
        sampled = work.sampled_slots
        is_sent = is_valid
        if work.has_drafts:
            places = work.rows
            is_sent = places.kept(rows.num_accepted) & np.repeat(is_valid, places.num_rows)
        result.sampled_slots.extend(sampled[is_valid].tolist())
        result.num_sampled_tokens.extend((1 + rows.num_accepted[is_valid]).tolist())
        result.sampled_token_ids.extend(rows.token_ids[is_sent].tolist())
        if self.is_speculative:
            result.num_draft_tokens.extend(work.num_drafts[work.is_sampled][is_valid].tolist())
        if rows.logprobs:
            result.logprobs.extend(
                _logprobs_message(int(rows.token_ids[row]), rows.logprobs[row])
                for row in sorted(rows.logprobs)
                if is_sent[row]
            )
        if not is_valid.all():
            result.failures.extend(_failures(sampled[~is_valid].tolist()))
        timings = result.timings
        timings.prepare_ms = self._apply_ms + times.prepare_ms
        timings.forward_ms = times.forward_ms
        timings.sample_ms = times.sample_ms
        timings.idle_ms = times.idle_ms


class Runner:
    """One engine and its slot table; used from one thread."""

    def __init__(
        self, *, engine: StepEngine, slots: SlotTable, group: RankGroup = SINGLE_RANK
    ) -> None:
        """Join the parts; no epoch is open."""
        self.slots = slots
        self._engine = engine
        self._group = group
        self._epoch: int | None = None
        self._next_step_id = 1
        self._unbooked: deque[PendingStep] = deque()

    def open_epoch(self, epoch: int) -> None:
        """Empty every slot; the next plan is step 1 of epoch."""
        self.slots.clear()
        self._engine.clear()
        self._unbooked.clear()
        self._epoch = epoch
        self._next_step_id = 1

    def check(self) -> None:
        """After an error, raise RuntimeError where no further step can run in this process."""
        self._group.check()
        self._engine.check()

    def execute(self, plan: StepPlan) -> StepResult:
        """Launch a plan and wait for its result; raises as launch does."""
        return self.launch(plan).finish()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Apply a plan and start its work; further plans may be launched before it has run.

        Any error ends the epoch: slots are undefined until the next open_epoch. Raises
        PlanOrderError for a plan of another epoch or out of sequence, or where other ranks have
        gone on to a newer epoch; PlanError for one that contradicts the slot table.
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
        self._group.align(epoch, plan.step_id)
        if self._unbooked and self._unbooked[-1].is_speculative:
            # How far its slots have come is in no plan: this one builds on it.
            self.book_until(self._unbooked[-1])
        started_s = time.perf_counter()
        applied = self.slots.apply(plan)
        apply_ms = 1e3 * (time.perf_counter() - started_s)
        if self._unbooked and applied.work.is_left_to_model:
            self.book_until(self._unbooked[-1])
        launched = self._engine.launch(applied, self.slots)
        self.slots.advance(applied.work)
        self._epoch = epoch
        self._next_step_id += 1
        pending = PendingStep(
            self, launched, epoch=plan.epoch, step_id=plan.step_id, apply_ms=apply_ms
        )
        self._unbooked.append(pending)
        return pending

    def book_until(self, last: PendingStep) -> None:
        """Book last, after the steps before it that are not."""
        while last in self._unbooked:
            self._unbooked.popleft().book()
        last.book()


def _failures(slots: Iterable[int]) -> list[SlotFailure]:
    return [SlotFailure(slot=slot, reason=NON_FINITE_REASON) for slot in slots]


def _logprobs_message(token_id: int, logprobs: RowLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )
