"""Owns the executor's KV blocks: who holds which, and when a freed one may be used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from stepwire_scheduler.prefix_cache import PrefixCache


class BlockPool:
    """Reference-counted blocks with leases to steps in flight.

    A block is used (referenced by sequences), leased (unreferenced, but a step in flight may
    still touch it) or free. Free blocks that the prefix cache knows keep their content until
    they are needed: least recently used first, the tail of a sequence before its head.

    Kwon et al. 2023 for paging; the lease replaces reference counts held by kernels in flight.
    """

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self._prefix_cache = prefix_cache
        self._acknowledged_step_id = 0
        self._ref_counts = [0] * num_blocks
        self._last_step_ids = [0] * num_blocks
        """The last step that any sequence which held the block has planned with it."""
        self._lease_step_ids = [0] * num_blocks
        """0: not leased."""
        self._leases: dict[int, list[int]] = {}
        """Blocks by the step they wait for; stale where a block's lease has ended or moved."""
        self._num_leased = 0
        self._empty_blocks = list(range(num_blocks - 1, -1, -1))
        self._cached_blocks: OrderedDict[int, None] = OrderedDict()
        """Free blocks with content, oldest first."""

    @property
    def num_free(self) -> int:
        return len(self._empty_blocks) + len(self._cached_blocks)

    @property
    def num_leased(self) -> int:
        return self._num_leased

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free - self._num_leased

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def is_free(self, block_id: int) -> bool:
        """Whether the block may be given to another sequence now."""
        return self._ref_counts[block_id] == 0 and self._lease_step_ids[block_id] == 0

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these cached blocks are free, so that sharing them takes from the pool."""
        return sum(1 for block_id in block_ids if self.is_free(block_id))

    def allocate(self) -> int:
        """Take a free block; the caller has checked num_free."""
        if self._empty_blocks:
            block_id = self._empty_blocks.pop()
        else:
            block_id, _ = self._cached_blocks.popitem(last=False)
            self._prefix_cache.forget(block_id)
        assert self._ref_counts[block_id] == 0, block_id
        self._ref_counts[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Add a reference to a block that the prefix cache found."""
        if self._ref_counts[block_id] == 0:
            if self._lease_step_ids[block_id]:
                self._lease_step_ids[block_id] = 0
                self._num_leased -= 1
            else:
                del self._cached_blocks[block_id]
        self._ref_counts[block_id] += 1

    def release(self, block_ids: list[int], last_step_id: int) -> None:
        """Drop one reference of each block of a sequence, head first in block_ids.

        last_step_id: the last planned step that touches them for this sequence. A block is free
        once the last such step of all its sequences is acknowledged, in whatever order they left.
        """
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, block_id
            self._ref_counts[block_id] -= 1
            lease_step_id = max(last_step_id, self._last_step_ids[block_id])
            self._last_step_ids[block_id] = lease_step_id
            if self._ref_counts[block_id]:
                continue
            if lease_step_id <= self._acknowledged_step_id:
                self._free(block_id)
            else:
                self._lease_step_ids[block_id] = lease_step_id
                self._leases.setdefault(lease_step_id, []).append(block_id)
                self._num_leased += 1

    def acknowledge(self, step_id: int) -> None:
        """End the leases to this step; steps are acknowledged in order, without gaps."""
        assert step_id == self._acknowledged_step_id + 1, step_id
        self._acknowledged_step_id = step_id
        for block_id in self._leases.pop(step_id, ()):
            if self._lease_step_ids[block_id] == step_id:
                self._lease_step_ids[block_id] = 0
                self._num_leased -= 1
                self._free(block_id)

    def reset(self) -> None:
        """Free everything at once: a new epoch has begun and no page has content."""
        self._prefix_cache.clear()
        self._acknowledged_step_id = 0
        self._ref_counts = [0] * self.num_blocks
        self._last_step_ids = [0] * self.num_blocks
        self._lease_step_ids = [0] * self.num_blocks
        self._leases.clear()
        self._num_leased = 0
        self._empty_blocks = list(range(self.num_blocks - 1, -1, -1))
        self._cached_blocks.clear()

    def _free(self, block_id: int) -> None:
        if block_id in self._prefix_cache:
            self._cached_blocks[block_id] = None
        else:
            self._empty_blocks.append(block_id)
