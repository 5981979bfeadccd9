"""GGUF files give the weights and the config that were put in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from stepwire_executor.kernels import select_kernels
from stepwire_executor.model import load_model
from stepwire_executor.model.config import LinearScaling, YarnScaling
from stepwire_executor.model.gguf_config import read_gguf_config
from stepwire_executor.model.weights.dequantize import FORMATS
from stepwire_executor.model.weights.gguf import GGUFWeights
from stepwire_executor.model.weights.gguf_file import GGUFFile
from support.gguf_files import dequantised, write_gguf
from support.model_steps import CPU, ModelSteps, SteppedSequence

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
TOKENS = [5, 17, 80, 3, 44, 95, 0, 17, 61, 12, 33, 71]
QUANTISABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def _model(config: Any) -> Any:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


def _state(model: Any) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _logits(path: Path) -> torch.Tensor:
    kernels = select_kernels(CPU, backend="reference")
    model = load_model(path, dtype=torch.float32, kernels=kernels, device=CPU)
    return ModelSteps(model).step([(SteppedSequence(list(TOKENS)), len(TOKENS))], all_rows=True)


@pytest.mark.parametrize("type_id", FORMATS)
def test_dequantisation_of_any_bytes_equals_the_package_bit_for_bit(type_id: int) -> None:
    quant_format = FORMATS[type_id]
    assert quant_format.name == gguf.GGMLQuantizationType(type_id).name
    num_elements, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
    assert (quant_format.num_elements, quant_format.block.itemsize) == (num_elements, num_bytes)
    raw = np.random.default_rng(type_id).integers(0, 256, (9, 40 * num_bytes), dtype=np.uint8)
    out = np.full((9 * 40, num_elements), np.nan, np.float32)

    with np.errstate(all="ignore"):  # random scales may be infinite or NaN
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(type_id))
        quant_format.dequantize(raw.reshape(-1).view(quant_format.block), out)

    expected = expected.reshape(out.shape)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(out), is_nan)
    np.testing.assert_array_equal(out.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


@pytest.mark.parametrize("type_name", QUANTISABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_stored_type_loads_as_the_package_reads_it(
    tmp_path: Path, type_name: str, dtype: torch.dtype
) -> None:
    matrix_type = gguf.GGMLQuantizationType[type_name]
    model = _model(transformers.LlamaConfig(**COMMON, attention_bias=True))
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, _state(model), matrix_type=matrix_type)
    file = GGUFFile(path)
    weights = GGUFWeights(file, read_gguf_config(file))

    for name, tensor in _state(model).items():
        out = torch.full(tensor.shape, float("nan"), dtype=dtype)
        weights.load_into(name, out)
        # Interleaving rows and quantising rows commute: a block never spans two rows.
        assert torch.equal(out, dequantised(tensor, matrix_type).to(dtype)), name


def test_a_slice_of_rows_equals_the_rows_of_the_whole(tmp_path: Path) -> None:
    model = _model(transformers.LlamaConfig(**COMMON, attention_bias=True))
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, _state(model), matrix_type=gguf.GGMLQuantizationType.Q8_0)
    file = GGUFFile(path)
    weights = GGUFWeights(file, read_gguf_config(file))
    for name, info in weights.tensors.items():
        whole = torch.empty(info.shape)
        weights.load_into(name, whole)
        part = torch.empty((info.shape[0] // 2, *info.shape[1:]))
        weights.load_into(name, part, first_row=info.shape[0] // 4)
        start = info.shape[0] // 4
        assert torch.equal(part, whole[start : start + len(part)]), name


@pytest.mark.parametrize("type_name", ["F32", "Q4_1"])
@pytest.mark.parametrize("columns", [(32, 64), (5, 40), (0, 1)])
def test_a_slice_of_columns_equals_the_columns_of_the_whole(
    tmp_path: Path, type_name: str, columns: tuple[int, int]
) -> None:
    """Also where it starts or ends inside a block."""
    model = _model(transformers.LlamaConfig(**COMMON))
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, _state(model), matrix_type=gguf.GGMLQuantizationType[type_name])
    file = GGUFFile(path)
    weights = GGUFWeights(file, read_gguf_config(file))
    first, last = columns
    for name, info in weights.tensors.items():
        if len(info.shape) < 2:
            continue
        whole = torch.empty(info.shape)
        weights.load_into(name, whole)
        for dtype in (torch.float32, torch.bfloat16):
            part = torch.empty(7, last - first, dtype=dtype)
            weights.load_into(name, part, 3, first)
            assert torch.equal(part, whole[3:10, first:last].to(dtype)), name


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**COMMON),
        transformers.LlamaConfig(**COMMON, tie_word_embeddings=True, attention_bias=True),
        transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
        transformers.Qwen3Config(**COMMON, head_dim=32),
    ],
    ids=["llama", "llama-tied-biased", "qwen2", "qwen3"],
)
def test_logits_from_a_gguf_file_equal_transformers(tmp_path: Path, config: Any) -> None:
    model = _model(config)
    path = tmp_path / "model.gguf"
    write_gguf(path, config, _state(model))
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(_logits(path), expected, atol=1e-4, rtol=0)


def test_frequency_factors_of_llama_3_equal_its_rope_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = _model(transformers.LlamaConfig(**COMMON, rope_parameters=scaling))
    plain = 1.0 / 10_000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    path = tmp_path / "model.gguf"
    extra = {"rope_freqs.weight": factors}
    write_gguf(path, model.config, _state(model), extra_tensors=extra)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(_logits(path), expected, atol=1e-4, rtol=0)


def test_rope_scaling_in_the_metadata_is_read(tmp_path: Path) -> None:
    model = _model(transformers.Qwen2Config(**COMMON))
    path = tmp_path / "model.gguf"
    metadata: dict[str, Any] = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    }
    write_gguf(path, model.config, _state(model), extra_metadata=metadata)
    yarn = read_gguf_config(GGUFFile(path)).rope.scaling
    assert isinstance(yarn, YarnScaling)
    assert yarn.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1.0)

    metadata = {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}
    write_gguf(path, model.config, _state(model), extra_metadata=metadata)
    assert read_gguf_config(GGUFFile(path)).rope.scaling == LinearScaling(factor=4.0)


def test_auto_dtype_is_bfloat16_for_quantised_files(tmp_path: Path) -> None:
    kernels = select_kernels(CPU, backend="reference")
    model = _model(transformers.LlamaConfig(**COMMON))
    for type_name, dtype in (
        ("Q4_1", torch.bfloat16),
        ("BF16", torch.bfloat16),
        ("F16", torch.float16),
        ("F32", torch.float32),
    ):
        path = tmp_path / f"{type_name}.gguf"
        matrix_type = gguf.GGMLQuantizationType[type_name]
        write_gguf(path, model.config, _state(model), matrix_type=matrix_type)
        assert load_model(path, dtype="auto", kernels=kernels, device=CPU).dtype == dtype


def test_the_real_model_says_what_it_is(smollm2_dir: Path) -> None:
    config = read_gguf_config(GGUFFile(next(smollm2_dir.glob("*.gguf"))))
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.hidden_size, config.vocab_size) == (64, 576, 49_152)
    assert config.rms_norm_eps == 1e-5
    assert config.rope.theta == 100_000.0
    assert config.max_position_embeddings == 8_192
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)


def test_a_load_that_is_given_up_raises_only_what_the_callback_raised(smollm2_dir: Path) -> None:
    class GaveUpError(Exception):
        pass

    def give_up(_phase: str, fraction: float) -> None:
        if fraction > 0.1:
            raise GaveUpError

    kernels = select_kernels(CPU, backend="reference")
    with pytest.raises(GaveUpError):
        load_model(smollm2_dir, dtype="auto", kernels=kernels, device=CPU, on_progress=give_up)
