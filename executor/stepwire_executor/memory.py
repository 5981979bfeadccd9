"""How many KV blocks to allocate, decided before they are allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepwire_executor.config import Capacity, ExecutorConfig, blocks_for
from stepwire_executor.errors import ModelLoadError

DEFAULT_TOKENS_PER_SEQ = 2_048
"""Tokens of KV a slot that a CPU's default pool has room for."""
DEFAULT_MEMORY_FRACTION = 0.25
"""Share of the available memory that a CPU's default pool may take."""
MAX_UTILIZATION = 0.97
"""Most of a GPU's memory that an error message will advise to use."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCachePlan:
    """Size of the KV pool and what follows from it."""

    num_blocks: int
    """Blocks to allocate."""
    max_model_len: int
    """Longest sequence in tokens that the pool can hold; at most what was asked for."""
    warning: str | None
    """One line for the operator where max_model_len had to shrink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A GPU's memory once weights and tables are on it, as measured."""

    total_bytes: int
    used_bytes: int
    """By everything: weights, tables, other processes."""
    activation_bytes: int
    """Most that a step adds."""
    graph_bytes: int
    """Kept for CUDA graphs."""

    def fixed_bytes(self) -> int:
        """What the KV pool cannot have."""
        return self.used_bytes + self.activation_bytes + self.graph_bytes


def plan_kv_cache(
    config: ExecutorConfig,
    capacity: Capacity,
    *,
    max_model_len: int,
    block_bytes: int,
    available_bytes: int,
) -> KVCachePlan:
    """Choose the size of a pool in host memory.

    max_model_len: tokens wanted for one sequence; block_bytes: of one block over all layers;
    available_bytes: memory free once the weights are loaded.
    Raises ModelLoadError where not even one block fits.
    """
    chosen = _chosen_blocks(config, block_bytes)
    if chosen is None:
        tokens = capacity.max_num_seqs * min(max_model_len, DEFAULT_TOKENS_PER_SEQ)
        affordable = int(available_bytes * DEFAULT_MEMORY_FRACTION) // block_bytes
        chosen = min(blocks_for(tokens, capacity.block_size), affordable)
    if chosen < 1:
        raise _no_block(block_bytes)
    return _plan(config, capacity, chosen, max_model_len, block_bytes, fix=None)


def plan_device_kv_cache(
    config: ExecutorConfig,
    capacity: Capacity,
    memory: DeviceMemory,
    *,
    max_model_len: int,
    block_bytes: int,
) -> KVCachePlan:
    """Choose the size of a pool on a GPU: all that --gpu-memory-utilization leaves.

    Arguments as of plan_kv_cache. Raises ModelLoadError where not even one block fits, with the
    flag to change and to what.
    """
    allowed = int(memory.total_bytes * config.gpu_memory_utilization)
    chosen = _chosen_blocks(config, block_bytes)
    if chosen is None:
        chosen = (allowed - memory.fixed_bytes()) // block_bytes
    if chosen < 1:
        raise ModelLoadError(
            f"the KV cache has no room: {_gib(memory.used_bytes)} of {_gib(memory.total_bytes)} "
            f"are taken by weights and others, a step takes {_gib(memory.activation_bytes)}, CUDA "
            f"graphs {_gib(memory.graph_bytes)}, and --gpu-memory-utilization "
            f"{config.gpu_memory_utilization} allows {_gib(allowed)} in all: "
            + _more_room(config, capacity, memory, block_bytes)
        )
    needed = blocks_for(max_model_len, capacity.block_size) * block_bytes
    utilization = _utilization_for(memory, needed)
    fix = (
        f"raise --gpu-memory-utilization to {utilization} for all of it"
        if utilization <= MAX_UTILIZATION
        else "try --kv-cache-dtype fp8 for twice as many"
    )
    return _plan(config, capacity, chosen, max_model_len, block_bytes, fix=fix)


def _chosen_blocks(config: ExecutorConfig, block_bytes: int) -> int | None:
    """What the operator asked for, if anything; raises ModelLoadError for less than a block."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_cache_memory_bytes is None:
        return None
    if config.kv_cache_memory_bytes < block_bytes:
        raise _no_block(block_bytes)
    return config.kv_cache_memory_bytes // block_bytes


def _no_block(block_bytes: int) -> ModelLoadError:
    return ModelLoadError(
        f"the KV cache has no room for one block: set --kv-cache-memory-bytes to at least "
        f"{block_bytes}, or lower --block-size"
    )


def _plan(
    config: ExecutorConfig,
    capacity: Capacity,
    num_blocks: int,
    max_model_len: int,
    block_bytes: int,
    *,
    fix: str | None,
) -> KVCachePlan:
    """fix: for a pool that nobody asked for; None names the flag that sets the pool."""
    num_tokens = num_blocks * capacity.block_size
    warning = None
    if num_tokens < max_model_len:
        needed_blocks = blocks_for(max_model_len, capacity.block_size)
        if config.num_kv_blocks is not None:
            fix = f"raise --num-kv-blocks to {needed_blocks} for all of it"
        elif config.kv_cache_memory_bytes is not None or fix is None:
            fix = f"raise --kv-cache-memory-bytes to {needed_blocks * block_bytes} for all of it"
        warning = (
            f"the KV cache holds {num_tokens} tokens, less than the context of {max_model_len}: "
            f"sequences are limited to {num_tokens} tokens; {fix}"
        )
    return KVCachePlan(
        num_blocks=num_blocks, max_model_len=min(max_model_len, num_tokens), warning=warning
    )


def _more_room(
    config: ExecutorConfig, capacity: Capacity, memory: DeviceMemory, block_bytes: int
) -> str:
    utilization = _utilization_for(memory, block_bytes)
    if utilization <= MAX_UTILIZATION:
        return f"raise it to {utilization} or more"
    allowed = int(memory.total_bytes * config.gpu_memory_utilization)
    room = allowed - memory.used_bytes - memory.graph_bytes - block_bytes
    num_tokens = 0
    if memory.activation_bytes:
        num_tokens = capacity.max_num_batched_tokens * room // memory.activation_bytes // 64 * 64
    if num_tokens >= capacity.max_num_seqs:
        return f"lower --max-num-batched-tokens to {num_tokens}"
    if capacity.max_num_seqs > 16 and memory.activation_bytes + memory.graph_bytes > block_bytes:
        return "lower --max-num-seqs to 16 and --max-num-batched-tokens to 512"
    return "use a smaller model, a smaller --dtype or a GPU with more memory"


def _utilization_for(memory: DeviceMemory, kv_bytes: int) -> float:
    """Least --gpu-memory-utilization that leaves kv_bytes, rounded up to a hundredth."""
    return math.ceil(100 * (memory.fixed_bytes() + kv_bytes) / memory.total_bytes) / 100


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
