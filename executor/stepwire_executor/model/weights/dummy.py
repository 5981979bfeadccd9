"""Random weights for a config, to measure without a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.expected import expected_tensors
from stepwire_executor.model.weights.source import TensorInfo


class DummyWeights:
    """A WeightSource that draws small normal numbers, the same for the same name."""

    def __init__(self, config: ModelConfig) -> None:
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(shape=shape, dtype="dummy", num_bytes=0)
            for name, shape in expected_tensors(config).items()
        }

    def load_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """See WeightSource; every row range is drawn afresh."""
        if name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{first_row}".encode()))
        out.normal_(0.0, 0.02, generator=generator)

    def sample(self, name: str) -> bytes:
        """See WeightSource."""
        return b""

    def close(self) -> None:
        """See WeightSource."""
