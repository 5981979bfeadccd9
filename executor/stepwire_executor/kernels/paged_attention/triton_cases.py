"""What is compiled ahead of time: heads as of Llama-3.1-8B and Qwen2.5-7B, also of other sizes."""

from __future__ import annotations

import itertools

import torch
import triton.language as tl

from stepwire_executor.kernels.compile_case import CompileCase
from stepwire_executor.kernels.launch import TRITON_TYPES
from stepwire_executor.kernels.paged_attention.triton_combine import combine_splits_kernel
from stepwire_executor.kernels.paged_attention.triton_config import (
    COMBINE_STAGES,
    MAX_DECODE_QUERY,
    choose_config,
    choose_dot_dtype,
    choose_split_tokens,
)
from stepwire_executor.kernels.paged_attention.triton_decode import decode_attention_kernel
from stepwire_executor.kernels.paged_attention.triton_prefill import prefill_attention_kernel
from stepwire_executor.kv_cache import FP8_DTYPE

_LENGTHS = {
    "cu_seqlens_q_ptr": "*i32",
    "seq_lens_ptr": "*i32",
    "block_table_ptr": "*i32",
    "table_stride": "i32",
    "num_seqs": "i32",
}
_SCALARS = {
    "query_token_stride": "i32",
    "query_head_stride": "i32",
    "score_scale": "fp32",
    "softcap": "fp32",
    "window": "i32",
    "value_factor": "fp32",
}
_SPLITS = {"split_weighted_ptr": "*fp32", "split_state_ptr": "*fp32", "max_splits": "i32"}
_SPLIT_TOKENS = choose_split_tokens(131_072)


def _attention_cases(
    capability: int,
    head_dim: int,
    page: str,
    block_size: int,
    has_window: bool,
    *,
    is_static: bool = False,
    heads: tuple[int, int] = (32, 8),
) -> list[CompileCase]:
    """Both kernels, for bfloat16 queries; heads: of queries, and of keys and values."""
    is_fp8 = page == "fp8e4nv"
    has_scales = is_fp8 and not is_static
    page_dtype = FP8_DTYPE if is_fp8 else torch.bfloat16
    dot_dtype = choose_dot_dtype(torch.bfloat16, page_dtype, head_dim=head_dim)
    config = choose_config(
        capability, head_dim=head_dim, dot_dtype=dot_dtype, page_dtype=page_dtype
    )
    signature = {
        "query_ptr": "*bf16",
        "out_ptr": "*bf16",
        "key_ptr": f"*{page}",
        "value_ptr": f"*{page}",
        **({"key_scale_ptr": "*i16", "value_scale_ptr": "*i16"} if has_scales else {}),
        **_LENGTHS,
        **_SCALARS,
    }
    constexprs = {
        "NUM_KV_HEADS": heads[1],
        "GROUP": heads[0] // heads[1],
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim,
        "BLOCK_D": head_dim,
        "BLOCK_SEQS": 64,
        "SPLIT_TOKENS": _SPLIT_TOKENS,
        "DOT_DTYPE": tl.dtype(TRITON_TYPES[dot_dtype]),
        "IS_SCALED": has_scales,
        "RESCALES_QUERY": dot_dtype == torch.float16,
        "HAS_SOFTCAP": has_window,
        "HAS_WINDOW": has_window,
        **({} if has_scales else {"key_scale_ptr": None, "value_scale_ptr": None}),
    }
    suffix = f"{page}_d{head_dim}_page{block_size}{'_window' if has_window else ''}"
    suffix += "_static" if is_static else ""
    suffix += f"_group{heads[0] // heads[1]}" if heads != (32, 8) else ""
    return [
        CompileCase(
            name=f"{name}_{suffix}",
            kernel=kernel,
            signature=signature | extra_signature,
            constexprs=constexprs | extra | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            min_capability=capability,
            max_capability=capability,
            divisible_by_16=frozenset({"query_token_stride", "query_head_stride"}),
            expect=frozenset({"wgmma", "async_copies"} if capability == 90 else {"async_copies"}),
        )
        for name, kernel, tile, extra, extra_signature in (
            (
                "decode_attention",
                decode_attention_kernel,
                config.decode,
                {"MAX_QUERY": MAX_DECODE_QUERY},
                {**_SPLITS, "num_tokens": "i32"},
            ),
            (
                "prefill_attention",
                prefill_attention_kernel,
                config.prefill,
                {"MAX_DECODE_QUERY": MAX_DECODE_QUERY},
                {},
            ),
        )
    ]


def _combine_case(head_dim: int) -> CompileCase:
    return CompileCase(
        name=f"combine_splits_d{head_dim}",
        kernel=combine_splits_kernel,
        signature={
            "out_ptr": "*bf16",
            "cu_seqlens_q_ptr": "*i32",
            "seq_lens_ptr": "*i32",
            "num_seqs": "i32",
            "window": "i32",
            "value_factor": "fp32",
            **_SPLITS,
        },
        constexprs={
            "NUM_HEADS": 32,
            "HEAD_DIM": head_dim,
            "BLOCK_D": head_dim,
            "BLOCK_SEQS": 64,
            "SPLIT_TOKENS": _SPLIT_TOKENS,
            "MAX_QUERY": MAX_DECODE_QUERY,
            "STAGES": COMBINE_STAGES,
            "HAS_WINDOW": False,
        },
        num_warps=1,
        num_stages=2,
        expect=frozenset({"async_copies"} if head_dim == 128 else ()),
    )


_PAGES = ((16, False), (64, False), (64, True))
"""Tokens a page, the fewest and the default of a GPU, and whether with a window and a softcap."""

COMPILE_CASES: tuple[CompileCase, ...] = (
    *itertools.chain.from_iterable(
        _attention_cases(90, head_dim, page, block_size, has_window)
        for head_dim in (64, 128, 256)
        for page in ("bf16", "fp8e4nv")
        for block_size, has_window in _PAGES
    ),
    *itertools.chain.from_iterable(
        _attention_cases(capability, head_dim, page, block_size, has_window)
        # sm_80 has no e4m3.
        for capability, page in ((80, "bf16"), (100, "bf16"), (100, "fp8e4nv"))
        for head_dim in (64, 128)
        for block_size, has_window in (_PAGES[0], _PAGES[2])
    ),
    *itertools.chain.from_iterable(
        _attention_cases(capability, 128, "fp8e4nv", 64, has_window=False, is_static=True)
        for capability in (90, 100)
    ),
    *itertools.chain.from_iterable(
        _attention_cases(90, 128, page, 64, has_window=False, heads=(28, 4))
        for page in ("bf16", "fp8e4nv")
    ),
    _combine_case(64),
    _combine_case(128),
)
