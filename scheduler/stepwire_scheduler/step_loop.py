"""The thin shell around the planner: clocks, the plan stream, and who gets which token."""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
from stepwire.executor.v1 import executor_pb2
from stepwire.executor.v1.executor_pb2 import DescribeResponse as Description

from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.detokenizer import TokenBytes
from stepwire_scheduler.errors import (
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    ExecutorLostError,
    ExecutorMismatchError,
    InternalError,
    NotReadyError,
    PlanStreamError,
    QueueFullError,
    SchedulerError,
    SlowReaderError,
)
from stepwire_scheduler.executor_client import ExecutorGroup, PlanStream, check_agreement
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.output import OutputAssembler
from stepwire_scheduler.plan import SequenceUpdate, StepPlan
from stepwire_scheduler.planner import Planner, PlannerConfig
from stepwire_scheduler.request_stream import RequestStream
from stepwire_scheduler.sequence import FinishReason, Request, Sequence

_DESCRIBE_INTERVAL_S = 0.05
_HOUSEKEEPING_INTERVAL_S = 0.05

log = structlog.get_logger(__name__)


class ServingState(enum.Enum):
    """How far the scheduler is from running requests."""

    CONNECTING = "connecting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far the executors' load has come."""

    phase: str
    fraction: float
    """0 to 1 over the whole load."""
    elapsed_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the executors serve and the limits that follow."""

    fingerprint: str
    architecture: str
    vocab_size: int
    max_model_len: int
    """Tokens, prompt and output: the model's context or the KV pool, whichever is smaller."""
    eos_token_ids: frozenset[int]
    dtype: str
    kv_cache_dtype: str
    block_size: int
    num_blocks: int
    weight_bytes: int
    kv_cache_bytes: int
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class _SentPlan:
    sent_ms: float
    schedule_ms: float
    num_tokens: int


@dataclass(slots=True)
class _Entry:
    """A running request: its stream and one assembler a sequence."""

    stream: RequestStream
    assemblers: list[OutputAssembler]


