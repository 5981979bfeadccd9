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

from stepwire_executor.config import ExecutorConfig
from stepwire_executor.engine.host import HostEngine
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.host import available_memory_bytes, usable_cores
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE, KVCache, bytes_per_block
from stepwire_executor.load_status import ModelDescription
from stepwire_executor.memory import plan_kv_cache
from stepwire_executor.model.loader import SUPPORTED_DTYPES, load_model
from stepwire_executor.model.locate import find_gguf
from stepwire_executor.model.tokenizer_conversion import convert_gguf_tokenizer
from stepwire_executor.runner import Runner
from stepwire_executor.slots import SlotTable

_MODEL_SHARE = 0.9
"""Part of the load's progress bar that the weights take."""

_log: Any = structlog.get_logger("stepwire_executor.loading")


def load_runner(
    config: ExecutorConfig, on_progress: Callable[[str, float], None]
) -> tuple[Runner, ModelDescription]:
    """Load the model, allocate its KV cache and run one step to warm up.

    on_progress: told a phase and the fraction of the whole load; may raise to give up.
    Raises ModelLoadError with one line that names the fix.
    """
    device = torch.device("cpu")
    torch.set_num_threads(config.num_threads or usable_cores())
    on_progress("choose kernels", 0.0)
    kernels = select_kernels(device, config.kernels)
    on_progress("convert tokenizer", 0.0)
    _convert_tokenizer(Path(config.model))
    model = load_model(
        Path(config.model),
        dtype="auto" if config.dtype == "auto" else SUPPORTED_DTYPES[config.dtype],
        kernels=kernels,
        device=device,
        max_model_len=config.max_model_len,
        load_format=config.load_format,
        on_progress=lambda phase, fraction: on_progress(phase, _MODEL_SHARE * fraction),
    )
    on_progress("allocate KV cache", _MODEL_SHARE)
    kv_dtype = FP8_DTYPE if config.kv_cache_dtype == "fp8" else model.dtype
    geometry: dict[str, Any] = {
        "num_layers": model.config.num_layers,
        "num_kv_heads": model.config.num_kv_heads,
        "block_size": config.block_size,
        "head_dim": model.config.head_dim,
        "dtype": kv_dtype,
    }
    kv_plan = plan_kv_cache(
        config,
        max_model_len=model.max_model_len,
        block_bytes=bytes_per_block(**geometry),
        available_bytes=available_memory_bytes(),
    )
    if kv_plan.warning is not None:
        _log.warning("kv_cache_small", detail=kv_plan.warning)
    try:
        cache = KVCache(num_blocks=kv_plan.num_blocks, device=device, **geometry)
    except (MemoryError, RuntimeError):
        raise ModelLoadError(
            f"the KV cache of {kv_plan.num_blocks} blocks does not fit in memory: lower "
            "--num-kv-blocks or --kv-cache-memory-bytes"
        ) from None
    slots = SlotTable(
        max_num_seqs=config.max_num_seqs,
        max_model_len=kv_plan.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_blocks=kv_plan.num_blocks,
        block_size=config.block_size,
        vocab_size=model.config.vocab_size,
    )
    engine = HostEngine(
        decoder=model.decoder,
        sample=kernels.sample,
        cache=cache,
        max_num_seqs=config.max_num_seqs,
        vocab_size=model.config.vocab_size,
    )
    runner = Runner(engine=engine, slots=slots)
    on_progress("warm up", 0.95)
    _warm_up(runner)
    # The model's objects live as long as the process: keep the collector off them.
    gc.collect()
    gc.freeze()
    dtype_name = _name(model.dtype)
    return runner, ModelDescription(
        model_fingerprint=_fingerprint(
            model.fingerprint, dtype_name, _name(kv_dtype), kernels.name
        ),
        architecture=model.config.architecture,
        dtype=dtype_name,
        kv_cache_dtype=_name(kv_dtype),
        device=f"{device} ({kernels.name})",
        vocab_size=model.config.vocab_size,
        max_position_embeddings=kv_plan.max_model_len,
        eos_token_ids=tuple(model.config.eos_token_ids),
        block_size=config.block_size,
        num_blocks=kv_plan.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        weight_bytes=model.weight_bytes,
        kv_cache_bytes=cache.num_bytes,
    )


def _convert_tokenizer(path: Path) -> None:
    """Make a GGUF file's tokenizer.json, which the scheduler reads; done once a model."""
    gguf_path = find_gguf(path)
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


def _warm_up(runner: Runner) -> None:
    """Run one token, so that the first request does not pay for lazy initialisation."""
    runner.open_epoch(0)
    params = SamplingParams(top_p=1.0, repetition_penalty=1.0)
    admission = Admission(
        slot=0, token_ids=[0], num_prompt_tokens=1, block_ids=[0], sampling_params=params
    )
    runner.execute(
        StepPlan(epoch=0, step_id=1, admissions=[admission], work_slots=[0], work_num_tokens=[1])
    )


def _fingerprint(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
