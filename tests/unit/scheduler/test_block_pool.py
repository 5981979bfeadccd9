"""Blocks that several sequences share, and the steps in flight that may touch them."""

from __future__ import annotations

import pytest
from stepwire_scheduler.block_pool import BlockPool
from stepwire_scheduler.prefix_cache import PrefixCache


@pytest.mark.parametrize("last_step_ids", [(2, 1), (1, 2)])
def test_a_shared_block_is_leased_to_the_last_step_of_all_its_sequences(
    last_step_ids: tuple[int, int],
) -> None:
    pool = BlockPool(4, PrefixCache(block_size=2, key=b"secret"))
    block_id = pool.allocate()
    pool.share(block_id)
    for last_step_id in last_step_ids:
        pool.release([block_id], last_step_id)
    pool.acknowledge(1)
    assert pool.num_leased == 1
    assert not pool.is_free(block_id)
    pool.acknowledge(2)
    assert pool.is_free(block_id)
