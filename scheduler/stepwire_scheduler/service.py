"""GenerationService: validates, submits to the step loop, and passes its events on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc.aio
from stepwire.scheduler.v1 import generation_pb2, generation_pb2_grpc

from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import (
    DrainingError,
    FieldViolation,
    InvalidRequestError,
    NotReadyError,
    QuotaExceededError,
    SchedulerError,
)
from stepwire_scheduler.event_writer import EventWriter
from stepwire_scheduler.logs import bound_request, get_logger
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.rejection_log import RejectionLog
from stepwire_scheduler.request_stream import (
    Queued,
    Scheduled,
    SequenceOutput,
    StreamReader,
)
from stepwire_scheduler.responses import (
    encode_output,
    encode_queued,
    encode_scheduled,
    encode_timings,
    encode_usage,
    extend_choice,
)
from stepwire_scheduler.sampling_validation import ModelLimits
from stepwire_scheduler.served_model import ServingState
from stepwire_scheduler.step_loop import StepLoop
from stepwire_scheduler.tenants import Tenant, current_tenant
from stepwire_scheduler.validation import (
    check_detokenize,
    check_tokenize,
    encode_prompt,
    input_digest,
    validate_input,
)

if TYPE_CHECKING:  # the library behind it loads after the server listens
    from stepwire_scheduler.tokenizer import Tokenizer

log = get_logger("service")

_Context = grpc.aio.ServicerContext[Any, Any]

_MAX_TOKENIZED = 32_768
"""Tokens that Tokenize answers with, or the model's context where that is longer."""

