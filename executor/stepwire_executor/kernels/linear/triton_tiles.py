"""Which tile a linear layer is computed in, and where its sums are cut.

Chosen by counting, which docs/adr/0007-chunked-linear.md writes down, and not yet measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepwire_executor.kernels.launch import ceil_div, configuration

BLOCK_K = 64
"""Inputs a step in 16 bits: 128 bytes of a row, a line of the L2 cache."""
FLOAT_BLOCK_K = 32
"""Inputs a step in float32."""
GROUP_SIZE = 8
"""Blocks of rows that are worked on together, so that they find a weight's tile in the cache."""
_MAX_PROGRAMS = 264
"""Programs that cutting may come to at few rows: two for each of an H100's multiprocessors."""
_OUTPUTS_A_PROGRAM = 64
"""Outputs of a program for one row; less than 64 no Hopper instruction multiplies."""
_MIN_CHUNK_SIZE = 512
"""Inputs below which filling a pipeline costs more than a further program brings."""
_MAX_CHUNKS = 8
"""Chunks that the last program of a tile adds alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program computes, and with how much."""

    outputs: int
    rows: int
    num_warps: int
    num_stages: tuple[int, ...]
    """Steps whose operands are held in shared memory, where that is shared by 1, 2, ...
    programs of a launch; the last entry is for any more."""

    @property
    def sum_outputs(self) -> int:
        """Outputs whose chunks are added at a time: some 16 values of each chunk a thread."""
        return min(self.outputs, max(1, 512 * self.num_warps // self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """The tiles of one device and dtype.

    A row's bits are the same in all of them where an instruction's result for a row does not
    depend on how many rows it multiplies, which is believed of Hopper's wgmma and Blackwell's
    tcgen05, and is to be checked by comparing rows on a device. Were it not so: ONE_WIDTH_TILES.
    """

    few_rows: tuple[tuple[int, Tile], ...]
    """(largest number of rows, tile), ascending. A program computes one chunk."""
    many_rows: Tile
    """For more rows than that. A program computes all chunks and adds them as it goes."""
    many_rows_one_chunk: Tile
    """For many rows of a layer of one chunk, which needs no registers for a second sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """Where the sums of a layer are cut; by its shape only, never by the number of rows."""

    size: int
    """Inputs a chunk, a multiple of BLOCK_K; the last chunk may have fewer."""
    count: int


def chunks(out_features: int, in_features: int) -> Chunks:
    """Cut in_features so that one row alone keeps a large device busy."""
    return max_programs_chunks(out_features, in_features, unit=BLOCK_K, min_size=_MIN_CHUNK_SIZE)


def max_programs_chunks(out_features: int, in_features: int, *, unit: int, min_size: int) -> Chunks:
    """Cut in_features into as many chunks of min_size or more, multiples of unit, as is wanted."""
    wanted = _MAX_PROGRAMS // ceil_div(out_features, _OUTPUTS_A_PROGRAM)
    wanted = max(1, min(wanted, _MAX_CHUNKS, in_features // min_size))
    size = ceil_div(ceil_div(in_features, wanted), unit) * unit
    return Chunks(size=size, count=ceil_div(in_features, size))


def _tile(outputs: int, rows: int, num_warps: int, *num_stages: int) -> Tile:
    return Tile(outputs=outputs, rows=rows, num_warps=num_warps, num_stages=num_stages)


HALF_TILES = {
    0: Tiles(
        few_rows=(
            (16, _tile(64, 16, 4, 8, 4)),
            (32, _tile(128, 32, 4, 5, 4)),
            (64, _tile(128, 64, 4, 4, 3)),
            (256, _tile(128, 128, 8, 4, 3)),
        ),
        many_rows=_tile(128, 128, 8, 3),
        many_rows_one_chunk=_tile(128, 128, 8, 3),
    ),
    90: Tiles(
        few_rows=(
            (16, _tile(64, 16, 4, 12, 10, 7, 5)),
            (32, _tile(128, 32, 4, 8, 5)),
            (64, _tile(128, 64, 4, 8, 4)),
            (256, _tile(128, 128, 8, 6, 3)),
        ),
        many_rows=_tile(128, 128, 8, 4),
        many_rows_one_chunk=_tile(128, 256, 8, 4),
    ),
}
"""By compute capability; 0 is the default."""
ONE_WIDTH_TILES = Tiles(
    few_rows=((256, _tile(128, 64, 4, 8, 4)),),
    many_rows=_tile(128, 64, 4, 4),
    many_rows_one_chunk=_tile(128, 64, 4, 4),
)
"""Every number of rows by the same instruction, slower: for a device that needs it, put these
in its place in HALF_TILES."""
FLOAT_TILES = {
    0: Tiles(
        few_rows=((32, _tile(32, 32, 4, 3)),),
        many_rows=_tile(64, 32, 8, 3),
        many_rows_one_chunk=_tile(64, 32, 8, 3),
    )
}
"""As HALF_TILES; float32 is multiplied without tensor cores."""


def tiles_of(dtype: torch.dtype, capability: int) -> Tiles:
    """Return the tiles for operands of dtype."""
    return configuration(FLOAT_TILES if dtype == torch.float32 else HALF_TILES, capability)


def block_k_of(dtype: torch.dtype) -> int:
    """Return the inputs a step."""
    return FLOAT_BLOCK_K if dtype == torch.float32 else BLOCK_K


def tile_of(tiles: Tiles, num_rows: int, num_chunks: int) -> tuple[Tile, bool]:
    """Return the tile for a number of rows, and whether each program computes one chunk."""
    for max_rows, tile in tiles.few_rows:
        if num_rows <= max_rows:
            return tile, num_chunks > 1
    return (tiles.many_rows if num_chunks > 1 else tiles.many_rows_one_chunk), False


def num_stages_of(tile: Tile, num_programs: int, num_multiprocessors: int) -> int:
    """Return the deepest pipeline that lets all programs run at once, if one does.

    It changes when operands are read, and no bit.
    """
    num_sharing = ceil_div(num_programs, max(num_multiprocessors, 1))
    return tile.num_stages[min(num_sharing, len(tile.num_stages)) - 1]


def max_split_tiles(tiles: Tiles, out_features: int) -> int:
    """Return the most tiles whose chunks are computed apart, over all numbers of rows."""
    return max(
        (
            ceil_div(max_rows, tile.rows) * ceil_div(out_features, tile.outputs)
            for max_rows, tile in tiles.few_rows
        ),
        default=0,
    )
