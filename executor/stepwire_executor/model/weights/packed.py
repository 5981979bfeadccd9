"""Weights packed in int32 words by GPTQ, AWQ or compressed-tensors, under their usual names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.hf_quantization import (
    GROUP_UNIT,
    CheckpointQuantization,
    IntegerScheme,
)
from stepwire_executor.model.weights.expected import expected_tensors
from stepwire_executor.model.weights.packed_words import (
    group_order,
    unpack_awq_words,
    unpack_words,
)
from stepwire_executor.model.weights.safetensors import SafetensorsWeights
from stepwire_executor.model.weights.source import GroupFormat, TensorInfo

_WORD = 32
"""Bits of a word."""
_ROWS_A_CHUNK = 512
"""Outputs that are dequantised at a time."""
_SCALE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_INTEGERS = ("I32", "I64")
_AGAIN = "get the model again from its source"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedNames:
    """Suffixes of the tensors that make one matrix."""

    codes: str
    scales: str
    zeros: str
    order: str
    """The group of each input; may be missing."""
    others: tuple[str, ...] = ()


NAMES = {
    "gptq": PackedNames(codes="qweight", scales="scales", zeros="qzeros", order="g_idx"),
    "awq": PackedNames(codes="qweight", scales="scales", zeros="qzeros", order="g_idx"),
    "compressed-tensors": PackedNames(
        codes="weight_packed",
        scales="weight_scale",
        zeros="weight_zero_point",
        order="weight_g_idx",
        others=("weight_shape",),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """A packed matrix as its tensors' headers describe it."""

    module: str
    out_features: int
    in_features: int
    scheme: IntegerScheme
    has_zeros: bool
    has_order: bool

    @property
    def group_size(self) -> int:
        """Neighbouring inputs that share a scale."""
        return self.scheme.group_size or self.in_features


