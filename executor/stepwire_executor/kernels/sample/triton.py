"""Greedy and Gumbel-max sampling in Triton, without a sort and without visiting the host.

groups, bound: one read of the logits leaves the likeliest of every 32 tokens, which bound what
the limits can keep; gather, choose: the few tokens within the bound are copied together, limited
exactly, and drawn from; search: where they are too many, limits are found among all tokens; draw,
pick: the best noisy score of rows without limits or with searched ones. Each row goes its own way,
decided on the device; kernels that have nothing to do for a row return. Groups and stretches start
at absolute token ids and each row's search is one program's, so that a row's token does not depend
on the other rows.

Counted for 128 x 131,072 on an H100 (67 MB; 22 us a read at 3.0 TB/s, and 0.9e12 instructions of
a warp a second), from the code compiled for sm_90; nothing here is measured:
- groups: 1 read, 12 instructions a logit, 24 where top-p is the only limit: 22 us, of memory.
- bound, gather, choose, for some tens of candidates: no whole read; about 4, 1 and 6 us.
- search: 3 to 5 reads a limit, 26 (top-k) or 33 (top-p) instructions each: about 22 us a read, and
  one more of 61, which copies: 35 us. None where no row needs it; top-k to about 2000 does not.
- draw: 1 read, 139 instructions, most of them two logarithms: 81 us. 0 for rows of candidates.
So top-k with top-p: 1 read and about 33 us, and the launches of the four kernels left over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import SampleOutput, SamplingBatch
from stepwire_executor.kernels.launch import ceil_div, next_power_of_two
from stepwire_executor.kernels.sample.triton_candidates import choose_kernel, gather_kernel
from stepwire_executor.kernels.sample.triton_cases import COMPILE_CASES
from stepwire_executor.kernels.sample.triton_config import CONFIG, Config
from stepwire_executor.kernels.sample.triton_draw import draw_kernel, pick_kernel
from stepwire_executor.kernels.sample.triton_groups import bound_kernel, groups_kernel
from stepwire_executor.kernels.sample.triton_search import search_kernel

__all__ = ["COMPILE_CASES", "Choice", "choose", "sample"]


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Choose a token a row by greedy or Gumbel-max sampling; see `interface.Sample`."""
    num_rows, vocab_size = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or vocab_size == 0:
        raise ValueError(
            "logits must be float32 with unit stride in a vocabulary that is not empty"
        )
    for parameter, dtype in (
        (batch.temperature, torch.float32),
        (batch.top_k, torch.int32),
        (batch.top_p, torch.float32),
        (batch.min_p, torch.float32),
        (batch.seeds, torch.int64),
        (batch.positions, torch.int64),
        (batch.streams, torch.int64),
    ):
        if (
            parameter.dtype != dtype
            or parameter.shape != (num_rows,)
            or not parameter.is_contiguous()
        ):
            raise ValueError(
                f"a sampling parameter is {parameter.dtype} {tuple(parameter.shape)}, "
                f"expected contiguous {dtype} [{num_rows}]"
            )
    token_ids, is_finite = _choose(logits, batch)
    return SampleOutput(token_ids=token_ids, is_finite=is_finite)


def _choose(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Return each row's token id, [num_rows] int64, and whether it could be chosen, bool."""
    choice = choose(logits, batch)
    return choice.token_ids, choice.is_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen for each row."""

    token_ids: Tensor
    """[num_rows] int64."""
    is_finite: Tensor
    """[num_rows] bool; False where the logits hold NaN or no token could be sampled."""
    routes: Tensor
    """[num_rows] int32, how: SETTLED, CANDIDATES, SEARCH or WHOLE of triton_scores."""


def choose(logits: Tensor, batch: SamplingBatch, config: Config = CONFIG) -> Choice:
    """Choose a token a row; log-probabilities and adjustments of batch are not looked at.

    logits: [num_rows, vocab_size] float32, unit stride in the vocabulary. Launches depend on the
    shape of logits alone and nothing waits for the device, so that graphs can hold them.
    """
    num_rows, vocab_size = logits.shape
    device, stride = logits.device, logits.stride(0)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((num_rows, *shape), dtype=dtype, device=device)

    token_ids, is_finite = empty(torch.int64), empty(torch.uint8)
    routes = empty(torch.int32)
    choice = Choice(token_ids=token_ids, is_finite=is_finite.view(torch.bool), routes=routes)
    if num_rows == 0:
        return choice
    group = config.group_size(vocab_size)
    num_groups, num_chunks = ceil_div(vocab_size, group), ceil_div(vocab_size, config.block)
    block_groups = next_power_of_two(num_groups)
    max_listed, capacity = config.max_listed, config.capacity
    group_largest, group_mass = (empty(torch.float32, num_groups) for _ in range(2))
    row_largest, mass = (empty(torch.float32) for _ in range(2))
    inverse_temperature = empty(torch.float64)
    bound_keys, num_listed, num_candidates, limit_keys, last_ties = (
        empty(torch.int32) for _ in range(5)
    )
    listed = empty(torch.int32, max_listed)
    candidate_ids = empty(torch.int32, capacity)
    candidate_scores = empty(torch.float32, capacity)
    chunk_scores = empty(torch.float32, num_chunks)
    chunk_ids = empty(torch.int32, num_chunks)

    rows, chunks = (num_rows,), (num_rows, num_chunks)
    groups_kernel[chunks](
        logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p,
        group_largest, group_mass, stride, vocab_size, num_groups,
        GROUP=group, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    bound_kernel[rows](
        logits, group_largest, group_mass,
        batch.temperature, batch.top_k, batch.top_p, batch.min_p,
        token_ids, is_finite, row_largest, inverse_temperature,
        routes, bound_keys, mass, num_listed, listed,
        limit_keys, last_ties, stride, vocab_size, num_groups,
        GROUP=group, BLOCK_GROUPS=block_groups, MAX_LISTED=max_listed,
        num_warps=config.row_warps(block_groups),
    )  # fmt: skip
    gather_kernel[rows](
        logits, inverse_temperature, row_largest, bound_keys, num_listed, listed,
        routes, num_candidates, candidate_ids, candidate_scores, stride, vocab_size,
        GROUP=group, MAX_LISTED=max_listed, CAPACITY=capacity, BLOCK=config.gather_block,
        num_warps=config.row_warps(config.gather_block),
    )  # fmt: skip
    choose_kernel[rows](
        batch.top_k, batch.top_p, batch.min_p,
        batch.seeds, batch.positions, batch.streams,
        mass, num_candidates, candidate_ids, candidate_scores, routes, token_ids, vocab_size,
        FEW=config.few, CAPACITY=capacity, num_warps=config.row_warps(capacity),
    )  # fmt: skip
    for is_mass in (False, True):
        search_kernel[rows](
            logits, inverse_temperature, batch.top_k, batch.top_p, batch.min_p,
            row_largest, mass, routes, candidate_ids, candidate_scores, limit_keys, last_ties,
            stride, vocab_size, IS_MASS=is_mass, CAPACITY=capacity, BLOCK=config.search_block,
            num_warps=config.row_warps(config.search_block),
        )  # fmt: skip
    draw_kernel[chunks](
        logits, inverse_temperature, batch.min_p, batch.seeds, batch.positions, batch.streams,
        token_ids, row_largest, routes, limit_keys, last_ties, chunk_scores, chunk_ids,
        stride, vocab_size, num_chunks,
        BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    pick_kernel[rows](
        routes, chunk_scores, chunk_ids, token_ids, num_chunks,
        BLOCK_CHUNKS=next_power_of_two(num_chunks), num_warps=1,
    )  # fmt: skip
    return choice
