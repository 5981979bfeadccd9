"""One decoder for every model of the Llama family."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.interface import (
    DecoderStack,
    Kernels,
    LayerProgram,
    PackedWeight,
)
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.layers import (
    DecoderLayer,
    HostLayer,
    Piece,
    Projection,
    pack_layer,
    pack_weight,
    read_layer,
    read_pieces,
    read_tensor,
    read_weight,
)
from stepwire_executor.model.rope import cos_sin_table
from stepwire_executor.model.weights.expected import head_name, input_groups
from stepwire_executor.model.weights.source import WeightSource
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.parallel.sharding import ModelShard, has_own_head, make_shard

_READERS = 2
"""Threads that read and dequantise; numpy lets go of the interpreter lock meanwhile."""
_LAYERS_AHEAD = 3
"""Layers that may be read before they are packed: bounds the memory that loading adds."""
ProgressCallback = Callable[[str, float], None]
"""Called with a phase ("read weights", "pack weights") and the fraction of the whole load."""


class Decoder:
    """Turns a step's tokens into logits, keeping keys and values in a paged cache.

    A rank of a group holds its shard of the weights and of the cache's heads. Its summands of
    the residual stream stay wide until all are added, and every rank gets all logits, so that
    each samples the same tokens from the same bits. Sums are cut at the same places for any
    number of ranks, so these bits are those of one rank where kernels.summand_dtype is float64.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        on_progress: ProgressCallback,
        group: RankGroup = SINGLE_RANK,
    ) -> None:
        """Read and pack the weights of this rank.

        config: of the whole model. dtype: of weights and activations. max_model_len: positions
        that can be rotated. The source must have passed check_tensors. Raises ModelLoadError.
        """
        shard = make_shard(
            config,
            group.rank,
            group.world_size,
            has_own_head=has_own_head(config, device),
            input_groups=input_groups(source),
        )
        config = shard.local_config(config)
        self.config = config
        self.dtype = dtype
        self._kernels = kernels
        self._group = group
        self._shard = shard
        self._head_sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._attention_scale = config.head_dim**-0.5
        self._cos_sin = cos_sin_table(config.rope, max_model_len, device)

        on_progress("read weights", 0.0)
        num_parts = config.num_layers + 2  # the embedding and the head weigh about a layer each
        table = _read_table(source, dtype, shard, kernels)
        layers: list[DecoderLayer] = []
        # Closed at once when packing or the callback fails, so that no thread reads on.
        with contextlib.closing(_read_ahead(source, config, dtype, shard)) as hosts:
            for host in hosts:
                layers.append(pack_layer(host, config, len(layers), kernels, device, shard))
                on_progress("read weights", (1 + len(layers)) / num_parts)
        self._layers = tuple(layers)
        self._final_norm = read_tensor(source, "model.norm.weight", dtype).to(device)
        on_progress("pack weights", (num_parts - 1) / num_parts)
        self._embedding: Tensor | PackedWeight = (
            table.to(device) if isinstance(table, Tensor) else kernels.pack_weight(table.to(device))
        )
        self._head = self._pack_head(source, device)
        self._program = self._make_program()
        on_progress("pack weights", 1.0)

    def _pack_head(self, source: WeightSource, device: torch.device) -> PackedWeight:
        """The embedding itself where it is packed already, or as it is where it is not."""
        name, table = head_name(self.config), self._embedding
        if self.config.tie_word_embeddings:
            if not isinstance(table, Tensor):
                return table
            if source.tensors[name].groups is None:
                return self._kernels.pack_weight(table)
        weight = read_weight(source, [Piece(name=name, rows=self._shard.vocab)], self.dtype)
        return pack_weight(weight, self._kernels, device)

    @property
    def layers(self) -> tuple[DecoderLayer, ...]:
        """This rank's part of each."""
        return self._layers

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of this rank's weights on the device; a head that is the embedding counts once."""
        table = self._embedding
        is_shared = self._head is table or getattr(self._head, "values", None) is table
        return (
            (table.nbytes if isinstance(table, Tensor) else table.num_bytes)
            + self._final_norm.nbytes
            + (0 if is_shared else self._head.num_bytes)
            + sum(layer.num_bytes for layer in self._layers)
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Compute a step: write every token's KV, return the logits that are wanted.

        Returns [num_logit_rows, vocab_size] float32, rows in the order of batch.logit_rows.
        A row depends on its own sequence only, bit for bit, where kernels.is_row_invariant.
        """
        return self.logits(self.hidden_states(batch, cache))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The head: float32 [num_rows, vocab_size] of hidden states, [num_rows, hidden_size]."""
        logits = self._kernels.linear(hidden, self._head, None, torch.float32)
        if self._group.world_size == 1:
            return logits
        missing = self._shard.max_vocab_rows - logits.shape[1]
        parts = self._group.all_gather(functional.pad(logits, (0, missing)).contiguous())
        sizes = map(len, self._shard.vocab_parts)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    @torch.inference_mode()
    def hidden_states(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Write every token's KV; final normalised states of the logit rows.

        Returns [num_logit_rows, hidden_size] in the model's dtype.
        """
        if self._program is not None:
            return self._program(self._embed(batch.token_ids), batch, cache)
        kernels = self._kernels
        rms_norm, linear, silu_and_mul = kernels.rms_norm, kernels.linear, kernels.silu_and_mul
        rope_and_write_kv, attend = kernels.rope_and_write_kv, kernels.paged_attention
        eps = self.config.rms_norm_eps
        head_dim, head_sizes = self.config.head_dim, self._head_sizes
        scale, cos_sin = self._attention_scale, self._cos_sin
        num_tokens = batch.token_ids.shape[0]
        last = len(self._layers) - 1

        residual = self._embed(batch.token_ids)
        hidden: Tensor | None = None  # what the residual stream still lacks
        for index, (layer, pages) in enumerate(zip(self._layers, cache.layers, strict=True)):
            if hidden is None:
                normed = rms_norm(residual, layer.input_norm, eps)
            else:
                normed = rms_norm(hidden, layer.input_norm, eps, residual)
            qkv = linear(normed, layer.qkv.weight, layer.qkv.bias)
            query, key, value = qkv.view(num_tokens, -1, head_dim).split_with_sizes(
                head_sizes, dim=1
            )
            if layer.query_norm is not None and layer.key_norm is not None:
                query = rms_norm(query.contiguous(), layer.query_norm, eps)
                key = rms_norm(key.contiguous(), layer.key_norm, eps)
            rope_and_write_kv(query, key, value, cos_sin, pages, batch)
            attended = attend(
                query, pages, batch, scale=scale, sliding_window=layer.sliding_window
            ).view(num_tokens, -1)
            if index == last:  # past the last attention only the logit rows matter
                attended = attended[batch.logit_rows]
                residual = residual[batch.logit_rows]
            hidden = self._add_up(attended, layer.attention_output)
            normed = rms_norm(hidden, layer.mlp_norm, eps, residual)
            gate_up = linear(normed, layer.gate_up.weight, layer.gate_up.bias)
            hidden = self._add_up(silu_and_mul(gate_up), layer.down)
        assert hidden is not None, "a model has layers"
        return rms_norm(hidden, self._final_norm, eps, residual)

    def _make_program(self) -> LayerProgram | None:
        """All layers in one call, where the kernels have one and no rank waits in between."""
        if self._group.world_size > 1 or self._kernels.make_layer_program is None:
            return None
        return self._kernels.make_layer_program(
            DecoderStack(
                layers=self._layers,
                final_norm=self._final_norm,
                cos_sin=self._cos_sin,
                dtype=self.dtype,
                num_heads=self.config.num_heads,
                num_kv_heads=self.config.num_kv_heads,
                head_dim=self.config.head_dim,
                rms_norm_eps=self.config.rms_norm_eps,
                attention_scale=self._attention_scale,
            )
        )

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding, [num_tokens, hidden_size]: of other ranks' rows, their sum."""
        if self._group.world_size == 1:
            return self._look_up(token_ids)
        rows = self._shard.vocab
        is_other = (token_ids < rows.start) | (token_ids >= rows.stop)
        own = self._look_up((token_ids - rows.start).masked_fill(is_other, 0))
        # Exact in any dtype: all summands but one are zero.
        return self._group.all_reduce(own.masked_fill(is_other.unsqueeze(1), 0.0))

    def _look_up(self, rows: Tensor) -> Tensor:
        """Rows of this rank's part of the embedding."""
        if isinstance(self._embedding, Tensor):
            return functional.embedding(rows, self._embedding)
        assert self._kernels.quantized_rows is not None
        return self._kernels.quantized_rows(self._embedding, rows, self.dtype)

    def _add_up(self, x: Tensor, projection: Projection) -> Tensor:
        """A projection whose columns the ranks share; x: this rank's columns."""
        if self._group.world_size == 1:
            return self._kernels.linear(x, projection.weight, projection.bias)
        partial = self._kernels.linear(
            x, projection.weight, projection.bias, self._kernels.summand_dtype
        )
        # A single rank's kernel rounds to float32 as well before it rounds to the dtype.
        return self._group.all_reduce(partial).to(torch.float32).to(self.dtype)


def _read_table(
    source: WeightSource, dtype: torch.dtype, shard: ModelShard, kernels: Kernels
) -> Tensor | GroupQuantized:
    """A rank's rows of the embedding, in integers where the kernels can look rows up in them."""
    piece = Piece(name="model.embed_tokens.weight", rows=shard.vocab)
    if kernels.quantized_rows is None or source.tensors[piece.name].groups is None:
        return read_pieces(source, [piece], dtype)
    return source.load_groups(piece.name, piece.rows)


def _read_ahead(
    source: WeightSource, config: ModelConfig, dtype: torch.dtype, shard: ModelShard
) -> Generator[HostLayer, None, None]:
    """Layers in order, the next few already being read by other threads."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as readers:
        pending: deque[Future[HostLayer]] = deque()
        try:
            for index in range(config.num_layers):
                pending.append(
                    readers.submit(read_layer, source, index, dtype, shard, config.head_dim)
                )
                if len(pending) > _LAYERS_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