class PackedWeights:
    """A WeightSource over safetensors files in which some matrices are packed."""

    def __init__(
        self,
        source: SafetensorsWeights,
        config: ModelConfig,
        quantization: CheckpointQuantization,
    ) -> None:
        """Check every packed matrix's tensors by their headers. Raises ModelLoadError."""
        self._source = source
        self._quantization = quantization
        self._names = NAMES[quantization.packing]
        expected = expected_tensors(config)
        suffix = "." + self._names.codes
        modules = [name.removesuffix(suffix) for name in source.tensors if name.endswith(suffix)]
        parts = (suffix, *(f".{each}" for each in self._parts()))
        tensors = {name: info for name, info in source.tensors.items() if not name.endswith(parts)}
        self._matrices: dict[str, _Matrix] = {}
        for module in sorted(modules):
            name = module + ".weight"
            if name in tensors:
                raise ModelLoadError(
                    f"tensor {name!r} is stored both packed and as it is; {_AGAIN}"
                )
            shape = expected.get(name)
            if shape is None or len(shape) != 2:
                raise ModelLoadError(
                    f"the checkpoint packs {module!r}, which a {config.architecture} of this "
                    "config does not have; get config and weights from the same source"
                )
            matrix = self._describe(module, shape)
            self._matrices[name] = matrix
            tensors[name] = self._info(matrix)
            if module + ".bias" not in expected and self._is_zero(module + ".bias"):
                tensors.pop(module + ".bias")  # written by some packers for every matrix
        for name in tensors:
            if tensors[name].dtype in _INTEGERS:
                raise ModelLoadError(
                    f"tensor {name!r} has type {tensors[name].dtype} but is not packed as "
                    f"{quantization.packing} does it; {_AGAIN}"
                )
        self.tensors: Mapping[str, TensorInfo] = tensors

    def load_into(self, name: str, out: Tensor, first_row: int = 0, first_column: int = 0) -> None:
        """See WeightSource."""
        if name not in self._matrices:
            self._source.load_into(name, out, first_row, first_column)
            return
        for start in range(0, len(out), _ROWS_A_CHUNK):
            target = out[start : start + _ROWS_A_CHUNK]
            first = first_row + start
            values = self.load_groups(name, range(first, first + len(target))).dequantize()
            target.copy_(values[:, first_column : first_column + out.shape[1]])

    def load_groups(self, name: str, rows: range, columns: range | None = None) -> GroupQuantized:
        """See WeightSource."""
        matrix = self._matrices[name]
        columns = columns or range(matrix.in_features)
        scheme, size = matrix.scheme, matrix.group_size
        order = self._order(matrix)
        codes = self._codes(
            matrix, rows, range(matrix.in_features) if order is not None else columns
        )
        scales, zeros = self._scales(matrix, rows), self._zeros(matrix, rows)
        if scheme.group_size is None:  # cut anywhere, rows stay whole groups
            size = len(columns)
        elif order is None:
            groups = slice(columns.start // size, columns.stop // size)
            scales, zeros = scales[:, groups], zeros[:, groups]
        else:
            kept = self._kept_groups(matrix, order, columns)
            codes = codes[:, order.view(-1, size)[kept].flatten()]
            scales, zeros = scales[:, kept], zeros[:, kept]
            order = order.view(-1, size)[kept].flatten() - columns.start
        return GroupQuantized(
            codes=codes.contiguous(),
            bits=scheme.bits,
            group_size=size,
            scales=scales.contiguous(),
            zeros=zeros.contiguous(),
            input_order=order,
        )

    def sample(self, name: str) -> bytes:
        """See WeightSource."""
        if name not in self._matrices:
            return self._source.sample(name)
        module = self._matrices[name].module
        parts = (self._names.codes, self._names.scales)
        return b"".join(
            self._source.read(f"{module}.{part}", rows=range(1))
            .flatten()[:8]
            .view(torch.uint8)
            .numpy()
            .tobytes()
            for part in parts
        )

    def close(self) -> None:
        """See WeightSource."""
        self._source.close()

    def _parts(self) -> tuple[str, ...]:
        names = self._names
        return (names.scales, names.zeros, names.order, *names.others)

    def _is_zero(self, name: str) -> bool:
        return name in self._source.tensors and not self._source.read(name).any()

    def _describe(self, module: str, shape: tuple[int, ...]) -> _Matrix:
        """What the shapes of its tensors say; raises ModelLoadError where they do not fit."""
        out_features, in_features = shape
        names, tensors = self._names, self._source.tensors
        for part in (names.codes, names.scales):
            if f"{module}.{part}" not in tensors:
                raise self._missing(module, part)
        if in_features % GROUP_UNIT:
            raise ModelLoadError(
                f"{module!r} packs rows of {in_features} inputs, but only whole {GROUP_UNIT} "
                "are supported; use the unquantised checkpoint or a GGUF file"
            )
        has_order = f"{module}.{names.order}" in tensors
        has_zeros = f"{module}.{names.zeros}" in tensors
        scheme = self._scheme(module, out_features, in_features)
        if not has_zeros and (self._quantization.packing == "gptq" or not scheme.is_symmetric):
            raise self._missing(module, names.zeros)
        matrix = _Matrix(
            module=module,
            out_features=out_features,
            in_features=in_features,
            scheme=scheme,
            has_zeros=has_zeros,
            has_order=has_order and scheme.group_size is not None,
        )
        for part, expected in self._shapes(matrix).items():
            self._check(f"{module}.{part}", expected)
        scales = tensors[f"{module}.{names.scales}"]
        if scales.dtype not in _SCALE_BYTES:
            raise ModelLoadError(
                f"tensor {module + '.' + names.scales!r} has type {scales.dtype}, but scales are "
                f"{', '.join(_SCALE_BYTES)}; {_AGAIN}"
            )
        if "weight_shape" in names.others and f"{module}.weight_shape" in tensors:
            stored = tuple(self._source.read(f"{module}.weight_shape").tolist())
            if stored != shape:
                raise ModelLoadError(
                    f"tensor {module + '.weight_shape'!r} says {list(stored)}, but the config "
                    f"calls for {list(shape)}; get config and weights from the same source"
                )
        return matrix

    def _scheme(self, module: str, out_features: int, in_features: int) -> IntegerScheme:
        """The scheme that fits the number of words and groups."""
        name = f"{module}.{self._names.codes}"
        shape = self._source.tensors[name].shape
        scales = self._source.tensors[f"{module}.{self._names.scales}"].shape
        packing = self._quantization.packing
        # AWQ and GPTQ store matrices transposed; AWQ packs outputs, the others inputs.
        num_words = shape[0 if packing == "gptq" else 1] if len(shape) == 2 else 0
        num_groups = scales[1 if packing == "compressed-tensors" else 0] if len(scales) == 2 else 0
        bits = num_words * _WORD / (out_features if packing == "awq" else in_features)
        schemes = self._quantization.schemes
        for scheme in schemes:
            groups = 1 if scheme.group_size is None else in_features / scheme.group_size
            if scheme.bits == bits and groups == num_groups:
                return scheme
        if self._quantization.has_overrides and bits in (4, 8) and num_groups:
            size = in_features // num_groups
            if size * num_groups == in_features and (num_groups == 1 or size % GROUP_UNIT == 0):
                return IntegerScheme(
                    bits=4 if bits == 4 else 8,
                    group_size=None if num_groups == 1 else size,
                    is_symmetric=schemes[0].is_symmetric,
                )
        described = " or ".join(
            f"{each.bits} bits in "
            + ("whole rows" if each.group_size is None else f"groups of {each.group_size}")
            for each in schemes
        )
        raise ModelLoadError(
            f"tensor {name!r} has shape {list(shape)} and its scales {list(scales)}, which is not "
            f"[{out_features}, {in_features}] in {described}; get config and weights from the same "
            "source"
        )

    def _shapes(self, matrix: _Matrix) -> dict[str, tuple[int, ...]]:
        """What every tensor of a matrix must look like."""
        names, out_features, in_features = self._names, matrix.out_features, matrix.in_features
        num_groups = in_features // matrix.group_size
        per_word = _WORD // matrix.scheme.bits
        shapes: dict[str, tuple[int, ...]]
        if self._quantization.packing == "compressed-tensors":
            shapes = {
                names.codes: (out_features, math.ceil(in_features / per_word)),
                names.scales: (out_features, num_groups),
                names.zeros: (math.ceil(out_features / per_word), num_groups),
            }
        else:
            is_awq = self._quantization.packing == "awq"
            words = (in_features, out_features // per_word)
            shapes = {
                names.codes: words if is_awq else (in_features // per_word, out_features),
                names.scales: (num_groups, out_features),
                names.zeros: (num_groups, out_features // per_word),
            }
        if not matrix.has_zeros:
            del shapes[names.zeros]
        if matrix.has_order:
            shapes[names.order] = (in_features,)
        return shapes

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        info = self._source.tensors[name]
        if info.shape != expected:
            raise ModelLoadError(
                f"tensor {name!r} has shape {list(info.shape)}, expected {list(expected)}; get "
                "config and weights from the same source"
            )
        if info.dtype not in _INTEGERS and not name.endswith(self._names.scales):
            raise ModelLoadError(
                f"tensor {name!r} has type {info.dtype}, but integers are expected; {_AGAIN}"
            )

    def _missing(self, module: str, part: str) -> ModelLoadError:
        return ModelLoadError(
            f"tensor {module + '.' + part!r} is missing from the checkpoint, whose weights are "
            f"packed by {self._quantization.packing}; {_AGAIN}"
        )

    def _info(self, matrix: _Matrix) -> TensorInfo:
        tensors, module = self._source.tensors, matrix.module
        stored = [name for part in self._shapes(matrix) if (name := f"{module}.{part}") in tensors]
        scale_bytes = _SCALE_BYTES[tensors[f"{module}.{self._names.scales}"].dtype]
        return TensorInfo(
            shape=(matrix.out_features, matrix.in_features),
            dtype=self._quantization.packing,
            num_bytes=sum(tensors[name].num_bytes for name in stored),
            groups=GroupFormat(
                bits=matrix.scheme.bits,
                group_size=matrix.scheme.group_size,
                group_bytes=scale_bytes + (0 if matrix.scheme.is_symmetric else 1),
            ),
        )

    def _codes(self, matrix: _Matrix, rows: range, columns: range) -> Tensor:
        """[len(rows), len(columns)] uint8; columns are those of whole words."""
        name = f"{matrix.module}.{self._names.codes}"
        bits = matrix.scheme.bits
        per_word = _WORD // bits
        if self._quantization.packing == "awq":
            words = range(rows.start // per_word, math.ceil(rows.stop / per_word))
            codes = unpack_awq_words(self._source.read(name, columns, words))
            first = words.start * per_word
            return codes[:, rows.start - first : rows.stop - first].t()
        words = range(columns.start // per_word, math.ceil(columns.stop / per_word))
        if self._quantization.packing == "gptq":
            packed = self._source.read(name, words, rows).t()
        else:
            packed = self._source.read(name, rows, words)
        first = words.start * per_word
        return unpack_words(packed, bits)[:, columns.start - first : columns.stop - first]

    def _scales(self, matrix: _Matrix, rows: range) -> Tensor:
        """[len(rows), num_groups]."""
        name = f"{matrix.module}.{self._names.scales}"
        if self._quantization.packing == "compressed-tensors":
            return self._source.read(name, rows)
        return self._source.read(name, None, rows).t()

    def _zeros(self, matrix: _Matrix, rows: range) -> Tensor:
        """[len(rows), num_groups] uint8."""
        bits = matrix.scheme.bits
        if not matrix.has_zeros:
            num_groups = matrix.in_features // matrix.group_size
            return torch.full((len(rows), num_groups), 1 << (bits - 1), dtype=torch.uint8)
        words = self._source.read(f"{matrix.module}.{self._names.zeros}")
        if self._quantization.packing == "compressed-tensors":
            return unpack_words(words.t(), bits)[:, rows.start : rows.stop].t()
        if self._quantization.packing == "awq":
            return unpack_awq_words(words)[:, rows.start : rows.stop].t()
        if self._quantization.zeros_lack_one:
            # As one number: writers subtract so too, and what one code borrows the next returns.
            words = words + sum(1 << shift for shift in range(0, _WORD, bits))
        return unpack_words(words, bits)[:, rows.start : rows.stop].t()

    def _order(self, matrix: _Matrix) -> Tensor | None:
        """The inputs in the order of their groups; None is their own order."""
        if not matrix.has_order:
            return None
        name = f"{matrix.module}.{self._names.order}"
        return group_order(self._source.read(name), matrix.group_size, name)

    def _kept_groups(self, matrix: _Matrix, order: Tensor, columns: range) -> Tensor:
        """Places of the groups whose inputs are columns; raises ModelLoadError where some cut."""
        is_kept = (order >= columns.start) & (order < columns.stop)
        counts = is_kept.view(-1, matrix.group_size).sum(dim=1)
        if ((counts != 0) & (counts != matrix.group_size)).any():
            raise ModelLoadError(
                f"{matrix.module!r} is quantised in the order of its activations (desc_act), so "
                "ranks would cut its groups: use --tensor-parallel-size 1, --quantization none or "
                "a checkpoint without desc_act"
            )
        return counts.nonzero().flatten()
