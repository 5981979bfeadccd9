"""All layers in one call: the bits of one operation after the other, and the same refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels import Kernels
from stepwire_executor.kernels.interface import DecoderStack, LayerProgram, PackedWeight
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kv_cache import FP8_DTYPE, KVCache
from stepwire_executor.model.config import ModelConfig
from stepwire_executor.model.decoder import Decoder
from support.kernels_support import make_batch, num_blocks
from support.random_decoders import cache_tensors, make_decoder, random_cache, small_config
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAGES = ["dtype", "scaled", "centred", "static"]
SEQUENCES = st.lists(
    # Query tokens and context before them: prefill, decode, verification, a late chunk.
    st.sampled_from([(9, 0), (1, 0), (1, 40), (1, 130), (4, 70), (20, 37), (70, 3), (1, 700)]),
    min_size=1,
    max_size=4,
)


def one_by_one(kernels: Kernels) -> Kernels:
    """Return the same operations without a call for all layers."""
    return replace(kernels, make_layer_program=None)


def step_of(
    sequences: list[tuple[int, int]], logit_rows: list[int], *, block_size: int = 16
) -> tuple[StepBatch, int]:
    """Return a step of random tokens, and how many blocks its cache has."""
    query_lens = [length for length, _ in sequences]
    seq_lens = [length + before for length, before in sequences]
    batch = make_batch(query_lens, seq_lens, block_size=block_size)
    num_tokens = sum(query_lens)
    batch = replace(
        batch,
        token_ids=torch.randint(0, 61, (num_tokens,), generator=torch.Generator().manual_seed(2)),
        logit_rows=torch.tensor([row % num_tokens for row in logit_rows], dtype=torch.int64),
    )
    return batch, num_blocks(seq_lens, block_size)


def cache_for(
    config: ModelConfig, pages: str, dtype: torch.dtype, blocks: int, block_size: int = 16
) -> KVCache:
    return random_cache(
        config,
        num_blocks=blocks,
        block_size=block_size,
        dtype=dtype if pages == "dtype" else FP8_DTYPE,
        has_static_scales=pages == "static",
        has_key_offsets=pages == "centred",
    )


def bits(tensors: list[Tensor]) -> list[bytes]:
    """Return what tensors hold, NaNs and zeros' signs included."""
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def outcome(decoder: Decoder, batch: StepBatch, cache: KVCache) -> list[bytes]:
    """Return all that a step makes: its result, then the cache."""
    hidden = decoder.hidden_states(batch, cache)
    return bits([hidden, *cache_tensors(cache)])


# float32 sums of an odd number of inputs, partly rotated heads of no power of two, no biases.
@example(
    config=small_config(hidden_size=35, head_dim=20, rotary_dim=12, num_heads=4, num_kv_heads=4),
    dtype=torch.bfloat16,
    pages="scaled",
    sequences=[(9, 0), (1, 700), (4, 70)],
    logit_rows=[8, 9, 10, 13],
    block_size=16,
    num_threads=2,
)
@settings(max_examples=60, deadline=None)
@given(
    config=st.builds(
        small_config,
        hidden_size=st.sampled_from([35, 48]),
        intermediate_size=st.sampled_from([40, 96]),
        num_heads=st.just(6),
        num_kv_heads=st.sampled_from([1, 2, 6]),
        head_dim=st.sampled_from([16, 20, 64]),
        rotary_dim=st.sampled_from([None, 8]),
        has_biases=st.booleans(),
        qk_norm=st.booleans(),
        sliding_windows=st.sampled_from([(None,), (None, None), (5, None, 64), (100, 7)]),
    ),
    dtype=st.sampled_from(DTYPES),
    pages=st.sampled_from(PAGES),
    sequences=SEQUENCES,
    logit_rows=st.lists(st.integers(0, 100), max_size=5),
    block_size=st.sampled_from([4, 16]),
    num_threads=st.integers(1, 3),
)
def test_one_call_makes_the_bits_of_operation_after_operation(
    native: Kernels,
    config: ModelConfig,
    dtype: torch.dtype,
    pages: str,
    sequences: list[tuple[int, int]],
    logit_rows: list[int],
    block_size: int,
    num_threads: int,
) -> None:
    torch.set_num_threads(num_threads)
    batch, blocks = step_of(sequences, logit_rows, block_size=block_size)
    expected, got = (
        outcome(
            make_decoder(config, kernels, dtype),
            batch,
            cache_for(config, pages, dtype, blocks, block_size),
        )
        for kernels in (one_by_one(native), native)
    )
    assert got == expected


def quantized(weight: Tensor, bits: Literal[4, 8], kind: str) -> GroupQuantized:
    """Return integers in groups of 32 inputs that stand for about a weight."""
    groups = weight.float().unflatten(1, (-1, 32))
    most = 2**bits - 1
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / most).half()
    codes = ((groups - low.unsqueeze(2)) / scales.float().unsqueeze(2)).round().clamp(0, most)
    zeros = (-low / scales.float()).round().clamp(0, most).to(torch.uint8)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(4))
    return GroupQuantized(
        codes=codes.flatten(1).to(torch.uint8),
        bits=bits,
        group_size=32,
        scales=scales,
        zeros=zeros if kind == "zeros" else None,
        minimums=None if kind == "zeros" else low.half(),
        input_order=order if kind == "ordered" else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["zeros", "minimums", "ordered", "stacked"])
