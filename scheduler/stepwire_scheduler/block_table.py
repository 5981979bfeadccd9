"""Each sequence's block table: which blocks hold its KV, and which of them others may share."""

from __future__ import annotations

from stepwire_scheduler.block_pool import BlockPool
from stepwire_scheduler.plan import StepPlan
from stepwire_scheduler.prefix_cache import PrefixCache
from stepwire_scheduler.sequence import Sequence, SequenceStatus


class BlockTables:
    """Grows and returns the block tables of sequences, over one pool and its prefix cache."""

    def __init__(
        self, *, num_blocks: int, block_size: int, enable_prefix_caching: bool, prefix_key: bytes
    ) -> None:
        """block_size: tokens a block. prefix_key: secret bytes for the prefix cache's hash."""
        self._block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._prefix_cache = PrefixCache(block_size=block_size, key=prefix_key)
        self.pool = BlockPool(num_blocks, self._prefix_cache)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._block_size)

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to add before the next num_tokens tokens can be computed."""
        num_needed = self.num_blocks_for(sequence.num_computed_tokens + num_tokens)
        return max(0, num_needed - len(sequence.block_ids))

    def num_to_come(self, sequence: Sequence) -> int:
        """Blocks that a prefill under way still needs for the tokens it knows."""
        return max(0, self.num_blocks_for(len(sequence.token_ids)) - len(sequence.block_ids))

    def find_cached(self, sequence: Sequence) -> list[int]:
        """Blocks that hold leading tokens; the last token is always computed, for its logits."""
        if not self._enable_prefix_caching:
            return []
        tenant = sequence.request.tenant
        self._prefix_cache.extend_hashes(sequence.block_hashes, sequence.token_ids, tenant)
        max_blocks = (len(sequence.token_ids) - 1) // self._block_size
        return self._prefix_cache.match(
            sequence.block_hashes[:max_blocks], sequence.token_ids, tenant
        )

    def open(self, sequence: Sequence, cached_block_ids: list[int]) -> None:
        """Begin a table with the blocks that find_cached found."""
        for block_id in cached_block_ids:
            self.pool.share(block_id)
        sequence.block_ids = list(cached_block_ids)
        sequence.num_computed_tokens = len(cached_block_ids) * self._block_size
        sequence.num_registered_blocks = len(cached_block_ids)

    def extend(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Add the blocks that the next num_tokens tokens lack; the pool must have them free."""
        taken = [self.pool.allocate() for _ in range(self.num_missing(sequence, num_tokens))]
        sequence.block_ids.extend(taken)
        return taken

    def cut(self, sequence: Sequence) -> None:
        """Return the blocks that its tokens do not need, as the executor does behind drafts."""
        num_needed = self.num_blocks_for(len(sequence.token_ids))
        surplus = sequence.block_ids[num_needed:]
        if surplus:
            del sequence.block_ids[num_needed:]
            self.pool.release(surplus, sequence.last_step_id)

    def close(self, sequence: Sequence) -> None:
        """Return all its blocks, once the last step that touches them is acknowledged."""
        self.pool.release(sequence.block_ids, sequence.last_step_id)
        sequence.forget_computed()

    def register_full_blocks(self, plan: StepPlan) -> None:
        """Tell the prefix cache of blocks that this step, now done, has filled."""
        self._register(plan.filled, plan.step_id)

    def register(self, sequence: Sequence, plan: StepPlan) -> None:
        """The same of one sequence, once what came of its drafts is booked."""
        self._register([(sequence, sequence.num_computed_tokens)], plan.step_id)

    def _register(self, filled: list[tuple[Sequence, int]], step_id: int) -> None:
        if not self._enable_prefix_caching:
            return
        for sequence, num_computed in filled:
            num_full = num_computed // self._block_size
            if (
                num_full <= sequence.num_registered_blocks
                or sequence.status is not SequenceStatus.RUNNING
                or sequence.admitted_step_id > step_id
            ):
                continue
            tenant = sequence.request.tenant
            self._prefix_cache.extend_hashes(sequence.block_hashes, sequence.token_ids, tenant)
            for position in range(sequence.num_registered_blocks, num_full):
                self._prefix_cache.register(
                    sequence.block_ids[position],
                    position,
                    sequence.block_hashes,
                    sequence.token_ids,
                    tenant,
                )
            sequence.num_registered_blocks = num_full
