"""Root-mean-square normalisation in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.dtypes import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Normalise rows by their root mean square; see `interface.RMSNorm`."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, rows of x have {tuple(x.shape[-1:])}"
        )
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
        residual += x
        x = residual
    wide = x.to(accumulation_dtype(x))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps) * weight.to(wide.dtype)).to(x.dtype)
