"""silu(gate) * up by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import SiluAndMul
from stepwire_executor.kernels.native.library import COMPUTE_DTYPES, DTYPE_CODES, NativeLibrary


def make_silu_and_mul(library: NativeLibrary) -> SiluAndMul:
    """Return the operation; see `interface.SiluAndMul`."""
    run = library.silu_and_mul

    def silu_and_mul(x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] % 2 or x.dtype not in COMPUTE_DTYPES:
            raise ValueError(
                "x must be [num_tokens, 2 * size] in float32, bfloat16 or float16, "
                f"not {x.dtype} {tuple(x.shape)}"
            )
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows, size = x.shape[0], x.shape[1] // 2
        out = torch.empty((num_rows, size), dtype=x.dtype)
        run(
            x.data_ptr(),
            x.stride(0),
            DTYPE_CODES[x.dtype],
            out.data_ptr(),
            num_rows,
            size,
            torch.get_num_threads(),
        )
        return out

    return silu_and_mul
