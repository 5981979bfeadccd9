"""Root-mean-square normalisation by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import RMSNorm
from stepwire_executor.kernels.native.library import COMPUTE_DTYPES, DTYPE_CODES, NativeLibrary
from stepwire_executor.kernels.rms_norm import reference


def make_rms_norm(library: NativeLibrary) -> RMSNorm:
    """Return the operation; see `interface.RMSNorm`."""
    run = library.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        size = x.shape[-1]
        if x.dtype not in COMPUTE_DTYPES or (residual is not None and not residual.is_contiguous()):
            return reference.rms_norm(x, weight, eps, residual)
        if weight.shape != (size,):
            raise ValueError(f"weight has shape {tuple(weight.shape)}, rows of x have {size}")
        if weight.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}")
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            raise ValueError(
                f"residual is {residual.dtype} {tuple(residual.shape)}, "
                f"x is {x.dtype} {tuple(x.shape)}"
            )
        if x.ndim > 3 or x.stride(-1) != 1:
            x = x.contiguous()
        # Heads of a fused projection come as a strided view [num_tokens, num_heads, head_dim].
        if x.is_contiguous():
            num_outer, num_inner = x.numel() // size, 1
            outer_stride = inner_stride = size
        elif x.ndim == 3:
            num_outer, num_inner = x.shape[0], x.shape[1]
            outer_stride, inner_stride = x.stride(0), x.stride(1)
        else:
            num_outer, num_inner = x.shape[0], 1
            outer_stride = inner_stride = x.stride(0)
        out = torch.empty(x.shape, dtype=x.dtype)
        weight = weight.contiguous()
        run(
            x.data_ptr(),
            outer_stride,
            inner_stride,
            DTYPE_CODES[x.dtype],
            weight.data_ptr(),
            DTYPE_CODES[weight.dtype],
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            eps,
            num_outer,
            num_inner,
            size,
            torch.get_num_threads(),
        )
        return out

    return rms_norm
