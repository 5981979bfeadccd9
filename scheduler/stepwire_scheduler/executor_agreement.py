"""Whether executor ranks make one group that computes one model."""

from __future__ import annotations

from collections.abc import Sequence

from stepwire.executor.v1.executor_pb2 import DescribeResponse as Description

from stepwire_scheduler.errors import ExecutorMismatchError

# What all ranks of a group must say alike, with the flag that sets it.
_AGREED_FIELDS = {
    "model_fingerprint": "--model",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
    "block_size": "--block-size",
    "num_blocks": "--num-kv-blocks",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "draft_model": "--speculative-model",
}

_AT_LEAST_ONE = (
    *("vocab_size", "max_position_embeddings", "block_size", "num_blocks"),
    *("max_num_seqs", "max_num_batched_tokens"),
)
"""What no executor that is ready lacks."""


def check_agreement(descriptions: Sequence[Description]) -> None:
    """Raise ExecutorMismatchError, which names the flag to change, unless the ranks agree."""
    check_ranks(descriptions)
    first = descriptions[0]
    for field in _AT_LEAST_ONE:
        if getattr(first, field) == 0:
            raise ExecutorMismatchError(
                f"an executor is ready with a {field} of 0: start it in the scheduler's version"
            )
    for other in descriptions[1:]:
        for field, flag in _AGREED_FIELDS.items():
            if getattr(other, field) != getattr(first, field):
                raise ExecutorMismatchError(
                    f"executors disagree on {field} ({getattr(first, field) or 'none'} and "
                    f"{getattr(other, field) or 'none'}): start them with the same {flag}"
                )


def check_ranks(descriptions: Sequence[Description]) -> None:
    """Raise ExecutorMismatchError unless each rank of one group is there once.

    Ranks that load know their place already, and would wait for one that is not named for good.
    """
    world_sizes = sorted({description.world_size for description in descriptions})
    if len(world_sizes) > 1:
        raise ExecutorMismatchError(
            f"executors disagree on world_size ({' and '.join(map(str, world_sizes))}): start them "
            "with the same --tensor-parallel-size"
        )
    expected = range(world_sizes[0])
    ranks = sorted(description.rank for description in descriptions)
    if ranks == list(expected):
        return
    missing = [str(rank) for rank in expected if rank not in ranks]
    doubled = sorted({str(rank) for rank in ranks if ranks.count(rank) > 1})
    problems = [f"rank {', '.join(missing)} is missing"] if missing else []
    problems += [f"rank {', '.join(doubled)} is there more than once"] if doubled else []
    raise ExecutorMismatchError(
        f"the {len(ranks)} executors named do not make a group of {world_sizes[0]}: "
        f"{' and '.join(problems)}: name each rank once in --executor"
    )
