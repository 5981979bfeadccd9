"""What the executors serve, the limits that follow, and how far their load has come."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from stepwire.executor.v1.executor_pb2 import DescribeResponse

from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ExecutorMismatchError


class ServingState(enum.Enum):
    """How far the scheduler is from running requests."""

    CONNECTING = "connecting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far the executors' load has come."""

    phase: str
    fraction: float
    """0 to 1 over the whole load."""
    elapsed_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the executors serve and the limits that follow."""

    fingerprint: str
    architecture: str
    vocab_size: int
    max_model_len: int
    """Tokens, prompt and output: the model's context or the KV pool, whichever is smaller."""
    eos_token_ids: frozenset[int]
    dtype: str
    kv_cache_dtype: str
    block_size: int
    num_blocks: int
    rank_weight_bytes: tuple[int, ...]
    """By rank."""
    kv_cache_bytes: int
    """Over all ranks."""
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    speculative_method: str = ""
    """Empty: none."""
    num_speculative_tokens: int = 0
    """Most draft tokens a step for each sequence."""
    quantization: str = "none"
    """Which weights are integers, for people."""


def served_model(descriptions: Sequence[DescribeResponse], config: SchedulerConfig) -> ServedModel:
    """Put together what the executors offer and what the scheduler's settings allow of it.

    descriptions: of ranks that agree, one each.
    """
    ranks = sorted(descriptions, key=lambda description: description.rank)
    description = ranks[0]
    pool_tokens = description.num_blocks * description.block_size
    return ServedModel(
        fingerprint=description.model_fingerprint,
        architecture=description.architecture,
        vocab_size=description.vocab_size,
        max_model_len=min(description.max_position_embeddings, pool_tokens),
        eos_token_ids=frozenset(description.eos_token_ids),
        dtype=description.dtype,
        kv_cache_dtype=description.kv_cache_dtype,
        quantization=description.quantization,
        block_size=description.block_size,
        num_blocks=description.num_blocks,
        rank_weight_bytes=tuple(rank.weight_bytes for rank in ranks),
        kv_cache_bytes=sum(rank.kv_cache_bytes for rank in ranks),
        device=description.device,
        max_num_seqs=min(config.max_num_seqs or description.max_num_seqs, description.max_num_seqs),
        max_num_batched_tokens=min(
            config.max_num_batched_tokens or description.max_num_batched_tokens,
            description.max_num_batched_tokens,
        ),
        speculative_method=config.speculative_method or "",
        num_speculative_tokens=config.max_num_drafts,
    )


def check_speculation(description: DescribeResponse, config: SchedulerConfig) -> None:
    """Raise ExecutorMismatchError, which names the fix, where executors cannot speculate so."""
    if config.speculative_method == "draft_model" and not description.draft_model:
        raise ExecutorMismatchError(
            "--speculative-method draft_model needs executors with a draft model: start them with "
            "--speculative-model, or choose ngram or suffix"
        )
    if config.max_num_drafts >= description.max_num_batched_tokens:
        raise ExecutorMismatchError(
            f"--num-speculative-tokens {config.max_num_drafts} and the token before them do not "
            f"fit in the executors' --max-num-batched-tokens {description.max_num_batched_tokens}: "
            "lower the one or raise the other"
        )