def test_weights_in_integers_make_the_same_bits(
    native: Kernels, kind: str, dtype: torch.dtype
) -> None:
    config = small_config(
        hidden_size=64, intermediate_size=192, num_heads=4, head_dim=16, has_biases=True
    )

    def pack(weight: Tensor, sum_unit: int | None = None) -> PackedWeight:
        if len(weight) == config.vocab_size:
            return native.pack_weight(weight)
        if kind != "stacked":
            return native.pack_weight(quantized(weight, 4, kind), sum_unit)
        parts = weight.split([32, 20, len(weight) - 52])
        unlike = (quantized(parts[0], 4, "zeros"), parts[1], quantized(parts[2], 8, "ordered"))
        return native.pack_weight(unlike, sum_unit)

    batch, blocks = step_of([(70, 3), (1, 130), (4, 70)], [69, 70, 74, 74])
    expected, got = (
        outcome(
            make_decoder(config, replace(kernels, pack_weight=pack), dtype),
            batch,
            cache_for(config, "dtype", dtype, blocks),
        )
        for kernels in (one_by_one(native), native)
    )
    assert got == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_leave_a_rows_bits_as_they_are(
    native: Kernels, dtype: torch.dtype
) -> None:
    config = small_config(qk_norm=True, sliding_windows=(None, 50))
    decoder = make_decoder(config, native, dtype)
    sequences = [(70, 3), (1, 700), (4, 70)]
    batch, blocks = step_of(sequences, [69, 70, 71, 72, 73, 74])
    together = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        cache = cache_for(config, "dtype", dtype, blocks)
        together.append(decoder.hidden_states(batch, cache))
    assert bits(together[1:]) == bits(together[:1]) * 2
    alone = replace(
        batch,
        token_ids=batch.token_ids[70:71],
        positions=batch.positions[70:71],
        slot_mapping=batch.slot_mapping[70:71],
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=batch.seq_lens[1:2],
        block_table=batch.block_table[1:2],
        logit_rows=torch.tensor([0]),
    )
    row = decoder.hidden_states(alone, cache_for(config, "dtype", dtype, blocks))
    assert bits([row]) == bits([together[0][1:2]])


def test_steps_in_turn_on_two_caches_each_keep_their_own(native: Kernels) -> None:
    config = small_config()
    batches = [step_of([(20, 37)], [3]), step_of([(1, 40), (9, 0)], [0, 9])]
    results = []
    for kernels in (one_by_one(native), native):
        decoder = make_decoder(config, kernels, torch.bfloat16)
        caches = [
            cache_for(config, pages, torch.bfloat16, batches[i][1], 16)
            for i, pages in enumerate(("dtype", "scaled"))
        ]
        made = [decoder.hidden_states(batches[i][0], caches[i]) for _ in range(2) for i in range(2)]
        results.append(bits(made + cache_tensors(caches[0]) + cache_tensors(caches[1])))
    assert results[1] == results[0]


def test_rows_that_pad_a_batch_are_as_one_by_one(native: Kernels) -> None:
    config = small_config()
    batch, blocks = step_of([(9, 0), (4, 70)], [12])
    shorter = replace(
        batch,
        cu_seqlens_q=batch.cu_seqlens_q[:2].contiguous(),
        seq_lens=batch.seq_lens[:1],
        block_table=batch.block_table[:1],
    )
    expected, got = (
        outcome(
            make_decoder(config, kernels, torch.bfloat16),
            shorter,
            cache_for(config, "dtype", torch.bfloat16, blocks),
        )
        for kernels in (one_by_one(native), native)
    )
    assert got == expected


Mutation = Callable[[DecoderStack], DecoderStack]


def _of_layer(stack: DecoderStack, **changes: object) -> DecoderStack:
    layers = list(stack.layers)
    layers[1] = dataclasses.replace(layers[1], **changes)  # type: ignore[type-var]  # DecoderLayer
    return replace(stack, layers=layers)


MUTANTS: dict[str, Mutation] = {
    "layers swapped": lambda s: replace(s, layers=[s.layers[1], s.layers[0], s.layers[2]]),
    "another layer's norm": lambda s: _of_layer(s, mlp_norm=s.layers[0].mlp_norm),
    "key norm for query norm": lambda s: _of_layer(s, query_norm=s.layers[1].key_norm),
    "no window": lambda s: _of_layer(s, sliding_window=None),
    "window one longer": lambda s: _of_layer(s, sliding_window=8),
    "no bias": lambda s: _of_layer(s, qkv=replace_bias(s.layers[1].qkv, None)),
    "other scale": lambda s: replace(s, attention_scale=s.attention_scale * 1.01),
    "other eps": lambda s: replace(s, rms_norm_eps=s.rms_norm_eps * 100),
    "positions one on": lambda s: replace(s, cos_sin=s.cos_sin.roll(1, 0)),
}


