"""All layers of a decoder in one call of the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.interface import (
    DecoderStack,
    LayerOperands,
    LayerProgram,
    LinearOperands,
    MakeLayerProgram,
    PackedWeight,
)
from stepwire_executor.kernels.layer_program import structures
from stepwire_executor.kernels.linear.cpu import PanelWeight
from stepwire_executor.kernels.linear.quantized_cpu import QuantizedPanelWeight
from stepwire_executor.kernels.linear.stacked import StackedWeight
from stepwire_executor.kernels.native.library import COMPUTE_DTYPES, DTYPE_CODES, NativeLibrary
from stepwire_executor.kernels.native.pages import check_pages
from stepwire_executor.kernels.rope_and_write_kv.reference import MIN_AMAX, mixing_size
from stepwire_executor.kv_cache import KVCache, KVPages

_PROBLEMS = {
    1: "a token's position lies outside cos_sin: the model's length limit was not enforced",
    2: "slot_mapping names a slot outside the pages",
    3: "block_table lacks a block that a sequence's length needs",
    4: "logit_rows names a row that is none of the step's tokens",
    5: "cu_seqlens_q names query rows that are none of the step's tokens",
}


def make_layer_programs(library: NativeLibrary) -> MakeLayerProgram:
    """Return the factory; see `interface.MakeLayerProgram`."""
    for index, structure in enumerate(structures.STRUCTURES):
        assert ctypes.sizeof(structure) == library.layer_struct_bytes(index), structure

    def make_layer_program(stack: DecoderStack) -> LayerProgram | None:
        _check_stack(stack)
        norms = [norm for layer in stack.layers for norm in _norms(layer)] + [stack.final_norm]
        linears = [linear for layer in stack.layers for linear in _linears(layer)]
        if (
            stack.final_norm.dtype not in COMPUTE_DTYPES
            or any(norm.dtype != stack.final_norm.dtype for norm in norms)
            or any(not _is_native(part) for linear in linears for part in _parts(linear.weight))
        ):
            return None
        return _NativeProgram(library, stack)

    return make_layer_program


class _NativeProgram:
    """A stack's layers as native code wants them, and those of the caches it has met."""

    def __init__(self, library: NativeLibrary, stack: DecoderStack) -> None:
        self._run = library.run_layers
        self._stack = stack
        self._owned: list[Any] = []  # what the structures point to
        self._caches: WeakKeyDictionary[KVCache, _CacheEntry] = WeakKeyDictionary()
        self._hidden_size = stack.final_norm.shape[0]
        self._dtype = stack.dtype
        layers = (structures.LayerWeights * len(stack.layers))(
            *(self._layer(layer) for layer in stack.layers)
        )
        self._owned.append(layers)
        rotary_dim = stack.cos_sin.shape[1]
        self._program = structures.LayerProgram(
            layers=layers,
            final_norm=self._address(stack.final_norm),
            cos_sin=self._address(stack.cos_sin),
            num_layers=len(stack.layers),
            dtype=DTYPE_CODES[stack.dtype],
            norm_dtype=DTYPE_CODES[stack.final_norm.dtype],
            hidden_size=self._hidden_size,
            intermediate_size=stack.layers[0].down.weight.in_features,
            num_heads=stack.num_heads,
            num_kv_heads=stack.num_kv_heads,
            head_dim=stack.head_dim,
            max_positions=stack.cos_sin.shape[0],
            rotary_dim=rotary_dim,
            mixing_size=mixing_size(stack.head_dim, rotary_dim),
            attention_scale=stack.attention_scale,
            eps=stack.rms_norm_eps,
            min_amax=MIN_AMAX,
        )
        self._program_address = ctypes.addressof(self._program)

    def __call__(self, residual: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        """See `interface.LayerProgram`."""
        num_tokens = residual.shape[0]
        if (
            residual.dtype != self._dtype
            or residual.shape != (num_tokens, self._hidden_size)
            or not residual.is_contiguous()
        ):
            raise ValueError(
                f"residual is {residual.dtype} {tuple(residual.shape)}, expected contiguous "
                f"{self._dtype} [*, {self._hidden_size}]"
            )
        entry = self._caches.get(cache)
        if entry is None or entry.layers is not cache.layers:
            entry = self._caches[cache] = _CacheEntry(cache.layers, self._stack)
        logit_rows, num_seqs = batch.logit_rows, batch.seq_lens.shape[0]
        for name, index, dtype, shape in (
            ("positions", batch.positions, torch.int64, (num_tokens,)),
            ("slot_mapping", batch.slot_mapping, torch.int64, (num_tokens,)),
            ("cu_seqlens_q", batch.cu_seqlens_q, torch.int32, (num_seqs + 1,)),
            ("seq_lens", batch.seq_lens, torch.int32, (num_seqs,)),
            ("logit_rows", logit_rows, torch.int64, (logit_rows.numel(),)),
            ("block_table", batch.block_table, torch.int32, (num_seqs, -1)),
        ):
            is_shaped = index.shape == shape or (shape[-1] == -1 and index.shape[:-1] == shape[:-1])
            if index.dtype != dtype or not is_shaped or not index.is_contiguous():
                raise ValueError(
                    f"{name} is {index.dtype} {tuple(index.shape)}, expected contiguous {dtype} "
                    f"{shape}"
                )
        out = torch.empty((logit_rows.shape[0], self._hidden_size), dtype=self._dtype)
        arguments = structures.StepArguments(
            residual.data_ptr(),
            out.data_ptr(),
            batch.positions.data_ptr(),
            batch.slot_mapping.data_ptr(),
            batch.cu_seqlens_q.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.block_table.data_ptr(),
            logit_rows.data_ptr(),
            num_tokens,
            num_seqs,
            logit_rows.shape[0],
            batch.block_table.shape[1],
            torch.get_num_threads(),
        )
        problem = self._run(self._program_address, entry.address, ctypes.addressof(arguments))
        if problem:
            raise ValueError(_PROBLEMS[problem])
        return out

    def _address(self, tensor: Tensor | None) -> int | None:
        """Address of a tensor that lives as long as this; None stays None."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._owned.append(tensor)
        return tensor.data_ptr()

    def _layer(self, layer: LayerOperands) -> structures.LayerWeights:
        return structures.LayerWeights(
            input_norm=self._address(layer.input_norm),
            query_norm=self._address(layer.query_norm),
            key_norm=self._address(layer.key_norm),
            mlp_norm=self._address(layer.mlp_norm),
            qkv=self._projection(layer.qkv),
            attention_output=self._projection(layer.attention_output),
            gate_up=self._projection(layer.gate_up),
            down=self._projection(layer.down),
            window=layer.sliding_window or 0,
        )

    def _projection(self, linear: LinearOperands) -> structures.Projection:
        weights = _parts(linear.weight)
        parts = (structures.ProjectionPart * len(weights))(*map(self._part, weights))
        self._owned.append(parts)
        return structures.Projection(
            parts=parts,
            num_parts=len(parts),
            bias=self._address(linear.bias),
            bias_dtype=0 if linear.bias is None else DTYPE_CODES[linear.bias.dtype],
            in_features=linear.weight.in_features,
            out_features=linear.weight.out_features,
        )

    def _part(self, weight: PackedWeight) -> structures.ProjectionPart:
        self._owned.append(weight)
        if isinstance(weight, QuantizedPanelWeight):
            return structures.ProjectionPart(quantized=ctypes.pointer(weight.fields))
        assert isinstance(weight, PanelWeight), weight
        steps, depth = weight.values.shape[1], weight.values.shape[3]
        dense = structures.DenseWeight(
            values=self._address(weight.values),
            dtype=DTYPE_CODES[weight.values.dtype],
            num_steps=steps,
            out_features=weight.out_features,
            chain_steps=weight.chain_length // depth,
        )
        return structures.ProjectionPart(dense=ctypes.pointer(dense))


class _CacheEntry:
    """A cache's pages as native code wants them."""

    def __init__(self, layers: Sequence[KVPages], stack: DecoderStack) -> None:
        self.layers = layers
        first = layers[0].key
        expected = (first.shape[0], stack.num_kv_heads, first.shape[2], stack.head_dim)
        if len(layers) != len(stack.layers):
            raise ValueError(f"the cache has {len(layers)} layers, the model {len(stack.layers)}")
        for pages in layers:
            check_pages(pages, stack.head_dim)
            if pages.key.shape != expected or pages.key.dtype != first.dtype:
                raise ValueError(
                    f"pages are {pages.key.dtype} {tuple(pages.key.shape)}, expected "
                    f"{first.dtype} {expected}"
                )
        self._layers = (structures.LayerPages * len(layers))(*map(_layer_pages, layers))
        self._pages = structures.CachePages(
            layers=self._layers,
            dtype=DTYPE_CODES[first.dtype],
            num_blocks=first.shape[0],
            block_size=first.shape[2],
        )
        self.address = ctypes.addressof(self._pages)


def _layer_pages(pages: KVPages) -> structures.LayerPages:
    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return structures.LayerPages(
        key=address(pages.key),
        value=address(pages.value),
        key_scales=address(pages.key_scale),
        value_scales=address(pages.value_scale),
        key_offset=address(pages.key_offset),
        static_key_scale=pages.static_key_scale or 0.0,
        static_value_scale=pages.static_value_scale or 0.0,
    )


def _parts(weight: PackedWeight) -> tuple[PackedWeight, ...]:
    return weight.parts if isinstance(weight, StackedWeight) else (weight,)


def _is_native(weight: PackedWeight) -> bool:
    return isinstance(weight, PanelWeight | QuantizedPanelWeight)


def _norms(layer: LayerOperands) -> list[Tensor]:
    norms = (layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
    return [norm for norm in norms if norm is not None]


def _linears(layer: LayerOperands) -> tuple[LinearOperands, ...]:
    return layer.qkv, layer.attention_output, layer.gate_up, layer.down


def _check_stack(stack: DecoderStack) -> None:
    """Raise ValueError unless the operands fit together."""
    hidden_size = stack.final_norm.shape[0]
    heads_size = stack.num_heads * stack.head_dim
    if not stack.layers or stack.num_heads % stack.num_kv_heads:
        raise ValueError(
            f"{len(stack.layers)} layers of {stack.num_heads} query heads over "
            f"{stack.num_kv_heads} KV heads make no decoder"
        )
    inner = stack.layers[0].down.weight.in_features
    shapes = (
        (heads_size + 2 * stack.num_kv_heads * stack.head_dim, hidden_size),
        (hidden_size, heads_size),
        (2 * inner, hidden_size),
        (hidden_size, inner),
    )
    rotary_dim = stack.cos_sin.shape[1]
    if stack.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"activations must be float32, bfloat16 or float16, not {stack.dtype}")
    if stack.cos_sin.dtype != torch.float32 or rotary_dim % 2 or rotary_dim > stack.head_dim:
        raise ValueError(
            "cos_sin must be float32 [max_positions, rotary_dim] with an even rotary_dim of at "
            f"most {stack.head_dim}, not {stack.cos_sin.dtype} {tuple(stack.cos_sin.shape)}"
        )
    for index, layer in enumerate(stack.layers):
        for linear, shape in zip(_linears(layer), shapes, strict=True):
            found = (linear.weight.out_features, linear.weight.in_features)
            if found != shape:
                raise ValueError(f"layer {index} has a weight of {found}, expected {shape}")
            for part in _parts(linear.weight):
                if isinstance(part, PanelWeight) and part.values.dtype != stack.dtype:
                    raise ValueError(
                        f"layer {index} has a weight of {part.values.dtype}, activations are "
                        f"{stack.dtype}"
                    )
            bias = linear.bias
            if bias is not None and (bias.shape != shape[:1] or bias.dtype not in COMPUTE_DTYPES):
                raise ValueError(
                    f"layer {index} has a bias of {bias.dtype} {tuple(bias.shape)}, expected "
                    f"{shape[:1]}"
                )
        heads = (layer.query_norm, layer.key_norm)
        if (heads[0] is None) != (heads[1] is None):
            raise ValueError(f"layer {index} must have norms of queries and of keys, or neither")
        for norm in _norms(layer):
            is_of_heads = any(norm is head for head in heads)
            if norm.shape != (stack.head_dim if is_of_heads else hidden_size,):
                raise ValueError(f"layer {index} has a norm of {tuple(norm.shape)}")
        if layer.sliding_window is not None and layer.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, not {layer.sliding_window}")
