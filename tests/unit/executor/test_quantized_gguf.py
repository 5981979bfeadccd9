"""GGUF weights in integers are what ggml's floats are, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized, stacked
from stepwire_executor.model import load_model
from stepwire_executor.model.gguf_config import read_gguf_config
from stepwire_executor.model.weights.dequantize import FORMATS
from stepwire_executor.model.weights.gguf import GGUFWeights
from stepwire_executor.model.weights.gguf_file import GGUFFile
from stepwire_executor.model.weights.gguf_groups import GROUP_FORMATS
from support.dequantising_kernels import dequantising_kernels
from support.gguf_files import write_gguf
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


def _bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether all bits agree but for those of NaN."""
    is_nan = right.isnan()
    return torch.equal(left.isnan(), is_nan) and torch.equal(
        left[~is_nan].view(torch.int32), right[~is_nan].view(torch.int32)
    )


def _write(path: Path, type_name: str, **more: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**COMMON, **more)
    )
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    matrix_type = gguf.GGMLQuantizationType[type_name]
    write_gguf(path, model.config, state, matrix_type=matrix_type)
    return state


def _open(path: Path) -> GGUFWeights:
    file = GGUFFile(path)
    return GGUFWeights(file, read_gguf_config(file))


@pytest.mark.parametrize("type_name", GROUP_FORMATS)
def test_any_bytes_dequantise_to_the_bits_of_the_package(type_name: str) -> None:
    matrix_type = gguf.GGMLQuantizationType[type_name]
    quant_format = FORMATS[matrix_type]
    num_bytes = quant_format.block.itemsize
    raw = np.random.default_rng(matrix_type).integers(0, 256, (9, 40 * num_bytes), dtype=np.uint8)
    blocks = raw.view(quant_format.block)
    described, to_groups = GROUP_FORMATS[type_name]

    with np.errstate(all="ignore"):  # random scales may be infinite or NaN
        groups = to_groups(blocks)
        expected = gguf.dequantize(raw, matrix_type)
    assert _bits_equal(groups.dequantize(), torch.from_numpy(expected.copy()))
    assert (groups.bits, groups.group_size) == (described.bits, described.group_size)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0"])
def test_every_part_of_a_matrix_is_that_part_of_its_floats(tmp_path: Path, type_name: str) -> None:
    """Rows of queries and keys included, which the file interleaves."""
    _write(tmp_path / "model.gguf", type_name)
    weights = _open(tmp_path / "model.gguf")
    matrices = [name for name, info in weights.tensors.items() if len(info.shape) == 2]
    assert all(weights.tensors[name].groups is not None for name in matrices)
    for name in matrices:
        num_rows, num_columns = weights.tensors[name].shape
        whole = torch.empty(num_rows, num_columns)
        weights.load_into(name, whole)
        for rows in (range(num_rows), range(3, num_rows - 2)):
            for columns in (None, range(32, num_columns), range(32)):
                part = weights.load_groups(name, rows, columns).dequantize()
                kept = slice(None) if columns is None else slice(columns.start, columns.stop)
                assert torch.equal(part, whole[rows.start : rows.stop, kept]), (name, rows, columns)


def test_columns_that_cut_a_group_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", "Q4_1")
    weights = _open(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="cut groups of 32"):
        weights.load_groups("model.layers.0.self_attn.o_proj.weight", range(64), range(16, 64))


def test_a_block_of_several_groups_may_be_parted_between_them() -> None:
    type_name = "Q4_K"
    quant_format = FORMATS[gguf.GGMLQuantizationType[type_name]]
    raw = np.random.default_rng(1).integers(0, 256, (5, quant_format.block.itemsize))
    _, to_groups = GROUP_FORMATS[type_name]
    with np.errstate(all="ignore"):
        whole = to_groups(raw.astype(np.uint8).view(quant_format.block))
    part = whole.columns(64, 224)
    assert _bits_equal(part.dequantize(), whole.dequantize()[:, 64:224])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0"])
def test_logits_of_a_file_in_integers_are_those_of_its_floats(
    tmp_path: Path, type_name: str, tied: bool
) -> None:
    path = tmp_path / "model.gguf"
    _write(path, type_name, tie_word_embeddings=tied)
    logits = {}
    for quantization in ("auto", "none"):
        model = load_model(
            path,
            dtype=torch.float32,
            kernels=dequantising_kernels(),
            device=CPU,
            quantization=quantization,
        )
        bits = 8 if type_name == "Q8_0" else 4
        expected = f"int{bits} in groups of 32, head int{bits} in groups of 32"
        assert model.quantization == ("none" if quantization == "none" else expected)
        work = [(SteppedSequence(list(TOKENS)), len(TOKENS))]
        logits[quantization] = ModelSteps(model).step(work, all_rows=True)
    assert torch.equal(logits["auto"], logits["none"])


def test_parts_of_one_kind_stack_and_others_do_not() -> None:
    def part(bits: int, *, has_minimums: bool) -> GroupQuantized:
        offsets = torch.rand(4, 2).half() if has_minimums else torch.full((4, 2), 8).byte()
        return GroupQuantized(
            codes=torch.randint(0, 16, (4, 64), dtype=torch.uint8),
            bits=4 if bits == 4 else 8,
            group_size=32,
            scales=torch.rand(4, 2).half(),
            minimums=offsets if has_minimums else None,
            zeros=None if has_minimums else offsets,
        )

    for has_minimums in (False, True):
        parts = [part(4, has_minimums=has_minimums) for _ in range(3)]
        together = stacked(parts)
        assert together is not None
        assert torch.equal(together.dequantize(), torch.cat([each.dequantize() for each in parts]))
    assert stacked([part(4, has_minimums=True), part(4, has_minimums=False)]) is None
    assert stacked([part(4, has_minimums=True), part(8, has_minimums=True)]) is None