def replace_bias(linear: object, bias: Tensor | None) -> object:
    """Return a projection with another bias."""
    return dataclasses.replace(linear, bias=bias)  # type: ignore[type-var]  # a Projection


@pytest.mark.parametrize("name", [*MUTANTS, "pages of another layer"])
def test_a_wrong_program_makes_other_bits(native: Kernels, name: str) -> None:
    config = small_config(qk_norm=True, has_biases=True, sliding_windows=(None, 7, None))
    batch, blocks = step_of([(20, 37), (1, 130)], [19, 20])
    make = native.make_layer_program
    assert make is not None

    def make_mutant(stack: DecoderStack) -> LayerProgram | None:
        return make(MUTANTS[name](stack) if name in MUTANTS else stack)

    def made(kernels: Kernels) -> list[bytes]:
        cache = cache_for(config, "dtype", torch.bfloat16, blocks)
        if kernels.make_layer_program is make_mutant and name not in MUTANTS:
            cache.layers = cache.layers[::-1]
        return outcome(make_decoder(config, kernels, torch.bfloat16), batch, cache)[:1]

    assert made(replace(native, make_layer_program=make_mutant)) != made(one_by_one(native))
    assert made(native) == made(one_by_one(native))


def _broken(batch: StepBatch, name: str) -> StepBatch:
    far = torch.full_like(batch.positions, 5000)
    table = batch.block_table.clone()
    table[1, 0] = -1
    outside = table.clone()
    outside[0, 0] = 10_000
    changes: dict[str, dict[str, Tensor]] = {
        "position": {"positions": far},
        "negative position": {"positions": far.neg()},
        "slot": {"slot_mapping": far},
        "missing block": {"block_table": table},
        "block outside": {"block_table": outside},
        "logit row": {"logit_rows": torch.tensor([0, 24])},
        "negative logit row": {"logit_rows": torch.tensor([-1])},
        "sequence outside": {"cu_seqlens_q": batch.cu_seqlens_q + 1},
        "dtype of positions": {"positions": batch.positions.int()},
        "number of slots": {"slot_mapping": batch.slot_mapping[1:]},
        "dtype of lengths": {"seq_lens": batch.seq_lens.long()},
        "number of sequences": {"cu_seqlens_q": batch.cu_seqlens_q[1:]},
        "table not contiguous": {"block_table": batch.block_table.t().contiguous().t()},
        "dtype of logit rows": {"logit_rows": batch.logit_rows.int()},
    }
    return replace(batch, **changes[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("position", "cos_sin"),
        ("negative position", "cos_sin"),
        ("slot", "slot"),
        ("missing block", "block_table lacks"),
        ("block outside", "block_table lacks"),
        ("logit row", "logit_rows names"),
        ("negative logit row", "logit_rows names"),
        ("sequence outside", "cu_seqlens_q names"),
        ("dtype of positions", "positions is"),
        ("number of slots", "slot_mapping is"),
        ("dtype of lengths", "seq_lens is"),
        ("number of sequences", "cu_seqlens_q is"),
        ("table not contiguous", "block_table is"),
        ("dtype of logit rows", "logit_rows is"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_nothing_written(
    native: Kernels, name: str, message: str
) -> None:
    config = small_config()
    batch, blocks = step_of([(20, 37), (4, 70)], [19, 23])
    cache = cache_for(config, "dtype", torch.bfloat16, blocks)
    before = bits(cache_tensors(cache))
    decoder = make_decoder(config, native, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        decoder.hidden_states(_broken(batch, name), cache)
    assert bits(cache_tensors(cache)) == before


def test_a_cache_of_another_model_is_refused(native: Kernels) -> None:
    config = small_config()
    decoder = make_decoder(config, native, torch.bfloat16)
    batch, blocks = step_of([(9, 0)], [8])
    others = {
        "layers": small_config(sliding_windows=(None,)),
        "head_dim": small_config(head_dim=20),
        "pages are": small_config(num_heads=6, num_kv_heads=3),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            decoder.hidden_states(batch, cache_for(other, "dtype", torch.bfloat16, blocks))


def test_weights_in_another_layout_go_one_by_one(native: Kernels) -> None:
    class OtherWeight:
        out_features, in_features, num_bytes = 192, 48, 0

    stacks: list[DecoderStack] = []
    make = native.make_layer_program
    assert make is not None

    def keep(stack: DecoderStack) -> None:
        stacks.append(stack)

    config = small_config(head_dim=16, num_heads=6, num_kv_heads=3)
    make_decoder(config, replace(native, make_layer_program=keep), torch.bfloat16)
    (stack,) = stacks
    assert make(stack) is not None
    other = dataclasses.replace(stack.layers[1].qkv, weight=OtherWeight())  # type: ignore[type-var]
    assert make(_of_layer(stack, qkv=other)) is None
    with pytest.raises(ValueError, match="bias"):
        make(_of_layer(stack, qkv=replace_bias(stack.layers[1].qkv, torch.zeros(3))))
    with pytest.raises(ValueError, match="norm"):
        make(_of_layer(stack, mlp_norm=torch.zeros(3, dtype=torch.bfloat16)))
