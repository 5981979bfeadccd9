"""--quantization: weights in integers as stored, in none, or rounded while they are loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stepwire_executor import plan
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels import Kernels
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.model.loader import open_checkpoint
from stepwire_executor.model.weights.quantization import (
    RoundedWeights,
    choose_weights,
    draft_quantization,
)
from stepwire_executor.model.weights.rounding import round_to_groups
from stepwire_executor.model.weights.source import GroupFormat
from support.dequantising_kernels import dequantising_kernels
from support.gguf_files import write_gguf
from support.model_steps import CPU, ModelSteps, SteppedSequence

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
INT4 = GroupFormat(bits=4, group_size=32, group_bytes=3)
INT8 = GroupFormat(bits=8, group_size=32, group_bytes=2)
DOWN = "model.layers.1.mlp.down_proj.weight"
TABLE = "model.embed_tokens.weight"


def _save(path: Path, **more: Any) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**{**CONFIG, **more})
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("llama"))


def _load(path: Path, kernels: Kernels | None = None, **options: Any) -> LoadedModel:
    kernels = kernels or dequantising_kernels()
    return load_model(path, dtype=torch.float32, kernels=kernels, device=CPU, **options)


def _logits(model: LoadedModel) -> torch.Tensor:
    tokens = [5, 17, 80, 3, 44, 95, 0, 17, 61]
    return ModelSteps(model).step([(SteppedSequence(tokens), len(tokens))], all_rows=True)


@given(seed=st.integers(0, 1 << 16), spread=st.sampled_from([1e-6, 0.02, 1.0, 3e4]))
def test_rounding_loses_no_more_than_plain_rounding_to_nearest(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 128, generator=generator) * spread
    weight += torch.randn(3, 1, generator=generator) * spread  # groups that leave zero out
    rounded = round_to_groups(weight, INT4)
    groups = weight.view(3, 4, 32)
    high, low = groups.amax(dim=2).clamp(min=0), groups.amin(dim=2).clamp(max=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    codes = (groups / scale[..., None]).round().add(zero[..., None]).clamp(0, 15)
    plain = (codes - zero[..., None]) * scale[..., None]

    errors = (rounded.dequantize().view(3, 4, 32) - groups).square().sum(dim=2)
    # The product with an inverse may round a tie another way.
    assert (errors <= (plain - groups).square().sum(dim=2) * (1 + 1e-3) + 1e-20).all()
    assert rounded.codes.max() <= 15
    assert (rounded.scales.dtype, rounded.zeros is not None) == (torch.float16, True)


def test_a_zero_stays_zero_and_a_group_of_zeros_is_one() -> None:
    weight = torch.randn(4, 64)
    weight[:, ::5] = 0
    weight[2, :32] = 0
    for groups in (INT4, INT8):
        restored = round_to_groups(weight, groups).dequantize()
        assert (restored[weight == 0] == 0).all()


def test_eight_bits_are_within_half_a_step() -> None:
    weight = torch.randn(50, 64)
    rounded = round_to_groups(weight, INT8)
    step = rounded.scales.float().repeat_interleave(32, dim=1)
    assert ((rounded.dequantize() - weight).abs() <= 0.5005 * step).all()
    assert rounded.zeros is not None
    assert (rounded.zeros == 128).all()


def test_clipping_pays_where_one_weight_is_far_out() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    weight[:, 0] = 6.0
    rounded = round_to_groups(weight, INT4)
    widest = ((weight.amax(1) - weight.amin(1)) / 15).half()
    assert (rounded.scales[:, 0] < widest).any()


@pytest.mark.parametrize("tied", [False, True])
def test_int4_serves_what_its_rounded_weights_stand_for(tmp_path: Path, tied: bool) -> None:
    """A checkpoint of the dequantised weights gives the same logits."""
    path = _save(tmp_path / "float", tie_word_embeddings=tied)
    config, source = open_checkpoint(path)
    rounded = RoundedWeights(source, config, 32)
    tensors = load_file(path / "model.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    head = TABLE if tied else "lm_head.weight"
    for name, info in rounded.tensors.items():
        expected = 8 if name == head else 4 if "_proj" in name else None
        assert (info.groups.bits if info.groups else None) == expected, name
        if info.groups is not None:
            tensors[name] = rounded.load_groups(name, range(info.shape[0])).dequantize()
    if tied:  # rows are looked up in the head
        tensors["lm_head.weight"] = tensors[TABLE].clone()
    restored = tmp_path / "restored"
    restored.mkdir()
    values = json.loads((path / "config.json").read_text())
    (restored / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    save_file(tensors, restored / "model.safetensors")

    model = _load(path, quantization="int4", quantization_group_size=32)

    assert model.quantization == "int4 in groups of 32, head int8 in groups of 32"
    assert torch.equal(_logits(model), _logits(_load(restored)))
    assert not torch.equal(_logits(model), _logits(_load(path)))


def test_rows_that_are_no_whole_groups_take_smaller_ones_or_stay_dense(tmp_path: Path) -> None:
    # 64 inputs of most, 96 of the down projection.
    config, source = open_checkpoint(_save(tmp_path / "a"))
    tensors = RoundedWeights(source, config, 64).tensors
    sizes = {info.groups.group_size for info in tensors.values() if info.groups is not None}
    assert sizes == {64, 32}
    assert tensors[DOWN].groups == dataclasses.replace(INT4, group_size=32)
    narrow = _save(tmp_path / "b", hidden_size=40, num_attention_heads=4, num_key_value_heads=2)
    config, source = open_checkpoint(narrow)
    tensors = RoundedWeights(source, config, 64).tensors
    assert [name for name, info in tensors.items() if info.groups is not None] == [
        name for name in tensors if "down_proj" in name
    ]


def test_ranks_round_to_the_same_integers(directory: Path) -> None:
    config, source = open_checkpoint(directory)
    rounded = RoundedWeights(source, config, 32)
    whole = rounded.load_groups(DOWN, range(64))
    part = rounded.load_groups(DOWN, range(8, 40), range(32, 96))
    assert torch.equal(part.dequantize(), whole.dequantize()[8:40, 32:96])


def test_the_fingerprint_tells_settings_apart(directory: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"quantization": "int4"},
        {"quantization": "int4", "quantization_group_size": 32},
    ]
    fingerprints = [_load(directory, **each).fingerprint for each in options]
    assert len(set(fingerprints)) == 3
    assert _load(directory, quantization="none").fingerprint == fingerprints[0]


def test_weights_that_are_not_finite_cannot_be_rounded(tmp_path: Path, directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[DOWN][3, 5] = float("inf")
    (tmp_path / "config.json").symlink_to(directory / "config.json")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"down_proj.* not finite.*--quantization none"):
        _load(tmp_path, quantization="int4")


@pytest.mark.parametrize("type_name", ["Q4_1", "Q5_0"])
def test_int4_of_a_quantised_checkpoint_is_refused(tmp_path: Path, type_name: str) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    path = tmp_path / "model.gguf"
    matrix_type = gguf.GGMLQuantizationType[type_name]
    write_gguf(path, model.config, dict(model.state_dict()), matrix_type=matrix_type)
    with pytest.raises(ModelLoadError, match=rf"stores .* as {type_name}: leave the flag out") as e:
        _load(path, quantization="int4")
    assert "\n" not in str(e.value)
    _, source = open_checkpoint(path)
    assert draft_quantization("int4", source) == "auto"
    assert draft_quantization("none", source) == "none"


def test_kernels_without_integers_get_the_floats(directory: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    path = tmp_path / "model.gguf"
    matrix_type = gguf.GGMLQuantizationType.Q4_1
    write_gguf(path, model.config, dict(model.state_dict()), matrix_type=matrix_type)
    floats = _load(path, quantization="none")
    for bits in ((), (8,)):
        kernels = dataclasses.replace(dequantising_kernels(), quantized_bits=frozenset(bits))
        loaded = _load(path, kernels)
        assert loaded.quantization == "none"
        assert torch.equal(_logits(loaded), _logits(floats))


def test_a_draft_model_that_is_dense_is_rounded_with_its_target(directory: Path) -> None:
    _, source = open_checkpoint(directory)
    assert draft_quantization("int4", source) == "int4"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "flags", [[], ["--quantization", "int4"], ["--quantization-group-size", "32"]]
)
def test_the_plan_counts_codes_scales_and_offsets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool, flags: list[str]
) -> None:
    path = _save(tmp_path, tie_word_embeddings=tied)
    if flags:
        flags = ["--quantization", "int4", *flags]
    assert plan.main(["--model", str(path), "--json", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    config, source = open_checkpoint(path)
    size = 32 if "32" in flags else 64
    if flags:
        source = choose_weights(source, config, "int4", size, bits=(4, 8))  # type: ignore[arg-type]  # one of two
    expected = 0
    for name, info in source.tensors.items():
        if info.groups is None:
            expected += 2 * info.shape[0] * (1 if len(info.shape) == 1 else info.shape[1])
            continue
        weight = source.load_groups(name, range(info.shape[0]))
        expected += weight.codes.numel() * weight.bits // 8 + weight.scales.nbytes
        if weight.bits == 4:  # else one zero for all
            assert weight.zeros is not None
            expected += weight.zeros.nbytes
    if tied and not flags:  # laid out as the head
        expected += 2 * 96 * 64
    assert printed["weight_bytes"] == expected
    assert ("int4" in printed["quantization"]) == bool(flags)
