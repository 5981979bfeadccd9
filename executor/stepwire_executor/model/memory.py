"""What a model will take, computed from its headers before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stepwire_executor.kv_cache import bytes_per_block
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.expected import expected_tensors, head_name
from stepwire_executor.model.weights.source import GroupFormat
from stepwire_executor.parallel.sharding import ModelShard

_LOGIT_COPIES = 2
"""The sampler holds float32 scores beside the logits."""
_MAX_SPLITS = 64
"""Parts that a GPU's attention kernel cuts a context into at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank's device, and the tokens that they are for."""

    num_parameters: int
    """Elements of the rank's part of the checkpoint; a tied table counts once."""
    weight_bytes: int
    """As packed; a tied table counts twice where lookup and head need it in two layouts: on a CPU
    unless it is in integers, on a GPU if it is."""
    norm_bytes: int
    """The part of weight_bytes that is whole on every rank; a draft model is, all of it."""
    activation_bytes: int
    """Most that a step holds beside weights and KV: the layers' buffers or the logits, and the
    rotary table; on a GPU the tables of slots too."""
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
    shard: ModelShard,
    *,
    dtype: torch.dtype,
    kv_cache_dtype: torch.dtype,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    is_gpu: bool = False,
    has_static_kv_scales: bool = False,
    groups: Mapping[str, GroupFormat] | None = None,
) -> MemoryPlan:
    """Add up tensors by shape; what CUDA takes for itself is not in it.

    config: of the whole model; shard: the rank's part of it. dtype: of weights and activations.
    kv_cache_dtype: of KV pages, float8_e4m3fn for fp8. has_static_kv_scales: whether the
    checkpoint brings the scales of an fp8 cache. groups: of weights in integers, by name.
    """
    vocab_size = config.vocab_size
    groups = groups or {}
    config = dataclasses.replace(shard.local_config(config), vocab_size=len(shard.vocab))
    tensors = _tensors(config, shard)
    num_norms = sum(
        math.prod(shape) for name, shape in tensors.items() if name.endswith("norm.weight")
    )
    block_bytes = bytes_per_block(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        block_size=block_size,
        head_dim=config.head_dim,
        dtype=kv_cache_dtype,
        has_static_scales=has_static_kv_scales,
    )
    return MemoryPlan(
        num_parameters=sum(map(math.prod, tensors.values())),
        weight_bytes=_weight_bytes(config, tensors, groups, dtype, is_gpu),
        norm_bytes=num_norms * dtype.itemsize,
        activation_bytes=max(
            max_num_batched_tokens
            * (_widest_token(config) * dtype.itemsize + _summand_bytes(config, shard, is_gpu)),
            max_num_seqs * 4 * (vocab_size * _LOGIT_COPIES + _gathered_logits(shard)),
        )
        + max_model_len * config.rope.rotary_dim * 4
        + (
            _device_bytes(config, vocab_size, max_num_seqs, max_model_len, block_size)
            if is_gpu
            else 0
        ),
        kv_bytes_per_block=block_bytes,
        kv_bytes_per_token=block_bytes // block_size,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
    )


def _tensors(config: ModelConfig, shard: ModelShard) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a rank's part, whose config this is; the first rank adds the biases."""
    tensors = expected_tensors(config)
    if shard.rank == 0:
        return tensors
    summed = ("o_proj.bias", "down_proj.bias")
    return {name: shape for name, shape in tensors.items() if not name.endswith(summed)}


def _weight_bytes(
    config: ModelConfig,
    tensors: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, GroupFormat],
    dtype: torch.dtype,
    is_gpu: bool,
) -> int:
    """Bytes of a rank's part as packed; config: the part's."""
    total = 0
    for name, shape in tensors.items():
        # A GPU looks tokens up in dtype.
        if name in groups and not (is_gpu and name == "model.embed_tokens.weight"):
            total += groups[name].packed_bytes(*shape)
        else:
            total += math.prod(shape) * dtype.itemsize
    head = head_name(config)
    if config.tie_word_embeddings and (head in groups) == is_gpu:  # laid out once more
        total += (
            groups[head].packed_bytes(*tensors[head])
            if is_gpu
            else math.prod(tensors[head]) * dtype.itemsize
        )
    return total


def _summand_bytes(config: ModelConfig, shard: ModelShard, is_gpu: bool) -> int:
    """Bytes a token while ranks add: this one's summand, and those of all."""
    if shard.world_size == 1:
        return 0
    return config.hidden_size * (4 if is_gpu else 8) * (1 + shard.world_size)


def _gathered_logits(shard: ModelShard) -> int:
    """Elements a row, while the parts of all ranks are joined."""
    if shard.world_size == 1:
        return 0
    return shard.max_vocab_rows * (1 + shard.world_size)


def _device_bytes(
    config: ModelConfig, vocab_size: int, max_num_seqs: int, max_model_len: int, block_size: int
) -> int:
    """Tables of slots on a GPU, and what attention keeps of each part of a context."""
    token_counts = (max_num_seqs + 1) * vocab_size * 4
    block_table = (max_num_seqs + 1) * math.ceil(max_model_len / block_size) * 4
    split_rows = max_num_seqs * config.num_heads * min(_MAX_SPLITS, math.ceil(max_model_len / 512))
    return token_counts + 2 * block_table + split_rows * (config.head_dim + 2) * 4


def _widest_token(config: ModelConfig) -> int:
    """Elements alive at once for one token, at the widest point of a layer."""
    streams = 2 * config.hidden_size  # the residual and its normalised copy
    attention = 2 * config.query_size + 2 * config.kv_size + config.hidden_size
    mlp = 3 * config.intermediate_size
    return streams + max(attention, mlp)
