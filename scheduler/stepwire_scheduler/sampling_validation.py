"""Checks sampling parameters and fills in their defaults."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from stepwire.scheduler.v1 import generation_pb2

from stepwire_scheduler.sequence import SamplingParams
from stepwire_scheduler.violations import Violations, check_vocabulary

MAX_NUM_SEQUENCES = 8
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 4
MAX_STOP_STRING_BYTES = 64
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1_024

_GREEDY_BELOW = 1e-5
"""A temperature so small that logits / temperature leaves float32's range is greedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a request must keep to."""

    vocab_size: int
    max_model_len: int
    """Tokens, prompt and output."""
    num_speculative_tokens: int = 0
    """Most draft tokens a step for each sequence."""


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
            return f"[{self.low:g}, inf)"
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


def check_sampling_params(
    params: generation_pb2.SamplingParams, limits: ModelLimits, violations: Violations
) -> None:
    """Note every parameter out of its range; lists that are too long are not looped over."""
    prefix = "input.sampling_params"
    for name, allowed in _RANGES.items():
        # HasField is typed by literal names; those of _RANGES are optional fields.
        if params.HasField(name) and getattr(params, name) not in allowed:  # type: ignore[arg-type]
            violations.add(f"{prefix}.{name}", f"must be in {allowed}")
    if params.HasField("max_tokens") and params.min_tokens > params.max_tokens:
        violations.add(f"{prefix}.min_tokens", "must not be above max_tokens")
    elif params.min_tokens >= limits.max_model_len:
        violations.add(f"{prefix}.min_tokens", f"must be below {limits.max_model_len}")
    if params.num_speculative_tokens > limits.num_speculative_tokens:
        most = limits.num_speculative_tokens
        violations.add(
            f"{prefix}.num_speculative_tokens",
            f"must be in [0, {most}]" if most else "must be 0: this server does not speculate",
        )
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
        check_vocabulary(
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


def with_defaults(
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
        num_speculative_tokens=params.num_speculative_tokens
        if params.HasField("num_speculative_tokens")
        else None,
    )
