"""Weights of one decoder layer, read and packed for a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import Kernels, PackedWeight
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.source import WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A linear layer; several that share their input are fused into one, stacked by rows."""

    weight: PackedWeight
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """What one layer needs besides its input."""

    input_norm: Tensor
    """[hidden_size]."""
    qkv: Projection
    """Query heads, key heads, value heads."""
    query_norm: Tensor | None
    """[head_dim], with QK norm."""
    key_norm: Tensor | None
    """[head_dim], with QK norm."""
    attention_output: Projection
    mlp_norm: Tensor
    """[hidden_size]."""
    gate_up: Projection
    """Gate rows, then up rows."""
    down: Projection
    sliding_window: int | None
    """Tokens a query sees, itself included; None is all."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights of the layer."""
        norms = (self.input_norm, self.mlp_norm, self.query_norm, self.key_norm)
        projections = (self.qkv, self.attention_output, self.gate_up, self.down)
        return sum(norm.nbytes for norm in norms if norm is not None) + sum(
            projection.num_bytes for projection in projections
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLayer:
    """One layer's weights in CPU memory, fused but not yet packed."""

    tensors: dict[str, Tensor]
    """By the names of DecoderLayer's fields, with ".weight" and ".bias" for projections."""


_PROJECTIONS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_NORMS = {
    "input_norm": "input_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
}


def read_tensor(source: WeightSource, names: list[str], dtype: torch.dtype) -> Tensor:
    """Tensors stacked by rows, read straight into one CPU tensor of a dtype."""
    shapes = [source.tensors[name].shape for name in names]
    stacked = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=dtype)
    row = 0
    for name, shape in zip(names, shapes, strict=True):
        source.load_into(name, stacked[row : row + shape[0]])
        row += shape[0]
    return stacked


def read_layer(source: WeightSource, index: int, dtype: torch.dtype) -> HostLayer:
    """Read one layer; safe to call in several threads at once."""
    prefix = f"model.layers.{index}."
    tensors: dict[str, Tensor] = {}
    for field, name in _NORMS.items():
        if prefix + name + ".weight" in source.tensors:
            tensors[field] = read_tensor(source, [prefix + name + ".weight"], dtype)
    for field, modules in _PROJECTIONS.items():
        for kind in (".weight", ".bias"):
            names = [prefix + module + kind for module in modules]
            if names[0] in source.tensors:
                tensors[field + kind] = read_tensor(source, names, dtype)
    return HostLayer(tensors=tensors)


def pack_layer(
    host: HostLayer, config: ModelConfig, index: int, kernels: Kernels, device: torch.device
) -> DecoderLayer:
    """Bring a layer to the device in the layout its kernels multiply fastest."""

    def tensor(field: str) -> Tensor | None:
        found = host.tensors.get(field)
        return None if found is None else found.to(device)

    def norm(field: str) -> Tensor:
        return host.tensors[field].to(device)

    def projection(field: str) -> Projection:
        weight = kernels.pack_weight(host.tensors[field + ".weight"].to(device))
        return Projection(weight=weight, bias=tensor(field + ".bias"))

    return DecoderLayer(
        input_norm=norm("input_norm"),
        qkv=projection("qkv"),
        query_norm=tensor("query_norm"),
        key_norm=tensor("key_norm"),
        attention_output=projection("attention_output"),
        mlp_norm=norm("mlp_norm"),
        gate_up=projection("gate_up"),
        down=projection("down"),
        sliding_window=config.sliding_windows[index],
    )
