"""What a request's stream holds, as messages of the public API."""

from __future__ import annotations

from collections.abc import Iterable

from stepwire.scheduler.v1 import generation_pb2

from stepwire_scheduler.request_stream import (
    Queued,
    RequestStream,
    Scheduled,
    SequenceOutput,
)
from stepwire_scheduler.sequence import FinishReason, Logprobs

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
}


def encode_queued(event: Queued) -> generation_pb2.Queued:
    """The stream's first event."""
    return generation_pb2.Queued(
        queued_unix_ms=event.queued_unix_ms,
        num_prompt_tokens=event.num_prompt_tokens,
        num_waiting=event.num_waiting,
    )


def encode_scheduled(event: Scheduled) -> generation_pb2.Scheduled:
    """A sequence's first step."""
    return generation_pb2.Scheduled(
        index=event.index, queue_ms=event.queue_ms, num_cached_tokens=event.num_cached_tokens
    )


def encode_output(event: SequenceOutput) -> generation_pb2.Output:
    """More of a sequence."""
    output = generation_pb2.Output(
        index=event.index,
        text=event.text,
        token_ids=event.token_ids,
        logprobs=_encode_logprobs(event.logprobs),
    )
    if event.finish_reason is not None:
        output.finish_reason = _FINISH_REASONS[event.finish_reason]
    _set_stop_cause(output, event)
    return output


def extend_choice(choice: generation_pb2.Choice, event: SequenceOutput) -> None:
    """Add more of a sequence to its choice."""
    choice.text += event.text
    choice.token_ids.extend(event.token_ids)
    choice.logprobs.extend(_encode_logprobs(event.logprobs))
    if event.finish_reason is not None:
        choice.finish_reason = _FINISH_REASONS[event.finish_reason]
    _set_stop_cause(choice, event)


def _set_stop_cause(
    message: generation_pb2.Output | generation_pb2.Choice, event: SequenceOutput
) -> None:
    if event.stop_string is not None:
        message.stop_string = event.stop_string
    elif event.stop_token_id is not None:
        message.stop_token_id = event.stop_token_id


def _encode_logprobs(entries: Iterable[Logprobs]) -> list[generation_pb2.TokenLogprob]:
    return [
        generation_pb2.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=[
                generation_pb2.AlternativeToken(token_id=token_id, logprob=logprob)
                for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            ],
        )
        for entry in entries
    ]


def encode_usage(stream: RequestStream) -> generation_pb2.Usage:
    """The request's tokens, so far or in all."""
    usage = stream.usage
    return generation_pb2.Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_output_tokens=usage.num_output_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_preemptions=usage.num_preemptions,
        num_draft_tokens=usage.num_draft_tokens,
        num_accepted_tokens=usage.num_accepted_tokens,
    )


def encode_timings(stream: RequestStream) -> generation_pb2.Timings:
    """The request's times, once it has ended."""
    timings = stream.timings
    return generation_pb2.Timings(
        queue_ms=timings.queue_ms,
        ttft_ms=timings.ttft_ms,
        tpot_ms=timings.tpot_ms,
        e2e_ms=timings.e2e_ms,
    )
