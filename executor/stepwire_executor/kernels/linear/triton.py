"""Linear layers in Triton whose rows are bit-equal whatever their number.

in_features is cut into chunks, by the layer's shape only. A chunk is summed over in order,
BLOCK_K inputs at a time; the chunks' sums are added in order, in float32. With few rows each
chunk is a program's, so that one row keeps the device busy; with many, one program computes all
chunks of its tile. Weights stay as they are stored: a tile's step reads whole lines of 128 bytes
from each of its rows already, and the reference and tied embeddings share the one copy. Weights in
4 or 8 bits are multiplied by `triton_quantized`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import PackedWeight
from stepwire_executor.kernels.launch import (
    COMPUTE_DTYPES,
    capability,
    ceil_div,
    num_multiprocessors,
)
from stepwire_executor.kernels.linear import reference, triton_quantized
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kernels.linear.stacked import StackedWeight, pack_parts
from stepwire_executor.kernels.linear.triton_cases import COMPILE_CASES
from stepwire_executor.kernels.linear.triton_kernel import linear_kernel, split_linear_kernel
from stepwire_executor.kernels.linear.triton_quantized import GroupedWords
from stepwire_executor.kernels.linear.triton_tiles import (
    GROUP_SIZE,
    Chunks,
    Tile,
    block_k_of,
    chunks,
    max_split_tiles,
    num_stages_of,
    tile_of,
    tiles_of,
)

__all__ = ["COMPILE_CASES", "ChunkedWeight", "linear", "pack_weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedWeight(reference.DenseWeight):
    """A weight as it is stored in a checkpoint, and where its sums are cut.

    Launches on one stream may share it; two streams at once may not, as they share `arrivals`.
    """

    chunks: Chunks
    arrivals: Tensor | None
    """[num_tiles] int32, zero between launches; None for one chunk."""


def pack_weight(
    weight: Tensor | GroupQuantized | tuple[object, ...], sum_unit: int | None = None
) -> PackedWeight:
    """Keep a weight of floats, [out_features, in_features], as it is, and lay integers out anew.

    Sums are cut by a weight's shape alone, and sum_unit changes nothing.
    """
    if isinstance(weight, GroupQuantized):
        return triton_quantized.pack_weight(weight)
    if isinstance(weight, tuple):
        return pack_parts(pack_weight, weight, sum_unit)
    return pack_dense(weight)


def pack_dense(weight: Tensor) -> ChunkedWeight:
    """Keep weight, [out_features, in_features], as it is."""
    values = reference.pack_dense(weight).values
    cuts = chunks(*values.shape)
    arrivals = None
    if cuts.count > 1:
        tiles = tiles_of(values.dtype, capability(values.device))
        num_tiles = max_split_tiles(tiles, values.shape[0])
        arrivals = torch.zeros(num_tiles, dtype=torch.int32, device=values.device)
    return ChunkedWeight(values=values, chunks=cuts, arrivals=arrivals)


def linear(
    x: Tensor,
    weight: ChunkedWeight | GroupedWords | StackedWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x @ weight.T + bias; see `interface.Linear`."""
    if isinstance(weight, GroupedWords):
        return triton_quantized.linear(x, weight, bias, out_dtype)
    if isinstance(weight, StackedWeight):
        return _multiply_parts(x, weight, bias, out_dtype or x.dtype)
    values = weight.values
    if x.ndim != 2 or x.shape[1] != weight.in_features or x.dtype != values.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, expected {values.dtype} [*, {weight.in_features}]"
        )
    out_dtype = out_dtype or x.dtype
    if x.dtype not in COMPUTE_DTYPES or out_dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"x and the result must be float32, bfloat16 or float16, not {x.dtype}, {out_dtype}"
        )
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected [{weight.out_features}]")
    if x.stride(1) != 1:
        x = x.contiguous()
    num_rows = x.shape[0]
    out = torch.empty((num_rows, weight.out_features), dtype=out_dtype, device=x.device)
    if num_rows == 0:
        return out
    tiles = tiles_of(x.dtype, capability(x.device))
    tile, is_split = tile_of(tiles, num_rows, weight.chunks.count)
    if bias is not None:
        bias = bias.contiguous()
    (_launch_split if is_split else _launch)(x, weight, bias, out, tile)
    return out


def _multiply_parts(
    x: Tensor, weight: StackedWeight, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """One part after the other; those in integers write where their outputs belong."""
    out = torch.empty((x.shape[0], weight.out_features), dtype=out_dtype, device=x.device)
    for part, columns in weight.columns():
        place, part_bias = out[:, columns], None if bias is None else bias[columns]
        if isinstance(part, GroupedWords):
            triton_quantized.linear(x, part, part_bias, out=place)
        else:
            assert isinstance(part, ChunkedWeight)
            place.copy_(linear(x, part, part_bias, out_dtype))
    return out


def _launch(x: Tensor, weight: ChunkedWeight, bias: Tensor | None, out: Tensor, tile: Tile) -> None:
    num_rows, block_k = x.shape[0], block_k_of(x.dtype)
    num_programs = ceil_div(num_rows, tile.rows) * ceil_div(weight.out_features, tile.outputs)
    linear_kernel[(num_programs,)](
        x,
        weight.values,
        bias,
        out,
        x.stride(0),
        num_rows,
        weight.out_features,
        weight.in_features,
        weight.chunks.size,
        GROUP_SIZE=GROUP_SIZE,
        IS_ONE_CHUNK=weight.chunks.count == 1,
        BLOCK_OUTPUTS=tile.outputs,
        BLOCK_ROWS=tile.rows,
        BLOCK_K=block_k,
        IS_K_EVEN=weight.in_features % block_k == 0,
        num_warps=tile.num_warps,
        num_stages=num_stages_of(tile, num_programs, num_multiprocessors(x.device)),
    )


def _launch_split(
    x: Tensor, weight: ChunkedWeight, bias: Tensor | None, out: Tensor, tile: Tile
) -> None:
    num_rows, num_chunks, block_k = x.shape[0], weight.chunks.count, block_k_of(x.dtype)
    num_tiles = ceil_div(num_rows, tile.rows) * ceil_div(weight.out_features, tile.outputs)
    assert weight.arrivals is not None
    assert num_tiles <= weight.arrivals.numel(), (num_tiles, weight.arrivals.numel())
    shape = (num_tiles, num_chunks, tile.outputs, tile.rows)
    num_programs = num_tiles * num_chunks
    split_linear_kernel[(num_programs,)](
        x,
        weight.values,
        bias,
        out,
        torch.empty(shape, dtype=torch.float32, device=x.device),
        weight.arrivals,
        x.stride(0),
        num_rows,
        weight.out_features,
        weight.in_features,
        weight.chunks.size,
        NUM_CHUNKS=num_chunks,
        SUM_OUTPUTS=tile.sum_outputs,
        BLOCK_OUTPUTS=tile.outputs,
        BLOCK_ROWS=tile.rows,
        BLOCK_K=block_k,
        IS_K_EVEN=weight.in_features % block_k == 0,
        num_warps=tile.num_warps,
        num_stages=num_stages_of(tile, num_programs, num_multiprocessors(x.device)),
    )
