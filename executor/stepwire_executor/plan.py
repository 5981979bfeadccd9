"""Prints what a model will take, from its headers: `python -m stepwire_executor.plan`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stepwire_executor.config import ExecutorConfig, resolve_capacity
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kv_cache import FP8_DTYPE
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.loader import (
    SUPPORTED_DTYPES,
    open_checkpoint,
    resolve_dtype,
    resolve_max_model_len,
)
from stepwire_executor.model.memory import MemoryPlan, estimate_memory
from stepwire_executor.model.weights.expected import (
    check_tensors,
    expected_tensors,
    input_groups,
)
from stepwire_executor.model.weights.kv_scales import find_static_scales
from stepwire_executor.model.weights.quantization import (
    DEFAULT_GROUP_SIZE,
    GroupSize,
    Quantization,
    choose_weights,
    describe_quantization,
    draft_quantization,
)
from stepwire_executor.model.weights.source import GroupFormat
from stepwire_executor.parallel.sharding import InputGroups, has_own_head, make_shard
from stepwire_executor.speculation.loading import check_draft_model, draft_model_name

_SUMMED = ("weight_bytes", "activation_bytes", "kv_bytes_per_block", "kv_bytes_per_token")
"""Fields of MemoryPlan that all ranks' devices need together."""
QUANTIZED_BITS = frozenset({4, 8})
"""Of the kernels that `--kernels auto` takes, where they can be built."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; 1 and one line on stderr where there is no such model."""
    options = _parser().parse_args(arguments)
    try:
        plan = plan_model(
            options.model,
            dtype=options.dtype,
            kv_cache_dtype=options.kv_cache_dtype,
            block_size=options.block_size,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
            load_format=options.load_format,
            quantization=options.quantization,
            quantization_group_size=options.quantization_group_size,
            tensor_parallel_size=options.tensor_parallel_size,
            gpu_memory_bytes=options.gpu_memory_bytes,
            gpu_memory_utilization=options.gpu_memory_utilization,
            speculative_model=options.speculative_model,
        )
    except ModelLoadError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.json:
        sys.stdout.write(json.dumps(plan) + "\n")
    else:
        ranks = plan.pop("ranks")
        width = max(map(len, plan))
        sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in plan.items())
        if len(ranks) > 1:
            for rank in ranks:
                parts = ", ".join(f"{name} {value}" for name, value in rank.items())
                sys.stdout.write(parts + "\n")
    return 0


