"""Which tile a linear layer over 4 or 8 bits is computed in, and how its weight is cut.

Chosen by counting, which docs/adr/0018-quantised-linear-on-gpus.md writes down, and not yet
measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stepwire_executor.kernels.compile_case import MAX_SHARED_BYTES
from stepwire_executor.kernels.launch import ceil_div, configuration
from stepwire_executor.kernels.linear.triton_tiles import Chunks, max_programs_chunks

OUTPUTS_UNIT = 128
"""Outputs that weights are padded to: the most that a tile holds."""
_LONG, _SHORT = 64, 32
"""Words of an output that a step reads: a line of the L2 cache, or half of one."""
_MIN_CHUNK_SIZE = 1024
"""Inputs below which filling a pipeline costs more than a further program brings."""
_MAX_STAGES = 4
"""Steps held in shared memory; what more would bring is not waited for."""
_MAX_SHARING = 3
"""Programs that are to find room on a multiprocessor, at most."""
_DEFAULT_SHARED_BYTES = 101_376
"""Of a program, where a device is not known: of compute capability 8.6 and 8.9."""
_RESERVED_BYTES = 2048
"""What a program takes beside its steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTile:
    """What one program computes."""

    outputs: int
    rows: int
    num_warps: int

    @property
    def sum_outputs(self) -> int:
        """Outputs whose chunks are added at a time: some 16 values of each chunk a thread."""
        return min(self.outputs, max(1, 512 * self.num_warps // self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTiles:
    """The tiles of one device and dtype."""

    few_rows: tuple[tuple[int, QuantizedTile], ...]
    """(largest number of rows, tile), ascending. A program computes one chunk."""
    many_rows: QuantizedTile
    """For more rows than that. A program computes all chunks and adds them as it goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCuts:
    """How a weight is cut into words, steps, spans and chunks: by the weight and device alone."""

    block_words: int
    """16-bit words of an output that a step reads."""
    step: int
    """Inputs a step."""
    span: int
    """Neighbouring inputs that are summed before they are scaled; divides step and the group."""
    num_steps: int
    """The last may have fewer inputs."""
    chunks: Chunks
    """In steps."""


def _tile(outputs: int, rows: int, num_warps: int) -> QuantizedTile:
    return QuantizedTile(outputs=outputs, rows=rows, num_warps=num_warps)


def _half_tiles(widest: QuantizedTile) -> QuantizedTiles:
    few_rows = ((16, _tile(64, 16, 4)), (32, _tile(128, 32, 8)), (64, widest))
    return QuantizedTiles(few_rows=few_rows, many_rows=widest)


_WIDE = _half_tiles(_tile(128, 64, 8))
HALF_TILES = {0: _half_tiles(_tile(64, 64, 8)), 80: _WIDE, 90: _WIDE}
"""By compute capability; 0 is the default. 128 rows would spill registers on sm_90. The products
of a step's groups each have their own tensor memory on sm_100: with minimums, and 128 outputs by
64 rows, 576 of its 512 columns."""
FLOAT_TILES = {0: QuantizedTiles(few_rows=((16, _tile(64, 16, 4)),), many_rows=_tile(64, 16, 4))}
"""As HALF_TILES; float32 is multiplied without tensor cores. Wider tiles spill registers."""


def tiles_of(dtype: torch.dtype, capability: int) -> QuantizedTiles:
    """Return the tiles for operands of dtype."""
    return configuration(FLOAT_TILES if dtype == torch.float32 else HALF_TILES, capability)


def tile_of(tiles: QuantizedTiles, num_rows: int, num_chunks: int) -> tuple[QuantizedTile, bool]:
    """Return the tile for a number of rows, and whether each program computes one chunk."""
    for max_rows, tile in tiles.few_rows:
        if num_rows <= max_rows:
            return tile, num_chunks > 1
    return tiles.many_rows, False


def max_split_tiles(out_features: int) -> int:
    """Return the most tiles whose chunks are computed apart, over all numbers of rows."""
    return max(
        ceil_div(max_rows, tile.rows) * ceil_div(out_features, tile.outputs)
        for tiles in (*HALF_TILES.values(), *FLOAT_TILES.values())
        for max_rows, tile in tiles.few_rows
    )


def cut(
    out_features: int, in_features: int, *, bits: int, group_size: int, capability: int
) -> WeightCuts:
    """Cut a weight. group_size: a multiple of 32, or in_features.

    Steps are long where that pads no inputs, groups are no shorter than a plane, and the device
    has room for several such steps; on sm_80 also no group may be of one plane: unrolled, the
    four of a step would spill registers.
    """
    num_planes = 16 // bits
    is_whole = group_size == in_features
    has_room = capability in MAX_SHARED_BYTES
    group_unit = 2 * _LONG if capability == 80 else _LONG
    is_long = has_room and in_features % (_LONG * num_planes) == 0 and group_size % group_unit == 0
    block_words = _LONG if is_long else _SHORT
    step = block_words * num_planes
    num_steps = ceil_div(in_features, step)
    in_inputs = max_programs_chunks(out_features, in_features, unit=step, min_size=_MIN_CHUNK_SIZE)
    return WeightCuts(
        block_words=block_words,
        step=step,
        span=step if is_whole else math.gcd(step, group_size),
        num_steps=num_steps,
        chunks=Chunks(size=in_inputs.size // step, count=in_inputs.count),
    )


def num_stages_of(
    tile: QuantizedTile,
    cuts: WeightCuts,
    *,
    x_bytes: int,
    group_bytes: int,
    num_sharing: int,
    capability: int,
) -> int:
    """Return how deep the pipeline of num_sharing programs a multiprocessor can be.

    x_bytes: of an input; group_bytes: of a scale with its offset. Changes when operands are read,
    and no bit.
    """
    shared = MAX_SHARED_BYTES.get(capability, _DEFAULT_SHARED_BYTES)
    shared //= min(max(num_sharing, 1), _MAX_SHARING)
    words = 2 * tile.outputs * cuts.block_words
    # A scale is copied twice: its threads are the weight's, and the sum's.
    groups = 2 * group_bytes * tile.outputs * (cuts.step // cuts.span)
    stage = words + x_bytes * tile.rows * cuts.step + groups
    return max(2, min(_MAX_STAGES, (shared - _RESERVED_BYTES) // stage))
