"""What a client is sent of a sequence, whatever the chunking."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from stepwire_scheduler.output import OutputAssembler, SequenceDelta
from stepwire_scheduler.sequence import FinishReason, Logprobs, SamplingParams
from stepwire_scheduler.stop_strings import StopMatcher

# One token a character of a small alphabet, so that stop strings overlap often.
ALPHABET = "abé\n"
EOS = len(ALPHABET)


@dataclass(frozen=True)
class AlphabetTokenizer:
    token_bytes: tuple[bytes, ...] = (*(c.encode() for c in ALPHABET), b"")


texts = st.text(ALPHABET, max_size=40)
stop_sets = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(where it starts, which) of the stop string whose last character comes first."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


def split(data: st.DataObject, items: list[int]) -> list[list[int]]:
    chunks = []
    while items:
        size = data.draw(st.integers(1, len(items)))
        chunks.append(items[:size])
        items = items[size:]
    return chunks


def run(
    chunks: list[list[int]], finish: FinishReason = FinishReason.LENGTH, **params: object
) -> list[SequenceDelta]:
    assembler = OutputAssembler(AlphabetTokenizer(), SamplingParams(max_tokens=99, **params))
    deltas = []
    for i, chunk in enumerate(chunks):
        deltas.append(assembler.push(chunk, (), finish if i == len(chunks) - 1 else None))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


@given(texts.filter(bool), stop_sets, st.data())
def test_output_ends_before_the_first_stop_string(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    token_ids = [ALPHABET.index(c) for c in text]
    deltas = run(split(data, token_ids), stop=tuple(stops))
    emitted = "".join(delta.text for delta in deltas)
    last = deltas[-1]
    expected = first_stop(text, stops)
    committed = [t for delta in deltas for t in delta.token_ids]
    if expected is None:
        assert (emitted, last.stop_string) == (text, None)
        assert last.finish_reason is FinishReason.LENGTH
        assert committed == token_ids
    else:
        start, stop = expected
        assert (emitted, last.stop_string) == (text[:start], stop)
        assert last.finish_reason is FinishReason.STOP
        assert committed == token_ids[: start + len(stop)]


@given(texts, stop_sets, st.data())
def test_nothing_of_a_possible_stop_string_is_emitted_before_it_is_decided(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """Whatever could follow, what was emitted stays a prefix of the final text."""
    matcher = StopMatcher(stops)
    emitted = matcher.push(text)
    if emitted.stop_string is not None:
        return
    continuation = data.draw(st.sampled_from(stops))
    for start in range(len(continuation) + 1):
        whole = text + continuation[start:]
        found = first_stop(whole, stops)
        final = whole if found is None else whole[: found[0]]
        assert final.startswith(emitted.text)


@given(texts, stop_sets)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    match = StopMatcher(stops).push(text)
    held = text[len(match.text) :]
    if match.stop_string is None and held:
        assert any(stop.startswith(held) for stop in stops)


@given(texts.filter(bool), st.data())
def test_chunking_without_stop_strings_loses_nothing(text: str, data: st.DataObject) -> None:
    deltas = run(split(data, [ALPHABET.index(c) for c in text]))
    assert "".join(delta.text for delta in deltas) == text


def test_the_stop_tokens_text_is_left_out_and_its_id_kept() -> None:
    assembler = OutputAssembler(AlphabetTokenizer(), SamplingParams(max_tokens=9))
    delta = assembler.push([0, 1], (), FinishReason.STOP, stop_token_id=1)
    assert (delta.text, list(delta.token_ids), delta.stop_token_id) == ("a", [0, 1], 1)


def test_a_stop_string_in_one_step_drops_the_tokens_after_it() -> None:
    """Several tokens of one step (accepted drafts): those past the stop never happened."""
    logprobs = [
        Logprobs(token_id=t, logprob=-1.0, rank=1, top_token_ids=(), top_logprobs=())
        for t in (0, 1, 0, EOS)
    ]
    assembler = OutputAssembler(AlphabetTokenizer(), SamplingParams(max_tokens=9, stop=("b",)))
    delta = assembler.push([0, 1, 0, EOS], logprobs, FinishReason.STOP, stop_token_id=EOS)
    assert (delta.text, list(delta.token_ids), delta.stop_string) == ("a", [0, 1], "b")
    assert [entry.token_id for entry in delta.logprobs] == [0, 1]
    assert delta.stop_token_id is None


def test_held_text_comes_with_the_end() -> None:
    assembler = OutputAssembler(AlphabetTokenizer(), SamplingParams(max_tokens=9, stop=("ab",)))
    assert assembler.push([0]).text == ""
    assert assembler.push([EOS], (), FinishReason.STOP, stop_token_id=EOS).text == "a"
