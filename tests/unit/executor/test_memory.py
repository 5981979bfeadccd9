"""How large the KV pool becomes."""

from __future__ import annotations

import pytest
import torch
from stepwire_executor.config import ExecutorConfig, resolve_capacity
from stepwire_executor.device import choose_device
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.host import available_memory_bytes, usable_cores
from stepwire_executor.memory import (
    DeviceMemory,
    KVCachePlan,
    plan_device_kv_cache,
    plan_kv_cache,
)

GIB = 1 << 30
BLOCK_BYTES = 16 * 1024


def plan(
    *, max_model_len: int = 4_096, available_bytes: int = 64 * GIB, **settings: int
) -> KVCachePlan:
    config = ExecutorConfig(model="m", **settings)  # type: ignore[arg-type]  # integers only
    return plan_kv_cache(
        config,
        resolve_capacity(config, is_gpu=False),
        max_model_len=max_model_len,
        block_bytes=BLOCK_BYTES,
        available_bytes=available_bytes,
    )


def test_the_default_pool_holds_2048_tokens_a_slot() -> None:
    assert plan(max_num_seqs=64).num_blocks == 64 * 2_048 // 16


def test_a_short_context_needs_a_smaller_default_pool() -> None:
    assert plan(max_num_seqs=64, max_model_len=100).num_blocks == 64 * 100 // 16


def test_the_default_pool_takes_at_most_a_quarter_of_the_memory() -> None:
    chosen = plan(max_num_seqs=64, available_bytes=GIB // 4)
    assert chosen.num_blocks == GIB // 16 // BLOCK_BYTES
    assert chosen.max_model_len == 4_096
    assert chosen.warning is None


def test_what_the_operator_asks_for_is_taken() -> None:
    assert plan(num_kv_blocks=1_000).num_blocks == 1_000
    assert plan(kv_cache_memory_bytes=300 * BLOCK_BYTES + 5).num_blocks == 300


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"num_kv_blocks": 8}, "raise --num-kv-blocks to 256 "),
        (
            {"kv_cache_memory_bytes": 8 * BLOCK_BYTES},
            f"raise --kv-cache-memory-bytes to {256 * BLOCK_BYTES} ",
        ),
        (
            {"available_bytes": 4 * 8 * BLOCK_BYTES},
            f"raise --kv-cache-memory-bytes to {256 * BLOCK_BYTES} ",
        ),
    ],
)
def test_a_pool_smaller_than_the_context_shortens_it_and_says_how_to_grow(
    settings: dict[str, int], fix: str
) -> None:
    chosen = plan(**settings)
    assert (chosen.num_blocks, chosen.max_model_len) == (8, 128)
    assert chosen.warning is not None
    assert fix in chosen.warning


def test_no_room_for_a_block_is_an_error_that_names_the_flag_and_the_value() -> None:
    for settings in ({"kv_cache_memory_bytes": BLOCK_BYTES - 1}, {"available_bytes": BLOCK_BYTES}):
        with pytest.raises(ModelLoadError, match=f"--kv-cache-memory-bytes to .* {BLOCK_BYTES}"):
            plan(**settings)


def device_plan(
    *, used: float = 16, activations: float = 2, graphs: float = 1, **settings: float
) -> KVCachePlan:
    """A GPU of 80 GiB; arguments in GiB."""
    config = ExecutorConfig(model="m", **settings)  # type: ignore[arg-type]  # numbers only
    memory = DeviceMemory(
        total_bytes=80 * GIB,
        used_bytes=int(used * GIB),
        activation_bytes=int(activations * GIB),
        graph_bytes=int(graphs * GIB),
    )
    return plan_device_kv_cache(
        config,
        resolve_capacity(config, is_gpu=True),
        memory,
        max_model_len=131_072,
        block_bytes=8 << 20,
    )


def test_a_gpus_pool_takes_all_that_the_utilization_leaves() -> None:
    assert device_plan().num_blocks == (72 - 19) * 128
    assert device_plan(gpu_memory_utilization=0.5).num_blocks == (40 - 19) * 128
    assert device_plan(graphs=0).num_blocks == (72 - 18) * 128


def test_what_the_operator_asks_of_a_gpu_is_taken() -> None:
    assert device_plan(num_kv_blocks=7_000).num_blocks == 7_000
    assert device_plan(kv_cache_memory_bytes=GIB, used=79).num_blocks == 128


def test_a_gpu_pool_smaller_than_the_context_says_how_to_grow() -> None:
    # The context takes 16 GiB; 19 are fixed.
    chosen = device_plan(gpu_memory_utilization=0.3)
    assert chosen.num_blocks == 5 * 128
    assert chosen.max_model_len == 5 * 128 * 64
    assert chosen.warning is not None
    assert "raise --gpu-memory-utilization to 0.44 " in chosen.warning
    assert device_plan(gpu_memory_utilization=0.44).warning is None
    full = device_plan(used=68)
    assert full.warning is not None
    assert "--kv-cache-dtype fp8" in full.warning


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"gpu_memory_utilization": 0.2}, "raise it to 0.24 or more"),
        ({"used": 66, "activations": 12}, "lower --max-num-batched-tokens to 832"),
        ({"used": 71, "activations": 8}, "lower --max-num-seqs to 16"),
        ({"used": 79.9, "activations": 0, "graphs": 0}, "use a smaller model"),
    ],
)
def test_a_gpu_without_room_names_the_flag_and_the_value(
    settings: dict[str, float], fix: str
) -> None:
    with pytest.raises(ModelLoadError, match="no room") as caught:
        device_plan(**settings)
    assert fix in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_advised_utilization_is_enough() -> None:
    assert device_plan(gpu_memory_utilization=0.24).num_blocks >= 1


def test_the_advised_number_of_tokens_is_enough() -> None:
    # Activations grow with the tokens of a step.
    advised = device_plan(used=66, activations=12 * 832 / 2048, max_num_batched_tokens=832)
    assert advised.num_blocks >= 1


def test_a_device_that_is_not_there_is_an_error_that_names_the_flag() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ModelLoadError, match=r"--device cuda:1: torch sees no GPU.*--device cpu"):
        choose_device("cuda:1")


def test_the_host_has_cores_and_memory() -> None:
    assert usable_cores() >= 1
    assert 1 << 20 < available_memory_bytes() < 1 << 60
