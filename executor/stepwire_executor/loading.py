"""From a model on disk to a runner that is ready to step; runs on the compute thread."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import torch
from stepwire.executor.v1.executor_pb2 import Admission, SamplingParams, StepPlan

from stepwire_executor.config import ExecutorConfig, blocks_for, resolve_capacity
from stepwire_executor.device import choose_device, device_label
from stepwire_executor.engine.building import EngineParts, build_device_engine, build_host_engine
from stepwire_executor.engine.key_offsets import measure_key_offsets
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.host import default_num_threads
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kernels.native.build import KernelBuildError
from stepwire_executor.kernels.native.library import NativeLibrary, load_library
from stepwire_executor.kv_cache import FP8_DTYPE
from stepwire_executor.load_status import ModelDescription
from stepwire_executor.model.loader import SUPPORTED_DTYPES, load_model
from stepwire_executor.model.locate import find_gguf
from stepwire_executor.model.tokenizer_conversion import convert_gguf_tokenizer
from stepwire_executor.parallel.rendezvous import join_group
from stepwire_executor.runner import Runner
from stepwire_executor.speculation.loading import (
    check_draft_model,
    draft_model_name,
    load_draft_model,
)

_MODEL_SHARE = 0.9
"""Part of the load's progress bar that the weights take."""
_TARGET_SHARE = 0.7
"""The part of it that is the target's, where there is a draft model."""

_log: Any = structlog.get_logger("stepwire_executor.loading")


def load_runner(
    config: ExecutorConfig,
    on_progress: Callable[[str, float], None],
    on_group_lost: Callable[[str], None] = lambda reason: None,
) -> tuple[Runner, ModelDescription]:
    """Load the model, allocate its KV cache and run steps to warm up.

    on_progress: told a phase and the fraction of the whole load; may raise to give up.
    on_group_lost: told, on a thread of its own, why no other rank will compute with this one.
    Raises ModelLoadError with one line that names the fix.
    """
    device = choose_device(config.device, config.local_rank)
    torch.set_num_threads(config.num_threads or default_num_threads(config))
    on_progress("choose kernels", 0.0)
    try:
        kernels = select_kernels(device, config.kernels)
    except KernelBuildError as error:
        raise ModelLoadError(str(error)) from None
    on_progress("convert tokenizer", 0.0)
    _convert_tokenizer(Path(config.model))
    target_share = _MODEL_SHARE
    if config.speculative_model is not None:
        on_progress("compare the draft model's tokenizer", 0.0)
        check_draft_model(config)
        target_share = _TARGET_SHARE
    group = join_group(
        config,
        device,
        on_lost=on_group_lost,
        on_wait=lambda: on_progress("wait for the other ranks", 0.0),
        library=_library_of_ranks(config),
    )
    model = load_model(
        Path(config.model),
        dtype="auto" if config.dtype == "auto" else SUPPORTED_DTYPES[config.dtype],
        kernels=kernels,
        device=device,
        max_model_len=config.max_model_len,
        load_format=config.load_format,
        quantization=config.quantization,
        quantization_group_size=config.quantization_group_size,
        has_fp8_kv_cache=config.kv_cache_dtype == "fp8",
        on_progress=lambda phase, fraction: on_progress(phase, target_share * fraction),
        group=group,
    )
    draft = load_draft_model(
        config,
        kernels=kernels,
        device=device,
        max_model_len=model.max_model_len,
        on_progress=lambda phase, fraction: on_progress(
            phase, target_share + (_MODEL_SHARE - target_share) * fraction
        ),
    )
    if group.world_size > 1:
        on_progress("wait for the other ranks", _MODEL_SHARE)
        group.least(0)
    kv_dtype = FP8_DTYPE if config.kv_cache_dtype == "fp8" else model.dtype
    key_offsets = None
    if kv_dtype == FP8_DTYPE:
        is_dynamic = model.static_kv_scales is None
        _log.info("kv_cache_scales", source="each vector" if is_dynamic else "checkpoint")
        if is_dynamic:
            on_progress("centre keys", _MODEL_SHARE)
            key_offsets = measure_key_offsets(model, device)
    on_progress("allocate KV cache", _MODEL_SHARE)
    parts = EngineParts(
        config=config,
        capacity=resolve_capacity(config, is_gpu=device.type == "cuda"),
        model=model,
        kernels=kernels,
        device=device,
        group=group,
        kv_dtype=kv_dtype,
        key_offsets=key_offsets,
        draft=draft,
    )
    # Triton's kernels get the engine they are for, also where an interpreter runs them.
    is_device = device.type != "cpu" or kernels.is_capturable
    build = build_device_engine if is_device else build_host_engine
    engine, cache, slots = build(parts, lambda phase: on_progress(phase, 0.95))
    runner = Runner(engine=engine, slots=slots, group=group)
    on_progress("warm up", 0.98)
    _warm_up(runner, has_draft_model=draft is not None)
    # The model's objects live as long as the process: keep the collector off them.
    gc.collect()
    gc.freeze()
    dtype_name, kv_dtype_name = _name(model.dtype), _name(parts.kv_dtype)
    draft_parts: tuple[str, ...] = ()
    draft_weight_bytes = 0
    if draft is not None:
        draft_parts = (draft.model.fingerprint, _name(draft.kv_dtype))
        draft_weight_bytes = draft.model.weight_bytes
    return runner, ModelDescription(
        model_fingerprint=_fingerprint(
            model.fingerprint,
            dtype_name,
            kv_dtype_name,
            kernels.name,
            str(group.world_size),
            config.speculative_verification,
            *draft_parts,
        ),
        architecture=model.config.architecture,
        dtype=dtype_name,
        quantization=model.quantization,
        kv_cache_dtype=kv_dtype_name,
        device=f"{device_label(device)} ({kernels.name})",
        vocab_size=model.config.vocab_size,
        max_position_embeddings=slots.max_model_len,
        eos_token_ids=tuple(model.config.eos_token_ids),
        block_size=slots.block_size,
        num_blocks=slots.num_blocks,
        max_num_seqs=slots.max_num_seqs,
        max_num_batched_tokens=slots.max_num_batched_tokens,
        weight_bytes=model.weight_bytes + draft_weight_bytes,
        kv_cache_bytes=cache.num_bytes + cache.num_blocks * parts.draft_block_bytes,
        draft_model=draft_model_name(config),
        draft_weight_bytes=draft_weight_bytes,
        draft_kv_cache_bytes=cache.num_blocks * parts.draft_block_bytes,
    )


