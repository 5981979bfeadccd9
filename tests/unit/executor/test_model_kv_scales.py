"""Scales of an fp8 KV cache that a checkpoint brings: found, checked and used."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stepwire_executor import plan
from stepwire_executor.config import ExecutorConfig
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE, StaticScales
from stepwire_executor.loading import load_runner
from stepwire_executor.model import LoadedModel, load_model
from support.model_steps import CPU, ModelSteps, SteppedSequence
from torch import Tensor

CONFIG = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    tie_word_embeddings=True,
)
SCALES = (StaticScales(key=0.0625, value=0.03125), StaticScales(key=0.046875, value=0.0390625))
"""Exact in every dtype."""
SPELLINGS = [
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
]
AddTensors = Callable[[dict[str, Tensor]], Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(path)
    return path


@pytest.fixture
def with_tensors(original: Path, tmp_path: Path) -> AddTensors:
    """Copy the checkpoint, with more tensors."""

    def add(tensors: dict[str, Tensor]) -> Path:
        path = shutil.copytree(original, tmp_path / "model", dirs_exist_ok=True)
        file = path / "model.safetensors"
        save_file(load_file(original / file.name) | tensors, file)
        return path

    return add


def scale_tensors(
    key_name: str = "k_scale",
    value_name: str = "v_scale",
    *,
    shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    tensors = {}
    for layer, scales in enumerate(SCALES):
        prefix = f"model.layers.{layer}.self_attn."
        tensors[prefix + key_name] = torch.full(shape, scales.key, dtype=dtype)
        tensors[prefix + value_name] = torch.full(shape, scales.value, dtype=dtype)
    return tensors


def load(path: Path, *, has_fp8_kv_cache: bool = True) -> LoadedModel:
    kernels = select_kernels(CPU, backend="auto")
    return load_model(
        path, dtype="auto", kernels=kernels, device=CPU, has_fp8_kv_cache=has_fp8_kv_cache
    )


def logits(model: LoadedModel, kv_dtype: torch.dtype | None = None) -> Tensor:
    """All rows of 20 tokens, of which the last ones are decoded."""
    steps = ModelSteps(model, kv_dtype=kv_dtype)
    sequence = SteppedSequence([3 * i % 64 for i in range(20)])
    return torch.cat([steps.step([(sequence, n)], all_rows=True) for n in (12, 5, 1, 1, 1)])


@pytest.mark.parametrize("names", SPELLINGS, ids="/".join)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((), torch.float32), ((1,), torch.bfloat16), ((1, 1), torch.float16)]
)
def test_every_spelling_is_found(
    with_tensors: AddTensors, names: tuple[str, str], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    path = with_tensors(scale_tensors(*names, shape=shape, dtype=dtype))
    assert load(path).static_kv_scales == SCALES


def test_one_scale_may_serve_keys_and_values(with_tensors: AddTensors) -> None:
    tensors = {f"model.layers.{i}.self_attn.kv_scale": torch.tensor(0.5) for i in range(2)}
    assert load(with_tensors(tensors)).static_kv_scales == (StaticScales(key=0.5, value=0.5),) * 2


def test_without_scales_each_vector_keeps_its_own(original: Path) -> None:
    model = load(original)
    assert model.static_kv_scales is None
    (pages, _) = ModelSteps(model, kv_dtype=FP8_DTYPE).cache.layers
    assert pages.key_scale is not None
    assert pages.static_key_scale is None


def test_the_decoder_computes_with_the_scales(with_tensors: AddTensors) -> None:
    path = with_tensors(scale_tensors())
    model = load(path)
    exact = logits(load(path, has_fp8_kv_cache=False))
    spread = float(exact.std())
    got = logits(model, FP8_DTYPE)
    assert 0 < float((got - exact).square().mean().sqrt()) < 0.15 * spread
    # Neither scale may be lost on the way: written with one and read with another, nothing fits.
    (pages, *_) = ModelSteps(model, kv_dtype=FP8_DTYPE).cache.layers
    assert (pages.static_key_scale, pages.static_value_scale) == (SCALES[0].key, SCALES[0].value)
    assert pages.key_scale is None
    assert pages.value_scale is None


def test_scales_change_the_fingerprint(with_tensors: AddTensors) -> None:
    tensors = scale_tensors()
    first = load(with_tensors(tensors)).fingerprint
    tensors["model.layers.1.self_attn.v_scale"] *= 2
    assert load(with_tensors(tensors)).fingerprint != first


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_scale_that_is_no_scale_is_refused(
    with_tensors: AddTensors, name: str, bad: float
) -> None:
    name = f"model.layers.1.self_attn.{name}"
    path = with_tensors(scale_tensors() | {name: torch.tensor(bad)})
    with pytest.raises(ModelLoadError, match=r"positive and finite.*--kv-cache-dtype auto") as e:
        load(path)
    assert repr(name) in str(e.value)
    # Only an fp8 cache reads it.
    assert load(path, has_fp8_kv_cache=False).static_kv_scales is None


def test_a_scale_a_head_is_refused(with_tensors: AddTensors) -> None:
    path = with_tensors(scale_tensors(shape=(2,)))
    with pytest.raises(ModelLoadError, match=r"k_scale' has shape \[2\].*--kv-cache-dtype auto"):
        load(path)


def test_a_layer_without_its_scales_is_refused(with_tensors: AddTensors) -> None:
    tensors = scale_tensors()
    del tensors["model.layers.1.self_attn.v_scale"]
    path = with_tensors(tensors)
    with pytest.raises(ModelLoadError, match=r"lacks tensor 'model.layers.1.self_attn.v_scale'"):
        load(path)
    assert plan.main(["--model", str(path), "--kv-cache-dtype", "fp8"]) == 1
    assert plan.main(["--model", str(path)]) == 0


def test_a_scale_of_a_layer_that_the_config_lacks_is_refused(with_tensors: AddTensors) -> None:
    path = with_tensors({"model.layers.2.self_attn.k_scale": torch.tensor(1.0)})
    with pytest.raises(ModelLoadError, match="does not have"):
        load(path)


def test_the_cache_takes_half_of_bfloat16s_bytes(
    with_tensors: AddTensors,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The rest of the tests' process has more to collect.
    monkeypatch.setattr(gc, "freeze", lambda: None)
    path = with_tensors(scale_tensors())
    sizes: dict[str, Any] = {}
    for kv_cache_dtype in ("auto", "fp8"):
        flags = ["--dtype", "bfloat16", "--kv-cache-dtype", kv_cache_dtype, "--json"]
        assert plan.main(["--model", str(path), *flags]) == 0
        sizes[kv_cache_dtype] = json.loads(capsys.readouterr().out)["kv_bytes_per_token"]
    assert sizes["fp8"] * 2 == sizes["auto"]
    config = ExecutorConfig(
        model=str(path), dtype="bfloat16", kv_cache_dtype="fp8", num_kv_blocks=8, max_model_len=64
    )
    num_threads = torch.get_num_threads()
    _, description = load_runner(config, lambda _phase, _fraction: None)
    torch.set_num_threads(num_threads)
    assert description.kv_cache_bytes == sizes["fp8"] * 8 * description.block_size
