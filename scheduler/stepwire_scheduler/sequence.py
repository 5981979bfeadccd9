"""Requests and the sequences that they generate: plain data, no behaviour of a server."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """End-of-sequence token, stop token or stop string."""
    LENGTH = "length"
    """max_tokens or the context's end."""
    CANCELLED = "cancelled"
    """Cancel, or the client went away."""
    DEADLINE = "deadline"
    """The request's deadline passed."""
    ERROR = "error"
    """The executor could not go on with it."""


class SequenceStatus(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    """In the queue: new, preempted, or its executor was lost."""
    RUNNING = "running"
    """Admitted: has a slot on the executor."""
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens; complete and validated. Field meanings as in the public API."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    n: int = 1
    num_speculative_tokens: int | None = None
    """Most draft tokens a step for each sequence; None: as many as the server's."""


RequestKey: TypeAlias = tuple[str, str]
"""(tenant, request_id): what names a request. Tenants do not see one another's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted request."""

    request_id: str
    prompt_token_ids: array[int]
    """Type code "I"; not empty."""
    sampling_params: SamplingParams
    priority: int = 0
    """Smaller runs earlier under the priority policy."""
    arrival_ms: float = 0.0
    """On the scheduler's monotonic clock."""
    deadline_ms: float = float("inf")
    """On the same clock."""
    tenant: str = ""
    """Whose request it is: ids are a tenant's own, and prefixes are shared within it only."""
    resume_window_ms: int = 0
    """How long it goes on, and its output is kept, without a reader; 0: it ends with its call."""
    input_digest: bytes = b""
    """Of what the client sent, where it may be resumed: an equal message attaches to it."""

    @property
    def key(self) -> RequestKey:
        """What tells it from every other request."""
        return self.tenant, self.request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probabilities of one sampled token under the unadjusted distribution."""

    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest."""
    top_token_ids: tuple[int, ...]
    """Likeliest first."""
    top_logprobs: tuple[float, ...]


class Sequence:
    """One continuation of a request's prompt: its tokens and what is planned for them.

    `num_computed_tokens` runs ahead of the executor: it counts what has been planned.
    `num_pending_tokens` counts samples that are planned but not back yet, so the executor
    knows `len(token_ids) + num_pending_tokens` tokens once it has run every plan sent. Neither
    counts drafts: those that are accepted come on top when their step is booked.
    """

    __slots__ = (
        "admitted_step_id",
        "block_hashes",
        "block_ids",
        "finish_reason",
        "first_scheduled_ms",
        "index",
        "last_step_id",
        "leader",
        "max_num_tokens",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_draft_tokens",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_resumes",
        "order_key",
        "request",
        "slot",
        "status",
        "stop_token_id",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        order_key: tuple[int, int],
        stop_ids: frozenset[int],
        leader: Sequence | None = None,
    ) -> None:
        """Start waiting.

        order_key sorts by policy; stop_ids end it, end-of-sequence included; leader is the
        request's first sequence, for the others, whose prompt they share.
        """
        self.leader = leader
        self.request = request
        self.index = index
        self.order_key = order_key
        self.stop_token_ids = stop_ids
        self.token_ids: array[int] = array("I", request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + request.sampling_params.max_tokens
        """Tokens, prompt included, at which it ends for its length."""
        self.status = SequenceStatus.WAITING
        self.slot = -1
        self.block_ids: list[int] = []
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix cache at the first admission."""
        self.num_registered_blocks = 0
        """Leading blocks of this admission that the prefix cache has been told of."""
        self.block_hashes: list[bytes] = []
        """Chain hashes of the leading full blocks of token_ids; survives preemption."""
        self.admitted_step_id = 0
        self.last_step_id = 0
        """The last planned step that touches its blocks."""
        self.first_scheduled_ms: float | None = None
        self.num_draft_tokens = 0
        """Tokens that were proposed by speculation and verified."""
        self.num_accepted_tokens = 0
        """Those of them that were sampled as well."""
        self.num_preemptions = 0
        self.num_resumes = 0
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def forget_computed(self) -> None:
        """Leave the executor: no slot, no blocks, nothing computed; samples in flight count."""
        self.slot = -1
        self.block_ids = []
        self.num_computed_tokens = 0
        self.num_registered_blocks = 0
        self.last_step_id = 0

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}/{self.index}, {self.status.value}, "
            f"tokens={len(self.token_ids)}, computed={self.num_computed_tokens}, "
            f"pending={self.num_pending_tokens}, blocks={len(self.block_ids)})"
        )
