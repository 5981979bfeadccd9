"""Rules about dtypes that every operation shares."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype sums of x are kept in: float32, or float64 when x already is.

    float64 is what the tests compare the other kernels with.
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32
