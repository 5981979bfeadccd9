"""What no scheduler sends, checked again: an executor trusts nobody with its device."""

from __future__ import annotations

import math

from stepwire.executor.v1.executor_pb2 import Admission, SamplingParams

from stepwire_executor.errors import PlanError


def check_sampling_params(admission: Admission, vocab_size: int) -> None:
    """Raise PlanError where an admission's parameters are out of range."""
    problem = _problem_in(admission.sampling_params, vocab_size)
    if problem is not None:
        raise PlanError(f"admission to slot {admission.slot}: {problem}")


def is_penalised(params: SamplingParams) -> bool:
    """Whether logits depend on the tokens before them."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _problem_in(params: SamplingParams, vocab_size: int) -> str | None:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return f"temperature {params.temperature} must be finite and at least 0"
    if not 0 < params.top_p <= 1:
        return f"top_p {params.top_p} must be in (0, 1]"
    if not 0 <= params.min_p <= 1:
        return f"min_p {params.min_p} must be in [0, 1]"
    if not (math.isfinite(params.repetition_penalty) and params.repetition_penalty > 0):
        return f"repetition_penalty {params.repetition_penalty} must be finite and above 0"
    if not math.isfinite(params.presence_penalty):
        return "presence_penalty must be finite"
    if not math.isfinite(params.frequency_penalty):
        return "frequency_penalty must be finite"
    if any(not math.isfinite(value) for value in params.logit_bias.values()):
        return "logit_bias must be finite"
    if max(params.logit_bias, default=0) >= vocab_size:
        return f"logit_bias names a token beyond the vocabulary of {vocab_size}"
    if max(params.suppressed_token_ids, default=0) >= vocab_size:
        return f"suppressed_token_ids names a token beyond the vocabulary of {vocab_size}"
    if params.num_logprobs > vocab_size:
        return f"num_logprobs {params.num_logprobs} is more than the vocabulary of {vocab_size}"
    return None
