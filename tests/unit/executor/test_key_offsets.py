"""What the fp8 cache's keys are centred by: measured once a model, the same for every sequence."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stepwire_executor import loading
from stepwire_executor.config import ExecutorConfig
from stepwire_executor.engine.building import EngineParts
from stepwire_executor.engine.key_offsets import measure_key_offsets
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE, KVCache, StaticScales
from stepwire_executor.model import LoadedModel, load_model
from torch import Tensor

CPU = torch.device("cpu")
CONFIG = transformers.Qwen2Config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=700,
    initializer_range=0.05,
    tie_word_embeddings=True,
)
GEOMETRY: dict[str, Any] = {
    "num_layers": 2,
    "num_blocks": 1,
    "num_kv_heads": 2,
    "block_size": 4,
    "head_dim": 16,
    "device": CPU,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose keys have a large bias in the pairs that turn slowest."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("qwen2")
    model = transformers.Qwen2ForCausalLM(CONFIG)
    for layer in model.model.layers:
        bias = torch.zeros(2, 16)
        bias[:, 7], bias[:, 15] = 5.0, -3.0
        layer.self_attn.k_proj.bias.data = bias.flatten()
    model.save_pretrained(path)
    return path


def load(path: Path, max_model_len: int | None = None) -> LoadedModel:
    kernels = select_kernels(CPU, backend="auto")
    return load_model(path, dtype="auto", kernels=kernels, device=CPU, max_model_len=max_model_len)


def test_an_offset_is_what_keys_have_in_common(checkpoint: Path) -> None:
    offsets = measure_key_offsets(load(checkpoint), CPU)
    assert [tuple(x.shape) for x in offsets] == [(2, 16)] * 2
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in offsets)
    for offset in offsets:
        # Over 700 positions the slowest pair turns by 0.2.
        torch.testing.assert_close(offset[:, 7], torch.full((2,), 5.0), atol=0.8, rtol=0)
        torch.testing.assert_close(offset[:, 15], torch.full((2,), -3.0), atol=0.8, rtol=0)
        assert float(offset[:, [0, 8]].abs().max()) < 0.8


def test_offsets_are_the_same_each_time_whatever_was_drawn_before(checkpoint: Path) -> None:
    first = measure_key_offsets(load(checkpoint), CPU)
    torch.rand(7)
    again = measure_key_offsets(load(checkpoint), CPU)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("max_model_len", [1, 2, 30])
def test_a_short_context_is_enough(checkpoint: Path, max_model_len: int) -> None:
    offsets = measure_key_offsets(load(checkpoint, max_model_len), CPU)
    for offset in offsets:
        torch.testing.assert_close(offset[:, 7], torch.full((2,), 5.0), atol=0.8, rtol=0)


def test_what_is_not_finite_is_not_an_offset(checkpoint: Path) -> None:
    model = load(checkpoint)
    model.decoder._embedding.fill_(torch.nan)
    assert all(not x.any() for x in measure_key_offsets(model, CPU))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_loaded_executor_centres_its_fp8_keys_alike_at_every_size(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    caches: list[KVCache] = []
    new_cache = EngineParts.new_cache

    def remember(self: EngineParts, num_blocks: int) -> KVCache:
        caches.append(new_cache(self, num_blocks))
        return caches[-1]

    monkeypatch.setattr(EngineParts, "new_cache", remember)
    for max_num_seqs in (1, 9):
        config = ExecutorConfig(
            model=str(checkpoint),
            kernels=backend,  # type: ignore[arg-type] # one of its literals
            kv_cache_dtype="fp8",
            max_num_seqs=max_num_seqs,
            num_kv_blocks=64,
        )
        loading.load_runner(config, lambda _phase, _fraction: None)
        gc.unfreeze()
    offsets = [[pages.key_offset for pages in cache.layers] for cache in caches]
    assert len(offsets) == 2
    for one, other in zip(*offsets, strict=True):
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        assert torch.equal(one, other)


def test_pages_without_scales_of_their_own_have_no_offset() -> None:
    offsets = [torch.zeros(2, 16)] * 2
    static = [StaticScales(key=1.0, value=1.0)] * 2
    KVCache(dtype=FP8_DTYPE, key_offsets=offsets, **GEOMETRY)
    for options in (
        {"dtype": torch.float32, "key_offsets": offsets},
        {"dtype": FP8_DTYPE, "key_offsets": offsets, "static_scales": static},
        {"dtype": FP8_DTYPE, "key_offsets": offsets[:1]},
    ):
        with pytest.raises(ValueError, match="offsets"):
            KVCache(**options, **GEOMETRY)
