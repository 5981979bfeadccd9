"""Weights of one decoder layer, read and packed for a device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import Kernels, PackedWeight
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized, stacked
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.source import WeightSource
from stepwire_executor.parallel.sharding import ModelShard


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


Weight = tuple[Tensor | GroupQuantized, ...]
"""Of a projection: parts below one another, where they are not stored alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLayer:
    """A rank's part of one layer's weights in CPU memory, fused but not yet packed."""

    weights: dict[str, Weight]
    """Of projections, by the names of DecoderLayer's fields."""
    tensors: dict[str, Tensor]
    """By the names of DecoderLayer's fields, with ".bias" for projections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a stored tensor."""

    name: str
    rows: range
    columns: range | None = None
    """None is all; only of matrices."""


_ROW_PARALLEL = {"attention_output": "self_attn.o_proj", "down": "mlp.down_proj"}
"""Split by columns: every rank makes a summand of all rows."""
_NORMS = {
    "input_norm": "input_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
}


def read_pieces(source: WeightSource, pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor:
    """Pieces stacked by rows, read straight into one CPU tensor of a dtype."""
    shape = source.tensors[pieces[0].name].shape[1:]
    if pieces[0].columns is not None:
        shape = (len(pieces[0].columns),)
    stacked = torch.empty((sum(len(piece.rows) for piece in pieces), *shape), dtype=dtype)
    row = 0
    for piece in pieces:
        target = stacked[row : row + len(piece.rows)]
        first_column = 0 if piece.columns is None else piece.columns.start
        source.load_into(piece.name, target, piece.rows.start, first_column)
        row += len(piece.rows)
    return stacked


def read_weight(source: WeightSource, pieces: Sequence[Piece], dtype: torch.dtype) -> Weight:
    """Pieces of matrices stacked by rows, in integers where the source has them."""
    parts: list[Tensor | GroupQuantized] = []
    for has_groups, alike in itertools.groupby(
        pieces, key=lambda piece: source.tensors[piece.name].groups is not None
    ):
        if not has_groups:
            parts.append(read_pieces(source, list(alike), dtype))
            continue
        groups = [source.load_groups(piece.name, piece.rows, piece.columns) for piece in alike]
        together = stacked(groups)
        parts.extend(groups if together is None else [together])
    return tuple(parts)


def pack_weight(
    weight: Weight, kernels: Kernels, device: torch.device, sum_unit: int | None = None
) -> PackedWeight:
    """Bring a weight to the device in the layout its kernels multiply fastest."""
    parts = tuple(part.to(device) for part in weight)
    return kernels.pack_weight(parts[0] if len(parts) == 1 else parts, sum_unit)


def read_tensor(source: WeightSource, name: str, dtype: torch.dtype) -> Tensor:
    """A whole tensor."""
    return read_pieces(source, [Piece(name=name, rows=range(source.tensors[name].shape[0]))], dtype)


def read_layer(
    source: WeightSource, index: int, dtype: torch.dtype, shard: ModelShard, head_dim: int
) -> HostLayer:
    """Read a rank's part of one layer; safe to call in several threads at once."""
    prefix = f"model.layers.{index}."
    query, key = (
        range(heads.start * head_dim, heads.stop * head_dim)
        for heads in (shard.query_heads, shard.kv_heads)
    )
    inner = shard.intermediate
    rows = {
        "qkv": {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key},
        "gate_up": {"mlp.gate_proj": inner, "mlp.up_proj": inner},
    }
    columns = {"attention_output": query, "down": inner}
    weights: dict[str, Weight] = {}
    tensors: dict[str, Tensor] = {}
    for field, name in _NORMS.items():
        if prefix + name + ".weight" in source.tensors:
            tensors[field] = read_tensor(source, prefix + name + ".weight", dtype)
    for field, modules in rows.items():
        pieces = [Piece(name=f"{prefix}{name}.weight", rows=part) for name, part in modules.items()]
        weights[field] = read_weight(source, pieces, dtype)
        biases = [Piece(name=f"{prefix}{name}.bias", rows=part) for name, part in modules.items()]
        if biases[0].name in source.tensors:
            tensors[field + ".bias"] = read_pieces(source, biases, dtype)
    for field, module in _ROW_PARALLEL.items():
        name = prefix + module + ".weight"
        piece = Piece(name=name, rows=range(source.tensors[name].shape[0]), columns=columns[field])
        weights[field] = read_weight(source, [piece], dtype)
        bias = prefix + module + ".bias"
        if bias in source.tensors and shard.rank == 0:  # else the sum would hold it many times
            tensors[field + ".bias"] = read_tensor(source, bias, dtype)
    return HostLayer(weights=weights, tensors=tensors)


def pack_layer(
    host: HostLayer,
    config: ModelConfig,
    index: int,
    kernels: Kernels,
    device: torch.device,
    shard: ModelShard,
) -> DecoderLayer:
    """Bring a layer to the device in the layout its kernels multiply fastest."""
    sum_units = {"attention_output": shard.attention_sum_unit, "down": shard.mlp_sum_unit}

    def tensor(field: str) -> Tensor | None:
        found = host.tensors.get(field)
        return None if found is None else found.to(device)

    def norm(field: str) -> Tensor:
        return host.tensors[field].to(device)

    def projection(field: str) -> Projection:
        weight = pack_weight(host.weights[field], kernels, device, sum_units.get(field))
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
