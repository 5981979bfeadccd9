"""What the planner is told about the executors and the policy."""

from __future__ import annotations

from dataclasses import dataclass

from stepwire_scheduler.config import SchedulingPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerConfig:
    """What the executor offers and how to share it out."""

    num_blocks: int
    block_size: int
    """Tokens a KV block."""
    max_num_seqs: int
    """Slots of the executor."""
    max_num_batched_tokens: int
    """Most tokens a step."""
    max_num_prefill_tokens: int
    """Most prefill tokens a step while streams that have begun decode, or wait to be recomputed;
    bounds their gaps."""
    max_inflight_steps: int = 2
    """Plans that may be out without their result."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    enable_prefix_caching: bool = True
    eos_token_ids: frozenset[int] = frozenset()
    has_draft_model: bool = False
    """Drafts are the executor's: plans say how many, not which."""
    max_resumes: int = 3
    """Epochs that a sequence may lose before it fails."""
