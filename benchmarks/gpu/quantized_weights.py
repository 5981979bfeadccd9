"""Random weights in 4 or 8 bits, of every kind that the kernels tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized

from benchmarks.gpu.bench import Bench


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How a weight is stored."""

    bits: Literal[4, 8] = 4
    group_size: int | None = 128
    """None: a whole row."""
    scale_dtype: torch.dtype = torch.float16
    """Of scales and minimums."""
    has_minimums: bool = False
    """Instead of zero points."""
    has_order: bool = False
    """Whether inputs are in an order of their own."""

    @property
    def name(self) -> str:
        """Short, for tables."""
        size = "a row" if self.group_size is None else self.group_size
        offsets = "minimums" if self.has_minimums else "zeros"
        order = ", ordered" if self.has_order else ""
        return f"int{self.bits} by {size}, {str(self.scale_dtype)[6:]} {offsets}{order}"


def random_weight(bench: Bench, shape: tuple[int, int], kind: Kind, salt: int) -> GroupQuantized:
    """A weight of (outputs, inputs) whose values are of the size of 1 and of either sign."""
    num_outputs, num_inputs = shape
    generator = bench.generator(salt)
    group_size = kind.group_size or num_inputs
    grid = (num_outputs, num_inputs // group_size)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(
            2**kind.bits, size, generator=generator, device=bench.device, dtype=torch.uint8
        )

    scales = torch.rand(grid, generator=generator, device=bench.device) + 0.5
    scales = (scales * 4 / 2**kind.bits).to(kind.scale_dtype)
    order = torch.randperm(num_inputs, generator=generator, device=bench.device)
    return GroupQuantized(
        codes=codes(*shape),
        bits=kind.bits,
        group_size=group_size,
        scales=scales,
        zeros=None if kind.has_minimums else codes(*grid),
        minimums=-scales * 2 ** (kind.bits - 1) if kind.has_minimums else None,
        input_order=order if kind.has_order else None,
    )
