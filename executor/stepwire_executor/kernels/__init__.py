"""Operations of the model and the sampler, one folder each, and the choice among them."""

from stepwire_executor.kernels.interface import (
    Kernels,
    PackedWeight,
    SampleOutput,
    SamplingBatch,
)
from stepwire_executor.kernels.select import KernelBackend, select_kernels

__all__ = [
    "KernelBackend",
    "Kernels",
    "PackedWeight",
    "SampleOutput",
    "SamplingBatch",
    "select_kernels",
]
