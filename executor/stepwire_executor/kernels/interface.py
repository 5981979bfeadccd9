"""What the model and the sampler ask of a device: one callable an operation.

A `Kernels` is chosen once, at start (`select_kernels`), and passed on; nothing looks a device
up later. Every operation has a folder beside this file with its torch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kv_cache import KVCache, KVPages


class RMSNorm(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise rows by their root mean square.

        x: [..., size]; weight: [size]. With residual (shape of x): residual += x first, in
        place, and the sum is what is normalised. Returns a new tensor in x's dtype. Statistics
        are float32.
        """
        ...


class RopeAndWriteKV(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos_sin: Tensor,
        pages: KVPages,
        batch: StepBatch,
    ) -> None:
        """Rotate query (in place) and key, then store key and value in their pages.

        query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads,
        head_dim]; each may be a strided view with unit stride in head_dim.
        cos_sin: [max_positions, rotary_dim] float32, cosines then sines; neox order: element i
        pairs with i + rotary_dim / 2. batch.slot_mapping of -1 stores nothing.
        fp8 pages with a scale a token and head: query and key are also mixed by an orthogonal
        matrix, which leaves their products as they are (`mix` of the reference); before that
        pages.key_offset, where there is one, is taken from the key; scale =
        max(amax, tiny) / 448, rounded up to bfloat16, and NaN where the vector is not finite,
        which then reads as NaN throughout. With static scales nothing is mixed, what they do not
        reach saturates at 448 of them, and what is not finite becomes NaN.
        """
        ...


class PagedAttention(Protocol):
    def __call__(
        self,
        query: Tensor,
        pages: KVPages,
        batch: StepBatch,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attend each query causally to its sequence's cached keys.

        query: [num_tokens, num_heads, head_dim]; returns the same shape and dtype, contiguous.
        Query head h reads KV head h // (num_heads // num_kv_heads). A window of w sees the
        query's own token and w - 1 before it. The result of a row depends on its sequence's
        tokens only, bit for bit: not on other rows, chunking or the placement of blocks.
        """
        ...


class SiluAndMul(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """silu(x[:, :size]) * x[:, size:]; x: [num_tokens, 2 * size]."""
        ...


class PackedWeight(Protocol):
    """A linear layer's weight in the layout that a device multiplies fastest."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class PackWeight(Protocol):
    def __call__(self, weight: Any, sum_unit: int | None = None) -> PackedWeight:
        """Lay weight, [out_features, in_features] in the dtype to compute in, out for `linear`.

        Or a GroupQuantized, or a tuple of both kinds: weights one below the other.
        sum_unit: the products of so many neighbouring inputs are summed on their own, before
        their sums are added up. A weight of some of the units then gives the same sums, bit for
        bit; only where `Kernels.summand_dtype` is wider than float32, else it changes nothing.
        """
        ...


class Linear(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x @ weight.T + bias; x: [num_rows, in_features]; returns [num_rows, out_features].

        weight is what pack_weight made. Accumulates in float32, units of sums as pack_weight
        says. A row's result does not depend on the number of rows, nor an element on the weight's
        other outputs, bit for bit, where `Kernels.is_row_invariant`.
        """
        ...


class QuantizedRows(Protocol):
    def __call__(self, weight: Any, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of some outputs, dequantised in float32 and rounded to dtype.

        weight is what pack_weight made of one GroupQuantized; rows: [num_rows] int64; returns
        [num_rows, in_features]. Raises IndexError if a row is not an output.
        """
        ...


class LinearOperands(Protocol):
    """A linear layer, or several that share their input, stacked by outputs."""

    @property
    def weight(self) -> PackedWeight: ...
    @property
    def bias(self) -> Tensor | None: ...


class LayerOperands(Protocol):
    """What one layer of a decoder needs besides its input; see `model.layers.DecoderLayer`."""

    @property
    def input_norm(self) -> Tensor: ...
    @property
    def qkv(self) -> LinearOperands: ...
    @property
    def query_norm(self) -> Tensor | None: ...
    @property
    def key_norm(self) -> Tensor | None: ...
    @property
    def attention_output(self) -> LinearOperands: ...
    @property
    def mlp_norm(self) -> Tensor: ...
    @property
    def gate_up(self) -> LinearOperands: ...
    @property
    def down(self) -> LinearOperands: ...
    @property
    def sliding_window(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderStack:
    """The layers of a decoder between its embedding and its head."""

    layers: Sequence[LayerOperands]
    """In order, at least one."""
    final_norm: Tensor
    """[hidden_size]."""
    cos_sin: Tensor
    """[max_positions, rotary_dim] float32; see RopeAndWriteKV."""
    dtype: torch.dtype
    """Of activations."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_scale: float
    """Of scores."""


class LayerProgram(Protocol):
    def __call__(self, residual: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        """Run all layers: write every token's KV, return the logit rows' normalised states.

        residual: [num_tokens, hidden_size] embeddings in the stack's dtype, overwritten. Returns
        [num_logit_rows, hidden_size], the bits that the operations give one by one. Raises
        ValueError, before anything is written, where the batch or the cache do not fit.
        """
        ...


class MakeLayerProgram(Protocol):
    def __call__(self, stack: DecoderStack) -> LayerProgram | None:
        """Prepare a stack, whose tensors are kept; None where one by one is the only way."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """How to sample each of num_rows rows of logits; tensors of the logits' device."""

    temperature: Tensor
    """[num_rows] float32, 0 is greedy."""
    top_k: Tensor
    """[num_rows] int32, 0 is all."""
    top_p: Tensor
    """[num_rows] float32."""
    min_p: Tensor
    """[num_rows] float32."""
    seeds: Tensor
    """[num_rows] int64, the bits of an unsigned seed."""
    positions: Tensor
    """[num_rows] int64, place in its sequence of the token to sample."""
    streams: Tensor
    """[num_rows] int64, second key of the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    token_ids: Tensor
    """[num_rows] int64."""
    is_finite: Tensor
    """[num_rows] bool; False where the logits hold NaN or no token could be sampled."""


class Sample(Protocol):
    def __call__(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        """Choose a token a row: argmax of logits / temperature + Gumbel noise.

        logits: [num_rows, vocab_size] float32, may be overwritten. Noise is a pure function of
        (seed, stream, position, token id), Philox4x32-10. Order: temperature, top-k, min-p,
        top-p.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The operations of one device."""

    name: str
    """For logs and Describe: "native avx512_bf16", "reference"."""
    is_row_invariant: bool
    """Whether every operation's row result is independent of the other rows, bit for bit."""
    is_capturable: bool
    """Whether every launch is fixed by shapes and nothing waits for the device: what a captured
    graph needs."""
    rms_norm: RMSNorm
    rope_and_write_kv: RopeAndWriteKV
    paged_attention: PagedAttention
    silu_and_mul: SiluAndMul
    pack_weight: PackWeight
    linear: Linear
    quantized_bits: frozenset[int] = frozenset()
    """Of the codes of GroupQuantized weights that pack_weight takes; other weights are dense."""
    summand_dtype: torch.dtype
    """What ranks that share a layer's inputs have `linear` return, to add. float64 holds sums of
    float32 so exactly that, rounded to float32, their total does not show in which order they
    were added: it errs only between summands some 2^26 apart, by 2^-53."""
    sample: Sample
    quantized_rows: QuantizedRows | None = None
    """None where packed weights in integers cannot be read back."""
    make_layer_program: MakeLayerProgram | None = None
    """Where one call over all layers costs less than a call an operation."""
