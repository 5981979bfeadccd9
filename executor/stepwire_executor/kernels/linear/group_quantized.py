"""Weights in integers of 4 or 8 bits, whatever format they were stored in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def to(self, device: torch.device) -> GroupQuantized:
        """The same on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=moved(self.zeros),
            minimums=moved(self.minimums),
            input_order=moved(self.input_order),
        )

    def columns(self, start: int, stop: int) -> GroupQuantized:
        """The part of inputs start to stop, which cut no group; there must be no order of inputs.

        Raises ValueError where they do.
        """
        if start == 0 and stop == self.in_features:
            return self
        size = self.group_size
        if start % size or stop % size or self.input_order is not None:
            raise ValueError(f"inputs {start} to {stop} cut groups of {size}")
        groups = slice(start // size, stop // size)
        return replace(
            self,
            codes=self.codes[:, start:stop],
            scales=self.scales[:, groups],
            zeros=None if self.zeros is None else self.zeros[:, groups],
            minimums=None if self.minimums is None else self.minimums[:, groups],
        )

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


def stacked(parts: Sequence[GroupQuantized]) -> GroupQuantized | None:
    """Parts one below the other, as one weight; None where they are not of one kind."""
    first = parts[0]
    if any(_kind(part) != _kind(first) or part.input_order is not None for part in parts):
        return first if len(parts) == 1 else None

    def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=cat([part.zeros for part in parts]),
        minimums=cat([part.minimums for part in parts]),
    )


def _kind(weight: GroupQuantized) -> tuple[object, ...]:
    minimums = None if weight.minimums is None else weight.minimums.dtype
    return (
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.scales.dtype,
        minimums,
        weight.zeros is None,
    )
