"""What a request is made of: the prompt and how to continue it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    """Who speaks: "system", "user" or "assistant" for most chat templates."""
    content: str
    """Its text."""


Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]
"""Text as it is, token ids, or chat messages to render with the model's template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens; None, or empty, leaves the choice to the server."""

    max_tokens: int | None = None
    """Most tokens to generate a sequence; 256 by default."""
    min_tokens: int | None = None
    """No end-of-sequence or stop token before this many."""
    temperature: float | None = None
    """0 is greedy; 1.0 by default."""
    top_k: int | None = None
    """Only the k most likely tokens; 0 is all."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability, (0, 1]."""
    min_p: float | None = None
    """Only tokens at least this likely relative to the likeliest, [0, 1]."""
    seed: int | None = None
    """Makes the output repeatable; drawn by the server by default."""
    presence_penalty: float | None = None
    """Subtracted once from the logit of each token generated before, [-2, 2]."""
    frequency_penalty: float | None = None
    """Subtracted for each time the token was generated before, [-2, 2]."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of tokens seen before, (0, 10]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logit of each token id, [-100, 100]."""
    stop: str | Sequence[str] = ()
    """The output ends before the first of these strings; at most 4."""
    stop_token_ids: Sequence[int] = ()
    """The output ends after the first of these tokens; at most 64."""
    ignore_eos: bool | None = None
    """Goes on past the model's end-of-sequence tokens."""
    logprobs: int | None = None
    """Log-probabilities of the sampled token and of this many likeliest ones, 0 to 20."""
    n: int | None = None
    """Sequences to generate from the prompt, 1 to 8."""
    num_speculative_tokens: int | None = None
    """Most draft tokens a step for each sequence; 0 turns speculation off. By default, and at
    most, ModelInfo.num_speculative_tokens."""
