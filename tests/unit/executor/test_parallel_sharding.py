"""Every head, row and column of a model is on some rank, and on one only where it can be."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.hf_config import read_hf_config
from stepwire_executor.model.locate import find_shape
from stepwire_executor.parallel.sharding import (
    UNGROUPED,
    InputGroups,
    ModelShard,
    make_shard,
)

LLAMA = read_hf_config(find_shape(Path("llama-3.1-8b")))


def _config(**changes: int) -> ModelConfig:
    return dataclasses.replace(LLAMA, **changes)  # type: ignore[arg-type]


def _shards(
    config: ModelConfig, world_size: int, input_groups: InputGroups = UNGROUPED
) -> list[ModelShard]:
    return [
        make_shard(config, rank, world_size, input_groups=input_groups)
        for rank in range(world_size)
    ]


def _sizes(parts: list[range]) -> list[int]:
    return [len(part) for part in parts]


@given(
    num_kv_heads=st.integers(1, 9),
    group_size=st.integers(1, 8),
    intermediate_size=st.integers(72, 3000),
    vocab_size=st.integers(72, 5000),
    data=st.data(),
)
def test_parts_are_whole_in_order_and_heads_find_their_kv_head(
    num_kv_heads: int, group_size: int, intermediate_size: int, vocab_size: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, num_kv_heads * group_size))
    config = _config(
        num_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
    )
    shards = _shards(config, world_size)
    for name, size in (
        ("query_heads", config.num_heads),
        ("intermediate", intermediate_size),
        ("vocab", vocab_size),
    ):
        parts = [getattr(shard, name) for shard in shards]
        assert all(len(part) > 0 for part in parts)
        assert [index for part in parts for index in part] == list(range(size)), name
    for shard in shards:
        local = shard.local_config(config)
        assert local.num_heads % local.num_kv_heads == 0
        for place, head in enumerate(shard.query_heads):
            kv_place = place // (local.num_heads // local.num_kv_heads)
            assert shard.kv_heads[kv_place] == head // group_size
    kv_sizes = _sizes([shard.kv_heads for shard in shards])
    if world_size <= num_kv_heads:
        assert sum(kv_sizes) == num_kv_heads
        assert max(kv_sizes) - min(kv_sizes) <= 1
    else:
        assert set(kv_sizes) == {1}
    # No rank has much more than another, in a layer or in all.
    width = config.hidden_size
    column = 3 * width
    attention = [_attention_size(config, shard) for shard in shards]
    layer = [
        held + column * len(shard.intermediate)
        for held, shard in zip(attention, shards, strict=True)
    ]
    least = max(sum(layer) / world_size, max(attention) + column)
    assert max(layer) <= 1.125 * least + column
    row = 2 * width  # of the embedding and of the head
    whole = [
        config.num_layers * held + row * len(shard.vocab)
        for held, shard in zip(layer, shards, strict=True)
    ]
    least = max(sum(whole) / world_size, config.num_layers * max(layer) + row)
    assert max(whole) <= least + 32 * row


def _attention_size(config: ModelConfig, shard: ModelShard) -> int:
    """Elements of queries and outputs, of keys and values."""
    num_heads = 2 * len(shard.query_heads) + 2 * len(shard.kv_heads)
    return num_heads * config.head_dim * config.hidden_size


def test_three_kv_heads_on_two_ranks_are_two_and_one() -> None:
    first, second = _shards(_config(num_heads=9, num_kv_heads=3), 2)
    assert (first.kv_heads, first.query_heads) == (range(2), range(6))
    assert (second.kv_heads, second.query_heads) == (range(2, 3), range(6, 9))


def test_two_kv_heads_on_three_ranks_are_replicated_and_share_their_queries() -> None:
    shards = _shards(_config(num_heads=6, num_kv_heads=2), 3)
    assert [shard.kv_heads for shard in shards] == [range(1), range(1), range(1, 2)]
    assert [shard.query_heads for shard in shards] == [range(2), range(2, 3), range(3, 6)]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_parts_of_a_common_model_are_equal_and_keep_groups_of_quantised_weights(
    world_size: int,
) -> None:
    shards = _shards(LLAMA, world_size)
    for name in ("query_heads", "kv_heads", "intermediate", "vocab"):
        assert len({len(getattr(shard, name)) for shard in shards}) == 1, name
    assert all(a.intermediate.stop == b.intermediate.start for a, b in pairwise(shards))
    assert all(shard.intermediate.start % 256 == 0 for shard in shards)


@pytest.mark.parametrize(
    ("changes", "world_sizes"),
    [
        ({}, (1, 2, 3, 4, 5, 6, 7, 8)),
        ({"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64,
          "intermediate_size": 1536, "vocab_size": 49152, "num_layers": 30}, (1, 2, 3)),
    ],
)  # fmt: skip
def test_every_number_of_ranks_parts_sums_at_the_same_places(
    changes: dict[str, int], world_sizes: tuple[int, ...]
) -> None:
    config = _config(**changes)
    whole = make_shard(config, 0, 1)
    assert whole.mlp_sum_unit == 256
    for world_size in world_sizes:
        for shard in _shards(config, world_size):
            first_input = shard.query_heads.start * config.head_dim
            assert first_input % shard.attention_sum_unit == 0
            assert shard.intermediate.start % 256 == 0
            assert (shard.attention_sum_unit, shard.mlp_sum_unit) == (
                whole.attention_sum_unit,
                whole.mlp_sum_unit,
            )


def test_a_rank_with_fewer_heads_has_more_of_the_rest() -> None:
    """Two KV heads and one: each holds half of all weights, to a panel of 32 rows."""
    changes = {"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
    config = _config(**changes, intermediate_size=1536, vocab_size=49152, num_layers=30)
    for has_own_head in (True, False):
        shards = [make_shard(config, rank, 2, has_own_head=has_own_head) for rank in range(2)]
        row = config.hidden_size * (2 if has_own_head else 1)
        first, second = (
            config.num_layers
            * (_attention_size(config, shard) + 3 * config.hidden_size * len(shard.intermediate))
            + row * len(shard.vocab)
            for shard in shards
        )
        assert abs(first - second) <= 32 * row


@given(
    num_kv_heads=st.integers(1, 9),
    queries=st.integers(1, 6),
    head_dim=st.sampled_from([16, 32, 64, 96, 128]),
    attention_group=st.sampled_from([32, 64, 96, 128, 256]),
    mlp_group=st.sampled_from([32, 64, 96, 128, 256]),
    num_mlp_groups=st.integers(1, 40),
    world_size=st.integers(1, 8),
)
def test_no_rank_cuts_a_group_of_inputs_and_sums_do_not_cross_ranks(
    num_kv_heads: int,
    queries: int,
    head_dim: int,
    attention_group: int,
    mlp_group: int,
    num_mlp_groups: int,
    world_size: int,
) -> None:
    config = _config(
        num_heads=num_kv_heads * queries,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=num_mlp_groups * mlp_group,
        vocab_size=1000,
    )
    groups = InputGroups(attention=attention_group, mlp=mlp_group)
    try:
        shards = _shards(config, world_size, groups)
    except ModelLoadError as error:
        text = str(error)
        if "can be split into" in text:
            assert world_size > config.num_heads
            return
        assert "would cut groups" in text
        assert "--quantization none" in text
        most = int(text.split("use at most ")[1].split(",")[0])
        assert most < world_size
        # Others may then refuse in turn, but not for the same reason.
        if f"groups of {mlp_group} " in text and most == num_mlp_groups:
            return
        _shards(dataclasses.replace(config, intermediate_size=8 * mlp_group), most, groups)
        return
    for shard in shards:
        inputs = range(shard.query_heads.start * head_dim, shard.query_heads.stop * head_dim)
        size = config.num_heads * head_dim
        for part, whole, group in (
            (inputs, size, attention_group),
            (shard.intermediate, config.intermediate_size, mlp_group),
        ):
            assert len(part) > 0
            assert part.start % group == 0
            assert part.stop % group == 0 or part.stop == whole
        assert shard.attention_sum_unit % 32 == 0
        assert shard.mlp_sum_unit is not None
        assert shard.mlp_sum_unit % 32 == 0
        if world_size <= num_kv_heads:
            assert inputs.start % shard.attention_sum_unit == 0
    assert [head for shard in shards for head in shard.query_heads] == list(range(config.num_heads))


def test_heads_stay_together_where_a_group_spans_them() -> None:
    """192 inputs a KV head are one group of 128 and a half: two KV heads are three groups."""
    config = _config(num_heads=12, num_kv_heads=4, head_dim=64, intermediate_size=1024)
    groups = InputGroups(attention=128, mlp=128)
    assert _sizes([shard.kv_heads for shard in _shards(config, 2, groups)]) == [2, 2]
    with pytest.raises(ModelLoadError, match=r"groups of 128 inputs .* use at most 2, or"):
        _shards(config, 3, groups)
    assert _sizes([shard.kv_heads for shard in _shards(config, 3)]) == [2, 1, 1]


def test_groups_that_units_hold_already_change_nothing() -> None:
    for world_size in (1, 2, 4, 8):
        assert _shards(LLAMA, world_size, InputGroups(attention=128, mlp=128)) == _shards(
            LLAMA, world_size
        )
