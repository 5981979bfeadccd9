"""Weights from a GGUF file, under their Hugging Face names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.weights.gguf_file import GGUFFile, GGUFTensor
from stepwire_executor.model.weights.gguf_groups import GROUP_FORMATS
from stepwire_executor.model.weights.source import GroupFormat, TensorInfo

_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP_LEVEL_TENSOR = re.compile(r"(\w+)\.(weight|bias)")
_FACTORS = "rope_freqs.weight"
_ELEMENTS_A_CHUNK = 1 << 15
"""Dequantised at a time: a float32 chunk of this size stays in a core's cache."""


class GGUFWeights:
    """A WeightSource over a GGUF file."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        """config tells how query and key rows were permuted. Raises ModelLoadError."""
        self._file = file
        self._by_name = {
            hf_name(name, file.name): tensor
            for name, tensor in file.tensors.items()
            if name != _FACTORS
        }
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                shape=tensor.shape,
                dtype=tensor.format.name,
                num_bytes=tensor.num_bytes,
                groups=_group_format(tensor),
            )
            for name, tensor in self._by_name.items()
        }
        # Files of architecture "llama" interleave the rotary halves of every query and key head.
        self._interleaved_heads: dict[str, int] = {}
        if file.metadata.get("general.architecture") == "llama":
            self._interleaved_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}

    def load_into(self, name: str, out: Tensor, first_row: int = 0, first_column: int = 0) -> None:
        """See WeightSource; of columns, the blocks that they lie in are dequantised."""
        tensor = self._by_name[name]
        rows = self._in_hf_order(name, self._file.blocks(tensor))
        if len(tensor.shape) == 1:  # small, and its rows are its elements
            vector = np.empty(tensor.shape, np.float32)
            _dequantize(tensor, rows, vector)
            vector = self._in_hf_order(name, vector)
            out.copy_(torch.from_numpy(vector[first_row : first_row + len(out)]))
            return
        block_size = tensor.format.num_elements
        first_block, offset = divmod(first_column, block_size)
        last_block = math.ceil((first_column + out.shape[1]) / block_size)
        rows = rows[first_row : first_row + len(out), first_block:last_block]
        width = rows.shape[1] * block_size
        rows_a_chunk = max(1, _ELEMENTS_A_CHUNK // width)
        buffer = np.empty((min(rows_a_chunk, len(rows)), width), np.float32)
        for start in range(0, len(rows), rows_a_chunk):
            chunk = rows[start : start + rows_a_chunk]
            target = out[start : start + len(chunk)]
            if out.dtype == torch.float32 and width == out.shape[1]:
                _dequantize(tensor, chunk, target.numpy())
            else:
                values = buffer[: len(chunk)]
                _dequantize(tensor, chunk, values)
                target.copy_(torch.from_numpy(values[:, offset : offset + out.shape[1]]))

    def load_groups(self, name: str, rows: range, columns: range | None = None) -> GroupQuantized:
        """See WeightSource."""
        tensor = self._by_name[name]
        blocks = self._in_hf_order(name, self._file.blocks(tensor))[rows.start : rows.stop]
        _, to_groups = GROUP_FORMATS[tensor.format.name]
        columns = columns or range(tensor.shape[1])
        # A block of some formats holds several groups.
        block_size = tensor.format.num_elements
        first_block, last_block = columns.start // block_size, -(-columns.stop // block_size)
        with np.errstate(all="ignore"):  # as in _dequantize
            part = to_groups(blocks[:, first_block:last_block])
        offset = first_block * block_size
        return part.columns(columns.start - offset, columns.stop - offset)

    def sample(self, name: str) -> bytes:
        """See WeightSource."""
        return self._file.sample(self._by_name[name], 64)

    def close(self) -> None:
        """See WeightSource."""
        self._file.close()

    def _in_hf_order(self, name: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Undo the interleaving of a query or key weight's rows, or of a bias's elements."""
        num_heads = self._interleaved_heads.get(name.split(".")[-2])
        is_one_row = rows.ndim == 2 and len(rows) == 1  # a bias that is still in blocks
        if num_heads is None or is_one_row:
            return rows
        if len(rows) % (2 * num_heads):
            raise ModelLoadError(
                f"{self._file.name}: tensor {name!r} has {len(rows)} rows, which "
                f"{num_heads} heads cannot share; download it again"
            )
        pairs = rows.reshape(num_heads, len(rows) // num_heads // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(rows.shape)


def _group_format(tensor: GGUFTensor) -> GroupFormat | None:
    known = GROUP_FORMATS.get(tensor.format.name)
    return None if known is None or len(tensor.shape) != 2 else known[0]


def _dequantize(tensor: GGUFTensor, blocks: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """Fill out, contiguous float32, from as many blocks as it takes."""
    with np.errstate(all="ignore"):  # a damaged scale may be infinite or NaN; so is the result
        tensor.format.dequantize(blocks.reshape(-1), out.reshape(-1, tensor.format.num_elements))


def hf_name(name: str, file_name: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises ModelLoadError where there is none."""
    if match := _LAYER_TENSOR.fullmatch(name):
        layer, module, kind = match.groups()
        if module in _IN_LAYER:
            return f"model.layers.{layer}.{_IN_LAYER[module]}.{kind}"
    elif match := _TOP_LEVEL_TENSOR.fullmatch(name):
        module, kind = match.groups()
        if module in _TOP_LEVEL:
            return f"{_TOP_LEVEL[module]}.{kind}"
    raise ModelLoadError(
        f"{file_name}: tensor {name!r} belongs to no supported architecture; "
        "supported: dense models of the llama, qwen2 and qwen3 architectures"
    )
