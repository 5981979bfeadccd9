"""Loads the draft model beside its target, once both are known to number the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from stepwire_executor.config import ExecutorConfig
from stepwire_executor.engine.building import PagedModel
from stepwire_executor.engine.key_offsets import measure_key_offsets
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels.interface import Kernels
from stepwire_executor.kv_cache import FP8_DTYPE
from stepwire_executor.model.loader import SUPPORTED_DTYPES, load_model, open_checkpoint
from stepwire_executor.model.vocabulary import check_same_tokenizer
from stepwire_executor.model.weights.quantization import draft_quantization


def draft_model_name(config: ExecutorConfig) -> str:
    """The name of the draft model's directory or file; empty where there is none."""
    return "" if config.speculative_model is None else Path(config.speculative_model).resolve().name


def check_draft_model(config: ExecutorConfig) -> None:
    """Read the headers of both models; raises ModelLoadError where they do not go together.

    Before the model is loaded, which takes long.
    """
    if config.speculative_model is None:
        return
    path, draft_path = Path(config.model), Path(config.speculative_model)
    vocab_size = _vocab_size(config, path)
    with _naming(config):
        check_same_tokenizer(
            path,
            draft_path,
            vocab_size=vocab_size,
            draft_vocab_size=_vocab_size(config, draft_path),
        )


def load_draft_model(
    config: ExecutorConfig,
    *,
    kernels: Kernels,
    device: torch.device,
    max_model_len: int,
    on_progress: Callable[[str, float], None],
) -> PagedModel | None:
    """Load the whole draft model on this rank; None where there is none.

    max_model_len: the target's; where the draft model's context is shorter, drafts end there.
    on_progress: told a phase and the fraction of this load. Raises ModelLoadError.
    """
    if config.speculative_model is None:
        return None
    path = Path(config.speculative_model)
    is_fp8 = config.kv_cache_dtype == "fp8"
    with _naming(config):
        draft_config, source = open_checkpoint(path, config.load_format)
        source.close()
        model = load_model(
            path,
            dtype="auto" if config.dtype == "auto" else SUPPORTED_DTYPES[config.dtype],
            kernels=kernels,
            device=device,
            max_model_len=min(max_model_len, draft_config.max_position_embeddings),
            load_format=config.load_format,
            quantization=draft_quantization(config.quantization, source),
            quantization_group_size=config.quantization_group_size,
            has_fp8_kv_cache=is_fp8,
            on_progress=lambda phase, fraction: on_progress(
                f"{phase} of the draft model", fraction
            ),
        )
    key_offsets = None
    if is_fp8 and model.static_kv_scales is None:
        key_offsets = measure_key_offsets(model, device)
    return PagedModel(
        model=model, kv_dtype=FP8_DTYPE if is_fp8 else model.dtype, key_offsets=key_offsets
    )


@contextlib.contextmanager
def _naming(config: ExecutorConfig) -> Iterator[None]:
    """Have a ModelLoadError say which of the two models it is about."""
    try:
        yield
    except ModelLoadError as error:
        raise ModelLoadError(f"--speculative-model {draft_model_name(config)}: {error}") from None


def _vocab_size(config: ExecutorConfig, path: Path) -> int:
    model_config, source = open_checkpoint(path, config.load_format)
    source.close()
    return model_config.vocab_size
