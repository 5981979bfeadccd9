"""Root-mean-square normalisation in Triton: one program a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepwire_executor.kernels.compile_case import CompileCase
from stepwire_executor.kernels.launch import COMPUTE_DTYPES, TRITON_TYPES, next_power_of_two

MAX_SIZE = 65_536
"""Longest row: one program holds it in registers."""


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_outer, num_inner, size]
    weight_ptr,  # [size]
    residual_ptr,  # [num_outer, num_inner, size] or None; summed in place
    out_ptr,  # [num_outer, num_inner, size], contiguous
    x_outer_stride,
    x_inner_stride,
    residual_outer_stride,
    residual_inner_stride,
    num_inner,
    size,
    eps,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // num_inner, row % num_inner
    columns = tl.arange(0, BLOCK_SIZE)
    mask = columns < size
    x_row_ptr = x_ptr + outer * x_outer_stride + inner * x_inner_stride
    # Before the sum, which waits for x: in decoding the weight comes from memory too.
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_row_ptr + columns, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual_row_ptr = (
            residual_ptr + outer * residual_outer_stride + inner * residual_inner_stride
        )
        residual = tl.load(residual_row_ptr + columns, mask=mask, other=0.0)
        # Rounded to the stored dtype first: the sum that is kept is what is normalised.
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(residual_row_ptr + columns, x, mask=mask)
    wide = x.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=0) / size
    out = wide * tl.rsqrt(mean_square + eps) * weight
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """How a tensor's rows lie in memory: row (i, j) starts at i * outer + j * inner."""

    num_outer: int
    num_inner: int
    outer_stride: int
    inner_stride: int


def _rows(x: Tensor) -> _Rows | None:
    """Describe x, [..., size]; None where its rows do not lie in a grid of two strides."""
    size = x.shape[-1]
    if x.is_contiguous():
        return _Rows(num_outer=x.numel() // size, num_inner=1, outer_stride=size, inner_stride=size)
    if x.stride(-1) != 1 or x.ndim > 3:
        return None
    if x.ndim == 3:
        return _Rows(
            num_outer=x.shape[0],
            num_inner=x.shape[1],
            outer_stride=x.stride(0),
            inner_stride=x.stride(1),
        )
    return _Rows(num_outer=x.shape[0], num_inner=1, outer_stride=x.stride(0), inner_stride=size)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Normalise rows by their root mean square; see `interface.RMSNorm`.

    Rows of up to 65,536. A residual must be contiguous.
    """
    size = x.shape[-1]
    if x.dtype not in COMPUTE_DTYPES or not 0 < size <= MAX_SIZE:
        raise ValueError(
            f"x must be float32, bfloat16 or float16 with rows of 1 to {MAX_SIZE}, "
            f"not {x.dtype} {tuple(x.shape)}"
        )
    if weight.shape != (size,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, rows of x have {size}")
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous()
    ):
        raise ValueError(
            f"residual must be contiguous {x.dtype} {tuple(x.shape)}, "
            f"not {residual.dtype} {tuple(residual.shape)}"
        )
    rows = _rows(x)
    if rows is None:
        x = x.contiguous()
        rows = _rows(x)
        assert rows is not None, x.stride()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = rows.num_outer * rows.num_inner
    if num_rows == 0:
        return out
    block_size = next_power_of_two(size)
    rms_norm_kernel[(num_rows,)](
        x,
        weight.contiguous(),
        residual,
        out,
        rows.outer_stride,
        rows.inner_stride,
        rows.num_inner * size,
        size,
        rows.num_inner,
        size,
        eps,
        BLOCK_SIZE=block_size,
        num_warps=_num_warps(block_size),
        num_stages=1,
    )
    return out


def _num_warps(block_size: int) -> int:
    """Warps a row: 8 elements a thread, within 1 to 16 warps. A row's bits depend on it.

    In 16 bits that is one load of 16 bytes from each operand, all in flight together.
    """
    return min(16, max(1, block_size // 256))


def _case(size: int, dtype: torch.dtype, *, has_residual: bool) -> CompileCase:
    kind = "*" + TRITON_TYPES[dtype]
    block_size = next_power_of_two(size)
    constexprs = {"BLOCK_SIZE": block_size} | ({} if has_residual else {"residual_ptr": None})
    return CompileCase(
        name=f"rms_norm {size} {TRITON_TYPES[dtype]}{' residual' if has_residual else ''}",
        kernel=rms_norm_kernel,
        signature={
            "x_ptr": kind,
            "weight_ptr": kind,
            "residual_ptr": kind,
            "out_ptr": kind,
            "x_outer_stride": "i32",
            "x_inner_stride": "i32",
            "residual_outer_stride": "i32",
            "residual_inner_stride": "i32",
            "num_inner": "i32",
            "size": "i32",
            "eps": "fp32",
        },
        constexprs=constexprs,
        num_warps=_num_warps(block_size),
        num_stages=1,
        divisible_by_16=frozenset(
            {
                "x_outer_stride",
                "x_inner_stride",
                "residual_outer_stride",
                "residual_inner_stride",
                "size",
            }
        ),
        expect=frozenset({"vector_loads"} if size >= 1024 else ()),
    )


COMPILE_CASES = tuple(
    _case(size, dtype, has_residual=has_residual)
    for size, dtype, has_residual in (
        (128, torch.bfloat16, False),  # heads, with QK norm
        (4096, torch.bfloat16, False),
        (4096, torch.bfloat16, True),
        (3584, torch.float16, True),
        (896, torch.float32, True),
        (16_384, torch.bfloat16, True),
    )
)
"""Configurations that are compiled ahead of time."""
