"""silu(gate) * up in torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from stepwire_executor.kernels.dtypes import accumulation_dtype


def silu_and_mul(x: Tensor) -> Tensor:
    """Multiply the second half of each row by silu of the first; see `interface.SiluAndMul`."""
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"x must be [num_tokens, 2 * size], not {tuple(x.shape)}")
    gate, up = x.to(accumulation_dtype(x)).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(x.dtype)
