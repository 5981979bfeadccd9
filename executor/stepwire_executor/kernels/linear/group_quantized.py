"""Weights in integers of 4 or 8 bits, whatever format they were stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupQuantized:
    """A weight whose neighbouring inputs share a scale, and a zero point or a minimum.

    With g = k // group_size, weight[n][k] is scales[n][g] * (codes[n][k] - zeros[n][g]), or
    scales[n][g] * codes[n][k] + minimums[n][g] where there are minimums; in float32, each
    operation rounded. Input k of the weight is input input_order[k] of the layer, where there is
    an order. Every loader makes this form and every device's `pack_weight` takes it.
    """

    codes: Tensor
    """[out_features, in_features] uint8, below 2 ** bits."""
    bits: Literal[4, 8]
    group_size: int
    """Neighbouring inputs that share a scale; divides in_features."""
    scales: Tensor
    """[out_features, num_groups] float16, bfloat16 or float32."""
    zeros: Tensor | None = None
    """[out_features, num_groups] uint8, the code that stands for 0."""
    minimums: Tensor | None = None
    """[out_features, num_groups] float16, bfloat16 or float32, what code 0 stands for."""
    input_order: Tensor | None = None
    """[in_features] int64, a permutation; None is the order of the inputs themselves."""

    def __post_init__(self) -> None:
        """Raise ValueError where the parts do not fit together."""
        out_features, in_features = self.codes.shape
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, not {self.codes.dtype}")
        if self.group_size < 1 or in_features % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {in_features} inputs")
        if (self.zeros is None) == (self.minimums is None):
            raise ValueError("there must be zeros or minimums, and not both")
        groups = (out_features, in_features // self.group_size)
        for name, dtypes in (
            ("scales", _SCALE_DTYPES),
            ("zeros", (torch.uint8,)),
            ("minimums", _SCALE_DTYPES),
        ):
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and (tensor.shape != groups or tensor.dtype not in dtypes):
                raise ValueError(
                    f"{name} are {tensor.dtype} {list(tensor.shape)}, expected {list(groups)}"
                )
        if self.input_order is not None and self.input_order.shape != (in_features,):
            raise ValueError(f"input_order must name {in_features} inputs")

    @property
    def out_features(self) -> int:
        """Length of a result's row."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Length of an input's row."""
        return self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The weight in float32, [out_features, in_features], in the order of the layer's inputs.

        Bit for bit what ggml makes of its formats; formats whose libraries compute in a narrower
        dtype round this to it, which gives their bits since the product is exact in float32.
        """
        codes = self.codes.reshape(*self.scales.shape, self.group_size).to(torch.float32)
        scales = self.scales.to(torch.float32).unsqueeze(2)
        if self.zeros is not None:
            values = (codes - self.zeros.to(torch.float32).unsqueeze(2)) * scales
        else:
            assert self.minimums is not None
            values = codes * scales + self.minimums.to(torch.float32).unsqueeze(2)
        values = values.flatten(1)
        if self.input_order is None:
            return values
        ordered = torch.empty_like(values)
        ordered[:, self.input_order] = values
        return ordered
