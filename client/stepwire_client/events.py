"""What a server tells: events of a stream, whole generations, the served model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """End-of-sequence token, stop token or stop string."""
    LENGTH = "length"
    """max_tokens or the context's end."""
    CANCELLED = "cancelled"
    """Ended by cancel."""


class ModelState(StrEnum):
    """What a server can do now."""

    CONNECTING = "connecting"
    """No executor answers yet."""
    LOADING = "loading"
    """Executors load the model."""
    READY = "ready"
    """Requests run."""
    DRAINING = "draining"
    """Running requests finish; no new ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a sampled token under the model, before penalties and truncation."""

    token_id: int
    """The token that was sampled."""
    logprob: float
    """Natural logarithm."""
    rank: int
    """1 is the likeliest."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest tokens, likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request."""

    num_prompt_tokens: int
    """Tokens of the prompt."""
    num_output_tokens: int
    """Generated tokens over all sequences."""
    num_cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache."""
    num_preemptions: int
    """Times a sequence lost its KV blocks and was recomputed."""
    num_draft_tokens: int = 0
    """Tokens that speculation proposed, over all sequences."""
    num_accepted_tokens: int = 0
    """Those of them that the model sampled as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Times of a request as the scheduler saw them, in milliseconds."""

    queue_ms: float
    """From arrival to the first step."""
    ttft_ms: float
    """From arrival to the first token."""
    tpot_ms: float
    """(e2e - ttft) / (tokens - 1) of the longest sequence; 0 below two tokens."""
    e2e_ms: float
    """From arrival to the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """The request was admitted to the queue."""

    request_id: str
    """Of the request."""
    queued_unix_ms: int
    """Milliseconds since the Unix epoch, server's clock."""
    num_prompt_tokens: int
    """Tokens of the prompt."""
    num_waiting: int
    """Requests ahead of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A sequence got its first step."""

    request_id: str
    """Of the request."""
    index: int
    """Of the sequence in its request."""
    queue_ms: float
    """Time from queued to the first step."""
    num_cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """More of one sequence."""

    request_id: str
    """Of the request."""
    index: int
    """Of the sequence in its request."""
    text: str
    """Whole characters only; can lag behind token_ids."""
    token_ids: tuple[int, ...]
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...]
    """One a token where asked for."""
    finish_reason: FinishReason | None
    """Set on the last output of the sequence."""
    stop_cause: str | int | None
    """The stop string or stop token id that ended it, if one did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """All sequences have ended; the last event."""

    request_id: str
    """Of the request."""
    usage: Usage
    """Token counts."""
    timings: Timings
    """As the scheduler saw them."""


Event: TypeAlias = Queued | Scheduled | Output | Completed


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One generated sequence."""

    index: int
    """0 to n - 1."""
    text: str
    """Its text, without special tokens."""
    token_ids: tuple[int, ...]
    """Its tokens, the ending one included."""
    finish_reason: FinishReason
    """Why it ended."""
    stop_cause: str | int | None
    """The stop string or stop token id that ended it, if one did."""
    logprobs: tuple[TokenLogprob, ...]
    """One a token where asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one request made."""

    request_id: str
    """Of the request."""
    choices: tuple[Choice, ...]
    """By index."""
    usage: Usage
    """Token counts."""
    timings: Timings
    """As the scheduler saw them."""

    @property
    def text(self) -> str:
        """Text of the first sequence."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sequence."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sequence ended."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far a load has come."""

    phase: str
    """What is done now: "read weights", "allocate KV cache", …"""
    fraction: float
    """0 to 1 over the whole load."""
    elapsed_ms: float
    """Since the load began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The served model and the limits in force; most is 0 or empty until READY."""

    model: str
    """The name that clients see."""
    state: ModelState
    """What the server can do now."""
    load_progress: LoadProgress | None
    """Set while LOADING."""
    architecture: str
    """Class name of the model: "LlamaForCausalLM", …"""
    vocab_size: int
    """Token ids are below it."""
    max_model_len: int
    """Most tokens, prompt and output together, that a request may need."""
    eos_token_ids: tuple[int, ...]
    """End a sequence."""
    dtype: str
    """Of weights and activations."""
    kv_cache_dtype: str
    """Of keys and values."""
    block_size: int
    """Tokens a KV block."""
    num_blocks: int
    """KV blocks of the pool."""
    weight_bytes: int
    """Of the loaded weights, over all ranks."""
    rank_weight_bytes: tuple[int, ...]
    """The part of weight_bytes that each rank holds."""
    kv_cache_bytes: int
    """Of the pool, over all ranks."""
    device: str
    """Where it runs: "cpu", "cuda:0 NVIDIA H100", …"""
    max_num_seqs: int
    """Most sequences that run at once."""
    max_num_batched_tokens: int
    """Most tokens a step."""
    has_chat_template: bool
    """Whether chat prompts are accepted."""
    speculative_method: str = ""
    """Where draft tokens come from: "ngram", "suffix" or "draft_model"; empty: there are none."""
    num_speculative_tokens: int = 0
    """Most draft tokens a step for each sequence."""
    quantization: str = ""
    """Which weights are integers, for people: "none", "int4 in groups of 32"."""
