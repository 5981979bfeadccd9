"""Runners of a real model with random weights, small enough to run hundreds of steps a second."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from stepwire_executor.config import ExecutorConfig, resolve_capacity
from stepwire_executor.engine.building import EngineParts, build_device_engine, build_host_engine
from stepwire_executor.engine.key_offsets import measure_key_offsets
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE
from stepwire_executor.model import load_model
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.runner import Runner
from support.model_steps import CPU

BUILDERS = {"host": build_host_engine, "device": build_device_engine}
VOCAB_SIZE = 101
NUM_BLOCKS = 30
BLOCK_SIZE = 4
MAX_NUM_SEQS = 4


def save_model(path: Path) -> None:
    """Write the weights."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)


def make_model_runner(
    directory: Path,
    engine_name: str,
    group: RankGroup = SINGLE_RANK,
    *,
    is_fp8: bool = False,
) -> Runner:
    """Load the model in float32 into an engine."""
    kernels = select_kernels(CPU)
    # Ranks may have room for different numbers of blocks.
    config = ExecutorConfig(
        model="m",
        max_num_seqs=MAX_NUM_SEQS,
        num_kv_blocks=NUM_BLOCKS + group.rank,
        block_size=BLOCK_SIZE,
    )
    model = load_model(directory, dtype=torch.float32, kernels=kernels, device=CPU, group=group)
    parts = EngineParts(
        config=config,
        capacity=resolve_capacity(config, is_gpu=False),
        model=model,
        kernels=kernels,
        device=CPU,
        group=group,
        kv_dtype=FP8_DTYPE if is_fp8 else torch.float32,
        key_offsets=measure_key_offsets(model, CPU) if is_fp8 else None,
    )
    engine, cache, slots = BUILDERS[engine_name](parts, lambda phase: None)
    assert cache.layers[0].key.shape[1] == model.decoder.config.num_kv_heads
    assert slots.num_blocks == NUM_BLOCKS
    return Runner(engine=engine, slots=slots, group=group)
