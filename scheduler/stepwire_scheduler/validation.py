"""One validator for all entry points: what a client sent to a `Request`, or every fault in it."""

from __future__ import annotations

import hashlib
import uuid
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepwire.scheduler.v1 import generation_pb2

from stepwire_scheduler.errors import (
    ChatTemplateError,
    FieldViolation,
    InvalidRequestError,
    TextTooLongError,
)
from stepwire_scheduler.sampling_validation import (
    ModelLimits,
    check_sampling_params,
    with_defaults,
)
from stepwire_scheduler.sequence import Request
from stepwire_scheduler.violations import Violations, check_vocabulary

if TYPE_CHECKING:  # the library behind it loads after the server listens
    from stepwire_scheduler.tokenizer import Tokenizer

MAX_REQUEST_ID_CHARACTERS = 128
MAX_PRIORITY = 1_000
MAX_CHAT_MESSAGES = 1_024
DEFAULT_MAX_TOKENS = 256


async def validate_input(
    message: generation_pb2.GenerationInput,
    *,
    limits: ModelLimits,
    tokenizer: Tokenizer,
    arrival_ms: float,
    deadline_ms: float,
    tenant: str = "",
    min_priority: int = -MAX_PRIORITY,
    resume_window_ms: int = 0,
) -> Request:
    """The request with every default filled in, its prompt tokenised.

    arrival_ms, deadline_ms: on the scheduler's clock. tenant, min_priority: whose it is, and the
    smallest priority that may have. resume_window_ms: needs a request_id. The cost is bounded
    before anything is looped over or tokenised. Raises InvalidRequestError, or QueueFullError if
    too many texts are being tokenised.
    """
    violations = Violations()
    params = message.sampling_params
    _check_request_id(message.request_id, violations)
    if resume_window_ms and not message.request_id:
        violations.add("input.request_id", "must be set where resume_window_ms is")
    if not -MAX_PRIORITY <= message.priority <= MAX_PRIORITY:
        violations.add("input.priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    check_sampling_params(params, limits, violations)
    prompt = message.WhichOneof("prompt")
    if prompt is None:
        violations.add("input.prompt", "set one of text, token_ids and chat")
    elif prompt == "token_ids":
        _check_token_ids(message.token_ids.ids, limits, violations)
    elif prompt == "text":
        if not message.text:
            violations.add("input.text", "must not be empty")
    else:
        _check_chat(message.chat, "input.chat", violations)
    violations.raise_if_any()

    if prompt == "token_ids":
        token_ids: Sequence[int] = message.token_ids.ids
    else:
        token_ids = await encode_prompt(
            message, tokenizer, max_tokens=limits.max_model_len, field_prefix="input."
        )
    prompt_token_ids = array("I", token_ids)
    max_tokens = _resolve_max_tokens(params, f"input.{prompt}", prompt_token_ids, limits)
    return Request(
        request_id=message.request_id or f"req-{uuid.uuid4().hex}",
        prompt_token_ids=prompt_token_ids,
        sampling_params=with_defaults(params, max_tokens, limits),
        priority=max(message.priority, min_priority),
        arrival_ms=arrival_ms,
        deadline_ms=deadline_ms,
        tenant=tenant,
        resume_window_ms=resume_window_ms,
        input_digest=input_digest(message) if resume_window_ms else b"",
    )


def input_digest(message: generation_pb2.GenerationInput) -> bytes:
    """Equal for equal inputs, whatever order a client wrote their fields and maps in."""
    return hashlib.blake2b(message.SerializeToString(deterministic=True), digest_size=16).digest()


async def encode_prompt(
    message: generation_pb2.GenerationInput | generation_pb2.TokenizeRequest,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    field_prefix: str = "",
) -> Sequence[int]:
    """Token ids of a text or chat.

    Raises InvalidRequestError where they are too many or the template refuses the messages,
    QueueFullError if too many texts are being tokenised.
    """
    prompt = "chat" if message.WhichOneof("prompt") == "chat" else "text"
    try:
        if prompt == "text":
            return await tokenizer.encode_text(message.text, max_tokens=max_tokens)
        messages = [{"role": each.role, "content": each.content} for each in message.chat.messages]
        return await tokenizer.encode_chat(messages, max_tokens=max_tokens)
    except (ChatTemplateError, TextTooLongError) as error:
        violation = FieldViolation(field=field_prefix + prompt, description=error.message)
        raise InvalidRequestError([violation]) from error


def check_tokenize(message: generation_pb2.TokenizeRequest) -> None:
    """Raises InvalidRequestError."""
    violations = Violations()
    prompt = message.WhichOneof("prompt")
    if prompt is None:
        violations.add("prompt", "set one of text and chat")
    elif prompt == "chat":
        _check_chat(message.chat, "chat", violations)
    violations.raise_if_any()


def check_detokenize(message: generation_pb2.DetokenizeRequest, vocab_size: int) -> None:
    """Raises InvalidRequestError for ids beyond the vocabulary."""
    violations = Violations()
    check_vocabulary(message.token_ids, "token_ids", vocab_size, violations)
    violations.raise_if_any()


def _check_request_id(request_id: str, violations: Violations) -> None:
    is_printable = request_id.isascii() and request_id.isprintable()
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not is_printable:
        violations.add(
            "input.request_id",
            f"must be at most {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters",
        )


def _check_token_ids(ids: Sequence[int], limits: ModelLimits, violations: Violations) -> None:
    if not ids:
        violations.add("input.token_ids.ids", "must not be empty")
    elif len(ids) >= limits.max_model_len:
        violations.add("input.token_ids", _too_long(len(ids), limits))
    else:
        check_vocabulary(ids, "input.token_ids.ids", limits.vocab_size, violations)


def _check_chat(chat: generation_pb2.Chat, field: str, violations: Violations) -> None:
    if not chat.messages:
        violations.add(f"{field}.messages", "must not be empty")
    elif len(chat.messages) > MAX_CHAT_MESSAGES:
        violations.add(f"{field}.messages", f"must be at most {MAX_CHAT_MESSAGES}")
    else:
        for i, message in enumerate(chat.messages):
            if not message.role:
                violations.add(f"{field}.messages[{i}].role", "must not be empty")
                if violations.is_full:
                    return


def _too_long(num_prompt_tokens: int, limits: ModelLimits) -> str:
    return (
        f"{num_prompt_tokens} prompt tokens leave no room for output: prompt and output share "
        f"{limits.max_model_len} tokens"
    )


def _resolve_max_tokens(
    params: generation_pb2.SamplingParams,
    prompt_field: str,
    prompt_token_ids: Sequence[int],
    limits: ModelLimits,
) -> int:
    """max_tokens or its default; raises InvalidRequestError where it cannot fit."""
    violations = Violations()
    num_prompt_tokens = len(prompt_token_ids)
    room = limits.max_model_len - num_prompt_tokens
    max_tokens = params.max_tokens if params.HasField("max_tokens") else 0
    if not prompt_token_ids:
        violations.add(prompt_field, "has no tokens")
    elif room < 1:
        violations.add(prompt_field, _too_long(num_prompt_tokens, limits))
    elif max_tokens > room:
        violations.add(
            "input.sampling_params.max_tokens",
            f"must be at most {room}: the prompt has {num_prompt_tokens} tokens, prompt and "
            f"output share {limits.max_model_len}",
        )
    elif params.min_tokens > room:
        violations.add("input.sampling_params.min_tokens", f"must be at most {room}")
    # Tokens of a text or chat come from the model's files, which may disagree with it.
    elif max(prompt_token_ids) >= limits.vocab_size:
        violations.add(prompt_field, "has a token that is not in the model's vocabulary")
    violations.raise_if_any()
    return max_tokens or min(max(DEFAULT_MAX_TOKENS, params.min_tokens), room)
