"""Which heads, rows and columns of a model each rank of a tensor-parallel group holds.

Query, key, value, gate and up projections are split by rows, the attention's output and the down
projection by columns, the embedding and the head by rows of the vocabulary. Norms are whole on
every rank. Shoeybi et al. 2019, section 3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.config import ModelConfig

_LARGEST_UNIT = 256
"""A part of the MLP is whole blocks of this many elements where that keeps parts balanced:
quantised weights share scales between 32 to 256 neighbours."""
_MOST_ABOVE_EVEN = 1.125
"""The largest part, against an even share, that is still balanced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShard:
    """One rank's part of a model; ranges of the whole model's indices."""

    rank: int
    world_size: int
    query_heads: range
    """Those that read kv_heads, and of a replicated KV head a part of them."""
    kv_heads: range
    """Whole groups; where ranks outnumber KV heads one, which other ranks hold too."""
    intermediate: range
    """Elements inside the MLP."""
    vocab: range
    """Rows of the embedding and of the head."""
    vocab_parts: tuple[range, ...]
    """vocab of each rank."""

    @property
    def max_vocab_rows(self) -> int:
        """Rows of the largest part: the width to which parts of logits are padded."""
        return max(map(len, self.vocab_parts))

    def local_config(self, config: ModelConfig) -> ModelConfig:
        """The config of the decoder that this part makes, but for the vocabulary."""
        return dataclasses.replace(
            config,
            num_heads=len(self.query_heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.intermediate),
        )


def make_shard(config: ModelConfig, rank: int, world_size: int) -> ModelShard:
    """The part of a rank. Raises ModelLoadError where there are more ranks than parts."""
    smallest = min(config.num_heads, config.intermediate_size, config.vocab_size)
    if world_size > smallest:
        raise ModelLoadError(
            f"--tensor-parallel-size {world_size} is more than the model can be split into: use "
            f"at most {smallest}"
        )
    query_heads, kv_heads = _heads(config.num_heads, config.num_kv_heads, rank, world_size)
    vocab_parts = tuple(
        split_evenly(config.vocab_size, part, world_size) for part in range(world_size)
    )
    return ModelShard(
        rank=rank,
        world_size=world_size,
        query_heads=query_heads,
        kv_heads=kv_heads,
        intermediate=_in_units(config.intermediate_size, rank, world_size),
        vocab=vocab_parts[rank],
        vocab_parts=vocab_parts,
    )


def split_evenly(size: int, part: int, num_parts: int) -> range:
    """A part of range(size); the first parts are larger by one where it does not divide."""
    share, rest = divmod(size, num_parts)
    start = part * share + min(part, rest)
    return range(start, start + share + (part < rest))


def _heads(num_heads: int, num_kv_heads: int, rank: int, world_size: int) -> tuple[range, range]:
    """Query and KV heads of a rank."""
    group_size = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        kv_heads = split_evenly(num_kv_heads, rank, world_size)
        return range(kv_heads.start * group_size, kv_heads.stop * group_size), kv_heads
    # Each KV head has several ranks, which share its query heads.
    for kv_head in range(num_kv_heads):
        ranks = split_evenly(world_size, kv_head, num_kv_heads)
        if rank in ranks:
            part = split_evenly(group_size, rank - ranks.start, len(ranks))
            start = kv_head * group_size
            return range(start + part.start, start + part.stop), range(kv_head, kv_head + 1)
    raise AssertionError((rank, world_size))


def _in_units(size: int, part: int, num_parts: int) -> range:
    """As split_evenly, in the largest units that keep the parts balanced."""
    unit = _LARGEST_UNIT
    while unit > 1:
        num_units = size // unit
        largest = -(-num_units // num_parts) * unit
        is_balanced = num_units >= num_parts and largest * num_parts <= size * _MOST_ABOVE_EVEN
        if size % unit == 0 and is_balanced:
            break
        unit //= 2
    units = split_evenly(size // unit, part, num_parts)
    return range(units.start * unit, units.stop * unit)
