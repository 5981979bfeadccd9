"""Random weights for a config, to measure without a checkpoint."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.expected import expected_tensors
from stepwire_executor.model.weights.source import TensorInfo

_NUM_DRAWN = 1_048_573
"""Normal numbers that all weights repeat; a prime, so that rows of a matrix differ.

Drawing every weight of a model of eight billion would take minutes.
"""


class DummyWeights:
    """A WeightSource of small normal numbers, the same for the same name and place."""

    def __init__(self, config: ModelConfig) -> None:
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(shape=shape, dtype="dummy", num_bytes=0)
            for name, shape in expected_tensors(config).items()
        }

    def load_into(self, name: str, out: Tensor, first_row: int = 0, first_column: int = 0) -> None:
        """See WeightSource."""
        if name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        width = self.tensors[name].shape[-1]
        if out.ndim > 1 and out.shape[1] < width:
            whole = torch.empty(1, width, dtype=out.dtype)
            for row, target in enumerate(out):
                self.load_into(name, whole, first_row + row)
                target.copy_(whole[0, first_column : first_column + len(target)])
            return
        row_size = out[0].numel() if out.ndim > 1 else 1
        place = (zlib.crc32(name.encode()) + first_row * row_size) % _NUM_DRAWN
        flat, numbers = out.view(-1), _drawn(out.dtype)
        start = 0
        while start < flat.numel():
            size = min(_NUM_DRAWN - place, flat.numel() - start)
            flat[start : start + size] = numbers[place : place + size]
            start, place = start + size, 0

    def load_groups(self, name: str, rows: range, columns: range | None = None) -> GroupQuantized:
        """See WeightSource; there are no groups."""
        raise AssertionError(name)

    def sample(self, name: str) -> bytes:
        """See WeightSource."""
        return b""

    def close(self) -> None:
        """See WeightSource."""


@functools.cache
def _drawn(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(_NUM_DRAWN).normal_(0.0, 0.02, generator=generator).to(dtype)
