"""Reads a ModelConfig from the metadata of a GGUF file."""

from __future__ import annotations

import numpy as np

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.config import (
    FrequencyFactors,
    LinearScaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from stepwire_executor.model.fields import MAX_LAYERS, Fields
from stepwire_executor.model.hf_config import yarn_mscale
from stepwire_executor.model.weights.gguf_file import GGUFFile

SUPPORTED_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # also Mistral, whose files do not say otherwise
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""By general.architecture."""
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """Translate a file's metadata. Raises ModelLoadError."""
    general = Fields(file.metadata, file_name=file.name, prefix="general.")
    gguf_architecture = general.string("architecture")
    architecture = SUPPORTED_ARCHITECTURES.get(gguf_architecture)
    if architecture is None:
        raise ModelLoadError(
            f"{file.name}: architecture {gguf_architecture!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    fields = Fields(file.metadata, file_name=file.name, prefix=gguf_architecture + ".")
    tokenizer = Fields(file.metadata, file_name=file.name, prefix="tokenizer.ggml.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelLoadError(
            f"{file.name}: tensor 'token_embd.weight' is missing; download it again"
        )
    num_layers = fields.positive_int("block_count", largest=MAX_LAYERS)
    num_heads = fields.positive_int("attention.head_count")
    num_kv_heads = fields.positive_int("attention.head_count_kv", num_heads)
    hidden_size = fields.positive_int("embedding_length")
    head_dim = fields.positive_int("attention.key_length", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise fields.wrong("attention.head_count_kv", f"a divisor of {num_heads}")
    window = (
        fields.positive_int("attention.sliding_window")
        if fields.has("attention.sliding_window")
        else None
    )
    eos = tuple(i for key in _END_TOKENS for i in tokenizer.token_ids(key))
    bos = tokenizer.token_ids("bos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=fields.positive_int("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_shortest_float32(fields.positive_float("attention.layer_norm_rms_epsilon")),
        max_position_embeddings=fields.positive_int("context_length"),
        rope=_rope(file, fields, head_dim),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_windows=(window,) * num_layers,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        bos_token_id=bos[0] if bos else None,
        checkpoint_dtype=_checkpoint_dtype(file),
    )


def _shortest_float32(value: float) -> float:
    """1e-5 for 9.999999747378752e-06: the decimal that the float32 in the file came from."""
    return float(str(np.float32(value)))


def _checkpoint_dtype(file: GGUFFile) -> str | None:
    """What the matrices are stored in, where that is a type to compute in."""
    names = {t.format.name for t in file.tensors.values() if len(t.shape) > 1}
    if names == {"F32"}:
        return "float32"
    return "float16" if names == {"F16"} else None


def _rope(file: GGUFFile, fields: Fields, head_dim: int) -> RopeConfig:
    rotary_dim = fields.positive_int("rope.dimension_count", head_dim)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise fields.wrong("rope.dimension_count", f"an even number up to {head_dim}")
    scaling: RopeScaling | None = None
    kind = fields.string("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        scaling = FrequencyFactors(factors=_frequency_factors(file, rotary_dim))
    elif kind == "linear":
        scaling = LinearScaling(factor=fields.positive_float("rope.scaling.factor"))
    elif kind == "yarn":
        factor = fields.positive_float("rope.scaling.factor")
        scaling = YarnScaling(
            factor=factor,
            original_max_position_embeddings=fields.positive_int(
                "rope.scaling.original_context_length"
            ),
            attention_factor=fields.positive_float("rope.scaling.attn_factor", 1.0)
            * yarn_mscale(factor),
            beta_fast=fields.positive_float("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.positive_float("rope.scaling.yarn_beta_slow", 1.0),
        )
    elif kind != "none":
        raise ModelLoadError(
            f"{file.name}: rope type {kind!r} is not supported; "
            "supported: none, linear, yarn, and the factors of Llama 3.1"
        )
    theta = fields.positive_float("rope.freq_base", 10_000.0)
    if theta <= 1:
        raise fields.wrong("rope.freq_base", "above 1")
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling=scaling,
    )


def _frequency_factors(file: GGUFFile, rotary_dim: int) -> tuple[float, ...]:
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.shape != (rotary_dim // 2,) or tensor.format.name != "F32":
        raise ModelLoadError(
            f"{file.name}: tensor 'rope_freqs.weight' must be {rotary_dim // 2} F32 factors; "
            "download it again"
        )
    factors = file.blocks(tensor).reshape(-1)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelLoadError(
            f"{file.name}: 'rope_freqs.weight' holds a factor that is not "
            "positive; download it again"
        )
    return tuple(factors.tolist())
