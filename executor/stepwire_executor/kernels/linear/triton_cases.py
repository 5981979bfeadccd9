"""The linear kernels' configurations that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from stepwire_executor.kernels.compile_case import CompileCase
from stepwire_executor.kernels.launch import TRITON_TYPES
from stepwire_executor.kernels.linear.triton_kernel import linear_kernel, split_linear_kernel
from stepwire_executor.kernels.linear.triton_tiles import (
    FLOAT_TILES,
    GROUP_SIZE,
    HALF_TILES,
    ONE_WIDTH_TILES,
    Tile,
    Tiles,
    block_k_of,
)

_NUM_CHUNKS = 4
"""Of the layers that are compiled: an output projection's of 4096 x 4096."""


def _case(
    target: int,
    tile: Tile,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    num_chunks: int,
    *,
    is_split: bool,
    num_stages: int | None = None,
    is_k_even: bool = True,
) -> CompileCase:
    kind, out_kind = TRITON_TYPES[dtype], TRITON_TYPES[out_dtype]
    block_k = block_k_of(dtype)
    signature = {"x_ptr": f"*{kind}", "weight_ptr": f"*{kind}", "out_ptr": f"*{out_kind}"}
    constexprs: dict[str, Any] = {
        "BLOCK_OUTPUTS": tile.outputs,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_K": block_k,
        "IS_K_EVEN": is_k_even,
    }
    if is_split:
        signature |= {"sums_ptr": "*fp32", "arrivals_ptr": "*i32"}
        constexprs |= {"NUM_CHUNKS": num_chunks, "SUM_OUTPUTS": tile.sum_outputs}
    else:
        constexprs |= {"IS_ONE_CHUNK": num_chunks == 1, "GROUP_SIZE": GROUP_SIZE}
    if out_dtype == dtype:
        signature["bias_ptr"] = f"*{kind}"
    else:
        constexprs["bias_ptr"] = None
    sizes = ("x_stride", "num_rows", "out_features", "in_features", "chunk_size")
    num_stages = num_stages or tile.num_stages[-1]
    needs_wgmma = target == 90 and dtype != torch.float32
    return CompileCase(
        name=f"linear {kind} to {out_kind} {tile.outputs}x{tile.rows}x{block_k} "
        f"{num_stages} stages{'' if is_k_even else ' uneven'} "
        f"{'split' if is_split else 'chunked' if num_chunks > 1 else 'whole'} "
        f"of {target or 'default'}",
        kernel=split_linear_kernel if is_split else linear_kernel,
        signature=signature | dict.fromkeys(sizes, "i32"),
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=num_stages,
        min_capability=target or 80,
        max_capability=target or None,
        divisible_by_16=frozenset(sizes) - {"num_rows"},
        expect=frozenset({"wgmma", "vector_loads"} if needs_wgmma else {"vector_loads"}),
    )


def _depths(target: int, tile: Tile, num_chunks: int) -> tuple[int, ...]:
    """Return all depths for a device that has its own table, the extremes once for the rest."""
    if target:
        return tile.num_stages
    return tile.num_stages[:1] if num_chunks == 1 else tile.num_stages[-1:]


def _layer_cases(
    target: int, tiles: Tiles, dtype: torch.dtype, num_chunks: int
) -> list[CompileCase]:
    """Return every tile, of layers with several chunks or one."""
    few = [
        _case(
            target, tile, dtype, dtype, num_chunks, is_split=num_chunks > 1, num_stages=num_stages
        )
        for _, tile in tiles.few_rows
        for num_stages in _depths(target, tile, num_chunks)
    ]
    many = tiles.many_rows if num_chunks > 1 else tiles.many_rows_one_chunk
    return [*few, _case(target, many, dtype, dtype, num_chunks, is_split=False)]


def _cases() -> list[CompileCase]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = []
    for target, tiles in HALF_TILES.items():
        for num_chunks in (1, _NUM_CHUNKS):
            cases += _layer_cases(target, tiles, bf16, num_chunks)
        first, many = tiles.few_rows[0][1], tiles.many_rows_one_chunk
        # The head, which alone is asked for float32, has outputs enough for one chunk.
        cases += [_case(target, tile, bf16, fp32, 1, is_split=False) for tile in (first, many)] + [
            _case(target, first, fp16, fp16, _NUM_CHUNKS, is_split=True),
            _case(target, many, fp16, fp16, 1, is_split=False),
            _case(target, many, bf16, bf16, 1, is_split=False, is_k_even=False),
        ]
    # The one configuration of these tiles that the table for Hopper has not.
    cases.append(_case(90, ONE_WIDTH_TILES.many_rows, bf16, bf16, _NUM_CHUNKS, is_split=False))
    for target, tiles in FLOAT_TILES.items():
        for num_chunks in (1, _NUM_CHUNKS):
            cases += _layer_cases(target, tiles, fp32, num_chunks)
    return cases


COMPILE_CASES = tuple(_cases())
"""Configurations that are compiled ahead of time."""
