"""Linear layers in Triton whose rows are bit-equal whatever their number.

Every output element is summed over in_features in order, BLOCK_K at a time, by one program:
nothing is split along in_features. Tiles of few and of many rows differ only in how many rows
and outputs a program holds; both are multiples of 64 rows, so that Hopper multiplies both by the
same instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepwire_executor.kernels.compile_case import CompileCase
from stepwire_executor.kernels.launch import (
    COMPUTE_DTYPES,
    TRITON_TYPES,
    capability,
    ceil_div,
    configuration,
)
from stepwire_executor.kernels.linear.reference import DenseWeight, pack_weight

__all__ = ["COMPILE_CASES", "linear", "pack_weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program computes, and with how much."""

    block_m: int
    """Rows."""
    block_n: int
    """Outputs."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """The tiles of one device and dtype."""

    block_k: int
    """Inputs that are multiplied at a time, the same for every number of rows."""
    few_rows: Tile
    """For up to block_m rows: decoding."""
    many_rows: Tile
    """For more: prefill."""


_HALF_TILES = {
    0: Tiles(
        block_k=64,
        few_rows=Tile(block_m=64, block_n=32, num_warps=4, num_stages=4),
        many_rows=Tile(block_m=128, block_n=128, num_warps=8, num_stages=3),
    ),
    90: Tiles(
        block_k=64,
        few_rows=Tile(block_m=64, block_n=32, num_warps=4, num_stages=6),
        many_rows=Tile(block_m=128, block_n=128, num_warps=8, num_stages=4),
    ),
}
"""By compute capability; 0 is the default. Chosen by reasoning, not yet measured."""
_FLOAT_TILES = {
    0: Tiles(
        block_k=32,
        few_rows=Tile(block_m=32, block_n=32, num_warps=4, num_stages=3),
        many_rows=Tile(block_m=64, block_n=64, num_warps=8, num_stages=3),
    )
}
"""As _HALF_TILES; float32 is multiplied without tensor cores."""
_GROUP_M = 8
"""Blocks of rows that are worked on together, so that they find a weight's tile in the cache."""


@triton.jit
def linear_kernel(
    x_ptr,  # [num_rows, in_features]
    weight_ptr,  # [out_features, in_features], contiguous
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_rows, out_features], contiguous
    x_stride,
    num_rows,
    out_features,
    in_features,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_K_EVEN: tl.constexpr,
):
    num_blocks_m = tl.cdiv(num_rows, BLOCK_M)
    num_blocks_n = tl.cdiv(out_features, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * num_blocks_n)
    first_m = group * GROUP_M
    group_size = min(num_blocks_m - first_m, GROUP_M)
    within = program % (GROUP_M * num_blocks_n)
    block_m = first_m + within % group_size
    block_n = within // group_size

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    row_mask, output_mask = rows < num_rows, outputs < out_features
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inputs[None, :]
    weight_ptrs = weight_ptr + outputs.to(tl.int64)[None, :] * in_features + inputs[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        if IS_K_EVEN:
            x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=output_mask[None, :], other=0.0)
        else:
            input_mask = inputs < in_features - start
            x = tl.load(x_ptrs, mask=row_mask[:, None] & input_mask[None, :], other=0.0)
            weight = tl.load(
                weight_ptrs, mask=output_mask[None, :] & input_mask[:, None], other=0.0
            )
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + outputs, mask=output_mask, other=0.0)
        total += bias.to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_features + outputs[None, :]
    tl.store(
        out_ptrs,
        total.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & output_mask[None, :],
    )


def linear(
    x: Tensor,
    weight: DenseWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x @ weight.T + bias; see `interface.Linear`."""
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
    table = _FLOAT_TILES if x.dtype == torch.float32 else _HALF_TILES
    tiles = configuration(table, capability(x.device))
    tile = tiles.few_rows if num_rows <= tiles.few_rows.block_m else tiles.many_rows
    num_programs = ceil_div(num_rows, tile.block_m) * ceil_div(weight.out_features, tile.block_n)
    linear_kernel[(num_programs,)](
        x,
        values,
        None if bias is None else bias.contiguous(),
        out,
        x.stride(0),
        num_rows,
        weight.out_features,
        weight.in_features,
        GROUP_M=_GROUP_M,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tiles.block_k,
        IS_K_EVEN=weight.in_features % tiles.block_k == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _cases() -> list[CompileCase]:
    cases = []
    for dtype, out_dtype, table in (
        (torch.bfloat16, torch.bfloat16, _HALF_TILES),
        (torch.bfloat16, torch.float32, _HALF_TILES),
        (torch.float16, torch.float16, _HALF_TILES),
        (torch.float32, torch.float32, _FLOAT_TILES),
    ):
        for target, tiles in table.items():
            for tile in (tiles.few_rows, tiles.many_rows):
                kind, out_kind = TRITON_TYPES[dtype], TRITON_TYPES[out_dtype]
                has_bias = out_dtype == dtype
                is_hopper = target == 90
                cases.append(
                    CompileCase(
                        name=f"linear {kind} to {out_kind} {tile.block_m}x{tile.block_n}x"
                        f"{tiles.block_k} of {target or 'default'}",
                        kernel=linear_kernel,
                        signature={
                            "x_ptr": f"*{kind}",
                            "weight_ptr": f"*{kind}",
                            "bias_ptr": f"*{kind}",
                            "out_ptr": f"*{out_kind}",
                            "x_stride": "i32",
                            "num_rows": "i32",
                            "out_features": "i32",
                            "in_features": "i32",
                        },
                        constexprs={
                            "GROUP_M": _GROUP_M,
                            "BLOCK_M": tile.block_m,
                            "BLOCK_N": tile.block_n,
                            "BLOCK_K": tiles.block_k,
                            "IS_K_EVEN": True,
                        }
                        | ({} if has_bias else {"bias_ptr": None}),
                        num_warps=tile.num_warps,
                        num_stages=tile.num_stages,
                        min_capability=target or 80,
                        max_capability=target or None,
                        divisible_by_16=frozenset({"x_stride", "out_features", "in_features"}),
                        expect=frozenset({"wgmma", "vector_loads"})
                        if is_hopper
                        else frozenset({"vector_loads"}),
                    )
                )
    return cases


COMPILE_CASES = tuple(_cases())
"""Configurations that are compiled ahead of time."""
