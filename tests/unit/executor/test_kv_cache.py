"""What KV pages take, and what copying them takes along."""

from __future__ import annotations

import pytest
import torch
from stepwire_executor.kv_cache import FP8_DTYPE, KVCache, bytes_per_block

CPU = torch.device("cpu")


def block_bytes(dtype: torch.dtype, head_dim: int) -> int:
    return bytes_per_block(
        num_layers=30, num_kv_heads=3, block_size=16, head_dim=head_dim, dtype=dtype
    )


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_an_fp8_cache_takes_at_most_53_percent_of_bfloat16s_bytes(head_dim: int) -> None:
    assert block_bytes(FP8_DTYPE, head_dim) <= 0.53 * block_bytes(torch.bfloat16, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8_DTYPE])
def test_a_cache_allocates_the_bytes_it_is_said_to_take(dtype: torch.dtype) -> None:
    geometry = {"num_layers": 2, "num_kv_heads": 3, "block_size": 4, "head_dim": 16}
    cache = KVCache(num_blocks=5, dtype=dtype, device=CPU, **geometry)
    allocated = sum(
        tensor.numel() * tensor.itemsize
        for pages in cache.layers
        for tensor in (pages.key, pages.value, pages.key_scale, pages.value_scale)
        if tensor is not None
    )
    assert cache.num_bytes == allocated == 5 * bytes_per_block(dtype=dtype, **geometry)


def test_a_copied_block_brings_its_scales() -> None:
    cache = KVCache(
        num_layers=1,
        num_blocks=3,
        num_kv_heads=2,
        block_size=4,
        head_dim=8,
        dtype=FP8_DTYPE,
        device=CPU,
    )
    (pages,) = cache.layers
    assert pages.key_scale is not None
    assert pages.value_scale is not None
    for number, tensor in enumerate((pages.key, pages.value, pages.key_scale, pages.value_scale)):
        tensor[2] = number + 1
    cache.copy_blocks(torch.tensor([2]), torch.tensor([0]))
    for tensor in (pages.key, pages.value, pages.key_scale, pages.value_scale):
        assert torch.equal(tensor[0].float(), tensor[2].float())
        assert not tensor[1].float().any()