def _library_of_ranks(config: ExecutorConfig) -> NativeLibrary | None:
    """Compiled code for ranks of one machine, which do without where there is none."""
    if config.tensor_parallel_size == 1 or config.kernels not in ("auto", "native"):
        return None
    try:
        return load_library()
    except KernelBuildError:
        return None


def _convert_tokenizer(path: Path) -> None:
    """Make a GGUF file's tokenizer.json, which the scheduler reads; done once a model."""
    gguf_path = find_gguf(path) if path.exists() else None
    if gguf_path is None or not gguf_path.is_file():
        return
    try:
        convert_gguf_tokenizer(gguf_path)
    except OSError as error:
        _log.warning(
            "tokenizer_not_written",
            reason=error.strerror,
            fix="make the model's directory writable once, or put tokenizer.json beside the file",
        )


def _warm_up(runner: Runner, *, has_draft_model: bool) -> None:
    """Run one token, so that the first request does not pay for lazy initialisation."""
    slots = runner.slots
    # A draft needs room for a second token.
    has_room = min(slots.max_model_len, slots.max_num_batched_tokens) > 1
    num_drafts = 1 if has_draft_model and has_room else 0
    runner.open_epoch(0)
    admission = Admission(
        slot=0,
        token_ids=[0],
        num_prompt_tokens=1,
        block_ids=range(blocks_for(1 + num_drafts, slots.block_size)),
        sampling_params=SamplingParams(top_p=1.0, repetition_penalty=1.0),
    )
    runner.execute(
        StepPlan(
            epoch=0,
            step_id=1,
            admissions=[admission],
            work_slots=[0],
            work_num_tokens=[1],
            work_num_drafts=[num_drafts],
        )
    )


def _fingerprint(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
