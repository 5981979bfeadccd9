"""Rotary position embedding and the write into KV pages by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.interface import RopeAndWriteKV
from stepwire_executor.kernels.native.library import COMPUTE_DTYPES, DTYPE_CODES, NativeLibrary
from stepwire_executor.kernels.native.pages import check_pages
from stepwire_executor.kernels.rope_and_write_kv.reference import MIN_AMAX, mixing_size
from stepwire_executor.kv_cache import KVPages

_PROBLEMS = {
    1: "a token's position lies outside cos_sin: the model's length limit was not enforced",
    2: "slot_mapping names a slot outside the pages",
}


def make_rope_and_write_kv(library: NativeLibrary) -> RopeAndWriteKV:
    """Return the operation; see `interface.RopeAndWriteKV`."""
    run = library.rope_and_write_kv

    def rope_and_write_kv(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos_sin: Tensor,
        pages: KVPages,
        batch: StepBatch,
    ) -> None:
        num_tokens, num_heads, head_dim = query.shape
        num_blocks, num_kv_heads, block_size, _ = pages.key.shape
        check_pages(pages, head_dim)
        dtype = query.dtype
        if dtype not in COMPUTE_DTYPES or key.dtype != dtype or value.dtype != dtype:
            raise ValueError(
                f"query, key and value are {dtype}, {key.dtype} and {value.dtype}; they must "
                "share float32, bfloat16 or float16"
            )
        if key.shape != (num_tokens, num_kv_heads, head_dim) or value.shape != key.shape:
            raise ValueError(
                f"key and value have shapes {tuple(key.shape)} and {tuple(value.shape)}, "
                f"expected {(num_tokens, num_kv_heads, head_dim)}"
            )
        if query.stride(2) != 1 or key.stride(2) != 1 or value.stride(2) != 1:
            raise ValueError("query, key and value must have unit stride in head_dim")
        rotary_dim = cos_sin.shape[1]
        if (
            cos_sin.dtype != torch.float32
            or not cos_sin.is_contiguous()
            or rotary_dim % 2
            or rotary_dim > head_dim
        ):
            raise ValueError(
                "cos_sin must be contiguous float32 [max_positions, rotary_dim] with an even "
                f"rotary_dim of at most {head_dim}, not {cos_sin.dtype} {tuple(cos_sin.shape)}"
            )
        positions, slots = batch.positions, batch.slot_mapping
        for index in (positions, slots):
            if (
                index.dtype != torch.int64
                or index.shape != (num_tokens,)
                or not index.is_contiguous()
            ):
                raise ValueError("positions and slot_mapping must be contiguous int64, one a token")
        problem = run(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
            DTYPE_CODES[dtype],
            cos_sin.data_ptr(),
            cos_sin.shape[0],
            rotary_dim,
            positions.data_ptr(),
            slots.data_ptr(),
            pages.key.data_ptr(),
            pages.value.data_ptr(),
            0 if pages.key_scale is None else pages.key_scale.data_ptr(),
            0 if pages.value_scale is None else pages.value_scale.data_ptr(),
            0 if pages.key_offset is None else pages.key_offset.data_ptr(),
            DTYPE_CODES[pages.key.dtype],
            num_blocks * block_size,
            block_size,
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            1 if pages.key_scale is None else mixing_size(head_dim, rotary_dim),
            MIN_AMAX,
            pages.static_key_scale or 0.0,
            pages.static_value_scale or 0.0,
            torch.get_num_threads(),
        )
        if problem:
            raise ValueError(_PROBLEMS[problem])

    return rope_and_write_kv
