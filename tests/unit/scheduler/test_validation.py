"""What a request may hold; every fault is named, and costs nothing to find."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_scheduler.errors import InvalidRequestError
from stepwire_scheduler.sampling_validation import ModelLimits
from stepwire_scheduler.sequence import Request
from stepwire_scheduler.tokenizer import Tokenizer
from stepwire_scheduler.validation import validate_input
from support.scheduler_fakes import tiny_tokenizer

LIMITS = ModelLimits(vocab_size=400, max_model_len=64)
PARAMS = "input.sampling_params"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(Path(tmp_path_factory.mktemp("model")))


async def validate(
    message: pb.GenerationInput, tokenizer: Tokenizer, limits: ModelLimits = LIMITS
) -> Request:
    return await validate_input(
        message, limits=limits, tokenizer=tokenizer, arrival_ms=5.0, deadline_ms=9.0
    )


async def faults(message: pb.GenerationInput, tokenizer: Tokenizer) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        await validate(message, tokenizer)
    return [violation.field for violation in caught.value.violations]


def with_params(**params: object) -> pb.GenerationInput:
    return pb.GenerationInput(text="hi", sampling_params=pb.SamplingParams(**params))


async def test_unset_parameters_take_the_documented_defaults(tokenizer: Tokenizer) -> None:
    request = await validate(pb.GenerationInput(text="hi"), tokenizer)
    params = request.sampling_params
    assert params.max_tokens == 64 - len(request.prompt_token_ids)
    assert (params.temperature, params.top_p, params.repetition_penalty, params.n) == (1, 1, 1, 1)
    assert (params.top_k, params.min_p, params.num_logprobs, params.stop) == (0, 0, None, ())
    assert (request.arrival_ms, request.deadline_ms) == (5.0, 9.0)
    assert request.request_id.startswith("req-")


async def test_unset_seeds_differ_and_set_ones_are_kept(tokenizer: Tokenizer) -> None:
    drawn = [(await validate(with_params(), tokenizer)).sampling_params.seed for _ in range(3)]
    assert len(set(drawn)) == 3
    for seed in (0, 2**64 - 1):
        assert (await validate(with_params(seed=seed), tokenizer)).sampling_params.seed == seed


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, 100.5]),
        ("top_p", [0.0, -1.0, 1.01, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan, -math.inf]),
        ("frequency_penalty", [-2.1, 2.1, math.nan]),
        ("repetition_penalty", [0.0, -1.0, 10.1, math.nan]),
        ("n", [0, 9, 10**6]),
        ("logprobs", [21, 2**32 - 1]),
        ("max_tokens", [0, 64, 2**32 - 1]),
        ("min_tokens", [64, 2**32 - 1]),
    ],
)
async def test_values_out_of_range_are_named(
    tokenizer: Tokenizer, name: str, values: list[float]
) -> None:
    for value in values:
        assert await faults(with_params(**{name: value}), tokenizer) == [f"{PARAMS}.{name}"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [0.0, 100.0]),
        ("top_p", [1.0, 1e-6]),
        ("min_p", [0.0, 1.0]),
        ("presence_penalty", [-2.0, 2.0]),
        ("repetition_penalty", [0.01, 10.0]),
        ("n", [1, 8]),
        ("logprobs", [0, 20]),
        ("top_k", [0, 2**32 - 1]),
    ],
)
async def test_values_at_the_ends_of_their_range_are_accepted(
    tokenizer: Tokenizer, name: str, values: list[float]
) -> None:
    for value in values:
        await validate(with_params(**{name: value}), tokenizer)


async def test_a_top_k_beyond_the_vocabulary_means_all(tokenizer: Tokenizer) -> None:
    request = await validate(with_params(top_k=2**32 - 1), tokenizer)
    assert request.sampling_params.top_k == 0


async def test_a_vanishing_temperature_is_greedy(tokenizer: Tokenizer) -> None:
    request = await validate(with_params(temperature=1e-40), tokenizer)
    assert request.sampling_params.temperature == 0.0


async def test_all_faults_are_reported_at_once(tokenizer: Tokenizer) -> None:
    message = pb.GenerationInput(
        request_id="x" * 129,
        priority=1001,
        token_ids=pb.TokenIds(ids=[1, 400, 5, 2**32 - 1]),
        sampling_params=pb.SamplingParams(
            temperature=-1, top_p=2, stop=["ok", ""], logit_bias={1: math.nan, 400: 1.0}
        ),
    )
    assert set(await faults(message, tokenizer)) == {
        "input.request_id",
        "input.priority",
        "input.token_ids.ids[1]",
        "input.token_ids.ids[3]",
        f"{PARAMS}.temperature",
        f"{PARAMS}.top_p",
        f"{PARAMS}.stop[1]",
        f"{PARAMS}.logit_bias[1]",
        f"{PARAMS}.logit_bias[400]",
    }


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerationInput(), "input.prompt"),
        (pb.GenerationInput(text=""), "input.text"),
        (pb.GenerationInput(token_ids=pb.TokenIds()), "input.token_ids.ids"),
        (pb.GenerationInput(chat=pb.Chat()), "input.chat.messages"),
        (
            pb.GenerationInput(chat=pb.Chat(messages=[pb.ChatMessage(content="hi")])),
            "input.chat.messages[0].role",
        ),
        (pb.GenerationInput(token_ids=pb.TokenIds(ids=[1] * 64)), "input.token_ids"),
        (pb.GenerationInput(text="word " * 200), "input.text"),
        (pb.GenerationInput(text="\x1f" * 500_000), "input.text"),
        (pb.GenerationInput(text="a", request_id="tab\there"), "input.request_id"),
        (pb.GenerationInput(text="a", request_id="é"), "input.request_id"),
    ],
)
async def test_a_prompt_that_cannot_run_is_named(
    tokenizer: Tokenizer, message: pb.GenerationInput, field: str
) -> None:
    assert await faults(message, tokenizer) == [field]


async def test_drafts_are_as_many_as_asked_for_and_by_default_the_servers(
    tokenizer: Tokenizer,
) -> None:
    limits = replace(LIMITS, num_speculative_tokens=4)
    for message, expected in (
        (with_params(), None),
        (with_params(num_speculative_tokens=0), 0),
        (with_params(num_speculative_tokens=3), 3),
        (with_params(num_speculative_tokens=4), 4),
    ):
        request = await validate(message, tokenizer, limits)
        assert request.sampling_params.num_speculative_tokens == expected
    # No server is too plain for a request that wants none.
    request = await validate(with_params(num_speculative_tokens=0), tokenizer)
    assert request.sampling_params.num_speculative_tokens == 0


@pytest.mark.parametrize(
    ("num_drafts", "limit", "said"),
    [(5, 4, r"in \[0, 4\]"), (2**32 - 1, 4, r"in \[0, 4\]"), (1, 0, "does not speculate")],
)
async def test_more_drafts_than_the_server_makes_are_refused(
    tokenizer: Tokenizer, num_drafts: int, limit: int, said: str
) -> None:
    message = with_params(num_speculative_tokens=num_drafts)
    with pytest.raises(InvalidRequestError, match=said) as caught:
        await validate(message, tokenizer, replace(LIMITS, num_speculative_tokens=limit))
    assert [each.field for each in caught.value.violations] == [f"{PARAMS}.num_speculative_tokens"]


async def test_an_unknown_role_is_refused_in_the_templates_words(tokenizer: Tokenizer) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="wizard", content="hi")])
    with pytest.raises(InvalidRequestError, match="use system, user or assistant") as caught:
        await validate(pb.GenerationInput(chat=chat), tokenizer)
    assert caught.value.violations[0].field == "input.chat"


async def test_max_tokens_beyond_the_room_says_how_much_there_is(tokenizer: Tokenizer) -> None:
    message = pb.GenerationInput(
        token_ids=pb.TokenIds(ids=[1] * 60), sampling_params=pb.SamplingParams(max_tokens=5)
    )
    with pytest.raises(InvalidRequestError, match="at most 4") as caught:
        await validate(message, tokenizer)
    assert caught.value.violations[0].field == f"{PARAMS}.max_tokens"
    message.sampling_params.max_tokens = 4
    assert (await validate(message, tokenizer)).sampling_params.max_tokens == 4


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"stop": ["x"] * 100_000}, "stop"),
        ({"stop_token_ids": [1] * 200_000}, "stop_token_ids"),
        ({"logit_bias": dict.fromkeys(range(100_000), 1.0)}, "logit_bias"),
    ],
)
async def test_long_lists_are_one_fault(
    tokenizer: Tokenizer, params: dict[str, object], field: str
) -> None:
    assert await faults(with_params(**params), tokenizer) == [f"{PARAMS}.{field}"]


async def test_many_faults_are_cut_short(tokenizer: Tokenizer) -> None:
    """The status travels in metadata, which gRPC limits to 8 KiB."""
    message = pb.GenerationInput(token_ids=pb.TokenIds(ids=[9999] * 60))
    assert len(await faults(message, tokenizer)) == 32


async def test_stop_strings_are_measured_in_bytes(tokenizer: Tokenizer) -> None:
    assert await faults(with_params(stop=["é" * 33]), tokenizer) == [f"{PARAMS}.stop[0]"]
    request = await validate(with_params(stop=["é" * 32, "b", "b"]), tokenizer)
    assert request.sampling_params.stop == ("é" * 32, "b")


floats = st.floats(width=32)
uints = st.integers(0, 2**32 - 1)


@given(
    params=st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": uints, "min_tokens": uints, "temperature": floats, "top_k": uints,
            "top_p": floats, "min_p": floats, "seed": st.integers(0, 2**64 - 1),
            "presence_penalty": floats, "frequency_penalty": floats,
            "repetition_penalty": floats, "stop": st.lists(st.text(
                st.characters(codec="utf-8"), max_size=70), max_size=6),
            "logit_bias": st.dictionaries(uints, floats, max_size=5),
            "stop_token_ids": st.lists(uints, max_size=5), "ignore_eos": st.booleans(),
            "logprobs": uints, "n": uints,
        },
    )
)  # fmt: skip
async def test_whatever_is_sent_is_accepted_in_range_or_refused(
    tokenizer: Tokenizer, params: dict[str, object]
) -> None:
    message = pb.GenerationInput(
        token_ids=pb.TokenIds(ids=[1]), sampling_params=pb.SamplingParams(**params)
    )
    try:
        accepted = (await validate(message, tokenizer)).sampling_params
    except InvalidRequestError:
        return
    assert 0 <= accepted.temperature <= 100
    assert 0 < accepted.top_p <= 1
    assert 1 <= accepted.n <= 8
    assert accepted.min_tokens <= accepted.max_tokens <= 63
    assert all(math.isfinite(bias) for bias in accepted.logit_bias.values())
    assert accepted.top_k < 400