class StepLoop:
    """Connects to the executors, keeps them fed, and hands every token to its stream.

    All of it runs on one event loop and one thread. When an executor is lost the epoch ends:
    every running sequence is queued again with the tokens it has, and streams go on.
    """

    def __init__(self, config: SchedulerConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._planner: Planner | None = None
        self._entries: dict[str, _Entry] = {}
        self._tokenizer: TokenBytes | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._is_connected = False
        self._sent: dict[int, _SentPlan] = {}
        """Plans in flight by step id, oldest first."""
        self._last_reply_ms = 0.0
        self.model: ServedModel | None = None
        """Set once the executors are ready; kept while they are away."""
        self.load_progress = LoadProgress(phase="connect", fraction=0.0, elapsed_ms=0.0)
        self._has_answered = False

    # For the service

    @property
    def state(self) -> ServingState:
        if self._is_draining:
            return ServingState.DRAINING
        if self._is_connected:
            return ServingState.READY
        return ServingState.LOADING if self._has_answered else ServingState.CONNECTING

    @property
    def is_progressing(self) -> bool:
        """False while a step is overdue by half its deadline or no executor is connected."""
        if not self._is_connected:
            return False
        return self._step_age_ms(now_ms()) < self._config.step_timeout_ms / 2

    def set_tokenizer(self, tokenizer: TokenBytes) -> None:
        """Give the tokenizer that turns output into text; requests need it."""
        self._tokenizer = tokenizer

    def submit(self, request: Request) -> RequestStream:
        """Queue a validated request.

        Raises NotReadyError, DrainingError, DuplicateRequestError or QueueFullError.
        """
        planner, tokenizer = self._planner, self._tokenizer
        if self._is_draining:
            raise DrainingError
        if planner is None or tokenizer is None:
            raise NotReadyError("the model still loads; GetModel says how far it is")
        if request.request_id in self._entries:
            raise DuplicateRequestError(request.request_id)
        num_sequences = request.sampling_params.n
        num_tokens = num_sequences * len(request.prompt_token_ids)
        if len(planner.waiting) + num_sequences > self._config.max_queued_requests:
            raise QueueFullError("too many requests wait; retry later")
        if planner.waiting.num_tokens + num_tokens > self._config.max_queued_tokens:
            raise QueueFullError("too many tokens wait; retry later")
        sequences = planner.add(request)
        stream = RequestStream(
            request,
            sequences,
            max_unread_bytes=self._config.max_unread_bytes,
            on_close=lambda stream: self._end(stream.request.request_id, FinishReason.CANCELLED),
        )
        self._entries[request.request_id] = _Entry(
            stream=stream,
            assemblers=[OutputAssembler(tokenizer, request.sampling_params) for _ in sequences],
        )
        self._idle.clear()
        self._metrics.on_request_queued()
        self._wake.set()
        return stream

    def cancel(self, request_id: str) -> bool:
        """End a request; its stream ends with what it has. False where it does not run."""
        if request_id not in self._entries:
            return False
        self._end(request_id, FinishReason.CANCELLED)
        return True

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._planner.waiting) if self._planner else 0

    # The loop

    async def run(self) -> None:
        """Serve epochs until cancelled; an executor that is lost is waited for."""
        group = ExecutorGroup(self._config.executor_addresses)
        epoch = time.time_ns()  # above any epoch of a scheduler before this one
        try:
            while True:
                descriptions = await self._wait_until_ready(group)
                epoch += 1
                try:
                    stream = await group.open_epoch(epoch, descriptions)
                    try:
                        await self._serve_epoch(stream)
                    finally:
                        stream.cancel()
                except PlanStreamError as error:
                    log.warning("epoch ended", epoch=epoch, cause=error.message)
                    await asyncio.sleep(_DESCRIBE_INTERVAL_S)
                finally:
                    self._is_connected = False
                    self._sent.clear()
                    if self._planner is not None:
                        self._deliver(self._planner.reset_epoch())
        finally:
            await group.close()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for running ones; then end what is left."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for request_id in list(self._entries):
                self._end(request_id, FinishReason.CANCELLED, DrainingError())

    async def _wait_until_ready(self, group: ExecutorGroup) -> list[Description]:
        complaint = ""
        while True:
            try:
                descriptions = await group.describe()
                self._has_answered = True
                self._note_load_progress(descriptions)
                if all(d.load_state == executor_pb2.LOAD_STATE_READY for d in descriptions):
                    self._adopt(check_agreement(descriptions))
                    return descriptions
                problem = next((d.load_error for d in descriptions if d.load_error), "")
            except PlanStreamError as error:
                self._has_answered = False
                problem = error.message if self.model is not None else ""
            except ExecutorMismatchError as error:
                problem = error.message
                self.load_progress = LoadProgress(phase=problem, fraction=0.0, elapsed_ms=0.0)
            if problem and problem != complaint:
                complaint = problem
                log.error("executors are not ready", cause=problem)
            if self._planner is not None:
                self._deliver(self._planner.expire(now_ms()))
            await asyncio.sleep(_DESCRIBE_INTERVAL_S)

    def _note_load_progress(self, descriptions: list[Description]) -> None:
        slowest = min(descriptions, key=lambda description: description.load_fraction)
        self.load_progress = LoadProgress(
            phase=slowest.load_phase,
            fraction=slowest.load_fraction,
            elapsed_ms=max(description.load_ms for description in descriptions),
        )

    def _adopt(self, description: Description) -> None:
        """Take the executors' limits; what waits outlives them unless the model changed."""
        model = _served_model(description, self._config)
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
            max_resumes=self._config.max_resumes,
        )
        is_other_model = self.model is not None and self.model.fingerprint != model.fingerprint
        self.model = model
        if is_other_model:
            log.warning("the executors serve another model; ending what waits")
            for request_id in list(self._entries):
                self._end(request_id, FinishReason.ERROR, ExecutorLostError("the model changed"))
        if self._planner is None:
            self._planner = Planner(config, prefix_key=secrets.token_bytes(32))
        else:
            self._deliver(self._planner.reconfigure(config))
        log.info(
            "executors are ready",
            device=model.device,
            num_blocks=model.num_blocks,
            max_model_len=model.max_model_len,
        )

    async def _serve_epoch(self, stream: PlanStream) -> None:
        assert self._planner is not None
        self._last_reply_ms = now_ms()
        self._is_connected = True
        self._wake.set()
        # Not a TaskGroup: 3.11's loses the caller's cancellation when a task fails meanwhile.
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._send_plans(stream, self._planner),
                self._receive_results(stream, self._planner),
                self._keep_house(self._planner),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _send_plans(self, stream: PlanStream, planner: Planner) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while True:
                started_ms = now_ms()
                plan = planner.plan(started_ms)
                if plan is None:
                    break
                sent_ms = now_ms()
                self._sent[plan.step_id] = _SentPlan(
                    sent_ms, sent_ms - started_ms, plan.num_scheduled_tokens
                )
                self._note_plan(plan, started_ms)
                await stream.send(plan)

    async def _receive_results(self, stream: PlanStream, planner: Planner) -> None:
        while True:
            reply = await stream.receive()
            if reply.epoch != stream.epoch:
                continue
            self._last_reply_ms = now_ms()
            sent = self._sent.pop(reply.outcome.step_id)
            updates = planner.commit(reply.outcome)
            self._wake.set()
            self._deliver(updates)
            pool = planner.block_pool
            self._metrics.on_step(
                num_running=len(planner.running),
                num_waiting=len(planner.waiting),
                blocks_used=pool.num_used + pool.num_leased,
                blocks_total=pool.num_blocks,
                schedule_seconds=sent.schedule_ms / 1e3,
                step_seconds=(self._last_reply_ms - sent.sent_ms) / 1e3,
                num_batched_tokens=sent.num_tokens,
            )

    async def _keep_house(self, planner: Planner) -> None:
        """Deadlines, slow readers, and steps that do not come back."""
        while True:
            await asyncio.sleep(_HOUSEKEEPING_INTERVAL_S)
            now = now_ms()
            self._deliver(planner.expire(now))
            for request_id, entry in list(self._entries.items()):
                since = entry.stream.over_bound_since_ms
                if since is not None and now - since > self._config.unread_timeout_ms:
                    self._end(
                        request_id,
                        FinishReason.ERROR,
                        SlowReaderError("the output was not read for too long"),
                    )
            if self._step_age_ms(now) > self._config.step_timeout_ms:
                raise PlanStreamError("a step is overdue")
            self._metrics.set_load(
                num_running=len(planner.running), num_waiting=len(planner.waiting)
            )

    def _step_age_ms(self, now: float) -> float:
        """How long the executors have been at the oldest step in flight."""
        oldest = next(iter(self._sent.values()), None)
        return 0.0 if oldest is None else now - max(oldest.sent_ms, self._last_reply_ms)

    # Delivery

    def _note_plan(self, plan: StepPlan, now: float) -> None:
        for sequence in plan.first_scheduled:
            entry = self._entries.get(sequence.request.request_id)
            if entry is None or entry.stream.request is not sequence.request:
                continue
            entry.stream.publish_scheduled(sequence, now)
            if sequence.index == 0:
                self._metrics.on_first_scheduled((now - sequence.request.arrival_ms) / 1e3)
        if plan.num_preemptions:
            self._metrics.on_preemption(plan.num_preemptions)
        if plan.num_prefix_queried_tokens:
            self._metrics.on_prefix_lookup(
                plan.num_prefix_queried_tokens, plan.num_prefix_hit_tokens
            )

    def _deliver(self, updates: Iterable[SequenceUpdate]) -> None:
        now = now_ms()
        for update in updates:
            sequence = update.sequence
            request_id = sequence.request.request_id
            entry = self._entries.get(request_id)
            if entry is None or sequence is not entry.stream.progress[sequence.index].sequence:
                continue
            if sequence.finish_reason is FinishReason.DEADLINE:
                self._end(
                    request_id,
                    FinishReason.DEADLINE,
                    DeadlineExceededError("the request's deadline passed"),
                )
            elif sequence.finish_reason is FinishReason.ERROR:
                self._end(request_id, FinishReason.ERROR, _error_of(update, sequence))
            else:
                self._deliver_tokens(entry, update, now)

    def _deliver_tokens(self, entry: _Entry, update: SequenceUpdate, now: float) -> None:
        sequence, stream = update.sequence, entry.stream
        progress = stream.progress[sequence.index]
        try:
            delta = entry.assemblers[sequence.index].push(
                update.token_ids, update.logprobs, sequence.finish_reason, sequence.stop_token_id
            )
        except Exception:
            # One request's text must not end the others' steps.
            log.exception("detokenisation failed", request_id=stream.request.request_id)
            self._end(
                stream.request.request_id,
                FinishReason.ERROR,
                InternalError("the output could not be turned into text"),
            )
            return
        if delta.finish_reason is FinishReason.STOP and sequence.finish_reason is None:
            assert self._planner is not None
            self._planner.finish(sequence, FinishReason.STOP)
            self._wake.set()
        if progress.first_token_ms is None:
            self._metrics.on_first_token((now - stream.request.arrival_ms) / 1e3)
        else:
            self._metrics.on_inter_token((now - progress.last_token_ms) / 1e3)
        stream.publish(sequence.index, delta, now)
        if all(other.is_finished for other in stream.progress):
            self._close(entry, delta.finish_reason or FinishReason.STOP, None)

    def _end(
        self, request_id: str, reason: FinishReason, error: SchedulerError | None = None
    ) -> None:
        """End all sequences of a request now."""
        entry = self._entries[request_id]
        now = now_ms()
        for progress, assembler in zip(entry.stream.progress, entry.assemblers, strict=True):
            if progress.is_finished:
                continue
            if self._planner is not None:
                self._planner.finish(progress.sequence, reason)
            if error is None:
                delta = assembler.push((), (), reason)
                entry.stream.publish(progress.sequence.index, delta, now)
        self._wake.set()
        self._close(entry, reason, error)

    def _close(self, entry: _Entry, reason: FinishReason, error: SchedulerError | None) -> None:
        stream = entry.stream
        del self._entries[stream.request.request_id]
        stream.end(now_ms(), error)
        usage, timings = stream.usage, stream.timings
        self._metrics.on_finished(
            reason.value, timings.e2e_ms / 1e3, usage.num_prompt_tokens, usage.num_output_tokens
        )
        log.info(
            "request ended",
            request_id=stream.request.request_id,
            finish_reason=reason.value,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_output_tokens=usage.num_output_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_preemptions=usage.num_preemptions,
            queue_ms=round(timings.queue_ms, 1),
            ttft_ms=round(timings.ttft_ms, 1),
            e2e_ms=round(timings.e2e_ms, 1),
        )
        if not self._entries:
            self._idle.set()


