"""Reads how a Hugging Face checkpoint's weights are quantised, from config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.fields import Fields

Packing = Literal["gptq", "awq", "compressed-tensors"]
SUPPORTED_METHODS: tuple[Packing, ...] = ("gptq", "awq", "compressed-tensors")
GROUP_UNIT = 32
"""Inputs that kernels multiply at once: a group is whole ones, or the whole row."""
_FIX = "use the unquantised checkpoint or a GGUF file"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerScheme:
    """What the matrices of a checkpoint, or some of them, are rounded to."""

    bits: Literal[4, 8]
    group_size: int | None
    """Neighbouring inputs that share a scale; None is a whole row."""
    is_symmetric: bool
    """Whether all groups have one zero point, the middle code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointQuantization:
    """How packed weights are to be read."""

    packing: Packing
    schemes: tuple[IntegerScheme, ...]
    """Of the packed matrices; which one a matrix has, its tensors' shapes tell."""
    zeros_lack_one: bool = False
    """GPTQ's first format: stored zero points are one less than those meant."""
    has_overrides: bool = False
    """Whether single matrices may have other schemes."""


def read_quantization(config: Fields) -> CheckpointQuantization | None:
    """Read config.json's quantization_config; None where no weight is packed.

    Raises ModelLoadError where weights are stored in a way that is not supported.
    """
    if not config.has("quantization_config"):
        return None
    fields = config.child("quantization_config")
    method = fields.string("quant_method", "unknown")
    if method == "gptq":
        return _read_gptq(fields)
    if method == "awq":
        return _read_awq(fields)
    if method == "compressed-tensors":
        return _read_compressed_tensors(fields)
    raise ModelLoadError(
        f"config.json: quantization method {method!r} is not supported, only "
        f"{', '.join(SUPPORTED_METHODS)}; {_FIX}"
    )


def _read_gptq(fields: Fields) -> CheckpointQuantization:
    checkpoint_format = fields.string("checkpoint_format", fields.string("format", "gptq"))
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise _unsupported("checkpoint_format", checkpoint_format, "gptq and gptq_v2")
    _check_words(fields)
    return CheckpointQuantization(
        packing="gptq",
        schemes=(_scheme(fields, "bits", fields.boolean("sym", True)),),
        zeros_lack_one=checkpoint_format == "gptq",
        has_overrides=fields.has("dynamic"),
    )


def _read_awq(fields: Fields) -> CheckpointQuantization:
    version = fields.string("version", "gemm").lower()
    if version != "gemm":
        raise _unsupported("version", version, "gemm")
    scheme = _scheme(
        fields, "bits" if fields.has("bits") else "w_bit", not fields.boolean("zero_point", True)
    )
    if scheme.bits != 4:
        raise _unsupported("bits", scheme.bits, "4 with awq")
    return CheckpointQuantization(packing="awq", schemes=(scheme,))


def _read_compressed_tensors(fields: Fields) -> CheckpointQuantization | None:
    for key in ("sparsity_config", "transform_config"):
        if fields.has(key) and fields.child(key).keys():
            raise ModelLoadError(
                f"config.json: quantization_config: {key} is not supported; {_FIX}"
            )
    groups = fields.child("config_groups")
    names = groups.keys()
    if not names:  # only a KV cache's scales
        return None
    formats = {fields.string("format", "pack-quantized")}
    schemes = []
    for key in names:
        group = groups.child(key)
        if group.has("format"):
            formats.add(group.string("format"))
        for activations in ("input_activations", "output_activations"):
            if group.has(activations):
                raise ModelLoadError(
                    f"config.json: quantization_config: {activations} are not supported, only "
                    f"weights in integers; {_FIX}"
                )
        weights = group.child("weights")
        kind = weights.string("type", "int")
        if kind != "int":
            raise _unsupported("type of weights", kind, "int")
        schemes.append(_compressed_scheme(weights))
    formats.discard("mixed-precision")
    for name in sorted(formats - {"pack-quantized"}):
        raise _unsupported("format", name, "pack-quantized")
    return CheckpointQuantization(packing="compressed-tensors", schemes=tuple(schemes))


def _compressed_scheme(weights: Fields) -> IntegerScheme:
    has_groups = weights.has("group_size")
    strategy = weights.string("strategy", "group" if has_groups else "tensor")
    if strategy not in ("group", "channel"):
        raise _unsupported("strategy", strategy, "group and channel")
    if strategy == "group" and not has_groups:
        raise weights.wrong("group_size", "the size of a group")
    return _scheme(weights, "num_bits", weights.boolean("symmetric", True))


def _scheme(fields: Fields, bits_key: str, is_symmetric: bool) -> IntegerScheme:
    bits = fields.positive_int(bits_key)
    if bits not in (4, 8):
        raise _unsupported(bits_key, bits, "4 and 8")
    key = "q_group_size" if fields.has("q_group_size") else "group_size"
    group_size = fields.integer(key, -1)
    if group_size != -1 and (group_size < 1 or group_size % GROUP_UNIT):
        raise _unsupported(key, group_size, f"multiples of {GROUP_UNIT}, and -1 for whole rows")
    return IntegerScheme(
        bits=4 if bits == 4 else 8,
        group_size=None if group_size == -1 else group_size,
        is_symmetric=is_symmetric,
    )


def _check_words(fields: Fields) -> None:
    dtype = fields.string("pack_dtype", "int32")
    if dtype != "int32":
        raise _unsupported("pack_dtype", dtype, "int32")


def _unsupported(key: str, value: object, supported: str) -> ModelLoadError:
    return ModelLoadError(
        f"config.json: quantization_config: {key} {value!r} is not supported, only {supported}; "
        f"{_FIX}"
    )
