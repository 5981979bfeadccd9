"""What a model will take, computed from its headers before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stepwire_executor.kv_cache import bytes_per_block
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.expected import expected_tensors

_LOGIT_COPIES = 2
"""The sampler holds float32 scores beside the logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on the device, and the tokens that they are for."""

    num_parameters: int
    """Elements of the checkpoint; a tied table counts once."""
    weight_bytes: int
    """As packed; a tied table counts twice, once for lookup and once laid out as the head."""
    activation_bytes: int
    """Most that a step holds beside weights and KV: the layers' buffers or the logits, and the
    rotary table."""
    kv_bytes_per_block: int
    """Over all layers, scales included."""
    kv_bytes_per_token: int
    """kv_bytes_per_block / block_size."""
    block_size: int
    """Tokens a KV block."""
    max_num_batched_tokens: int
    """Tokens a step that activation_bytes allows for."""
    max_num_seqs: int
    """Rows of logits a step that activation_bytes allows for."""


def estimate_memory(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    kv_cache_dtype: torch.dtype,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
) -> MemoryPlan:
    """Add up tensors by shape.

    dtype: of weights and activations. kv_cache_dtype: of KV pages, float8_e4m3fn for fp8.
    """
    num_parameters = sum(math.prod(shape) for shape in expected_tensors(config).values())
    table_copies = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    block_bytes = bytes_per_block(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        block_size=block_size,
        head_dim=config.head_dim,
        dtype=kv_cache_dtype,
    )
    return MemoryPlan(
        num_parameters=num_parameters,
        weight_bytes=(num_parameters + table_copies) * dtype.itemsize,
        activation_bytes=max(
            max_num_batched_tokens * _widest_token(config) * dtype.itemsize,
            max_num_seqs * config.vocab_size * 4 * _LOGIT_COPIES,
        )
        + max_model_len * config.rope.rotary_dim * 4,
        kv_bytes_per_block=block_bytes,
        kv_bytes_per_token=block_bytes // block_size,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
    )


def _widest_token(config: ModelConfig) -> int:
    """Elements alive at once for one token, at the widest point of a layer."""
    streams = 2 * config.hidden_size  # the residual and its normalised copy
    attention = 2 * config.query_size + 2 * config.kv_size + config.hidden_size
    mlp = 3 * config.intermediate_size
    return streams + max(attention, mlp)