_MODEL_STATES = {
    ServingState.CONNECTING: generation_pb2.MODEL_STATE_CONNECTING,
    ServingState.LOADING: generation_pb2.MODEL_STATE_LOADING,
    ServingState.READY: generation_pb2.MODEL_STATE_READY,
    ServingState.DRAINING: generation_pb2.MODEL_STATE_DRAINING,
}


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """The public API over one step loop. Its methods raise SchedulerError."""

    def __init__(
        self, config: SchedulerConfig, step_loop: StepLoop, metrics: Metrics, model_name: str
    ) -> None:
        self._config = config
        self._step_loop = step_loop
        self._metrics = metrics
        self._model_name = model_name
        self._tokenizer: Tokenizer | None = None
        self._rejections = RejectionLog()

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Give the tokenizer once it has loaded."""
        self._tokenizer = tokenizer

    @property
    def state(self) -> ServingState:
        """The step loop's, but not READY before the tokenizer is."""
        state = self._step_loop.state
        if state is ServingState.READY and self._tokenizer is None:
            return ServingState.LOADING
        return state

    @property
    def is_serving(self) -> bool:
        """Whether a request sent now would make progress."""
        return self.state is ServingState.READY and self._step_loop.is_progressing

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: _Context
    ) -> generation_pb2.GenerateResponse:
        async with self._reading(request, context) as reader:
            stream = reader.stream
            choices = [
                generation_pb2.Choice(index=index)
                for index in range(stream.request.sampling_params.n)
            ]
            async for event in reader:
                if isinstance(event, SequenceOutput):
                    extend_choice(choices[event.index], event)
            stream.is_delivered = True
            return generation_pb2.GenerateResponse(
                request_id=stream.request.request_id,
                choices=choices,
                usage=encode_usage(stream),
                timings=encode_timings(stream),
            )

    async def GenerateStream(  # type: ignore[override]
        self, request: generation_pb2.GenerateStreamRequest, context: _Context
    ) -> None:
        async with self._reading(request, context, request.from_seq) as reader:
            stream = reader.stream
            timeout_s = self._config.unread_timeout_ms / 1e3
            with EventWriter(context, stream.request.request_id, timeout_s) as writer:
                if reader.from_seq == 0 and stream.queued is not None:
                    await writer.write(0, queued=encode_queued(stream.queued))
                async for event in reader:
                    if isinstance(event, Scheduled):
                        await writer.write(reader.seq, scheduled=encode_scheduled(event))
                    else:
                        await writer.write(reader.seq, output=encode_output(event))
                if reader.from_seq <= stream.completed_seq:
                    completed = generation_pb2.Completed(
                        usage=encode_usage(stream), timings=encode_timings(stream)
                    )
                    await writer.write(stream.completed_seq, completed=completed)
            stream.is_delivered = True

    async def Cancel(
        self, request: generation_pb2.CancelRequest, context: _Context
    ) -> generation_pb2.CancelResponse:
        tenant = current_tenant().name
        cancelled = [each for each in request.request_ids if self._step_loop.cancel(each, tenant)]
        return generation_pb2.CancelResponse(cancelled_request_ids=cancelled)

    async def GetModel(
        self, request: generation_pb2.GetModelRequest, context: _Context
    ) -> generation_pb2.GetModelResponse:
        state = self.state
        response = generation_pb2.GetModelResponse(
            model=self._model_name,
            state=_MODEL_STATES[state],
            has_chat_template=self._tokenizer is not None and self._tokenizer.has_chat_template,
        )
        if state is ServingState.LOADING:
            response.load_progress.CopyFrom(self._load_progress())
        model = self._step_loop.model
        if model is not None and state in {ServingState.READY, ServingState.DRAINING}:
            response.architecture = model.architecture
            response.vocab_size = model.vocab_size
            response.max_model_len = model.max_model_len
            response.eos_token_ids.extend(sorted(model.eos_token_ids))
            response.dtype = model.dtype
            response.quantization = model.quantization
            response.kv_cache_dtype = model.kv_cache_dtype
            response.block_size = model.block_size
            response.num_blocks = model.num_blocks
            response.weight_bytes = sum(model.rank_weight_bytes)
            response.rank_weight_bytes.extend(model.rank_weight_bytes)
            response.kv_cache_bytes = model.kv_cache_bytes
            response.device = model.device
            response.max_num_seqs = model.max_num_seqs
            response.max_num_batched_tokens = model.max_num_batched_tokens
            response.speculative_method = model.speculative_method
            response.num_speculative_tokens = model.num_speculative_tokens
        return response

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: _Context
    ) -> generation_pb2.TokenizeResponse:
        tokenizer = self._loaded_tokenizer()
        check_tokenize(request)
        model = self._step_loop.model
        max_tokens = max(_MAX_TOKENIZED, model.max_model_len if model is not None else 0)
        token_ids = await encode_prompt(request, tokenizer, max_tokens=max_tokens)
        return generation_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: _Context
    ) -> generation_pb2.DetokenizeResponse:
        tokenizer = self._loaded_tokenizer()
        model = self._step_loop.model
        vocab_size = max(tokenizer.vocab_size, model.vocab_size if model is not None else 0)
        check_detokenize(request, vocab_size)
        text = await tokenizer.decode(
            request.token_ids, skip_special_tokens=request.skip_special_tokens
        )
        return generation_pb2.DetokenizeResponse(text=text)

    @asynccontextmanager
    async def _reading(
        self,
        request: generation_pb2.GenerateRequest | generation_pb2.GenerateStreamRequest,
        context: _Context,
        from_seq: int = 0,
    ) -> AsyncIterator[StreamReader]:
        """A reader of the request, submitted or resumed; leaves it on the way out.

        A client that goes away or cancels ends the handler with CancelledError, which passes.
        """
        try:
            reader = await self._open(request, context, from_seq)
        except SchedulerError as error:
            self._metrics.on_rejected(error.reason)
            self._rejections.add(error)
            raise
        with bound_request(reader.stream.request.request_id):
            try:
                yield reader
            finally:
                reader.close()

    async def _open(
        self,
        request: generation_pb2.GenerateRequest | generation_pb2.GenerateStreamRequest,
        context: _Context,
        from_seq: int,
    ) -> StreamReader:
        """Attach to the request where it is known, else validate and submit it."""
        arrival_ms = now_ms()
        tenant = current_tenant()
        reader = self._attach(request, tenant, from_seq)
        if reader is not None:
            return reader
        if self._step_loop.state is ServingState.DRAINING:
            raise DrainingError
        model = self._step_loop.model
        if model is None:
            raise NotReadyError("the model still loads; GetModel says how far it is")
        tokenizer = self._loaded_tokenizer()
        # Before the cost of reading it, too: a flood of what is refused must stay cheap.
        self._step_loop.check_room()
        self._check_quota(tenant)
        if not request.HasField("input"):
            raise InvalidRequestError([FieldViolation(field="input", description="must be set")])
        validated = await validate_input(
            request.input,
            limits=ModelLimits(
                vocab_size=model.vocab_size,
                max_model_len=model.max_model_len,
                num_speculative_tokens=model.num_speculative_tokens,
            ),
            tokenizer=tokenizer,
            arrival_ms=arrival_ms,
            deadline_ms=arrival_ms + self._time_allowed_ms(context),
            tenant=tenant.name,
            min_priority=tenant.min_priority,
            resume_window_ms=self._resume_window_ms(request),
        )
        # It may have been sent again and have arrived meanwhile.
        reader = self._attach(request, tenant, from_seq)
        if reader is not None:
            return reader
        self._check_quota(tenant)
        num_waiting = self._step_loop.num_waiting
        stream = self._step_loop.submit(validated)
        log.debug(
            "request queued",
            request_id=validated.request_id,
            num_prompt_tokens=len(validated.prompt_token_ids),
        )
        stream.announce(
            Queued(
                queued_unix_ms=time.time_ns() // 1_000_000,
                num_prompt_tokens=len(validated.prompt_token_ids),
                num_waiting=num_waiting,
            )
        )
        return stream.attach()

    def _attach(
        self,
        request: generation_pb2.GenerateRequest | generation_pb2.GenerateStreamRequest,
        tenant: Tenant,
        from_seq: int,
    ) -> StreamReader | None:
        """A reader of the request if it runs or is retained."""
        key = (tenant.name, request.input.request_id)
        if not from_seq and not self._step_loop.knows(key):
            return None
        return self._step_loop.attach(
            key,
            input_digest(request.input),
            from_seq=from_seq,
            resume_window_ms=self._resume_window_ms(request),
        )

    def _resume_window_ms(
        self, request: generation_pb2.GenerateRequest | generation_pb2.GenerateStreamRequest
    ) -> int:
        return min(request.resume_window_ms, self._config.resume_retention_ms)

    def _check_quota(self, tenant: Tenant) -> None:
        """Raises QuotaExceededError where one more request would be too many."""
        limit = tenant.max_requests
        if limit is not None and self._step_loop.num_requests_of(tenant.name) >= limit:
            raise QuotaExceededError(
                f"{limit} requests of this tenant are under way, which is all it may have; retry "
                "when one has ended"
            )

    def _time_allowed_ms(self, context: _Context) -> float:
        """The call's deadline from now, the default where it has none, never above the limit."""
        remaining_s = context.time_remaining()
        if remaining_s is None:
            return self._config.default_deadline_ms
        return min(remaining_s * 1e3, self._config.max_deadline_ms)

    def _loaded_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise NotReadyError("the model's tokenizer still loads; the server's log says why")
        return self._tokenizer

    def _load_progress(self) -> generation_pb2.LoadProgress:
        if self._step_loop.state is ServingState.READY:
            return generation_pb2.LoadProgress(phase="load tokenizer", fraction=1.0)
        progress = self._step_loop.load_progress
        return generation_pb2.LoadProgress(
            phase=progress.phase, fraction=progress.fraction, elapsed_ms=progress.elapsed_ms
        )