def plan_model(
    path: Path,
    *,
    dtype: str,
    kv_cache_dtype: str,
    block_size: int | None,
    max_num_batched_tokens: int,
    max_num_seqs: int | None,
    max_model_len: int | None,
    load_format: str,
    quantization: Quantization = "auto",
    quantization_group_size: GroupSize = DEFAULT_GROUP_SIZE,
    tensor_parallel_size: int = 1,
    gpu_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    speculative_model: Path | None = None,
) -> dict[str, Any]:
    """The model's memory plan and the facts it rests on, ready for JSON.

    Bytes are those of all ranks together, and of each under "ranks". gpu_memory_bytes: of every
    rank's GPU, whose KV pool is added; None plans for a CPU. speculative_model: the draft model,
    which every rank holds whole; it is part of all bytes.
    Reads headers only. Raises ModelLoadError for what load_model would refuse.
    """
    is_gpu = gpu_memory_bytes is not None
    settings = ExecutorConfig(
        model=str(path),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        load_format="dummy" if load_format == "dummy" else "auto",
        quantization=quantization,
        quantization_group_size=quantization_group_size,
        speculative_model=None if speculative_model is None else str(speculative_model),
    )
    capacity = resolve_capacity(settings, is_gpu=is_gpu)
    read = _read(settings, path, dtype, kv_cache_dtype)
    config = read.config
    context = resolve_max_model_len(max_model_len, config)
    check_draft_model(settings)

    def estimates(read: _Headers, context: int, num_ranks: int) -> list[MemoryPlan]:
        # Which parts ranks hold depends on whether the head is a tensor of its own.
        device = torch.device("cuda" if is_gpu else "cpu")
        own_head = has_own_head(read.config, device)
        return [
            estimate_memory(
                read.config,
                make_shard(
                    read.config,
                    rank,
                    num_ranks,
                    has_own_head=own_head,
                    input_groups=read.input_groups,
                ),
                dtype=read.dtype,
                kv_cache_dtype=read.kv_dtype,
                block_size=capacity.block_size,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=capacity.max_num_seqs,
                max_model_len=context,
                is_gpu=is_gpu,
                has_static_kv_scales=read.has_static_kv_scales,
                groups=read.groups,
            )
            for rank in range(num_ranks)
        ]

    plans = estimates(read, context, tensor_parallel_size)
    draft: dict[str, Any] = {}
    if speculative_model is not None:
        draft_read = _read(settings, speculative_model, dtype, kv_cache_dtype, is_draft=True)
        draft_context = min(context, draft_read.config.max_position_embeddings)
        (draft_plan,) = estimates(draft_read, draft_context, 1)
        rotary_bytes = draft_context * draft_read.config.rope.rotary_dim * 4
        plans = [_with_draft(plan, draft_plan, rotary_bytes) for plan in plans]
        draft = {
            "draft_model": draft_model_name(settings),
            "draft_weight_bytes": draft_plan.weight_bytes * tensor_parallel_size,
            "draft_kv_bytes_per_block": draft_plan.kv_bytes_per_block * tensor_parallel_size,
        }
    pool: dict[str, Any] = {}
    if gpu_memory_bytes is not None:
        num_blocks = min(
            _num_blocks(plan, int(gpu_memory_bytes * gpu_memory_utilization)) for plan in plans
        )
        pool = {
            "gpu_memory_bytes": gpu_memory_bytes,
            "gpu_memory_utilization": gpu_memory_utilization,
            "num_kv_blocks": num_blocks,
            "kv_cache_bytes": num_blocks * sum(plan.kv_bytes_per_block for plan in plans),
            "kv_cache_tokens": num_blocks * capacity.block_size,
        }
    return {
        "architecture": config.architecture,
        "dtype": str(read.dtype).removeprefix("torch."),
        "quantization": read.quantization,
        "kv_cache_dtype": str(read.kv_dtype).removeprefix("torch."),
        "num_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_model_len": context,
        "num_parameters": sum(map(math.prod, expected_tensors(config).values())),
        **{name: sum(getattr(plan, name) for plan in plans) for name in _SUMMED},
        "block_size": capacity.block_size,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": capacity.max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
        **pool,
        **draft,
        "ranks": [
            {"rank": rank, **{name: getattr(plan, name) for name in ("norm_bytes", *_SUMMED)}}
            for rank, plan in enumerate(plans)
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Headers:
    """What the headers of a checkpoint say, and flags choose."""

    config: ModelConfig
    dtype: torch.dtype
    """Of weights and activations."""
    kv_dtype: torch.dtype
    """Of KV pages."""
    has_static_kv_scales: bool
    """Whether the checkpoint brings the scales of an fp8 cache."""
    quantization: str
    """Which weights are in integers, for people."""
    groups: Mapping[str, GroupFormat]
    """Of weights in integers, by name."""
    input_groups: InputGroups
    """Inputs that ranks must not part."""


def _read(
    settings: ExecutorConfig, path: Path, dtype: str, kv_cache_dtype: str, *, is_draft: bool = False
) -> _Headers:
    config, source = open_checkpoint(path, settings.load_format)
    try:
        check_tensors(config, source)
        resolved_dtype = resolve_dtype(
            "auto" if dtype == "auto" else SUPPORTED_DTYPES[dtype], config, source
        )
        quantization = settings.quantization
        if is_draft:
            quantization = draft_quantization(quantization, source)
        source = choose_weights(
            source, config, quantization, settings.quantization_group_size, bits=QUANTIZED_BITS
        )
        kv_dtype = FP8_DTYPE if kv_cache_dtype == "fp8" else resolved_dtype
        has_static_kv_scales = kv_dtype == FP8_DTYPE and (
            find_static_scales(source.tensors, config.num_layers) is not None
        )
    finally:
        source.close()
    return _Headers(
        config=config,
        dtype=resolved_dtype,
        kv_dtype=kv_dtype,
        has_static_kv_scales=has_static_kv_scales,
        quantization=describe_quantization(source, config),
        groups={
            name: info.groups for name, info in source.tensors.items() if info.groups is not None
        },
        input_groups=input_groups(source),
    )


def _with_draft(plan: MemoryPlan, draft: MemoryPlan, rotary_bytes: int) -> MemoryPlan:
    """A rank's plan with the draft model beside its part; the two never compute at once.

    rotary_bytes: of the draft model's table, which stays.
    """
    kv_bytes_per_block = plan.kv_bytes_per_block + draft.kv_bytes_per_block
    return replace(
        plan,
        num_parameters=plan.num_parameters + draft.num_parameters,
        weight_bytes=plan.weight_bytes + draft.weight_bytes,
        norm_bytes=plan.norm_bytes + draft.weight_bytes,
        activation_bytes=max(plan.activation_bytes, draft.activation_bytes) + rotary_bytes,
        kv_bytes_per_block=kv_bytes_per_block,
        kv_bytes_per_token=kv_bytes_per_block // plan.block_size,
    )


def _num_blocks(plan: MemoryPlan, num_bytes: int) -> int:
    """KV blocks that fit beside the rest."""
    room = num_bytes - plan.weight_bytes - plan.activation_bytes
    return max(0, room // plan.kv_bytes_per_block)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stepwire_executor.plan",
        description="Print the bytes of weights, activations and KV of a model, loading nothing.",
    )
    parser.add_argument("--model", type=Path, required=True, help="directory or .gguf file")
    parser.add_argument("--dtype", choices=["auto", *SUPPORTED_DTYPES], default="auto")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--block-size", type=_positive, default=None, help="tokens a KV block")
    parser.add_argument("--max-num-batched-tokens", type=_positive, default=2048)
    parser.add_argument("--max-num-seqs", type=_positive, default=None)
    parser.add_argument("--max-model-len", type=_positive, default=None, help="tokens")
    parser.add_argument(
        "--speculative-model", type=Path, default=None, help="directory or .gguf file that drafts"
    )
    parser.add_argument("--tensor-parallel-size", type=_positive, default=1, help="ranks")
    parser.add_argument("--quantization", choices=["auto", "none", "int4"], default="auto")
    parser.add_argument(
        "--quantization-group-size", type=int, choices=[32, 64], default=DEFAULT_GROUP_SIZE
    )
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument(
        "--gpu-memory-bytes", type=_positive, default=None, help="plan for a GPU of this memory"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="part to use")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
