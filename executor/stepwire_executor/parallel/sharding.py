"""Which heads, rows and columns of a model each rank of a tensor-parallel group holds.

Query, key, value, gate and up projections are split by rows, the attention's output and the down
projection by columns, the embedding and the head by rows of the vocabulary. Norms are whole on
every rank. Shoeybi et al. 2019, section 3.

Heads come in whole groups, so ranks may differ by one; the MLP's units and then the vocabulary's
rows go to those that have least, until all hold the same.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.config import ModelConfig

_LARGEST_UNIT = 256
"""Elements of the MLP that stay together where that keeps parts balanced: quantised weights share
scales between 32 to 256 neighbours, and adding up sums of 256 products takes a CPU 3% of the time
of the products."""
_FEWEST_UNITS = 6
"""Two and three ranks can share them."""
_MOST_ABOVE_EVEN = 1.125
"""The largest part of a layer, against an even share, that is still balanced."""
_VOCAB_UNIT = 32
"""Rows of the vocabulary that stay together in a large one: a CPU kernel's panel."""
_MANY_VOCAB_UNITS = 64
"""A rank, from which a vocabulary is a large one."""


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
    attention_sum_unit: int
    """Inputs of the attention's output projection whose products every number of ranks sums on
    their own: those of one KV head."""
    mlp_sum_unit: int | None
    """As many inputs of the down projection; None where no unit divides the MLP."""

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


def has_own_head(config: ModelConfig, device: torch.device) -> bool:
    """Whether the head is another tensor than the embedding; a CPU lays a tied one out anew."""
    return device.type == "cpu" or not config.tie_word_embeddings


def make_shard(
    config: ModelConfig, rank: int, world_size: int, *, has_own_head: bool = True
) -> ModelShard:
    """The part of a rank. Raises ModelLoadError where there are more ranks than parts.

    has_own_head: see the function of this name; ranks that differ in it do not fit together.
    """
    smallest = min(config.num_heads, config.intermediate_size, config.vocab_size)
    if world_size > smallest:
        raise ModelLoadError(
            f"--tensor-parallel-size {world_size} is more than the model can be split into: use "
            f"at most {smallest}"
        )
    heads = [
        _heads(config.num_heads, config.num_kv_heads, part, world_size)
        for part in range(world_size)
    ]
    # Elements of one layer, then of all of them.
    attention = [
        2 * config.hidden_size * config.head_dim * (len(query_heads) + len(kv_heads))
        for query_heads, kv_heads in heads
    ]
    sum_unit = _sum_unit(config.intermediate_size)
    inner = _share_mlp(config, attention, sum_unit or 1)
    layers = [
        config.num_layers * (held + 3 * config.hidden_size * len(part))
        for held, part in zip(attention, inner, strict=True)
    ]
    is_large = config.vocab_size >= _VOCAB_UNIT * _MANY_VOCAB_UNITS * world_size
    vocab_parts = tuple(
        _share_out(
            config.vocab_size,
            unit=_VOCAB_UNIT if is_large else 1,
            held=layers,
            weight=config.hidden_size * (2 if has_own_head else 1),
        )
    )
    query_heads, kv_heads = heads[rank]
    return ModelShard(
        rank=rank,
        world_size=world_size,
        query_heads=query_heads,
        kv_heads=kv_heads,
        intermediate=inner[rank],
        vocab=vocab_parts[rank],
        vocab_parts=vocab_parts,
        attention_sum_unit=config.num_heads // config.num_kv_heads * config.head_dim,
        mlp_sum_unit=sum_unit,
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


def _sum_unit(size: int) -> int | None:
    """Elements of the MLP that no usual number of ranks parts; None where it has no such parts.

    Even, as bfloat16 is multiplied in pairs.
    """
    unit = _LARGEST_UNIT
    while unit > 1:
        if size % unit == 0 and size // unit >= _FEWEST_UNITS:
            return unit
        unit //= 2
    return None


def _share_mlp(config: ModelConfig, attention: Sequence[int], unit: int) -> list[range]:
    """The MLP's elements of each rank, in the largest units that keep layers balanced.

    attention: elements of each rank's attention. Units smaller than those of the sums round
    unlike one rank, but for those balance would be lost.
    """
    weight, size = 3 * config.hidden_size, config.intermediate_size
    even = (sum(attention) + weight * size) / len(attention)
    least_possible = max(even, max(attention) + weight)
    while True:
        if size // unit >= len(attention):
            parts = _share_out(size, unit=unit, held=attention, weight=weight)
            largest = max(
                held + weight * len(part) for held, part in zip(attention, parts, strict=True)
            )
            if unit == 1 or largest <= _MOST_ABOVE_EVEN * least_possible:
                return parts
        unit //= 2


def _share_out(size: int, *, unit: int, held: Sequence[int], weight: int) -> list[range]:
    """Parts of range(size): each unit goes to whom holds least, the first unit of each to each.

    held: by rank. weight: of one element, as held counts. The last unit may be shorter.
    """
    num_units = -(-size // unit)
    counts = [1] * len(held)
    totals = [(before + unit * weight, rank) for rank, before in enumerate(held)]
    heapq.heapify(totals)
    for _ in range(num_units - len(held)):
        total, rank = totals[0]
        heapq.heapreplace(totals, (total + unit * weight, rank))
        counts[rank] += 1
    parts, start = [], 0
    for count in counts:
        stop = min(size, start + count * unit)
        parts.append(range(start, stop))
        start = stop
    return parts
