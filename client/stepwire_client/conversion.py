"""Between this package's types and the messages of stepwire.scheduler.v1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from stepwire.scheduler.v1 import generation_pb2 as pb

from stepwire_client.errors import FieldViolation, InvalidArgumentError, ServerError
from stepwire_client.events import (
    Choice,
    Completed,
    Event,
    FinishReason,
    Generation,
    LoadProgress,
    ModelInfo,
    ModelState,
    Output,
    Queued,
    Scheduled,
    Timings,
    TokenLogprob,
    Usage,
)
from stepwire_client.params import ChatMessage, Prompt, SamplingParams

_SCALARS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "logprobs",
    "n",
    "num_speculative_tokens",
)
_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_MODEL_STATES = {
    pb.MODEL_STATE_CONNECTING: ModelState.CONNECTING,
    pb.MODEL_STATE_LOADING: ModelState.LOADING,
    pb.MODEL_STATE_READY: ModelState.READY,
    pb.MODEL_STATE_DRAINING: ModelState.DRAINING,
}


def to_input(
    prompt: Prompt, params: SamplingParams | None, *, request_id: str, priority: int
) -> pb.GenerationInput:
    """Build the request's input.

    Raises InvalidArgumentError with every field that the protocol cannot carry: negative
    counts, lone surrogates, wrong types. Ranges are the server's to check.
    """
    message = pb.GenerationInput()
    violations = _Violations()
    with violations.of("input.request_id"):
        message.request_id = request_id
    with violations.of("input.priority"):
        message.priority = priority
    if isinstance(prompt, str):
        with violations.of("input.text"):
            message.text = prompt
    elif _is_chat(prompt):
        with violations.of("input.chat"):
            message.chat.CopyFrom(_to_chat(prompt))
    else:
        with violations.of("input.token_ids"):
            message.token_ids.SetInParent()
            message.token_ids.ids.extend(cast("Sequence[int]", prompt))
    # An absent message and an empty one mean the same: the server's defaults.
    _fill_sampling_params(message.sampling_params, params or SamplingParams(), violations)
    violations.raise_if_any()
    return message


def to_tokenize_request(prompt: str | Sequence[ChatMessage]) -> pb.TokenizeRequest:
    """Build the request; raises InvalidArgumentError as to_input does."""
    message = pb.TokenizeRequest()
    violations = _Violations()
    with violations.of("prompt"):
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.chat.CopyFrom(_to_chat(prompt))
    violations.raise_if_any()
    return message


def to_detokenize_request(
    token_ids: Iterable[int], *, skip_special_tokens: bool
) -> pb.DetokenizeRequest:
    """Build the request; raises InvalidArgumentError as to_input does."""
    message = pb.DetokenizeRequest(skip_special_tokens=skip_special_tokens)
    violations = _Violations()
    with violations.of("token_ids"):
        message.token_ids.extend(token_ids)
    violations.raise_if_any()
    return message


def from_stream_response(message: pb.GenerateStreamResponse) -> Event:
    """Read one event; raises ServerError where it is of no known kind."""
    kind = message.WhichOneof("event")
    request_id = message.request_id
    if kind == "output":
        output = message.output
        return Output(
            request_id=request_id,
            index=output.index,
            text=output.text,
            token_ids=tuple(output.token_ids),
            logprobs=_logprobs(output.logprobs),
            finish_reason=_FINISH_REASONS.get(output.finish_reason),
            stop_cause=_stop_cause(output),
        )
    if kind == "queued":
        return Queued(
            request_id=request_id,
            queued_unix_ms=message.queued.queued_unix_ms,
            num_prompt_tokens=message.queued.num_prompt_tokens,
            num_waiting=message.queued.num_waiting,
        )
    if kind == "scheduled":
        return Scheduled(
            request_id=request_id,
            index=message.scheduled.index,
            queue_ms=message.scheduled.queue_ms,
            num_cached_tokens=message.scheduled.num_cached_tokens,
        )
    if kind == "completed":
        return Completed(
            request_id=request_id,
            usage=_usage(message.completed.usage),
            timings=_timings(message.completed.timings),
        )
    raise ServerError("the server sent an event of an unknown kind: update stepwire here")


def from_generate_response(message: pb.GenerateResponse) -> Generation:
    """Read a whole generation; raises ServerError where it is incomplete."""
    choices: list[Choice] = []
    for choice in message.choices:
        reason = _FINISH_REASONS.get(choice.finish_reason)
        if reason is None:
            raise ServerError("the server sent an unknown finish reason: update stepwire here")
        choices.append(
            Choice(
                index=choice.index,
                text=choice.text,
                token_ids=tuple(choice.token_ids),
                finish_reason=reason,
                stop_cause=_stop_cause(choice),
                logprobs=_logprobs(choice.logprobs),
            )
        )
    if not choices:
        raise ServerError("the server sent no choice: its version differs from this client's")
    return Generation(
        request_id=message.request_id,
        choices=tuple(sorted(choices, key=lambda choice: choice.index)),
        usage=_usage(message.usage),
        timings=_timings(message.timings),
    )


def from_get_model_response(message: pb.GetModelResponse) -> ModelInfo:
    """Read the description of the served model."""
    progress = message.load_progress
    return ModelInfo(
        model=message.model,
        state=_MODEL_STATES.get(message.state, ModelState.CONNECTING),
        load_progress=LoadProgress(
            phase=progress.phase, fraction=progress.fraction, elapsed_ms=progress.elapsed_ms
        )
        if message.HasField("load_progress")
        else None,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        eos_token_ids=tuple(message.eos_token_ids),
        dtype=message.dtype,
        kv_cache_dtype=message.kv_cache_dtype,
        quantization=message.quantization,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        weight_bytes=message.weight_bytes,
        rank_weight_bytes=tuple(message.rank_weight_bytes),
        kv_cache_bytes=message.kv_cache_bytes,
        device=message.device,
        max_num_seqs=message.max_num_seqs,
        max_num_batched_tokens=message.max_num_batched_tokens,
        has_chat_template=message.has_chat_template,
        speculative_method=message.speculative_method,
        num_speculative_tokens=message.num_speculative_tokens,
    )


class _Violations:
    """Collects the fields that protobuf refuses, as a context manager a field."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []
        self._field = ""

    def of(self, field: str) -> _Violations:
        self._field = field
        return self

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> bool:
        if isinstance(error, UnicodeError):
            self._add("is not valid Unicode: it holds a lone surrogate")
        elif isinstance(error, (TypeError, ValueError, OverflowError, AttributeError)):
            self._add(" ".join(str(error).split()))
        else:
            return False
        return True

    def _add(self, description: str) -> None:
        self._found.append(FieldViolation(field=self._field, description=description))

    def raise_if_any(self) -> None:
        if self._found:
            raise InvalidArgumentError(
                "the request cannot be sent",
                code="INVALID_ARGUMENT",
                field_violations=tuple(self._found),
            )


