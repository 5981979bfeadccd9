"""What the decoder asks of a checkpoint, whatever its file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor as a file's header describes it."""

    shape: tuple[int, ...]
    """Outermost dimension first: [out_features, in_features] for a linear layer."""
    dtype: str
    """As the format names it: "BF16", "F32", "Q4_1", …"""
    num_bytes: int
    """In the file."""


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

    def sample(self, name: str) -> bytes:
        """Up to 64 bytes of a tensor as stored, for the fingerprint."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...
