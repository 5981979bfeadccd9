"""Captured work that is replayed with one call, and the batch sizes worth capturing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Replay = Callable[[], None]


class GraphCapture(Protocol):
    """Records what a function queues, to queue it again at once."""

    def capture(self, body: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Return what repeats body on the tensors it used, and body's result, rewritten by it.

        body must have run before, so that nothing is compiled or initialised while it records.
        """
        ...


class CudaGraphs:
    """CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        """Make an empty pool."""
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """See GraphCapture."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = body()
        return graph.replay, result


class RepeatedCalls:
    """Calls body again in place of a graph, where there are none: on the CPU."""

    def capture(self, body: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """See GraphCapture."""
        result = body()

        def replay() -> None:
            result.copy_(body())

        return replay, result


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending; the last is max_num_seqs.

    Small batches, whose rows cost little, double; larger ones are padded by at most an eighth.
    """
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_num_seqs, 32)}
    return (*sorted(size for size in sizes if size < max_num_seqs), max_num_seqs)
