"""Which weights are served in integers: as a checkpoint stores them, none, or all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.expected import expected_tensors, head_name
from stepwire_executor.model.weights.rounding import round_to_groups
from stepwire_executor.model.weights.source import GroupFormat, TensorInfo, WeightSource

Quantization = Literal["auto", "none", "int4"]
GroupSize = Literal[32, 64]
DEFAULT_GROUP_SIZE: GroupSize = 64
HEAD_FORMAT = GroupFormat(bits=8, group_size=32, group_bytes=2)
"""Of the head under int4: it chooses between all tokens, and loses most by rounding."""
_DENSE_DTYPES = ("F32", "F16", "BF16", "dummy")
_LINEAR_SUFFIX = "_proj.weight"


def choose_weights(
    source: WeightSource,
    config: ModelConfig,
    quantization: Quantization,
    group_size: GroupSize = DEFAULT_GROUP_SIZE,
    *,
    bits: Collection[int],
) -> WeightSource:
    """The source as --quantization asks for it; the source given closes with it.

    bits: of codes that the kernels multiply; other weights are dequantised. Raises ModelLoadError
    where what is asked for does not go with the checkpoint.
    """
    if quantization == "int4":
        return RoundedWeights(source, config, group_size, bits)
    return DenseWeights(source, () if quantization == "none" else bits)


def draft_quantization(quantization: Quantization, source: WeightSource) -> Quantization:
    """What the target's --quantization means for a draft model: int4 only where it is dense."""
    is_dense = all(info.dtype in _DENSE_DTYPES for info in source.tensors.values())
    return "auto" if quantization == "int4" and not is_dense else quantization


def describe_quantization(source: WeightSource, config: ModelConfig) -> str:
    """Formats of the layers' matrices, then of the head: "int4 in groups of 32, head int8 …".

    "none" where all are dense.
    """
    head = head_name(config)
    layers = Counter(
        _described(info) for name, info in source.tensors.items() if name.endswith(_LINEAR_SUFFIX)
    )
    names = " and ".join(name for name, _ in layers.most_common())
    if source.tensors[head].groups is None:
        return names
    return f"{names}, head {_described(source.tensors[head])}"


def _described(info: TensorInfo) -> str:
    return "none" if info.groups is None else str(info.groups)


class DenseWeights:
    """A WeightSource that hides integers, but those of some numbers of bits."""

    def __init__(self, source: WeightSource, bits: Collection[int] = ()) -> None:
        """bits: what stays."""
        self._source = source
        self.tensors: Mapping[str, TensorInfo] = {
            name: info
            if info.groups is None or info.groups.bits in bits
            else dataclasses.replace(info, groups=None)
            for name, info in source.tensors.items()
        }

    def load_into(self, name: str, out: Tensor, first_row: int = 0, first_column: int = 0) -> None:
        """See WeightSource."""
        self._source.load_into(name, out, first_row, first_column)

    def load_groups(self, name: str, rows: range, columns: range | None = None) -> GroupQuantized:
        """See WeightSource."""
        return self._source.load_groups(name, rows, columns)

    def sample(self, name: str) -> bytes:
        """See WeightSource."""
        return self._source.sample(name)

    def close(self) -> None:
        """See WeightSource."""
        self._source.close()


class RoundedWeights(DenseWeights):
    """A WeightSource that rounds the matrices of a dense one to integers as they are read.

    Layers to 4 bits with a zero point a group, the head to 8 bits. A matrix whose rows are no
    whole number of groups, of group_size or else of 32, stays dense.
    """

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        group_size: GroupSize,
        bits: Collection[int] = (4, 8),
    ) -> None:
        """Raises ModelLoadError where the source is quantised already."""
        super().__init__(source)
        for name, info in source.tensors.items():
            if info.dtype not in _DENSE_DTYPES:
                raise ModelLoadError(
                    f"--quantization int4 rounds float weights, but the checkpoint stores "
                    f"{name!r} as {info.dtype}: leave the flag out to serve it as it is"
                )
        tensors = dict(source.tensors)
        for name in expected_tensors(config):
            groups = _rounded_format(name, tensors[name], config, group_size)
            if groups is not None and groups.bits in bits:
                tensors[name] = dataclasses.replace(tensors[name], groups=groups)
        self.tensors = tensors

    def load_groups(self, name: str, rows: range, columns: range | None = None) -> GroupQuantized:
        """See WeightSource; raises ModelLoadError where a weight is not finite."""
        info = self.tensors[name]
        assert info.groups is not None, name
        columns = columns or range(info.shape[1])
        values = torch.empty(len(rows), len(columns), dtype=torch.float32)
        self._source.load_into(name, values, rows.start, columns.start)
        if not values.isfinite().all():
            raise ModelLoadError(
                f"tensor {name!r} holds numbers that are not finite, which integers cannot: "
                "use --quantization none, or get the model again from its source"
            )
        return round_to_groups(values, info.groups)


def _rounded_format(
    name: str, info: TensorInfo, config: ModelConfig, group_size: int
) -> GroupFormat | None:
    if name == head_name(config):
        return HEAD_FORMAT if info.shape[1] % 32 == 0 else None
    if not name.endswith(_LINEAR_SUFFIX):
        return None
    for size in (group_size, 32):
        if info.shape[1] % size == 0:
            return GroupFormat(bits=4, group_size=size, group_bytes=3)
    return None
