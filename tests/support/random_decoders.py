"""Small decoders of random weights, and caches that hold random contexts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from stepwire_executor.kernels import Kernels
from stepwire_executor.kv_cache import FP8_DTYPE, KVCache, StaticScales
from stepwire_executor.model.config import ModelConfig, RopeConfig
from stepwire_executor.model.decoder import Decoder
from stepwire_executor.model.weights.expected import expected_tensors
from stepwire_executor.model.weights.source import TensorInfo
from torch import Tensor

CPU = torch.device("cpu")
MAX_MODEL_LEN = 1200


class RandomWeights:
    """A WeightSource of normal numbers of about the scale that keeps activations near 1."""

    def __init__(self, config: ModelConfig) -> None:
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(shape=shape, dtype="random", num_bytes=0)
            for name, shape in expected_tensors(config).items()
        }

    def load_into(self, name: str, out: Tensor, first_row: int = 0, first_column: int = 0) -> None:
        """See WeightSource."""
        shape = self.tensors[name].shape
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, generator=generator)
        whole = 1 + 0.1 * whole if name.endswith("norm.weight") else whole * shape[-1] ** -0.5
        rows = whole[first_row : first_row + len(out)]
        out.copy_(rows if out.ndim == 1 else rows[:, first_column : first_column + out.shape[1]])

    def sample(self, name: str) -> bytes:
        """See WeightSource."""
        return name.encode()

    def close(self) -> None:
        """See WeightSource."""


def small_config(
    *,
    hidden_size: int = 48,
    intermediate_size: int = 64,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    rotary_dim: int | None = None,
    has_biases: bool = False,
    qk_norm: bool = False,
    sliding_windows: tuple[int | None, ...] = (None, None, None),
) -> ModelConfig:
    """Return the config of a decoder with a layer for each window."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=61,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=len(sliding_windows),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=MAX_MODEL_LEN,
        rope=RopeConfig(theta=10_000.0, rotary_dim=rotary_dim or head_dim),
        tie_word_embeddings=False,
        attention_bias=has_biases,
        attention_output_bias=has_biases,
        mlp_bias=has_biases,
        qk_norm=qk_norm,
        sliding_windows=sliding_windows,
        eos_token_ids=(0,),
        bos_token_id=None,
        checkpoint_dtype=None,
    )


def make_decoder(config: ModelConfig, kernels: Kernels, dtype: torch.dtype) -> Decoder:
    """Return the decoder; the same weights for the same config and dtype."""
    return Decoder(
        config,
        RandomWeights(config),
        kernels,
        dtype=dtype,
        device=CPU,
        max_model_len=MAX_MODEL_LEN,
        on_progress=lambda phase, fraction: None,
    )


def random_cache(
    config: ModelConfig,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    has_static_scales: bool = False,
    has_key_offsets: bool = False,
) -> KVCache:
    """Return a cache, every page of which holds something; the same for the same arguments."""
    generator = torch.Generator().manual_seed(1)
    layers = range(config.num_layers)

    def offset() -> Tensor:
        return torch.randn(config.num_kv_heads, config.head_dim, generator=generator)

    cache = KVCache(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=config.num_kv_heads,
        block_size=block_size,
        head_dim=config.head_dim,
        dtype=dtype,
        device=CPU,
        static_scales=[StaticScales(key=0.01 + 0.001 * i, value=0.02) for i in layers]
        if has_static_scales
        else None,
        key_offsets=[offset() for _ in layers] if has_key_offsets else None,
    )
    is_fp8 = dtype == FP8_DTYPE
    for tensor in cache_tensors(cache):
        numbers = torch.randn(tensor.shape, generator=generator)
        is_scale = tensor.ndim == 3
        tensor.copy_(0.004 * numbers.abs() + 1e-4 if is_scale else numbers * (99 if is_fp8 else 1))
    return cache


def cache_tensors(cache: KVCache) -> list[Tensor]:
    """Return all that a step may write."""
    return [
        tensor
        for pages in cache.layers
        for tensor in (pages.key, pages.value, pages.key_scale, pages.value_scale)
        if tensor is not None
    ]
