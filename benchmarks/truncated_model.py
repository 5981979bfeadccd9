"""A copy of a model with fewer layers, as safetensors: a draft model that needs no training.

Run: python -m benchmarks.truncated_model MODEL TARGET [--layers 0-19,28,29] [--dtype float32]

The layers that are left are the model's own, so what the copy computes only resembles it. With all
layers the copy is the model. A tokenizer beside the model is copied with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from stepwire_executor.model.hf_config import SUPPORTED_ARCHITECTURES
from stepwire_executor.model.loader import SUPPORTED_DTYPES, open_checkpoint, resolve_dtype
from stepwire_executor.model.weights.expected import check_tensors, expected_tensors

_MODEL_TYPES = {name: kind for kind, name in SUPPORTED_ARCHITECTURES.items()}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_LAYER_PREFIX = "model.layers."


def write_truncated_model(
    source: Path, target: Path, *, layers: Sequence[int] | None = None, dtype: str = "auto"
) -> None:
    """Write a directory with some layers of the model at source, in their order.

    source: a directory or a .gguf file. layers: indices into its layers, rising; None is all.
    dtype: of the copy, "auto" is what the model is computed in. Raises ModelLoadError for a model
    that cannot be read, ValueError for layers that it does not have.
    """
    config, weights = open_checkpoint(source)
    try:
        check_tensors(config, weights)
        kept = range(config.num_layers) if layers is None else layers
        if (
            not kept
            or list(kept) != sorted(set(kept))
            or not 0 <= kept[0] <= kept[-1] < (config.num_layers)
        ):
            raise ValueError(f"layers must rise within 0..{config.num_layers - 1}, not {layers}")
        resolved = resolve_dtype(
            "auto" if dtype == "auto" else SUPPORTED_DTYPES[dtype], config, weights
        )
        tensors = {}
        for name, shape in expected_tensors(config).items():
            new_name = _renamed(name, kept)
            if new_name is not None:
                tensors[new_name] = torch.empty(shape, dtype=resolved)
                weights.load_into(name, tensors[new_name])
    finally:
        weights.close()
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors")
    values = _config_values(config, kept, str(resolved).removeprefix("torch."))
    (target / "config.json").write_text(json.dumps(values, indent=2))
    beside = source if source.is_dir() else source.parent
    for file_name in _TOKENIZER_FILES:
        if (beside / file_name).is_file():
            shutil.copyfile(beside / file_name, target / file_name)


def parse_layers(text: str) -> list[int]:
    """ "0-3,7" is [0, 1, 2, 3, 7]; raises ValueError."""
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers.extend(range(int(first), int(last or first) + 1))
    return layers


def _renamed(name: str, kept: Sequence[int]) -> str | None:
    """A tensor's name in the copy; None where its layer is left out."""
    if not name.startswith(_LAYER_PREFIX):
        return name
    layer, _, rest = name.removeprefix(_LAYER_PREFIX).partition(".")
    if int(layer) not in kept:
        return None
    return f"{_LAYER_PREFIX}{list(kept).index(int(layer))}.{rest}"


def _config_values(config: ModelConfig, kept: Sequence[int], dtype: str) -> dict[str, Any]:
    """What config.json says, as read_hf_config reads it."""
    values: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(kept),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "partial_rotary_factor": config.rope.rotary_dim / config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_output_bias,
        "mlp_bias": config.mlp_bias,
        "eos_token_id": list(config.eos_token_ids),
        "bos_token_id": config.bos_token_id,
    }
    scaling = _scaling_values(config.rope)
    if scaling is not None:
        values["rope_scaling"] = scaling
    windows = [config.sliding_windows[layer] for layer in kept]
    width = next((window for window in windows if window is not None), None)
    if width is not None:
        values["sliding_window"] = width
        values["use_sliding_window"] = True
        values["layer_types"] = [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ]
    return values


def _scaling_values(rope: RopeConfig) -> dict[str, Any] | None:
    scaling = rope.scaling
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    raise ModelLoadError(
        "a GGUF file's frequency factors have no place in config.json: give the model's directory "
        "of safetensors"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the copy; 1 and one line on stderr where that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.truncated_model",
        description="Copy a model with fewer layers.",
    )
    parser.add_argument("model", type=Path, help="directory or .gguf file")
    parser.add_argument("target", type=Path, help="directory to write")
    parser.add_argument("--layers", type=parse_layers, default=None, help="for example 0-19,28,29")
    parser.add_argument("--dtype", choices=["auto", *SUPPORTED_DTYPES], default="auto")
    options = parser.parse_args(arguments)
    try:
        write_truncated_model(
            options.model, options.target, layers=options.layers, dtype=options.dtype
        )
    except (ModelLoadError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
