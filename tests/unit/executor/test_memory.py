"""How large the KV pool becomes."""

from __future__ import annotations

import pytest
from stepwire_executor.config import ExecutorConfig
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.host import available_memory_bytes, usable_cores
from stepwire_executor.memory import KVCachePlan, plan_kv_cache

GIB = 1 << 30
BLOCK_BYTES = 16 * 1024


def plan(
    *, max_model_len: int = 4_096, available_bytes: int = 64 * GIB, **settings: int
) -> KVCachePlan:
    config = ExecutorConfig(model="m", **settings)  # type: ignore[arg-type]  # integers only
    return plan_kv_cache(
        config,
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


def test_the_host_has_cores_and_memory() -> None:
    assert usable_cores() >= 1
    assert 1 << 20 < available_memory_bytes() < 1 << 60