def now_ms() -> float:
    """The scheduler's clock: monotonic milliseconds."""
    return time.monotonic() * 1e3


def _error_of(update: SequenceUpdate, sequence: Sequence) -> SchedulerError:
    message = update.error or "the executor could not go on with the request"
    if sequence.num_resumes:  # it is the executors' fault, so another try may succeed
        return ExecutorLostError(message)
    return InternalError(message)


def _served_model(description: Description, config: SchedulerConfig) -> ServedModel:
    pool_tokens = description.num_blocks * description.block_size
    return ServedModel(
        fingerprint=description.model_fingerprint,
        architecture=description.architecture,
        vocab_size=description.vocab_size,
        max_model_len=min(description.max_position_embeddings, pool_tokens),
        eos_token_ids=frozenset(description.eos_token_ids),
        dtype=description.dtype,
        kv_cache_dtype=description.kv_cache_dtype,
        block_size=description.block_size,
        num_blocks=description.num_blocks,
        weight_bytes=description.weight_bytes,
        kv_cache_bytes=description.kv_cache_bytes,
        device=description.device,
        max_num_seqs=min(config.max_num_seqs or description.max_num_seqs, description.max_num_seqs),
        max_num_batched_tokens=min(
            config.max_num_batched_tokens or description.max_num_batched_tokens,
            description.max_num_batched_tokens,
        ),
    )