def _is_chat(prompt: Sequence[int] | Sequence[ChatMessage]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], ChatMessage)


def _to_chat(messages: Sequence[int] | Sequence[ChatMessage]) -> pb.Chat:
    chat = pb.Chat()
    for message in messages:
        if not isinstance(message, ChatMessage):
            raise TypeError(f"must hold ChatMessage only, not {type(message).__name__}")
        chat.messages.add(role=message.role, content=message.content)
    return chat


def _fill_sampling_params(
    message: pb.SamplingParams, params: SamplingParams, violations: _Violations
) -> None:
    prefix = "input.sampling_params"
    for name in _SCALARS:
        value = getattr(params, name)
        if value is not None:
            with violations.of(f"{prefix}.{name}"):
                setattr(message, name, value)
    with violations.of(f"{prefix}.logit_bias"):
        message.logit_bias.update(params.logit_bias)
    with violations.of(f"{prefix}.stop"):
        message.stop.extend([params.stop] if isinstance(params.stop, str) else params.stop)
    with violations.of(f"{prefix}.stop_token_ids"):
        message.stop_token_ids.extend(params.stop_token_ids)


def _stop_cause(message: pb.Output | pb.Choice) -> str | int | None:
    kind = message.WhichOneof("stop_cause")
    if kind == "stop_string":
        return message.stop_string
    return message.stop_token_id if kind == "stop_token_id" else None


def _logprobs(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=message.token_id,
            logprob=message.logprob,
            rank=message.rank,
            top=tuple((token.token_id, token.logprob) for token in message.top),
        )
        for message in messages
    )


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        num_prompt_tokens=message.num_prompt_tokens,
        num_output_tokens=message.num_output_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_preemptions=message.num_preemptions,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
    )


def _timings(message: pb.Timings) -> Timings:
    return Timings(
        queue_ms=message.queue_ms,
        ttft_ms=message.ttft_ms,
        tpot_ms=message.tpot_ms,
        e2e_ms=message.e2e_ms,
    )
