"""Packs checkpoints as GPTQ, AWQ and compressed-tensors lay them out; plain loops, no library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its word's eight outputs each nibble holds, from the lowest nibble on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """A format and a scheme."""

    method: Literal["gptq", "awq", "compressed-tensors"]
    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    has_order: bool = False

    def __str__(self) -> str:
        """For the names of tests."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        order = " in activation order" if self.has_order else ""
        return f"{self.method} int{self.bits} {self.group_size} {kind}{order}"


PACKINGS = (
    Packing(method="gptq"),
    Packing(method="gptq", symmetric=False),
    Packing(method="gptq", symmetric=False, has_order=True),
    Packing(method="awq", symmetric=False),
    Packing(method="compressed-tensors"),
    Packing(method="compressed-tensors", symmetric=False),
    Packing(method="compressed-tensors", has_order=True),
    Packing(method="compressed-tensors", group_size=None),
    Packing(method="gptq", bits=8, group_size=64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCheckpoint:
    """A checkpoint's tensors, packed and as they stand for."""

    tensors: dict[str, Tensor]
    dequantised: dict[str, Tensor]
    """In float32."""
    quantization: dict[str, Any]
    """config.json's quantization_config."""


def pack_checkpoint(state: dict[str, Tensor], packing: Packing) -> PackedCheckpoint:
    """Round and pack all projections of the layers; all else stays float32."""
    generator = torch.Generator().manual_seed(11)
    tensors: dict[str, Tensor] = {}
    dequantised: dict[str, Tensor] = {}
    for name, weight in state.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = dequantised[name] = weight
            continue
        parts, values = _pack(weight, packing, generator)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        dequantised[name] = values
    return PackedCheckpoint(
        tensors=tensors, dequantised=dequantised, quantization=_quantization(packing)
    )


def _pack(
    weight: Tensor, packing: Packing, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    out_features, in_features = weight.shape
    size = packing.group_size or in_features
    group_of = torch.arange(in_features) // size
    if packing.has_order:
        group_of = group_of[torch.randperm(in_features, generator=generator)]
    num_groups, largest = in_features // size, (1 << packing.bits) - 1
    scales = torch.empty(out_features, num_groups, dtype=torch.float16)
    zeros = torch.full((out_features, num_groups), 1 << (packing.bits - 1))
    for group in range(num_groups):
        members = weight[:, group_of == group]
        if packing.symmetric:
            scales[:, group] = 2 * members.abs().amax(dim=1) / largest
            continue
        # GPTQ's first format has no code for a zero point of 0.
        low, high = members.amin(dim=1).clamp(max=0), members.amax(dim=1).clamp(min=0)
        scales[:, group] = (high - low) / largest
        zeros[:, group] = (-low / scales[:, group].float()).round().clamp(1, largest).long()
    scale, zero = scales.float()[:, group_of], zeros[:, group_of]
    codes = ((weight / scale).round().long() + zero).clamp(0, largest)
    values = (codes - zero) * scale
    if packing.method == "gptq":
        parts = {
            "qweight": _words(codes, packing.bits).t(),
            "qzeros": _words((zeros - 1).t(), packing.bits),
            "scales": scales.t(),
            "g_idx": group_of.int(),
        }
    elif packing.method == "awq":
        parts = {
            "qweight": _words(_awq_order(codes.t()), 4),
            "qzeros": _words(_awq_order(zeros.t()), 4),
            "scales": scales.t(),
        }
    else:
        parts = {
            "weight_packed": _words(codes, packing.bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([out_features, in_features]),
        }
        if not packing.symmetric:
            parts["weight_zero_point"] = _words(zeros.t(), packing.bits).t()
        if packing.has_order:
            parts["weight_g_idx"] = group_of.int()
    return parts, values


def _words(codes: Tensor, bits: int) -> Tensor:
    """The codes of each row in int32 words, the first in the lowest bits."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // per_word, dtype=torch.int64)
    for column in range(codes.shape[1]):
        words[:, column // per_word] |= codes[:, column] << (bits * (column % per_word))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _awq_order(codes: Tensor) -> Tensor:
    return codes.reshape(len(codes), -1, 8)[:, :, list(_AWQ_ORDER)].flatten(1)


def _quantization(packing: Packing) -> dict[str, Any]:
    size = -1 if packing.group_size is None else packing.group_size
    if packing.method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": packing.bits,
            "group_size": size,
            "sym": packing.symmetric,
            "desc_act": packing.has_order,
        }
    if packing.method == "awq":
        return {
            "quant_method": "awq",
            "bits": packing.bits,
            "group_size": size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    weights: dict[str, Any] = {
        "num_bits": packing.bits,
        "type": "int",
        "symmetric": packing.symmetric,
        "strategy": "channel" if packing.group_size is None else "group",
        "group_size": packing.group_size,
        "actorder": "group" if packing.has_order else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
