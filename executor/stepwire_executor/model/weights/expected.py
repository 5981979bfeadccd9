"""The tensors that a config calls for."""

from __future__ import annotations

import math

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.kv_scales import kv_scale_names
from stepwire_executor.model.weights.source import WeightSource
from stepwire_executor.parallel.sharding import KERNEL_GROUP, InputGroups


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor by its Hugging Face name, with its shape, in loading order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def linear(name: str, out_features: int, in_features: int, has_bias: bool) -> None:
        tensors[name + ".weight"] = (out_features, in_features)
        if has_bias:
            tensors[name + ".bias"] = (out_features,)

    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        tensors[prefix + "input_layernorm.weight"] = (hidden,)
        linear(attention + "q_proj", config.query_size, hidden, config.attention_bias)
        linear(attention + "k_proj", config.kv_size, hidden, config.attention_bias)
        linear(attention + "v_proj", config.kv_size, hidden, config.attention_bias)
        linear(attention + "o_proj", hidden, config.query_size, config.attention_output_bias)
        if config.qk_norm:
            tensors[attention + "q_norm.weight"] = (config.head_dim,)
            tensors[attention + "k_norm.weight"] = (config.head_dim,)
        tensors[prefix + "post_attention_layernorm.weight"] = (hidden,)
        linear(mlp + "gate_proj", inner, hidden, config.mlp_bias)
        linear(mlp + "up_proj", inner, hidden, config.mlp_bias)
        linear(mlp + "down_proj", hidden, inner, config.mlp_bias)
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def head_name(config: ModelConfig) -> str:
    """The matrix that makes logits."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def check_tensors(config: ModelConfig, source: WeightSource) -> None:
    """Raise ModelLoadError unless the checkpoint holds just what the config calls for.

    A head beside tied embeddings is let pass: some checkpoints store the table twice. So are the
    scales of an fp8 KV cache, which only such a cache reads.
    """
    expected = expected_tensors(config)
    for name, shape in expected.items():
        info = source.tensors.get(name)
        if info is None:
            raise ModelLoadError(
                f"tensor {name!r} is missing from the checkpoint; "
                "get the model again from its source"
            )
        if info.shape != shape:
            raise ModelLoadError(
                f"tensor {name!r} has shape {list(info.shape)}, but the config calls for "
                f"{list(shape)}; get config and weights from the same source"
            )
    optional = {"lm_head.weight"} | kv_scale_names(config.num_layers)
    unexpected = source.tensors.keys() - expected.keys() - optional
    if unexpected:
        raise ModelLoadError(
            f"the checkpoint holds tensor {min(unexpected)!r}, which a {config.architecture} of "
            "this config does not have; get config and weights from the same source"
        )


def input_groups(source: WeightSource) -> InputGroups:
    """Inputs that ranks must not part: groups that share a scale, in any layer.

    Rows that share one scale can be cut anywhere, but for the kernels' own groups.
    """
    sizes = {"self_attn.o_proj.weight": 1, "mlp.down_proj.weight": 1}
    for name, info in source.tensors.items():
        module = name.split(".", 3)[-1]
        if module in sizes and info.groups is not None:
            size = info.groups.group_size or KERNEL_GROUP
            sizes[module] = math.lcm(sizes[module], size, KERNEL_GROUP)
    attention, mlp = sizes.values()
    return InputGroups(attention=attention, mlp=mlp)
