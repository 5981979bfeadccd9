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
import math
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
KERNEL_GROUP = 32
"""Inputs that a CPU kernel multiplies in integers at once."""
_VOCAB_UNIT = 32
"""Rows of the vocabulary that stay together in a large one: a CPU kernel's panel."""
_MANY_VOCAB_UNITS = 64
"""A rank, from which a vocabulary is a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroups:
    """Neighbouring inputs that no rank may part, as quantised weights share scales among them."""

    attention: int = 1
    """Inputs of the attention's output projection."""
    mlp: int = 1
    """Inputs of the down projection."""


UNGROUPED = InputGroups()


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
    their own: those of one KV head, or of as many as groups of inputs ask for."""
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
    config: ModelConfig,
    rank: int,
    world_size: int,
    *,
    has_own_head: bool = True,
    input_groups: InputGroups = UNGROUPED,
) -> ModelShard:
    """The part of a rank. Raises ModelLoadError where there are more ranks than parts.

    has_own_head: see the function of this name; ranks that differ in it or in input_groups do not
    fit together.
    """
    smallest = min(config.num_heads, config.intermediate_size, config.vocab_size)
    if world_size > smallest:
        raise ModelLoadError(
            f"--tensor-parallel-size {world_size} is more than the model can be split into: use "
            f"at most {smallest}"
        )
    heads = [_heads(config, part, world_size, input_groups.attention) for part in range(world_size)]
    # Elements of one layer, then of all of them.
    attention = [
        2 * config.hidden_size * config.head_dim * (len(query_heads) + len(kv_heads))
        for query_heads, kv_heads in heads
    ]
    sum_unit = _sum_unit(config.intermediate_size, input_groups.mlp)
    inner = _share_mlp(config, attention, sum_unit or 1, input_groups.mlp)
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
        attention_sum_unit=_attention_sum_unit(config, input_groups.attention),
        mlp_sum_unit=sum_unit,
    )


def split_evenly(size: int, part: int, num_parts: int) -> range:
    """A part of range(size); the first parts are larger by one where it does not divide."""
    share, rest = divmod(size, num_parts)
    start = part * share + min(part, rest)
    return range(start, start + share + (part < rest))


def _heads(config: ModelConfig, rank: int, world_size: int, group: int) -> tuple[range, range]:
    """Query and KV heads of a rank; group: inputs of the output projection that stay together."""
    num_kv_heads, queries = config.num_kv_heads, config.num_heads // config.num_kv_heads
    bundle = _bundle(queries * config.head_dim, group)  # KV heads that stay together
    num_bundles = math.ceil(num_kv_heads / bundle)
    if world_size <= num_bundles:
        part = split_evenly(num_bundles, rank, world_size)
        kv_heads = range(part.start * bundle, min(part.stop * bundle, num_kv_heads))
        return range(kv_heads.start * queries, kv_heads.stop * queries), kv_heads
    # Each KV head has several ranks, which share its query heads.
    query_bundle = _bundle(config.head_dim, group)
    num_parts = queries // query_bundle if bundle == 1 else 1
    if world_size > num_bundles * num_parts:
        raise _cuts_groups(world_size, group, num_bundles * num_parts)
    for kv_head in range(num_kv_heads):
        ranks = split_evenly(world_size, kv_head, num_kv_heads)
        if rank in ranks:
            part = split_evenly(num_parts, rank - ranks.start, len(ranks))
            start = kv_head * queries
            return (
                range(start + part.start * query_bundle, start + part.stop * query_bundle),
                range(kv_head, kv_head + 1),
            )
    raise AssertionError((rank, world_size))


def _bundle(num_inputs: int, group: int) -> int:
    """How often so many inputs are a whole number of groups."""
    return math.lcm(num_inputs, group) // num_inputs


def _cuts_groups(world_size: int, group: int, most: int) -> ModelLoadError:
    return ModelLoadError(
        f"--tensor-parallel-size {world_size} would cut groups of {group} inputs that share a "
        f"scale: use at most {most}, or --quantization none"
    )


def _attention_sum_unit(config: ModelConfig, group: int) -> int:
    num_inputs = config.num_heads // config.num_kv_heads * config.head_dim
    is_whole = group == 1 or num_inputs % KERNEL_GROUP == 0
    return num_inputs if is_whole else num_inputs * _bundle(num_inputs, group)


def _sum_unit(size: int, group: int) -> int | None:
    """Elements of the MLP that no usual number of ranks parts; None where it has no such parts.

    Even, as bfloat16 is multiplied in pairs; whole groups, or whole parts of one.
    """
    unit = _LARGEST_UNIT
    while unit > 1:
        is_shared = unit % group == 0 and size // unit >= _FEWEST_UNITS
        if size % unit == 0 and (is_shared or group % unit == 0):
            return unit
        unit //= 2
    return None


def _share_mlp(config: ModelConfig, attention: Sequence[int], unit: int, group: int) -> list[range]:
    """The MLP's elements of each rank, in the largest units that keep layers balanced.

    attention: elements of each rank's attention. unit: the largest to try, but for group, of
    which units are multiples. Units smaller than those of the sums round unlike one rank, but for
    those balance would be lost.
    """
    weight, size = 3 * config.hidden_size, config.intermediate_size
    even = (sum(attention) + weight * size) / len(attention)
    least_possible = max(even, max(attention) + weight * group)
    unit = unit if unit % group == 0 else group
    while True:
        if size // unit >= len(attention):
            parts = _share_out(size, unit=unit, held=attention, weight=weight)
            largest = max(
                held + weight * len(part) for held, part in zip(attention, parts, strict=True)
            )
            if unit == group or largest <= _MOST_ABOVE_EVEN * least_possible:
                return parts
        if unit == group:
            raise _cuts_groups(len(attention), group, size // group)
        unit = unit // 2 if unit % (2 * group) == 0 else group


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
