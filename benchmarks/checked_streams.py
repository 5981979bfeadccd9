"""Seeded requests, and readers that notice a token lost, doubled or out of order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

TEXTS = (
    "The first ten numbers are",
    "Once upon a time, in a city by the sea,",
    "def fibonacci(n):",
    "Photosynthesis is",
    "Dear Sir or Madam,",
    "The three laws of motion are these:",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededRequest:
    """A request whose tokens depend on nothing but itself."""

    name: str
    """Tells it from others."""
    prompt: str | tuple[int, ...]
    """Text, or token ids."""
    params: pb.SamplingParams
    """With a seed where it samples."""

    def message(self, request_id: str = "") -> pb.GenerateStreamRequest:
        """As it is sent; an empty request_id is made by the server."""
        message = pb.GenerationInput(request_id=request_id, sampling_params=self.params)
        if isinstance(self.prompt, str):
            message.text = self.prompt
        else:
            message.token_ids.ids.extend(self.prompt)
        return pb.GenerateStreamRequest(input=message)


@dataclass(slots=True, kw_only=True)
class SequenceTranscript:
    """What a reader got of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    """In order."""
    text: str = ""
    """In order."""
    finish_reason: int = pb.FINISH_REASON_UNSPECIFIED
    """Set once it has ended."""


Transcript = list[SequenceTranscript]
"""Of one request, by index."""


class BrokenStreamError(Exception):
    """A stream that is no stream of its request: one line says how."""


def seeded_requests(
    num_requests: int,
    *,
    seed: int,
    vocab_size: int,
    prompt_lens: tuple[int, int] = (4, 120),
    output_lens: tuple[int, int] = (8, 48),
) -> list[SeededRequest]:
    """Greedy, sampled, penalised and several at once, in turns; the same for the same seed.

    Every other prompt is text, the rest are random ids: those give flat distributions, where the
    smallest difference of the logits would change a token.
    """
    generator = random.Random(seed)
    requests = []
    for index in range(num_requests):
        params = pb.SamplingParams(
            max_tokens=generator.randint(*output_lens), ignore_eos=True, temperature=0.0
        )
        kind = index % 4
        if kind != 0:
            params.temperature = generator.uniform(0.5, 1.2)
            params.seed = generator.getrandbits(64)
        if kind == 2:
            params.top_p, params.repetition_penalty = 0.9, 1.1
        if kind == 3:
            params.n = generator.randint(2, 3)
        prompt: str | tuple[int, ...] = generator.choice(TEXTS)
        if index % 2 == index // 4 % 2:
            prompt_len = generator.randint(*prompt_lens)
            prompt = tuple(generator.randrange(vocab_size) for _ in range(prompt_len))
        requests.append(SeededRequest(name=f"request-{index}", prompt=prompt, params=params))
    return requests


async def read_stream(
    stub: pb_grpc.GenerationServiceAsyncStub,
    request: SeededRequest,
    *,
    timeout_s: float,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> Transcript:
    """Read to the end; on_tokens hears of every event's tokens as they come.

    Raises BrokenStreamError where events are missing, doubled or out of order, and
    grpc.aio.AioRpcError where the request fails.
    """
    transcript = [SequenceTranscript() for _ in range(request.params.n or 1)]
    num_events = 0
    completed: pb.Completed | None = None
    call = stub.GenerateStream(request.message(), timeout=timeout_s)
    try:
        async for response in call:
            _check(response.seq == num_events, f"event {response.seq} came for {num_events}")
            _check(completed is None, "an event came after the last")
            num_events += 1
            if response.HasField("output"):
                _add(transcript, response.output)
                on_tokens(len(response.output.token_ids))
            elif response.HasField("completed"):
                completed = response.completed
    finally:
        call.cancel()
    if completed is None:
        raise BrokenStreamError("the stream ended without its last event")
    _check(all(each.finish_reason for each in transcript), "a sequence did not end")
    num_tokens = sum(len(each.token_ids) for each in transcript)
    _check(completed.usage.num_output_tokens == num_tokens, "tokens are missing or doubled")
    return transcript


def first_difference(expected: Transcript, got: Transcript) -> str | None:
    """One line about where two transcripts part; None where they are equal."""
    for index, (one, other) in enumerate(zip(expected, got, strict=True)):
        if one.token_ids != other.token_ids:
            place = _common_length(one.token_ids, other.token_ids)
            return (
                f"sequence {index} differs at token {place}: "
                f"{one.token_ids[place : place + 4]} and {other.token_ids[place : place + 4]}"
            )
        if one.text != other.text:
            return f"sequence {index} has the tokens, but another text"
        if one.finish_reason != other.finish_reason:
            return f"sequence {index} ended for another reason"
    return None


def _add(transcript: Transcript, output: pb.Output) -> None:
    sequence = transcript[output.index]
    _check(not sequence.finish_reason, f"sequence {output.index} went on after its end")
    sequence.token_ids += output.token_ids
    sequence.text += output.text
    sequence.finish_reason = output.finish_reason


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise BrokenStreamError(problem)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
