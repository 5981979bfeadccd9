"""One validator for all entry points: what a client sent to a `Request`, or every fault in it."""

from __future__ import annotations

import math
import secrets
import uuid
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepwire.scheduler.v1 import generation_pb2

from stepwire_scheduler.errors import (
    MAX_VIOLATIONS,
    ChatTemplateError,
    FieldViolation,
    InvalidRequestError,
    TextTooLongError,
)
from stepwire_scheduler.sequence import Request, SamplingParams

if TYPE_CHECKING:  # the library behind it loads after the server listens
    from stepwire_scheduler.tokenizer import Tokenizer

MAX_REQUEST_ID_CHARACTERS = 128
MAX_PRIORITY = 1_000
MAX_NUM_SEQUENCES = 8
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 4
MAX_STOP_STRING_BYTES = 64
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1_024
MAX_CHAT_MESSAGES = 1_024
DEFAULT_MAX_TOKENS = 256

_GREEDY_BELOW = 1e-5
"""A temperature so small that logits / temperature leaves float32's range is greedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a request must keep to."""

    vocab_size: int
    max_model_len: int
    """Tokens, prompt and output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """Allowed values of a sampling parameter."""

    low: float
    high: float
    is_low_allowed: bool = True

    def __contains__(self, value: float) -> bool:
        """False for NaN."""
        above = self.low <= value if self.is_low_allowed else self.low < value
        return above and value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"[{self.low:g}, ∞)"
        return f"{'[' if self.is_low_allowed else '('}{self.low:g}, {self.high:g}]"


_RANGES = {
    "temperature": _Range(low=0, high=100),
    "top_p": _Range(low=0, high=1, is_low_allowed=False),
    "min_p": _Range(low=0, high=1),
    "presence_penalty": _Range(low=-2, high=2),
    "frequency_penalty": _Range(low=-2, high=2),
    "repetition_penalty": _Range(low=0, high=10, is_low_allowed=False),
    "n": _Range(low=1, high=MAX_NUM_SEQUENCES),
    "logprobs": _Range(low=0, high=MAX_LOGPROBS),
    "max_tokens": _Range(low=1, high=math.inf),
}
_LOGIT_BIAS_RANGE = _Range(low=-100, high=100)


class Violations:
    """Collects faults, so that a client learns of all of them at once."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """field: path from the request message."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append(FieldViolation(field=field, description=description))

    @property
    def is_full(self) -> bool:
        """Whether more faults would not be reported."""
        return len(self._found) >= MAX_VIOLATIONS

    def raise_if_any(self) -> None:
        """Raises InvalidRequestError."""
        if self._found:
            raise InvalidRequestError(self._found)


async def validate_input(
    message: generation_pb2.GenerationInput,
    *,
    limits: ModelLimits,
    tokenizer: Tokenizer,
    arrival_ms: float,
    deadline_ms: float,
) -> Request:
    """The request with every default filled in, its prompt tokenised.

    arrival_ms, deadline_ms: on the scheduler's clock. The cost is bounded before anything is
    looped over or tokenised. Raises InvalidRequestError, or QueueFullError if too many texts
    are being tokenised.
    """
    violations = Violations()
    params = message.sampling_params
    _check_request_id(message.request_id, violations)
    if not -MAX_PRIORITY <= message.priority <= MAX_PRIORITY:
        violations.add("input.priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    _check_sampling_params(params, limits, violations)
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
        sampling_params=_with_defaults(params, max_tokens, limits),
        priority=message.priority,
        arrival_ms=arrival_ms,
        deadline_ms=deadline_ms,
    )


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
    _check_vocabulary(message.token_ids, "token_ids", vocab_size, violations)
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
        _check_vocabulary(ids, "input.token_ids.ids", limits.vocab_size, violations)


def _check_vocabulary(
    ids: Sequence[int], field: str, vocab_size: int, violations: Violations
) -> None:
    """Name the ids beyond the vocabulary; the common case is one pass in C."""
    if not ids or max(ids) < vocab_size:
        return
    for i, token_id in enumerate(ids):
        if token_id >= vocab_size:
            violations.add(f"{field}[{i}]", f"must be below the vocabulary size {vocab_size}")
            if violations.is_full:
                return


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


def _check_sampling_params(
    params: generation_pb2.SamplingParams, limits: ModelLimits, violations: Violations
) -> None:
    prefix = "input.sampling_params"
    for name, allowed in _RANGES.items():
        # HasField is typed by literal names; those of _RANGES are optional fields.
        if params.HasField(name) and getattr(params, name) not in allowed:  # type: ignore[arg-type]
            violations.add(f"{prefix}.{name}", f"must be in {allowed}")
    if params.HasField("max_tokens") and params.min_tokens > params.max_tokens:
        violations.add(f"{prefix}.min_tokens", "must not be above max_tokens")
    elif params.min_tokens >= limits.max_model_len:
        violations.add(f"{prefix}.min_tokens", f"must be below {limits.max_model_len}")
    _check_logit_bias(params, limits, violations)
    if len(params.stop) > MAX_STOP_STRINGS:
        violations.add(f"{prefix}.stop", f"must be at most {MAX_STOP_STRINGS} strings")
    else:
        for i, stop in enumerate(params.stop):
            if not 0 < len(stop.encode()) <= MAX_STOP_STRING_BYTES:
                violations.add(
                    f"{prefix}.stop[{i}]", f"must have 1 to {MAX_STOP_STRING_BYTES} bytes of UTF-8"
                )
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        violations.add(f"{prefix}.stop_token_ids", f"must be at most {MAX_STOP_TOKEN_IDS} ids")
    else:
        _check_vocabulary(
            params.stop_token_ids, f"{prefix}.stop_token_ids", limits.vocab_size, violations
        )


def _check_logit_bias(
    params: generation_pb2.SamplingParams, limits: ModelLimits, violations: Violations
) -> None:
    field = "input.sampling_params.logit_bias"
    if len(params.logit_bias) > MAX_LOGIT_BIASES:
        violations.add(field, f"must be at most {MAX_LOGIT_BIASES} entries")
        return
    for token_id, bias in sorted(params.logit_bias.items()):
        if token_id >= limits.vocab_size:
            violations.add(
                f"{field}[{token_id}]",
                f"the token id must be below the vocabulary size {limits.vocab_size}",
            )
        if bias not in _LOGIT_BIAS_RANGE:
            violations.add(f"{field}[{token_id}]", f"must be in {_LOGIT_BIAS_RANGE}")
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


def _with_defaults(
    params: generation_pb2.SamplingParams, max_tokens: int, limits: ModelLimits
) -> SamplingParams:
    """Checked parameters with every default filled in."""
    temperature = params.temperature if params.HasField("temperature") else 1.0
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_k=params.top_k if params.top_k < limits.vocab_size else 0,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        min_p=params.min_p,
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty
        if params.HasField("repetition_penalty")
        else 1.0,
        logit_bias=dict(params.logit_bias),
        stop=tuple(dict.fromkeys(params.stop)),
        stop_token_ids=frozenset(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        num_logprobs=params.logprobs if params.HasField("logprobs") else None,
        n=params.n if params.HasField("n") else 1,
    )
