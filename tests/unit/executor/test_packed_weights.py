"""Weights packed by GPTQ, AWQ and compressed-tensors are what those formats' libraries say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from golden.packed_weights import Case, read_cases
from safetensors.torch import load_file, save_file
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.hf_config import read_hf_config, read_hf_quantization
from stepwire_executor.model.loader import open_checkpoint
from stepwire_executor.model.weights.packed import PackedWeights
from stepwire_executor.model.weights.packed_words import group_order, unpack_words
from stepwire_executor.model.weights.safetensors import SafetensorsWeights
from support.dequantising_kernels import dequantising_kernels
from support.model_steps import CPU, ModelSteps, SteppedSequence
from support.packed_checkpoints import PACKINGS, Packing, pack_checkpoint
from support.rank_threads import run_ranks
from torch import Tensor

CASES = read_cases()
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
MODULE = "model.layers.0.self_attn.q_proj"
TOKENS = [5, 17, 80, 3, 44, 95, 0, 17, 61]


def _write(path: Path, tensors: dict[str, Tensor], quantization: Any, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    values = transformers.LlamaConfig(**{**CONFIG, **config}).to_dict()
    (path / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors"
    )
    return path


def _case(path: Path, case: Case) -> tuple[PackedWeights, ModelConfig, Tensor]:
    """The matrix of a case, as the query projection of a model that is all else missing."""
    quantization, tensors = case
    stored = {f"{MODULE}.{name}": each for name, each in tensors.items() if name != "expected"}
    expected = tensors["expected"]
    sizes = {"num_attention_heads": 2, "head_dim": len(expected) // 2, "hidden_size": 64}
    directory = _write(path, stored, quantization, **sizes)
    config, described = read_hf_config(directory), read_hf_quantization(directory)
    assert described is not None
    files = SafetensorsWeights(directory, has_integers=True)
    return PackedWeights(files, config, described), config, expected


@pytest.mark.parametrize("name", CASES)
def test_a_librarys_matrix_dequantises_to_the_librarys_bits(tmp_path: Path, name: str) -> None:
    weights, _, expected = _case(tmp_path, CASES[name])
    rows = range(len(expected))
    groups = weights.load_groups(f"{MODULE}.weight", rows)
    assert torch.equal(groups.dequantize().to(expected.dtype), expected)
    out = torch.full(expected.shape, float("nan"), dtype=expected.dtype)
    weights.load_into(f"{MODULE}.weight", out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", CASES)
def test_any_rows_and_whole_groups_of_columns_are_those_of_the_whole(
    tmp_path: Path, name: str
) -> None:
    weights, _, expected = _case(tmp_path, CASES[name])
    matrix = f"{MODULE}.weight"
    for rows in (range(3, 11), range(8, 16), range(15, 16)):
        part = weights.load_groups(matrix, rows)
        kept = expected[rows.start : rows.stop]
        assert torch.equal(part.dequantize().to(expected.dtype), kept)
        out = torch.empty(len(rows), 9, dtype=expected.dtype)
        weights.load_into(matrix, out, rows.start, 21)
        assert torch.equal(out, kept[:, 21:30])
        if "activation order" not in name:
            for columns in (range(32), range(32, 64)):
                half = weights.load_groups(matrix, rows, columns).dequantize()
                assert torch.equal(half.to(expected.dtype), kept[:, columns.start : columns.stop])


def test_the_second_gptq_format_stores_the_zero_points_themselves(tmp_path: Path) -> None:
    config, tensors = CASES["gptq int4 asymmetric"]
    second = tensors | {"qzeros": tensors["qzeros"] + 0x11111111}
    weights, _, expected = _case(tmp_path, (config | {"checkpoint_format": "gptq_v2"}, second))
    part = weights.load_groups(f"{MODULE}.weight", range(32)).dequantize()
    assert torch.equal(part.half(), expected)


def test_a_zero_point_that_borrowed_from_its_neighbour_gets_it_back(tmp_path: Path) -> None:
    """The first GPTQ format subtracts 1 from whole words, in which some zero points are 0."""
    config, tensors = CASES["gptq int4 asymmetric"]
    zeros = torch.randint(0, 16, (2, 32), generator=torch.Generator().manual_seed(3))
    zeros[0, :9] = torch.tensor([0, 3, 0, 0, 15, 0, 1, 0, 0])
    words = torch.zeros(2, 4, dtype=torch.int64)
    for column in range(32):
        words[:, column // 8] |= zeros[:, column] << (4 * (column % 8))
    words = (words - 0x11111111) % (1 << 32)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    weights, _, _ = _case(tmp_path, (config, tensors | {"qzeros": signed}))
    stored = weights.load_groups(f"{MODULE}.weight", range(32)).zeros
    assert stored is not None
    assert torch.equal(stored.long(), zeros.t())


def test_ranks_that_would_cut_groups_in_activation_order_are_refused(tmp_path: Path) -> None:
    weights, _, _ = _case(tmp_path, CASES["gptq int4 in activation order"])
    with pytest.raises(ModelLoadError, match=r"q_proj'.*desc_act.*--quantization none") as caught:
        weights.load_groups(f"{MODULE}.weight", range(4), range(32))
    assert "\n" not in str(caught.value)


def test_groups_in_another_order_that_ranks_keep_whole_are_shared() -> None:
    order = group_order(torch.tensor([1] * 32 + [0] * 32), 32, "g_idx")
    assert order is not None
    assert order.tolist() == [*range(32, 64), *range(32)]


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_the_lowest_code_first(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 64 // bits))
    shifts = torch.arange(0, 32, bits)
    words = (codes.view(3, 2, -1) << shifts).sum(dim=2)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    assert torch.equal(unpack_words(signed, bits).long(), codes)
    assert torch.equal(unpack_words(signed.t().contiguous().t(), bits).long(), codes)


# Whole checkpoints, packed by code of the tests.


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def _load(path: Path, **options: Any) -> LoadedModel:
    return load_model(
        path, dtype=torch.float32, kernels=dequantising_kernels(), device=CPU, **options
    )


def _logits(model: LoadedModel) -> Tensor:
    return ModelSteps(model).step([(SteppedSequence(list(TOKENS)), len(TOKENS))], all_rows=True)


def _checkpoint(path: Path, state: dict[str, Tensor], packing: Packing) -> tuple[Path, Path]:
    """Packed, and the same dequantised."""
    packed = pack_checkpoint(state, packing)
    values = transformers.LlamaConfig(**CONFIG).to_dict()
    dense = path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(values))
    save_file(packed.dequantised, dense / "model.safetensors")
    return _write(path / "packed", packed.tensors, packed.quantization), dense


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_packed_checkpoint_gives_the_logits_of_its_dequantised_weights(
    tmp_path: Path, state: dict[str, Tensor], packing: Packing
) -> None:
    """The head, which is in the list of what to leave, is dense in both."""
    packed, dense = _checkpoint(tmp_path, state, packing)
    expected = _logits(_load(dense))
    model = _load(packed)
    size = "rows" if packing.group_size is None else f"groups of {packing.group_size}"
    assert model.quantization == f"int{packing.bits} in {size}"
    assert torch.equal(_logits(model), expected)
    dequantised = _load(packed, quantization="none")
    assert dequantised.quantization == "none"
    assert torch.equal(_logits(dequantised), expected)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_ranks_share_a_packed_checkpoint_or_refuse_it_in_one_line(
    tmp_path: Path, state: dict[str, Tensor], packing: Packing
) -> None:
    packed, dense = _checkpoint(tmp_path, state, packing)
    expected = _logits(_load(dense))
    if packing.has_order:
        with pytest.raises(ModelLoadError, match="use --tensor-parallel-size 1"):
            run_ranks(2, lambda group: _load(packed, group=group))
        options: dict[str, Any] = {"quantization": "none"}
    else:
        options = {}
    by_rank = run_ranks(2, lambda group: _logits(_load(packed, group=group, **options)))
    assert torch.equal(by_rank[0], by_rank[1])
    torch.testing.assert_close(by_rank[0], expected, atol=1e-4, rtol=0)


def test_int4_of_a_packed_checkpoint_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    packed, _ = _checkpoint(tmp_path, state, PACKINGS[0])
    with pytest.raises(ModelLoadError, match=r"stores .* as gptq: leave the flag out"):
        _load(packed, quantization="int4")


def test_the_plan_of_a_packed_checkpoint_is_read_from_headers(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    packed, _ = _checkpoint(tmp_path, state, PACKINGS[0])
    _, source = open_checkpoint(packed)
    info = source.tensors[f"{MODULE}.weight"]
    assert info.groups is not None
    assert info.shape == (128, 64)
    assert info.groups.packed_bytes(*info.shape) == 128 * 32 + 128 * 2 * 2


def test_zero_biases_that_the_config_does_not_know_are_left_out(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    packed = pack_checkpoint(state, PACKINGS[0])
    for value in (0.0, 1.0):
        tensors = packed.tensors | {f"{MODULE}.bias": torch.full((128,), value)}
        path = _write(tmp_path / f"{value}", tensors, packed.quantization)
        if value:
            with pytest.raises(ModelLoadError, match=r"q_proj\.bias', which a Llama"):
                _load(path)
        else:
            assert _load(path).quantization.startswith("int4")


Change = Any


def _without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def _with(name: str, change: Change) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _swap_one(order: Tensor) -> Tensor:
    order = order.clone()
    order[0] = 1 - order[0]
    return order


BROKEN: dict[str, tuple[int, Change, str]] = {
    "no scales": (0, _without(f"{MODULE}.scales"), r"q_proj\.scales' is missing .* gptq"),
    "no zeros": (0, _without(f"{MODULE}.qzeros"), r"q_proj\.qzeros' is missing"),
    "no codes": (0, _without(f"{MODULE}.qweight"), r"q_proj\.weight' is missing"),
    "half the codes": (
        0,
        _with(f"{MODULE}.qweight", lambda words: words[:4]),
        r"q_proj\.qweight' has shape \[4, 128\] .* not \[128, 64\] in 4 bits in groups of 32",
    ),
    "codes of a vector": (
        0,
        _with(f"{MODULE}.qweight", lambda words: words.flatten()),
        r"qweight' has shape \[1024\]",
    ),
    "scales of other groups": (
        0,
        _with(f"{MODULE}.scales", lambda scales: scales[:1]),
        r"its scales \[1, 128\], which is not",
    ),
    "zeros of other groups": (
        0,
        _with(f"{MODULE}.qzeros", lambda zeros: zeros[:1]),
        r"qzeros' has shape \[1, 16\], expected \[2, 16\]",
    ),
    "integer scales": (
        0,
        _with(f"{MODULE}.scales", lambda scales: scales.int()),
        "has type I32, but scales are F16",
    ),
    "float codes": (
        0,
        _with(f"{MODULE}.qweight", lambda words: words.float()),
        "has type F32, but integers are expected",
    ),
    "a group out of range": (
        2,
        _with(f"{MODULE}.g_idx", lambda groups: groups + 1),
        r"g_idx' names group 2 of 2",
    ),
    "a group too large": (
        2,
        _with(f"{MODULE}.g_idx", _swap_one),
        r"g_idx' gives group 0 3[13] inputs instead of 32",
    ),
    "a shape of another": (
        4,
        _with(f"{MODULE}.weight_shape", lambda shape: shape + 1),
        r"weight_shape' says \[129, 65\], but the config calls for \[128, 64\]",
    ),
    "no zeros of asymmetric weights": (
        5,
        _without(f"{MODULE}.weight_zero_point"),
        r"weight_zero_point' is missing .* compressed-tensors",
    ),
    "an integer that belongs nowhere": (
        0,
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).int()}),
        r"'model.norm.weight' has type I32 but is not packed",
    ),
    "a matrix twice": (
        0,
        lambda tensors: tensors.update({f"{MODULE}.weight": torch.ones(128, 64)}),
        r"q_proj\.weight' is stored both packed and as it is",
    ),
    "a module of no layer": (
        0,
        lambda tensors: tensors.update({"model.extra.qweight": torch.ones(8, 64).int()}),
        r"packs 'model\.extra', which a LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_packed_checkpoint_is_one_clear_line(
    tmp_path: Path, state: dict[str, Tensor], name: str
) -> None:
    index, change, message = BROKEN[name]
    packed = pack_checkpoint(state, PACKINGS[index])
    change(packed.tensors)
    path = _write(tmp_path / "packed", packed.tensors, packed.quantization)
    with pytest.raises(ModelLoadError, match=message) as caught:
        _load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(tmp_path) not in text
    assert text.count("get ") == 1


COMPRESSED = PACKINGS[4]
UNSUPPORTED: list[tuple[Packing, dict[str, Any], str]] = [
    (PACKINGS[0], {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported, only gptq"),
    (PACKINGS[0], {"quant_method": None}, "'unknown' is not supported"),
    (PACKINGS[0], {"bits": 3}, "bits 3 is not supported, only 4 and 8"),
    (PACKINGS[0], {"bits": "4"}, "bits must be a positive integer, is '4'"),
    (PACKINGS[0], {"group_size": 16}, "group_size 16 is not supported, only multiples of 32"),
    (PACKINGS[0], {"group_size": 0}, "group_size 0 is not supported"),
    (PACKINGS[0], {"group_size": 64}, "which is not .* in 4 bits in groups of 64"),
    (PACKINGS[0], {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    (PACKINGS[0], {"pack_dtype": "int64"}, "pack_dtype 'int64' is not supported"),
    (PACKINGS[3], {"version": "gemv"}, "version 'gemv' is not supported, only gemm"),
    (PACKINGS[3], {"bits": 8}, "bits 8 is not supported, only 4 with awq"),
    (COMPRESSED, {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not"),
    (COMPRESSED, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not"),
    (COMPRESSED, {"transform_config": {"config_groups": {"a": {}}}}, "transform_config is not"),
]
GROUP: list[tuple[dict[str, Any], str]] = [
    ({"input_activations": {"num_bits": 8}}, "input_activations are not supported, only weights"),
    (
        {"format": "int-quantized", "weights": {"num_bits": 8, "strategy": "channel"}},
        "format 'int-quantized' is not supported, only pack-quantized",
    ),
    ({"weights": {"num_bits": 8, "type": "float"}}, "type of weights 'float' is not supported"),
    ({"weights": {"num_bits": 4, "strategy": "tensor"}}, "strategy 'tensor' is not supported"),
    ({"weights": {"num_bits": 4, "strategy": "group"}}, "group_size must be the size of a group"),
    ({"weights": {"num_bits": 4, "group_size": 48}}, "group_size 48 is not supported"),
    ({"weights": {"num_bits": 2, "group_size": 32}}, "num_bits 2 is not supported"),
]


@pytest.mark.parametrize(
    ("packing", "change", "message"),
    UNSUPPORTED
    + [(COMPRESSED, {"config_groups": {"group_0": each}}, text) for each, text in GROUP],
    ids=[str(change) for _, change, _ in UNSUPPORTED] + [str(change) for change, _ in GROUP],
)
def test_what_is_not_supported_is_one_line_that_names_what_is(
    tmp_path: Path, state: dict[str, Tensor], packing: Packing, change: Any, message: str
) -> None:
    packed = pack_checkpoint(state, packing)
    path = _write(tmp_path / "packed", packed.tensors, packed.quantization | change)
    with pytest.raises(ModelLoadError, match=message) as caught:
        _load(path)
    assert "\n" not in str(caught.value)


def test_single_matrices_may_differ_where_gptq_says_so(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    four, eight = (
        pack_checkpoint(state, dataclasses.replace(PACKINGS[0], bits=bits)) for bits in (4, 8)
    )
    mixed = {
        name: eight.tensors[name] if ".o_proj." in name else tensor
        for name, tensor in four.tensors.items()
    }
    with pytest.raises(ModelLoadError, match="in 4 bits in groups of 32"):
        _load(_write(tmp_path / "a", mixed, four.quantization))
    overrides = {"dynamic": {r"+:.*o_proj": {"bits": 8}}}
    model = _load(_write(tmp_path / "b", mixed, four.quantization | overrides))
    assert model.quantization == "int4 in groups of 32 and int8 in groups of 32"
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(transformers.LlamaConfig(**CONFIG).to_dict()))
    tensors = {
        name: eight.dequantised[name] if ".o_proj." in name else tensor
        for name, tensor in four.dequantised.items()
    }
    save_file(tensors, dense / "model.safetensors")
    assert torch.equal(_logits(model), _logits(_load(dense)))


def test_a_config_that_only_quantises_the_kv_cache_packs_nothing(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    path = _write(tmp_path / "dense", state, quantization)
    assert _load(path).quantization == "none"
    assert len(load_file(path / "model.safetensors")) == len(state)
