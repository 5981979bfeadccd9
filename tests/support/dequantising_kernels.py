"""Kernels that take weights in integers and multiply what they stand for, without rounding more."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from stepwire_executor.kernels import Kernels, select_kernels
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kernels.linear.reference import DenseWeight, linear
from torch import Tensor


def dequantising_kernels(dtype: torch.dtype = torch.float32) -> Kernels:
    """The torch references; weights in integers become dtype, that of the activations."""

    def dense(weight: Any) -> Tensor:
        if isinstance(weight, tuple):
            return torch.cat([dense(part) for part in weight])
        values = weight.dequantize() if isinstance(weight, GroupQuantized) else weight
        assert isinstance(values, Tensor)
        return values.to(dtype)

    def pack_weight(weight: Any, sum_unit: int | None = None) -> DenseWeight:
        return DenseWeight(values=dense(weight))

    def quantized_rows(weight: DenseWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.values[rows].to(dtype)

    return dataclasses.replace(
        select_kernels(torch.device("cpu"), backend="reference"),
        pack_weight=pack_weight,
        linear=linear,
        quantized_bits=frozenset({4, 8}),
        quantized_rows=quantized_rows,
    )
