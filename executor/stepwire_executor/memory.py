"""How many KV blocks to allocate, decided before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from stepwire_executor.config import ExecutorConfig, blocks_for
from stepwire_executor.errors import ModelLoadError

DEFAULT_TOKENS_PER_SEQ = 2_048
"""Tokens of KV a slot that the default pool has room for."""
DEFAULT_MEMORY_FRACTION = 0.25
"""Share of the available memory that the default pool may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCachePlan:
    """Size of the KV pool and what follows from it."""

    num_blocks: int
    """Blocks to allocate."""
    max_model_len: int
    """Longest sequence in tokens that the pool can hold; at most what was asked for."""
    warning: str | None
    """One line for the operator where max_model_len had to shrink."""


def plan_kv_cache(
    config: ExecutorConfig, *, max_model_len: int, block_bytes: int, available_bytes: int
) -> KVCachePlan:
    """Choose the pool's size.

    max_model_len: tokens wanted for one sequence; block_bytes: of one block over all layers;
    available_bytes: memory free once the weights are loaded.
    Raises ModelLoadError where not even one block fits.
    """
    if config.num_kv_blocks is not None:
        num_blocks, flag = config.num_kv_blocks, "--num-kv-blocks"
    elif config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
        flag = "--kv-cache-memory-bytes"
    else:
        tokens = config.max_num_seqs * min(max_model_len, DEFAULT_TOKENS_PER_SEQ)
        affordable = int(available_bytes * DEFAULT_MEMORY_FRACTION) // block_bytes
        num_blocks = min(blocks_for(tokens, config.block_size), affordable)
        flag = "--kv-cache-memory-bytes"
    if num_blocks < 1:
        raise ModelLoadError(
            f"the KV cache has no room for one block: set --kv-cache-memory-bytes to at least "
            f"{block_bytes}, or lower --block-size"
        )
    capacity = num_blocks * config.block_size
    warning = None
    if capacity < max_model_len:
        needed_blocks = blocks_for(max_model_len, config.block_size)
        needed = needed_blocks if flag == "--num-kv-blocks" else needed_blocks * block_bytes
        warning = (
            f"the KV cache holds {capacity} tokens, less than the context of {max_model_len}: "
            f"sequences are limited to {capacity} tokens; raise {flag} to {needed} for all of it"
        )
    return KVCachePlan(
        num_blocks=num_blocks, max_model_len=min(max_model_len, capacity), warning=warning
    )
