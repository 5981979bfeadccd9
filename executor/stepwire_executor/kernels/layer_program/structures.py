"""What native code gets of a decoder, a cache and a step: src/layer_program.h, field by field."""

from __future__ import annotations

import ctypes

from stepwire_executor.kernels.linear.quantized_cpu import QuantizedWeightFields

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64
_Float = ctypes.c_float
_Double = ctypes.c_double


class DenseWeight(ctypes.Structure):
    """As in src/linear.h."""

    _fields_ = (
        ("values", _Pointer),
        ("dtype", _Int),
        ("num_steps", _Int),
        ("out_features", _Int),
        ("chain_steps", _Int),
    )


class ProjectionPart(ctypes.Structure):
    """A weight of either kind; the other is null."""

    _fields_ = (
        ("dense", ctypes.POINTER(DenseWeight)),
        ("quantized", ctypes.POINTER(QuantizedWeightFields)),
    )


class Projection(ctypes.Structure):
    """Weights that share their input and write side by side."""

    _fields_ = (
        ("parts", ctypes.POINTER(ProjectionPart)),
        ("num_parts", _Int),
        ("bias", _Pointer),
        ("bias_dtype", _Int),
        ("in_features", _Int),
        ("out_features", _Int),
    )


class LayerWeights(ctypes.Structure):
    """One layer."""

    _fields_ = (
        ("input_norm", _Pointer),
        ("query_norm", _Pointer),
        ("key_norm", _Pointer),
        ("mlp_norm", _Pointer),
        ("qkv", Projection),
        ("attention_output", Projection),
        ("gate_up", Projection),
        ("down", Projection),
        ("window", _Int),
    )


class LayerProgram(ctypes.Structure):
    """What is the same for every step."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerWeights)),
        ("final_norm", _Pointer),
        ("cos_sin", _Pointer),
        ("num_layers", _Int),
        ("dtype", _Int),
        ("norm_dtype", _Int),
        ("hidden_size", _Int),
        ("intermediate_size", _Int),
        ("num_heads", _Int),
        ("num_kv_heads", _Int),
        ("head_dim", _Int),
        ("max_positions", _Int),
        ("rotary_dim", _Int),
        ("mixing_size", _Int),
        ("attention_scale", _Double),
        ("eps", _Float),
        ("min_amax", _Float),
    )


class LayerPages(ctypes.Structure):
    """One layer's pages."""

    _fields_ = (
        ("key", _Pointer),
        ("value", _Pointer),
        ("key_scales", _Pointer),
        ("value_scales", _Pointer),
        ("key_offset", _Pointer),
        ("static_key_scale", _Double),
        ("static_value_scale", _Double),
    )


class CachePages(ctypes.Structure):
    """What is the same for every step of a cache."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerPages)),
        ("dtype", _Int),
        ("num_blocks", _Int),
        ("block_size", _Int),
    )


class StepArguments(ctypes.Structure):
    """One step."""

    _fields_ = (
        ("residual", _Pointer),
        ("out", _Pointer),
        ("positions", _Pointer),
        ("slots", _Pointer),
        ("cu_seqlens_q", _Pointer),
        ("seq_lens", _Pointer),
        ("block_table", _Pointer),
        ("logit_rows", _Pointer),
        ("num_tokens", _Int),
        ("num_seqs", _Int),
        ("num_logit_rows", _Int),
        ("block_table_stride", _Int),
        ("num_threads", _Int),
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    DenseWeight,
    ProjectionPart,
    Projection,
    LayerWeights,
    LayerProgram,
    LayerPages,
    CachePages,
    StepArguments,
)
"""In the order of stepwire_layer_struct_bytes."""
