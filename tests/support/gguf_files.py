"""Writes small GGUF files with the package `gguf`, the way converters of checkpoints do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

_TOP_LEVEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_IN_LAYER[module]}.{kind}"


def write_gguf(
    path: Path,
    config: Any,
    state: dict[str, Tensor],
    *,
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra_metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a transformers model of model_type llama, qwen2 or qwen3.

    matrix_type: of every matrix; vectors stay F32. For llama, query and key rows are
    interleaved, as llama.cpp wants them.
    """
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    writer.add_eos_token_id(2)
    for key, value in (extra_metadata or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](
            key, value
        )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in state.items():
        values = tensor.detach().float()
        module = name.split(".")[-2]
        if config.model_type == "llama" and module in heads:
            halves = values.reshape(heads[module], 2, len(values) // heads[module] // 2, -1)
            values = halves.transpose(1, 2).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values.contiguous().numpy())
        else:
            stored = gguf.quantize(values.contiguous().numpy(), matrix_type)
            writer.add_tensor(gguf_name(name), stored, raw_dtype=matrix_type)
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantised(tensor: Tensor, matrix_type: gguf.GGMLQuantizationType) -> Tensor:
    """What is left of a tensor after write_gguf stored it, by the package's own code."""
    if tensor.ndim == 1:
        return tensor
    values = tensor.detach().float().contiguous().numpy()
    return torch.from_numpy(gguf.dequantize(gguf.quantize(values, matrix_type), matrix_type).copy())
