"""The thin shell around the planner: clocks, the plan stream, and who gets which token."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeAlias

import structlog
from stepwire.executor.v1.executor_pb2 import DescribeResponse as Description

from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.detokenizer import TokenBytes
from stepwire_scheduler.errors import (
    DrainingError,
    DuplicateRequestError,
    EpochEnd,
    ExecutorLostError,
    FieldViolation,
    InvalidRequestError,
    NotReadyError,
    PlanStreamError,
    QueueFullError,
)
from stepwire_scheduler.executor_client import ExecutorGroup, PlanStream
from stepwire_scheduler.executor_groups import DESCRIBE_INTERVAL_S, ExecutorGroups, ReadyGroup
from stepwire_scheduler.journal import Journal
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.plan import StepPlan
from stepwire_scheduler.plan_log import PlanLog
from stepwire_scheduler.planner import Planner, PlannerConfig
from stepwire_scheduler.request_stream import RequestStream, StreamReader
from stepwire_scheduler.restoration import restore
from stepwire_scheduler.running_requests import RunningRequests
from stepwire_scheduler.sequence import FinishReason, Request, RequestKey, Sequence
from stepwire_scheduler.served_model import (
    LoadProgress,
    ServedModel,
    ServingState,
    check_speculation,
    served_model,
)
from stepwire_scheduler.speculation import Speculator
from stepwire_scheduler.tls import executor_tls

_HOUSEKEEPING_INTERVAL_S = 0.05
TOKENS_OF_A_TIMEOUT = 512
"""A step of more tokens may take longer than step_timeout_ms."""

log = structlog.get_logger(__name__)

SpeculatorFactory: TypeAlias = Callable[[SchedulerConfig, ServedModel], Speculator | None]
"""Makes what proposes drafts for a model, or None where tokens are to come one a step."""


@dataclass(frozen=True, slots=True)
class _SentPlan:
    sent_ms: float
    schedule_ms: float
    num_tokens: int
    had_work_before: bool
    """Whether sequences could go on all the time since the plan before."""


class StepLoop:
    """Connects to the executors, keeps them fed, and hands every token to its stream.

    All of it runs on one event loop and one thread. When an executor is lost, or is to end, the
    epoch ends: every running sequence is queued again with the tokens it has, and streams go on.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        metrics: Metrics,
        plan_log: PlanLog | None = None,
        journal: Journal | None = None,
        *,
        make_speculator: SpeculatorFactory | None = None,
    ) -> None:
        """plan_log: records every epoch's plans and results. journal: records requests, and has
        those of a scheduler before.
        """
        self._make_speculator = make_speculator
        self._config = config
        self._journal = journal
        self._plan_log = plan_log
        self._metrics = metrics
        self._planner: Planner | None = None
        self._requests = RunningRequests(
            metrics,
            max_unread_bytes=config.max_unread_bytes,
            max_retained_bytes=config.max_retained_bytes,
            finish_sequence=self._finish_sequence,
            journal=journal,
        )
        self._tokenizer: TokenBytes | None = None
        self._wake = asyncio.Event()
        self._is_draining = False
        self._is_connected = False
        self._sent: dict[int, _SentPlan] = {}
        """Plans in flight by step id, oldest first."""
        self._last_reply_ms = 0.0
        self._has_booked = asyncio.Event()
        self.model: ServedModel | None = None
        """Set once the executors are ready; kept while they are away."""
        self._groups: ExecutorGroups | None = None

    # For the service

    @property
    def state(self) -> ServingState:
        if self._is_draining:
            return ServingState.DRAINING
        if self._is_connected:
            return ServingState.READY
        has_answered = self._groups is not None and self._groups.has_answered
        return ServingState.LOADING if has_answered else ServingState.CONNECTING

    @property
    def load_progress(self) -> LoadProgress:
        """How far the executors have come."""
        if self._groups is None:
            return LoadProgress(phase="connect", fraction=0.0, elapsed_ms=0.0)
        return self._groups.load_progress

    @property
    def is_progressing(self) -> bool:
        """False while a step is overdue by half its deadline or no executor is connected."""
        if not self._is_connected:
            return False
        return self._used_deadline(now_ms()) < 0.5

    def set_tokenizer(self, tokenizer: TokenBytes) -> None:
        """Give the tokenizer that turns output into text; requests need it."""
        self._tokenizer = tokenizer
        self._restore()

    def submit(self, request: Request) -> RequestStream:
        """Queue a validated request.

        Raises NotReadyError, DrainingError, DuplicateRequestError, QueueFullError, or
        InvalidRequestError where the executors' limits have shrunk since the validation.
        """
        planner, tokenizer = self._planner, self._tokenizer
        if self._is_draining:
            raise DrainingError
        if planner is None or tokenizer is None:
            raise NotReadyError("the model still loads; GetModel says how far it is")
        if request.key in self._requests:
            raise DuplicateRequestError(request.request_id)
        self._check_fits(request)
        num_sequences = request.sampling_params.n
        num_tokens = num_sequences * len(request.prompt_token_ids)
        self.check_room(num_sequences)
        if planner.waiting.num_tokens + num_tokens > self._config.max_queued_tokens:
            raise QueueFullError("too many tokens wait; retry later")
        assert self.model is not None
        sequences = planner.add(request)
        stream = self._requests.add(request, sequences, tokenizer, self.model.fingerprint)
        self._wake.set()
        return stream

    def check_room(self, num_sequences: int = 1) -> None:
        """Raises QueueFullError where the queue does not take so many sequences."""
        if self.num_waiting + num_sequences > self._config.max_queued_requests:
            raise QueueFullError("too many requests wait; retry later")

    def _check_fits(self, request: Request) -> None:
        """Executors may have come back with less while the request was validated."""
        assert self.model is not None
        limit = self.model.max_model_len
        num_tokens = len(request.prompt_token_ids) + request.sampling_params.max_tokens
        if num_tokens > limit:
            description = f"{num_tokens} tokens of prompt and output are more than the {limit} "
            violation = FieldViolation(
                field="input", description=description + "that fit now; ask GetModel again"
            )
            raise InvalidRequestError([violation])

    def knows(self, key: RequestKey) -> bool:
        """Whether a request runs or is retained under the key."""
        return self._requests.knows(key)

    def attach(
        self, key: RequestKey, input_digest: bytes, *, from_seq: int, resume_window_ms: int
    ) -> StreamReader | None:
        """Read on a request that runs or is retained; None where it should be submitted.

        Raises DuplicateRequestError, NotRetainedError, and NotReadyError where a scheduler before
        may have left the request. Works while the scheduler drains.
        """
        if from_seq and self._journal is not None and self._journal.has_saved(key):
            raise NotReadyError("the model still loads, and this request waits for it; retry")
        return self._requests.attach(
            key, input_digest, from_seq=from_seq, resume_window_ms=resume_window_ms
        )

    def cancel(self, request_id: str, tenant: str = "") -> bool:
        """End a request; its stream ends with what it has. False where it does not run."""
        key = tenant, request_id
        if self._journal is not None and self._journal.discard(key):
            return True
        return self._requests.cancel(key)

    def num_requests_of(self, tenant: str) -> int:
        """Requests of a tenant that are queued or running."""
        return self._requests.num_of_tenant(tenant)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._planner.waiting) if self._planner else 0

    # The loop

    async def run(self) -> None:
        """Serve epochs until cancelled; an executor that is lost is waited for."""
        await _run_until_one_ends(self._serve_epochs(), self._keep_house())

    async def _serve_epochs(self) -> None:
        config = self._config
        addresses = (config.executor_addresses, *config.standby_executor_addresses)
        groups = [ExecutorGroup(each, self._plan_log, executor_tls(config)) for each in addresses]
        self._groups = ExecutorGroups(groups, lambda offered: check_speculation(offered, config))
        epoch = time.time_ns()  # above any epoch of a scheduler before this one
        try:
            while True:
                fingerprint = None if self.model is None else self.model.fingerprint
                ready = await self._groups.first_ready(fingerprint)
                self._adopt(ready.descriptions)
                epoch += 1
                await self._live_through_epoch(self._groups, ready, epoch)
        finally:
            await self._groups.close()

    async def _live_through_epoch(
        self, groups: ExecutorGroups, ready: ReadyGroup, epoch: int
    ) -> None:
        """Return when the epoch is over and its sequences are queued again."""
        ended: EpochEnd = "lost"
        try:
            stream = await self._open_epoch(ready.group, epoch, ready.descriptions)
            try:
                await self._serve_epoch(stream, groups)
            finally:
                stream.cancel()
            ended = "handover"
            log.info("epoch handed over", epoch=epoch)
        except PlanStreamError as error:
            ended = error.cause
            log.warning("epoch ended", epoch=epoch, cause=error.message)
            await asyncio.sleep(DESCRIBE_INTERVAL_S)
        finally:
            self._is_connected = False
            self._sent.clear()
            if self._planner is not None:
                self._metrics.on_epoch_ended(ended, num_running=len(self._planner.running))
                self._requests.deliver(self._planner.reset_epoch(is_handover=ended == "handover"))

    async def _open_epoch(
        self, group: ExecutorGroup, epoch: int, descriptions: list[Description]
    ) -> PlanStream:
        """Opening has the deadline of a step: a rank may stop between Describe and here."""
        try:
            async with asyncio.timeout(self._config.step_timeout_ms / 1e3):
                return await group.open_epoch(epoch, descriptions)
        except TimeoutError:
            raise PlanStreamError(
                "an executor did not open the epoch in time", cause="overdue"
            ) from None
        except PlanStreamError as error:
            error.cause = "refused" if error.cause == "lost" else error.cause
            raise

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for running ones; then end what is left."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._requests.wait_until_none(), timeout_s)
        except TimeoutError:
            for key in self._requests:
                self._requests.end(key, FinishReason.CANCELLED, DrainingError())

    def _adopt(self, descriptions: list[Description]) -> None:
        """Take the executors' limits; what waits outlives them unless the model changed."""
        model = served_model(descriptions, self._config)
        if self._planner is not None and model == self.model:
            return
        config = PlannerConfig(
            num_blocks=model.num_blocks,
            block_size=model.block_size,
            max_num_seqs=model.max_num_seqs,
            max_num_batched_tokens=model.max_num_batched_tokens,
            max_num_prefill_tokens=self._config.max_num_prefill_tokens,
            max_inflight_steps=self._config.max_inflight_steps,
            scheduling_policy=self._config.scheduling_policy,
            enable_prefix_caching=self._config.enable_prefix_caching,
            eos_token_ids=model.eos_token_ids,
            has_draft_model=self._config.speculative_method == "draft_model",
            max_resumes=self._config.max_resumes,
        )
        is_other_model = self.model is not None and self.model.fingerprint != model.fingerprint
        self.model = model
        if is_other_model:
            log.warning("the executors serve another model; ending what waits")
            for key in self._requests:
                self._requests.end(key, FinishReason.ERROR, ExecutorLostError("the model changed"))
        make_speculator = self._make_speculator
        speculator = make_speculator(self._config, model) if make_speculator is not None else None
        if self._planner is None:
            prefix_key = secrets.token_bytes(32)
            self._planner = Planner(config, prefix_key=prefix_key, speculator=speculator)
        else:
            self._requests.deliver(self._planner.reconfigure(config, speculator=speculator))
        log.info(
            "executors are ready",
            device=model.device,
            num_blocks=model.num_blocks,
            max_model_len=model.max_model_len,
        )
        self._restore()

    def _restore(self) -> None:
        """Go on with what a scheduler before has left, once all is there that it takes."""
        journal, model = self._journal, self.model
        if (
            journal is None
            or journal.saved is None
            or self._planner is None
            or self._tokenizer is None
            or model is None
        ):
            return
        restore(journal, self._requests, self._planner, self._tokenizer, model, self._metrics)
        self._wake.set()

    async def _serve_epoch(self, stream: PlanStream, groups: ExecutorGroups) -> None:
        """Return once the epoch is to be handed over; raises PlanStreamError where it breaks."""
        assert self._planner is not None
        assert self.model is not None
        self._last_reply_ms = now_ms()
        self._is_connected = True
        self._wake.set()
        works = [
            self._send_plans(stream, self._planner),
            self._receive_results(stream, self._planner),
            self._watch_steps(),
            self._until_handover(stream, self._planner),
        ]
        if groups.has_standby:
            works.append(
                groups.watch_standbys(self.model.fingerprint, self._metrics.set_ready_standbys)
            )
        await _run_until_one_ends(*works)

    async def _send_plans(self, stream: PlanStream, planner: Planner) -> None:
        had_work_before = False
        while True:
            await self._wake.wait()
            self._wake.clear()
            while not stream.drain_notice.is_set():
                started_ms = now_ms()
                plan = planner.plan(started_ms)
                if plan is None:
                    had_work_before = had_work_before and bool(planner.inflight)
                    break
                sent_ms = now_ms()
                self._sent[plan.step_id] = _SentPlan(
                    sent_ms, sent_ms - started_ms, plan.num_scheduled_tokens, had_work_before
                )
                had_work_before = True
                self._note_plan(plan, started_ms)
                await stream.send(plan)

    async def _receive_results(self, stream: PlanStream, planner: Planner) -> None:
        while True:
            reply = await stream.receive()
            if reply.epoch != stream.epoch:
                continue
            self._last_reply_ms = now_ms()
            sent = self._sent.pop(reply.outcome.step_id)
            idle_ms = reply.idle_ms if sent.had_work_before else None
            updates = planner.commit(reply.outcome, idle_ms=idle_ms)
            self._wake.set()
            self._has_booked.set()
            self._requests.deliver(updates)
            pool = planner.block_pool
            step_ms = self._last_reply_ms - sent.sent_ms
            self._metrics.on_step(
                num_running=len(planner.running),
                num_waiting=len(planner.waiting),
                blocks_used=pool.num_used + pool.num_leased,
                blocks_total=pool.num_blocks,
                schedule_seconds=sent.schedule_ms / 1e3,
                step_seconds=step_ms / 1e3,
                wire_seconds=max(0.0, step_ms - reply.elapsed_ms) / 1e3,
                busy_seconds=reply.outcome.busy_ms / 1e3,
                idle_seconds=(idle_ms or 0.0) / 1e3,
                num_batched_tokens=sent.num_tokens,
            )
            self._metrics.on_drafts(planner.last_drafts)

    async def _until_handover(self, stream: PlanStream, planner: Planner) -> None:
        """Return once a rank is to end and every plan has its result."""
        await stream.drain_notice.wait()
        log.info("an executor drains", epoch=stream.epoch, num_inflight=len(planner.inflight))
        while planner.inflight:
            self._has_booked.clear()
            await self._has_booked.wait()

    async def _watch_steps(self) -> None:
        """End the epoch where a step does not come back."""
        while True:
            await asyncio.sleep(_HOUSEKEEPING_INTERVAL_S)
            if self._used_deadline(now_ms()) > 1:
                raise PlanStreamError("a step is overdue", cause="overdue")

    async def _keep_house(self) -> None:
        """Deadlines and slow readers, whether executors are there or not."""
        while True:
            await asyncio.sleep(_HOUSEKEEPING_INTERVAL_S)
            planner = self._planner
            if planner is None:
                continue
            now = now_ms()
            self._requests.deliver(planner.expire(now))
            self._requests.end_slow_readers(now, self._config.unread_timeout_ms)
            self._requests.expire(now)
            self._metrics.set_load(
                num_running=len(planner.running), num_waiting=len(planner.waiting)
            )

    def _used_deadline(self, now: float) -> float:
        """Part of the deadline that the oldest step in flight has used; above 1 it is overdue.

        Counted from when the executors could begin with it, not from when it was sent.
        """
        oldest = next(iter(self._sent.values()), None)
        if oldest is None:
            return 0.0
        age_ms = now - max(oldest.sent_ms, self._last_reply_ms)
        return age_ms / step_deadline_ms(self._config.step_timeout_ms, oldest.num_tokens)

    # Delivery

    def _note_plan(self, plan: StepPlan, now: float) -> None:
        self._requests.note_first_steps(plan, now)
        if plan.num_preemptions:
            self._metrics.on_preemption(plan.num_preemptions)
        if plan.num_prefix_queried_tokens:
            self._metrics.on_prefix_lookup(
                plan.num_prefix_queried_tokens, plan.num_prefix_hit_tokens
            )

    def _finish_sequence(self, sequence: Sequence, reason: FinishReason) -> None:
        if self._planner is not None:
            self._planner.finish(sequence, reason)
            self._wake.set()


def step_deadline_ms(timeout_ms: int, num_tokens: int) -> float:
    """How long a step may take: timeout_ms, and longer in proportion where it is large."""
    return timeout_ms * max(1.0, num_tokens / TOKENS_OF_A_TIMEOUT)


async def _run_until_one_ends(*works: Coroutine[Any, Any, None]) -> None:
    """Run works side by side; when one ends, or fails, or the caller is cancelled, end all."""
    # Not a TaskGroup: 3.11's loses the caller's cancellation when a task fails meanwhile.
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
