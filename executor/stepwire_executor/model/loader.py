"""From a path to a model that computes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels.interface import Kernels
from stepwire_executor.kv_cache import StaticScales
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.decoder import Decoder, ProgressCallback
from stepwire_executor.model.gguf_config import read_gguf_config
from stepwire_executor.model.hf_config import read_hf_config, read_hf_quantization
from stepwire_executor.model.locate import find_gguf, find_shape
from stepwire_executor.model.weights.dummy import DummyWeights
from stepwire_executor.model.weights.expected import check_tensors
from stepwire_executor.model.weights.gguf import GGUFWeights
from stepwire_executor.model.weights.gguf_file import GGUFFile
from stepwire_executor.model.weights.kv_scales import read_static_scales
from stepwire_executor.model.weights.packed import PackedWeights
from stepwire_executor.model.weights.quantization import (
    DEFAULT_GROUP_SIZE,
    GroupSize,
    Quantization,
    choose_weights,
    describe_quantization,
)
from stepwire_executor.model.weights.safetensors import SafetensorsWeights
from stepwire_executor.model.weights.source import WeightSource
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup

LoadFormat = Literal["auto", "dummy"]
SUPPORTED_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DTYPE_OF_TENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A decoder and what the other side must know of it."""

    decoder: Decoder
    config: ModelConfig
    """Of the whole model; decoder.config is this rank's part."""
    dtype: torch.dtype
    """Of weights and activations."""
    max_model_len: int
    """Positions that the decoder can compute, at most config.max_position_embeddings."""
    quantization: str
    """Which weights are in integers, for people; see `describe_quantization`."""
    weight_bytes: int
    """Of this rank, on the device, as packed."""
    fingerprint: str
    """Equal for equal config, tensors and dtype, on every rank; 32 hexadecimal digits."""
    static_kv_scales: tuple[StaticScales, ...] | None = None
    """Of each layer's fp8 keys and values; None where the checkpoint has none or the cache has
    another dtype."""


def load_model(
    path: Path,
    *,
    dtype: Literal["auto"] | torch.dtype,
    kernels: Kernels,
    device: torch.device,
    max_model_len: int | None = None,
    load_format: LoadFormat = "auto",
    quantization: Quantization = "auto",
    quantization_group_size: GroupSize = DEFAULT_GROUP_SIZE,
    has_fp8_kv_cache: bool = False,
    on_progress: ProgressCallback | None = None,
    group: RankGroup = SINGLE_RANK,
) -> LoadedModel:
    """Load this rank's part of a Hugging Face directory or a GGUF file.

    dtype "auto" is the checkpoint's, bfloat16 where its weights are quantised. load_format
    "dummy" needs a config only. quantization: see `choose_weights`. has_fp8_kv_cache: whether the
    cache's scales are wanted. Raises ModelLoadError with one line that names the fix.
    """
    config, source = open_checkpoint(path, load_format)
    try:
        check_tensors(config, source)
        resolved_dtype = resolve_dtype(dtype, config, source)
        source = choose_weights(
            source, config, quantization, quantization_group_size, bits=kernels.quantized_bits
        )
        static_kv_scales = (
            read_static_scales(source, config.num_layers) if has_fp8_kv_cache else None
        )
        decoder = Decoder(
            config,
            source,
            kernels,
            dtype=resolved_dtype,
            device=device,
            max_model_len=resolve_max_model_len(max_model_len, config),
            on_progress=on_progress or (lambda _phase, _fraction: None),
            group=group,
        )
        fingerprint = _fingerprint(config, source, resolved_dtype)
    except RuntimeError as error:  # how torch says that an allocation failed
        if "allocat" not in str(error):
            raise
        raise ModelLoadError(
            "there is not enough memory for the weights; use a smaller model, a smaller dtype or "
            "a smaller --max-model-len"
        ) from None
    finally:
        source.close()
    return LoadedModel(
        decoder=decoder,
        config=config,
        dtype=resolved_dtype,
        quantization=describe_quantization(source, config),
        max_model_len=resolve_max_model_len(max_model_len, config),
        weight_bytes=decoder.num_weight_bytes,
        fingerprint=fingerprint,
        static_kv_scales=static_kv_scales,
    )


def open_checkpoint(
    path: Path, load_format: LoadFormat = "auto"
) -> tuple[ModelConfig, WeightSource]:
    """Read a checkpoint's config and headers, no weights. Raises ModelLoadError."""
    if load_format == "dummy":
        path = find_shape(path)
    gguf_path = find_gguf(path)
    if gguf_path is None:
        config = read_hf_config(path)
        if load_format == "dummy":
            return config, DummyWeights(config)
        quantization = read_hf_quantization(path)
        if quantization is None:
            return config, SafetensorsWeights(path)
        files = SafetensorsWeights(path, has_integers=True)
        try:
            return config, PackedWeights(files, config, quantization)
        except BaseException:
            files.close()
            raise
    file = GGUFFile(gguf_path)
    config = read_gguf_config(file)
    if load_format == "dummy":
        file.close()
        return config, DummyWeights(config)
    return config, GGUFWeights(file, config)


def resolve_dtype(
    dtype: Literal["auto"] | torch.dtype, config: ModelConfig, source: WeightSource
) -> torch.dtype:
    """The dtype to compute in: what is asked for, else what the checkpoint was saved in."""
    if dtype != "auto":
        return dtype
    if config.checkpoint_dtype is not None:
        return SUPPORTED_DTYPES[config.checkpoint_dtype]
    stored = source.tensors["model.embed_tokens.weight"].dtype
    return _DTYPE_OF_TENSORS.get(stored, torch.bfloat16)


def resolve_max_model_len(asked: int | None, config: ModelConfig) -> int:
    """The context to serve. Raises ModelLoadError where the model has less than is asked."""
    if asked is None:
        return config.max_position_embeddings
    if not 0 < asked <= config.max_position_embeddings:
        raise ModelLoadError(
            f"max_model_len {asked} is not between 1 and the model's context of "
            f"{config.max_position_embeddings}; lower it"
        )
    return asked


def _fingerprint(config: ModelConfig, source: WeightSource, dtype: torch.dtype) -> str:
    """Hash what changes results, reading only the first bytes of each tensor."""
    digest = hashlib.sha256()
    digest.update(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    digest.update(str(dtype).encode())
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {info.shape} {info.dtype} {info.groups}\n".encode())
        digest.update(source.sample(name))
    return digest.hexdigest()[:32]
