"""What the decoder asks of a checkpoint, whatever its file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from stepwire_executor.kernels.linear.group_quantized import GroupQuantized


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFormat:
    """How the integers of a matrix are stored, as far as sizes go; see GroupQuantized."""

    bits: Literal[4, 8]
    group_size: int | None
    """Neighbouring inputs that share a scale; None is a whole row."""
    group_bytes: int
    """Of a scale, and of the zero point or minimum where groups differ in it."""

    def __str__(self) -> str:
        """As people are told: "int4 in groups of 32"."""
        groups = "rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"int{self.bits} in {groups}"

    def packed_bytes(self, out_features: int, in_features: int) -> int:
        """Of a matrix of this format on a device, but for its padding."""
        num_groups = 1 if self.group_size is None else in_features // self.group_size
        return out_features * (in_features * self.bits // 8 + num_groups * self.group_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor as a file's header describes it."""

    shape: tuple[int, ...]
    """Outermost dimension first: [out_features, in_features] for a linear layer."""
    dtype: str
    """As the format names it: "BF16", "F32", "Q4_1", …"""
    num_bytes: int
    """In the file."""
    groups: GroupFormat | None = None
    """Of a matrix that can be had in integers."""


class WeightSource(Protocol):
    """Tensors by their Hugging Face names, read from disk only when asked for."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint."""
        ...

    def load_into(self, name: str, out: Tensor, first_row: int = 0, first_column: int = 0) -> None:
        """Copy a tensor's rows first_row to first_row + len(out), converted to out's dtype.

        out: a contiguous CPU tensor, shaped as the tensor but for the number of rows and, where
        there are two dimensions, of columns, which start at first_column; of a tensor without
        dimensions all is copied. So a rank can read only its shard, straight into a fused
        weight. May be called by several threads at once. Raises ModelLoadError where the file
        does not hold the bytes.
        """
        ...

    def load_groups(self, name: str, rows: range, columns: range | None = None) -> GroupQuantized:
        """A part of a matrix whose TensorInfo has groups, in its integers; None is all columns.

        Columns must not cut a group. May be called by several threads at once. Raises
        ModelLoadError as load_into does, and where groups are not what the format says.
        """
        ...

    def sample(self, name: str) -> bytes:
        """Up to 64 bytes of a tensor as stored, for the fingerprint."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...
