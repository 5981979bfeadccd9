"""Reads a ModelConfig from a Hugging Face model directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from stepwire_executor.model.fields import MAX_LAYERS, Fields
from stepwire_executor.model.hf_quantization import CheckpointQuantization, read_quantization

SUPPORTED_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""By config.json's model_type."""
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_DTYPES = ("float32", "bfloat16", "float16")


def read_hf_config(directory: Path) -> ModelConfig:
    """Read config.json and, where it is there, generation_config.json.

    Understands rope_theta and rope_scaling (transformers 4) as well as rope_parameters
    (transformers 5). Raises ModelLoadError.
    """
    config = Fields(_read_json(directory / "config.json"), file_name="config.json")
    generation_path = directory / "generation_config.json"
    generation_values = _read_json(generation_path) if generation_path.is_file() else {}
    generation = Fields(generation_values, file_name="generation_config.json")

    architecture = _architecture(config)
    activation = config.string("hidden_act", "silu")
    if activation != "silu":
        raise ModelLoadError(f"config.json: hidden_act {activation!r} is not supported, only silu")

    num_layers = config.positive_int("num_hidden_layers", largest=MAX_LAYERS)
    num_heads = config.positive_int("num_attention_heads")
    num_kv_heads = config.positive_int("num_key_value_heads", num_heads)
    hidden_size = config.positive_int("hidden_size")
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
    head_dim = config.positive_int("head_dim", default_head_dim)
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of {num_heads} attention heads")
    max_position_embeddings = config.positive_int("max_position_embeddings", 2048)
    # Qwen2 always biases query, key and value; Llama and Qwen3 say so, and bias the output too.
    attention_bias = config.boolean("attention_bias", False)
    dtype = config.string("dtype", config.string("torch_dtype", ""))
    eos = generation.token_ids("eos_token_id") + config.token_ids("eos_token_id")
    bos = config.token_ids("bos_token_id") or generation.token_ids("bos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.positive_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.positive_int("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.positive_float("rms_norm_eps", 1e-6),
        max_position_embeddings=max_position_embeddings,
        rope=_rope(config, head_dim, max_position_embeddings),
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        attention_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        attention_output_bias=attention_bias and architecture != "Qwen2ForCausalLM",
        mlp_bias=architecture == "LlamaForCausalLM" and config.boolean("mlp_bias", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_windows=_sliding_windows(config, architecture, num_layers),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        bos_token_id=bos[0] if bos else None,
        checkpoint_dtype=dtype if dtype in _DTYPES else None,
    )


def read_hf_quantization(directory: Path) -> CheckpointQuantization | None:
    """How the directory's weights are packed; None where they are not. Raises ModelLoadError."""
    return read_quantization(Fields(_read_json(directory / "config.json"), file_name="config.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(
            f"{path.name} is missing; the model must be a GGUF file or a directory with "
            "config.json and *.safetensors"
        ) from None
    except OSError as error:
        raise ModelLoadError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelLoadError(
            f"{path.name} is not valid JSON; get the model again from its source"
        ) from None
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path.name} must hold an object; get the model again")
    return values


def _architecture(config: Fields) -> str:
    model_type = config.string("model_type", "")
    if model_type in SUPPORTED_ARCHITECTURES:
        return SUPPORTED_ARCHITECTURES[model_type]
    raise ModelLoadError(
        f"config.json: model_type {model_type!r} is not supported; "
        f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _rope(config: Fields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    fields = config.child("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    rope_type = fields.string("rope_type", fields.string("type", "default"))
    theta = fields.positive_float("rope_theta", config.positive_float("rope_theta", 10_000.0))
    if theta <= 1:
        raise config.wrong("rope_theta", "above 1")
    fraction = fields.positive_float(
        "partial_rotary_factor", config.positive_float("partial_rotary_factor", 1.0)
    )
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ModelLoadError(
            f"config.json: rotates {rotary_dim} of {head_dim} elements a head; "
            "supported: an even number up to head_dim"
        )
    scaling: RopeScaling | None
    if rope_type == "default":
        scaling = None
    elif rope_type == "linear":
        scaling = LinearScaling(factor=fields.positive_float("factor"))
    elif rope_type == "llama3":
        low_freq_factor = fields.positive_float("low_freq_factor")
        high_freq_factor = fields.positive_float("high_freq_factor")
        if high_freq_factor <= low_freq_factor:
            raise fields.wrong("high_freq_factor", f"above low_freq_factor, {low_freq_factor}")
        scaling = Llama3Scaling(
            factor=fields.positive_float("factor"),
            low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor,
            original_max_position_embeddings=fields.positive_int(
                "original_max_position_embeddings"
            ),
        )
    elif rope_type == "yarn":
        original = fields.positive_int("original_max_position_embeddings", max_position_embeddings)
        factor = fields.positive_float("factor", max_position_embeddings / original)
        scaling = YarnScaling(
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=fields.positive_float(
                "attention_factor", _yarn_attention_factor(fields, factor)
            ),
            beta_fast=fields.positive_float("beta_fast", 32.0),
            beta_slow=fields.positive_float("beta_slow", 1.0),
            truncate=fields.boolean("truncate", True),
        )
    else:
        raise ModelLoadError(
            f"config.json: rope type {rope_type!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    return RopeConfig(theta=theta, rotary_dim=rotary_dim, scaling=scaling)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Attention's temperature for a stretch. Peng et al. 2023, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(fields: Fields, factor: float) -> float:
    if fields.has("mscale") and fields.has("mscale_all_dim"):
        return yarn_mscale(factor, fields.positive_float("mscale")) / yarn_mscale(
            factor, fields.positive_float("mscale_all_dim")
        )
    return yarn_mscale(factor)


def _sliding_windows(config: Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "MistralForCausalLM":
        window = config.positive_int("sliding_window") if config.has("sliding_window") else None
        return (window,) * num_layers
    if architecture == "LlamaForCausalLM" or not config.boolean("use_sliding_window", False):
        return (None,) * num_layers
    window = config.positive_int("sliding_window", 4096)
    if config.has("layer_types"):
        layer_types = config.strings("layer_types")
        if len(layer_types) != num_layers:
            raise config.wrong("layer_types", f"{num_layers} layer types, one a layer")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first_windowed = config.positive_int("max_window_layers", 28)
    return tuple(window if layer >= first_windowed else None for layer in range(num_layers))
