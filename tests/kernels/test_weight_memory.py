"""Packed weights side by side: none lies in another, and each lives as long as it is held."""

from __future__ import annotations

import gc
import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from stepwire_executor.kernels.native.weight_memory import WeightMemory
from torch import Tensor

SHAPES = st.lists(
    st.tuples(
        # Some larger than a region.
        st.lists(st.sampled_from([0, 1, 3, 64, 700, 6000]), min_size=1, max_size=2),
        st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    ),
    max_size=12,
)


def extent(tensor: Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


@given(SHAPES)
def test_tensors_begin_at_cache_lines_and_share_no_byte(
    shapes: list[tuple[list[int], torch.dtype]],
) -> None:
    memory = WeightMemory()
    tensors = [memory.empty(shape, dtype) for shape, dtype in shapes]
    assert [list(tensor.shape) for tensor in tensors] == [shape for shape, _ in shapes]
    assert [tensor.dtype for tensor in tensors] == [dtype for _, dtype in shapes]
    taken = [extent(tensor) for tensor in tensors if math.prod(tensor.shape)]
    assert all(each.start % 64 == 0 for each in taken)
    taken.sort(key=lambda each: each.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(taken))


def test_small_ones_follow_one_another() -> None:
    memory = WeightMemory()
    first, second = (memory.empty((100,), torch.uint8) for _ in range(2))
    assert second.data_ptr() == first.data_ptr() + 128


def test_a_tensor_outlives_its_memory_and_its_neighbours() -> None:
    memory = WeightMemory()
    tensors = [memory.empty((1 << 20,), torch.float32).fill_(i) for i in range(9)]
    kept = tensors[2]
    del memory, tensors
    gc.collect()
    others = [WeightMemory().empty((1 << 20,), torch.float32).fill_(-1.0) for _ in range(9)]
    assert bool((kept == 2).all())
    assert len(others) == 9
