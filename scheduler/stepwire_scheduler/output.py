"""Turns the tokens that a sequence commits into what its client is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepwire_scheduler.detokenizer import Detokenizer, TokenBytes
from stepwire_scheduler.sequence import FinishReason, Logprobs, SamplingParams
from stepwire_scheduler.stop_strings import StopMatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceDelta:
    """More of one sequence."""

    text: str
    """Complete characters that are certainly not part of a stop string."""
    token_ids: Sequence[int]
    """The committed tokens, up to the one that completed a stop string."""
    logprobs: Sequence[Logprobs]
    """One a token where asked for, else empty."""
    finish_reason: FinishReason | None
    """Set on the last delta; STOP where a stop string was found."""
    stop_string: str | None
    """The stop string that was found."""
    stop_token_id: int | None
    """The end-of-sequence or stop token that ended the sequence, if nothing did before."""


class OutputAssembler:
    """Detokenises one sequence and ends it at a stop string.

    The text of end-of-sequence and stop tokens is left out; their ids are kept.
    """

    __slots__ = ("_detokenizer", "_is_finished", "_stop_matcher")

    def __init__(self, tokenizer: TokenBytes, params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer.token_bytes)
        self._stop_matcher = StopMatcher(params.stop) if params.stop else None
        self._is_finished = False

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprobs] = (),
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
    ) -> SequenceDelta:
        """Commit tokens; finish_reason says that they are the last.

        stop_token_id: the last of token_ids, where that is what ended the sequence.
        Where the delta holds fewer token_ids than were pushed, a stop string ended the
        sequence and the rest never happened.
        """
        assert not self._is_finished
        text = ""
        has_stop_token = stop_token_id is not None
        for i, token_id in enumerate(token_ids):
            if has_stop_token and i == len(token_ids) - 1:
                break
            piece, stop_string = self._settle(self._detokenizer.push(token_id))
            text += piece
            if stop_string is not None:
                return self._stopped(text, token_ids[: i + 1], logprobs[: i + 1], stop_string)
        if finish_reason is not None:
            piece, stop_string = self._settle(self._detokenizer.finish())
            text += piece
            if stop_string is not None:
                return self._stopped(text, token_ids, logprobs, stop_string)
            if self._stop_matcher is not None:
                text += self._stop_matcher.finish()
            self._is_finished = True
        return SequenceDelta(
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_string=None,
            stop_token_id=stop_token_id,
        )

    def catch_up(self, token_ids: Sequence[int], text: str) -> bool:
        """Commit, before all else, what another one made a text of; says whether this one does."""
        delta = self.push(token_ids)
        return delta.finish_reason is None and delta.text == text

    def _settle(self, text: str) -> tuple[str, str | None]:
        if self._stop_matcher is None or not text:
            return text, None
        match = self._stop_matcher.push(text)
        return match.text, match.stop_string

    def _stopped(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprobs],
        stop_string: str,
    ) -> SequenceDelta:
        self._is_finished = True
        return SequenceDelta(
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=FinishReason.STOP,
            stop_string=stop_string,
            stop_token_id=None,
        )
