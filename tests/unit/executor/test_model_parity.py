"""The decoder computes what transformers computes, for every supported architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stepwire_executor.kernels import select_kernels
from stepwire_executor.model import LoadedModel, load_model
from support.model_steps import CPU, ModelSteps, SteppedSequence
from torch import Tensor

VOCAB_SIZE = 99
TOLERANCE = 1e-4
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that a wrong rotation or mask shows in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """Wide heads, so that there are frequencies on both sides of each bound and between."""
    rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0, **parameters}
    return {"head_dim": 32, "rope_parameters": rope_parameters}


CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**COMMON),
    "llama-tied-biased": transformers.LlamaConfig(
        **COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-linear": transformers.LlamaConfig(**COMMON, **_rope("linear", factor=4.0)),
    "llama-llama3": transformers.LlamaConfig(
        **COMMON,
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-yarn": transformers.LlamaConfig(
        **COMMON, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    "llama-yarn-tuned": transformers.LlamaConfig(
        **COMMON,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=8.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=1.2,
            truncate=False,
        ),
    ),
    "mistral-window": transformers.MistralConfig(**COMMON, head_dim=16, sliding_window=7),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=None),
    "qwen2-tied": transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2-window": transformers.Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=16),
    "qwen3-tied-biased": transformers.Qwen3Config(
        **COMMON, head_dim=16, tie_word_embeddings=True, attention_bias=True
    ),
}
KERNELS = {
    "reference": select_kernels(CPU, backend="reference"),
    "auto": select_kernels(CPU, backend="auto"),
}
SHARDED = {"llama-llama3", "qwen2-tied"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The same weights in both."""

    reference: Any
    models: dict[str, LoadedModel]
    """By kernel backend."""
    directory: Path

    def reference_logits(self, token_ids: list[int]) -> Tensor:
        """[num_tokens, vocab_size]."""
        with torch.inference_mode():
            return self.reference(torch.tensor([token_ids])).logits[0]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking a second thread costs more than these sizes take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=KERNELS)
def model(request: pytest.FixtureRequest, pair: Pair) -> LoadedModel:
    return pair.models[request.param]


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(11)
    config = CONFIGS[request.param]
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    reference.eval()
    for name, parameter in reference.named_parameters():
        if parameter.ndim == 1:  # biases start at 0 and norms at 1, where a mix-up is invisible
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    shard = {"max_shard_size": "30KB"} if request.param in SHARDED else {}
    reference.save_pretrained(directory, **shard)
    assert (directory / "model.safetensors.index.json").exists() == bool(shard)
    models = {
        backend: load_model(directory, dtype="auto", kernels=kernels, device=CPU)
        for backend, kernels in KERNELS.items()
    }
    return Pair(reference=reference, models=models, directory=directory)


def _tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()


def test_prefill_logits_of_every_token_equal_transformers(pair: Pair, model: LoadedModel) -> None:
    tokens = _tokens(45, seed=1)
    logits = ModelSteps(model).step([(SteppedSequence(tokens), len(tokens))], all_rows=True)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, pair.reference_logits(tokens), atol=TOLERANCE, rtol=0)


def test_chunked_prefill_and_decode_in_a_mixed_batch_equal_transformers(
    pair: Pair, model: LoadedModel
) -> None:
    steps = ModelSteps(model)
    decoding, chunked, late = (
        SteppedSequence(_tokens(count, seed)) for count, seed in ((33, 2), (41, 3), (18, 4))
    )
    wanted = {id(s): pair.reference_logits(s.token_ids) for s in (decoding, chunked, late)}

    def check(work: list[tuple[SteppedSequence, int]]) -> None:
        logits = steps.step(work)
        for row, (sequence, _) in zip(logits, work, strict=True):
            expected = wanted[id(sequence)][sequence.num_computed_tokens - 1]
            torch.testing.assert_close(row, expected, atol=TOLERANCE, rtol=0)

    check([(decoding, 20)])
    for chunk in (1, 7, 13, 3, 10, 5):
        check([(decoding, 1), (chunked, chunk)])
    check([(late, 17), (decoding, 1), (chunked, 1)])
    check([(chunked, 1), (decoding, 1), (late, 1)])


def test_config_written_by_transformers_4_loads_the_same_model(pair: Pair, tmp_path: Path) -> None:
    for file in pair.directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    values = json.loads((pair.directory / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    values["torch_dtype"] = values.pop("dtype")
    values.pop("layer_types", None)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(values))

    loaded = load_model(tmp_path, dtype="auto", kernels=KERNELS["reference"], device=CPU)

    assert loaded.config == pair.models["reference"].config
    assert loaded.fingerprint == pair.models["reference"].fingerprint


def test_weight_bytes_count_every_parameter(pair: Pair, model: LoadedModel) -> None:
    num_parameters = sum(parameter.numel() for parameter in pair.reference.parameters())
    assert model.weight_bytes >= 4 * num_parameters
