"""Linear layers by the native library, over weights packed in panels of 32 outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stepwire_executor.kernels.interface import Linear
from stepwire_executor.kernels.native.library import COMPUTE_DTYPES, DTYPE_CODES, NativeLibrary

_PANEL = 32
"""Outputs that are computed together; PANEL in linear.cpp."""
SUMMAND_DTYPE = torch.float64
"""Of the sums of chains; see `interface.Kernels`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelWeight:
    """A weight in the order in which the native kernel reads it, zero-padded."""

    values: Tensor
    """[panels, steps, 32, depth]; depth is 2 for bfloat16, multiplied in pairs, else 1."""
    out_features: int
    """Length of a result's row."""
    in_features: int
    """Length of an input's row."""
    chain_length: int
    """Neighbouring inputs whose products are summed in float32, before float64 adds such sums."""

    @property
    def num_bytes(self) -> int:
        """Memory the weight takes."""
        return self.values.nbytes


def pack_weight(weight: Tensor, sum_unit: int | None = None) -> PanelWeight:
    """Lay weight, [out_features, in_features] in the dtype to compute in, out in panels.

    sum_unit: see `interface.PackWeight`; even in bfloat16, which is multiplied in pairs.
    """
    if weight.ndim != 2 or weight.dtype not in COMPUTE_DTYPES:
        raise ValueError(
            "weight must be [out_features, in_features] in float32, bfloat16 or float16, "
            f"not {weight.dtype} {tuple(weight.shape)}"
        )
    out_features, in_features = weight.shape
    depth = 2 if weight.dtype == torch.bfloat16 else 1
    if sum_unit is not None and (sum_unit < 1 or sum_unit % depth):
        raise ValueError(f"sum_unit must be a positive multiple of {depth}, not {sum_unit}")
    padding = (0, -in_features % depth, 0, -out_features % _PANEL)
    padded = functional.pad(weight, padding) if any(padding) else weight  # pad always copies
    steps = padded.shape[1] // depth
    # A pair of bfloat16 moves as one int32: torch transposes that 6 times as fast.
    words = padded.contiguous().view(torch.int32) if depth == 2 else padded
    panels = words.view(-1, _PANEL, steps).transpose(1, 2).contiguous()
    return PanelWeight(
        values=panels.view(weight.dtype).view(-1, steps, _PANEL, depth),
        out_features=out_features,
        in_features=in_features,
        chain_length=sum_unit or max(steps, 1) * depth,
    )


def make_linear(library: NativeLibrary) -> Linear:
    """Return the operation; see `interface.Linear`. Rows are bit-equal whatever their number."""
    run, takes_bf16 = library.linear, library.linear_takes_bf16

    def linear(
        x: Tensor,
        weight: PanelWeight,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        values = weight.values
        if x.ndim != 2 or x.shape[1] != weight.in_features or x.dtype != values.dtype:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}, expected {values.dtype} "
                f"[*, {weight.in_features}]"
            )
        out_dtype = out_dtype or x.dtype
        if out_dtype not in COMPUTE_DTYPES and out_dtype != SUMMAND_DTYPE:
            raise ValueError(
                f"out_dtype must be float32, bfloat16, float16 or float64, not {out_dtype}"
            )
        if bias is not None:
            if bias.shape != (weight.out_features,) or bias.dtype not in COMPUTE_DTYPES:
                raise ValueError(
                    f"bias is {bias.dtype} {tuple(bias.shape)}, expected [{weight.out_features}]"
                )
            bias = bias.contiguous()
        num_rows = x.shape[0]
        out = torch.empty((num_rows, weight.out_features), dtype=out_dtype)
        steps, depth = values.shape[1], values.shape[3]
        if x.dtype != torch.float32 and not (takes_bf16 and x.dtype == torch.bfloat16):
            x = x.float()
        if steps * depth != weight.in_features:
            x = functional.pad(x, (0, 1))
        if x.stride(1) != 1:
            x = x.contiguous()
        run(
            x.data_ptr(),
            x.stride(0),
            values.data_ptr(),
            DTYPE_CODES[values.dtype],
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPE_CODES[bias.dtype],
            out.data_ptr(),
            DTYPE_CODES[out_dtype],
            num_rows,
            steps,
            weight.out_features,
            weight.chain_length // depth,
            torch.get_num_threads(),
        )
        return out

    return linear
