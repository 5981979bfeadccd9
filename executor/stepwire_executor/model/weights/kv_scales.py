"""Scales of an fp8 KV cache that a checkpoint was calibrated with."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kv_cache import StaticScales
from stepwire_executor.model.weights.source import TensorInfo, WeightSource

_KEY_NAMES = ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale")
"""Under `self_attn.`, the first that is there counts. In turn: compressed-tensors and AutoFP8, a
checkpoint saved by vLLM, ModelOpt, Quark, and AutoFP8 when keys and values shared a scale."""
_VALUE_NAMES = ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale")
_FIX = "serve with --kv-cache-dtype auto, or get the model again from its source"


def kv_scale_names(num_layers: int) -> frozenset[str]:
    """Every name that a scale of some layer may have."""
    return frozenset(
        _prefix(layer) + name
        for layer in range(num_layers)
        for name in (*_KEY_NAMES, *_VALUE_NAMES)
    )


def find_static_scales(
    tensors: Mapping[str, TensorInfo], num_layers: int
) -> list[tuple[str, str]] | None:
    """Names of the key's and the value's scale of each layer; None where there are none.

    Raises ModelLoadError where some layers have scales and others lack them, or where one is not
    a single number.
    """
    if not kv_scale_names(num_layers) & tensors.keys():
        return None
    return [
        (_find(tensors, layer, _KEY_NAMES), _find(tensors, layer, _VALUE_NAMES))
        for layer in range(num_layers)
    ]


def read_static_scales(source: WeightSource, num_layers: int) -> tuple[StaticScales, ...] | None:
    """The scales of each layer; None where the checkpoint has none.

    An element of the cache stands for its e4m3 value times the scale. Raises ModelLoadError for
    scales that cannot be meant so.
    """
    names = find_static_scales(source.tensors, num_layers)
    if names is None:
        return None
    return tuple(
        StaticScales(key=_read(source, key), value=_read(source, value)) for key, value in names
    )


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def _find(tensors: Mapping[str, TensorInfo], layer: int, names: tuple[str, ...]) -> str:
    found = next((name for name in names if _prefix(layer) + name in tensors), None)
    if found is None:
        raise ModelLoadError(
            f"the checkpoint has scales of an fp8 KV cache, but lacks tensor "
            f"{_prefix(layer) + names[0]!r}; {_FIX}"
        )
    name = _prefix(layer) + found
    shape = tensors[name].shape
    if math.prod(shape) != 1:
        raise ModelLoadError(
            f"tensor {name!r} has shape {list(shape)}, but a KV cache's scale is one number a "
            f"layer; {_FIX}"
        )
    return name


def _read(source: WeightSource, name: str) -> float:
    stored = torch.empty(source.tensors[name].shape, dtype=torch.float32)
    source.load_into(name, stored)
    scale = stored.item()
    if not 0 < scale < math.inf:
        raise ModelLoadError(
            f"tensor {name!r} is {scale:g}, but a KV cache's scale is positive and finite; {_FIX}"
        )
    return scale
