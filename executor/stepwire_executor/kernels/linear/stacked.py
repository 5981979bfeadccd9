"""Weights that share their input but not their layout, one below the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import Linear, PackedWeight, PackWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedWeight:
    """Packed weights whose outputs lie side by side in a result's row."""

    parts: tuple[PackedWeight, ...]
    """All of the same in_features."""

    @property
    def out_features(self) -> int:
        """Length of a result's row."""
        return sum(part.out_features for part in self.parts)

    @property
    def in_features(self) -> int:
        """Length of an input's row."""
        return self.parts[0].in_features

    @property
    def num_bytes(self) -> int:
        """Memory the weight takes."""
        return sum(part.num_bytes for part in self.parts)

    def columns(self) -> Iterator[tuple[PackedWeight, slice]]:
        """Each part, and where its outputs lie."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.out_features)
            start += part.out_features


def pack_parts(
    pack_weight: PackWeight, parts: Sequence[object], sum_unit: int | None
) -> PackedWeight:
    """Pack weights one below the other, each on its own.

    Raises ValueError if there is none, or if their inputs differ in number.
    """
    packed = tuple(pack_weight(part, sum_unit) for part in parts)
    if len({part.in_features for part in packed}) != 1:
        raise ValueError("stacked weights must have the same number of inputs")
    return packed[0] if len(packed) == 1 else StackedWeight(parts=packed)


def multiply_parts(
    multiply: Linear | Callable[..., Tensor],
    x: Tensor,
    weight: StackedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """x @ weight.T + bias, one part after the other; see `interface.Linear`."""
    out = torch.empty(
        (x.shape[0], weight.out_features), dtype=out_dtype or x.dtype, device=x.device
    )
    for part, columns in weight.columns():
        out[:, columns] = multiply(x, part, None if bias is None else bias[columns], out_dtype)
    return out
