"""silu(gate) * up in Triton: one program a stretch of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepwire_executor.kernels.compile_case import CompileCase
from stepwire_executor.kernels.launch import COMPUTE_DTYPES, TRITON_TYPES, ceil_div

_BLOCK_SIZE = 1024
_NUM_WARPS = 4


@triton.jit
def silu_and_mul_kernel(
    x_ptr,  # [num_tokens, 2 * size]
    out_ptr,  # [num_tokens, size], contiguous
    x_stride,
    size,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = columns < size
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + columns, mask=mask, other=0.0).to(tl.float32)
    # exp overflows to inf for very negative gates, and the quotient is then -0.
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(x: Tensor) -> Tensor:
    """Multiply the second half of each row by silu of the first; see `interface.SiluAndMul`."""
    if x.ndim != 2 or x.shape[1] % 2 or x.dtype not in COMPUTE_DTYPES:
        raise ValueError(
            "x must be [num_tokens, 2 * size] in float32, bfloat16 or float16, "
            f"not {x.dtype} {tuple(x.shape)}"
        )
    if x.stride(1) != 1:
        x = x.contiguous()
    num_tokens, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    silu_and_mul_kernel[(num_tokens, ceil_div(size, _BLOCK_SIZE))](
        x,
        out,
        x.stride(0),
        size,
        BLOCK_SIZE=_BLOCK_SIZE,
        num_warps=_NUM_WARPS,
        num_stages=1,
    )
    return out


COMPILE_CASES = tuple(
    CompileCase(
        name=f"silu_and_mul {name}",
        kernel=silu_and_mul_kernel,
        signature={"x_ptr": f"*{name}", "out_ptr": f"*{name}", "x_stride": "i32", "size": "i32"},
        constexprs={"BLOCK_SIZE": _BLOCK_SIZE},
        num_warps=_NUM_WARPS,
        num_stages=1,
        divisible_by_16=frozenset({"x_stride", "size"}),
        expect=frozenset({"vector_loads"}),
    )
    for name in (TRITON_TYPES[dtype] for dtype in COMPUTE_DTYPES)
)
"""Configurations that are compiled ahead of time."""
