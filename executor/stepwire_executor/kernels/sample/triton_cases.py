"""Configurations of the sampler's kernels that are compiled ahead of time."""

from __future__ import annotations

import triton

from stepwire_executor.kernels.compile_case import CompileCase
from stepwire_executor.kernels.launch import ceil_div, next_power_of_two
from stepwire_executor.kernels.sample.triton_candidates import choose_kernel, gather_kernel
from stepwire_executor.kernels.sample.triton_config import CONFIG
from stepwire_executor.kernels.sample.triton_draw import draw_kernel, pick_kernel
from stepwire_executor.kernels.sample.triton_groups import bound_kernel, groups_kernel
from stepwire_executor.kernels.sample.triton_search import search_kernel

_ARGUMENTS = {
    "logits_ptr": "*fp32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "seed_ptr": "*i64",
    "position_ptr": "*i64",
    "stream_ptr": "*i64",
    "group_largest_ptr": "*fp32",
    "group_mass_ptr": "*fp32",
    "token_id_ptr": "*i64",
    "is_finite_ptr": "*u8",
    "row_largest_ptr": "*fp32",
    "inverse_temperature_ptr": "*fp64",
    "route_ptr": "*i32",
    "bound_key_ptr": "*i32",
    "mass_ptr": "*fp32",
    "num_listed_ptr": "*i32",
    "listed_ptr": "*i32",
    "num_candidates_ptr": "*i32",
    "candidate_id_ptr": "*i32",
    "candidate_score_ptr": "*fp32",
    "limit_key_ptr": "*i32",
    "last_tie_ptr": "*i32",
    "best_ptr": "*fp32",
    "best_token_id_ptr": "*i32",
    "logits_stride": "i32",
    "vocab_size": "i32",
    "num_groups": "i32",
    "num_chunks": "i32",
}
"""Types of the kernels' arguments by name."""
_MULTIPLES_OF_16 = {"logits_stride", "vocab_size", "num_groups"}
"""Of the arguments, in the vocabularies that are compiled for."""


def _case(
    name: str, kernel: triton.JITFunction, num_warps: int, /, *expect: str, **constexprs: int
) -> CompileCase:
    return CompileCase(
        name=f"sample {name}",
        kernel=kernel,
        signature=_ARGUMENTS,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=3,
        divisible_by_16=frozenset(_MULTIPLES_OF_16),
        expect=frozenset(expect),
    )


def _cases_of(vocab_size: int) -> tuple[CompileCase, ...]:
    """Return the cases of kernels whose sizes depend on the vocabulary's."""
    c = CONFIG
    group = c.group_size(vocab_size)
    block_groups = next_power_of_two(ceil_div(vocab_size, group))
    return (
        _case(
            f"bound of {vocab_size}", bound_kernel, c.row_warps(block_groups), "vector_loads",
            GROUP=group, BLOCK_GROUPS=block_groups, MAX_LISTED=c.max_listed,
        ),
        _case(
            f"pick of {vocab_size}", pick_kernel, 1,
            BLOCK_CHUNKS=next_power_of_two(ceil_div(vocab_size, c.block)),
        ),
    )  # fmt: skip


def _cases() -> tuple[CompileCase, ...]:
    c = CONFIG
    return (
        _case("groups", groups_kernel, c.num_warps, "vector_loads", GROUP=c.group, BLOCK=c.block),
        _case(
            "gather", gather_kernel, c.row_warps(c.gather_block),
            GROUP=c.group, MAX_LISTED=c.max_listed, CAPACITY=c.capacity, BLOCK=c.gather_block,
        ),
        _case(
            "choose", choose_kernel, c.row_warps(c.capacity), "vector_loads",
            FEW=c.few, CAPACITY=c.capacity,
        ),
        *(
            _case(
                f"search by {name}", search_kernel, c.row_warps(c.search_block), "vector_loads",
                IS_MASS=is_mass, CAPACITY=c.capacity, BLOCK=c.search_block,
            )
            for is_mass, name in ((False, "rank"), (True, "mass"))
        ),
        _case("draw", draw_kernel, c.num_warps, "vector_loads", BLOCK=c.block),
        *_cases_of(131_072),
        *_cases_of(262_144),
    )  # fmt: skip


COMPILE_CASES = _cases()
"""Every kernel, at the sizes of vocabularies that models have."""
