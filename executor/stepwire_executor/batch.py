"""The tensors of one step, as the model and the kernels see them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """Work of one step over num_seqs sequences with num_tokens query tokens in all.

    Sequence i owns query rows cu_seqlens_q[i] to cu_seqlens_q[i + 1]; its last query row is
    the token at position seq_lens[i] - 1.
    """

    token_ids: Tensor
    """[num_tokens] int64."""
    positions: Tensor
    """[num_tokens] int64, place of each token in its sequence."""
    slot_mapping: Tensor
    """[num_tokens] int64, where each token's KV goes: block_id * block_size + offset."""
    cu_seqlens_q: Tensor
    """[num_seqs + 1] int32, tokens."""
    seq_lens: Tensor
    """[num_seqs] int32, tokens of context including this step's."""
    block_table: Tensor
    """[num_seqs, max_blocks] int32, -1 padded."""
    logit_rows: Tensor
    """[num_logit_rows] int64, query rows whose logits are wanted."""
    max_query_len: int | None = None
    """Most query tokens of a sequence, where known without asking the device."""
