"""Drives a Decoder directly: sequences with their own blocks, steps of any mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.model import LoadedModel
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(slots=True)
class SteppedSequence:
    """A sequence on its way through a decoder."""

    token_ids: list[int]
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)


class ModelSteps:
    """Blocks are dealt in a scattered order, so that a test cannot pass by adjacency."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        config = model.decoder.config  # of a rank's part, where there are several
        self._model = model
        self.block_size = block_size
        self.cache = KVCache(
            num_layers=config.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=config.num_kv_heads,
            block_size=block_size,
            head_dim=config.head_dim,
            dtype=kv_dtype or model.dtype,
            device=CPU,
            static_scales=model.static_kv_scales,
        )
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(7))
        self._free_blocks: list[int] = order.tolist()

    def step(
        self,
        work: Sequence[tuple[SteppedSequence, int]],
        *,
        all_rows: bool = False,
        no_rows: bool = False,
    ) -> Tensor:
        """Compute the next tokens of some sequences.

        Returns the logits of each sequence's last token of the step, of every token, or none.
        """
        positions: list[int] = []
        token_ids: list[int] = []
        slots: list[int] = []
        cu_seqlens = [0]
        for sequence, num_tokens in work:
            start = sequence.num_computed_tokens
            end = start + num_tokens
            assert end <= len(sequence.token_ids), (end, len(sequence.token_ids))
            while len(sequence.block_ids) * self.block_size < end:
                sequence.block_ids.append(self._free_blocks.pop())
            for position in range(start, end):
                block_id = sequence.block_ids[position // self.block_size]
                slots.append(block_id * self.block_size + position % self.block_size)
            positions.extend(range(start, end))
            token_ids.extend(sequence.token_ids[start:end])
            cu_seqlens.append(len(positions))
            sequence.num_computed_tokens = end
        width = max(len(sequence.block_ids) for sequence, _ in work)
        rows = range(len(positions)) if all_rows else [end - 1 for end in cu_seqlens[1:]]
        batch = StepBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            cu_seqlens_q=torch.tensor(cu_seqlens, dtype=torch.int32),
            seq_lens=torch.tensor([s.num_computed_tokens for s, _ in work], dtype=torch.int32),
            block_table=torch.tensor(
                [s.block_ids + [-1] * (width - len(s.block_ids)) for s, _ in work],
                dtype=torch.int32,
            ),
            logit_rows=torch.tensor([] if no_rows else list(rows), dtype=torch.int64),
            max_query_len=max(num_tokens for _, num_tokens in work),
        )
        return self._model.decoder.forward(batch, self.cache)
