"""A speculator that knows the truth, tells it for a while, and checks what the planner tells it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from random import Random
from typing import Protocol

from stepwire_scheduler.sequence import Sequence, SequenceStatus
from stepwire_scheduler.speculation.interface import Draft


class Truth(Protocol):
    """What a sequence generates where nothing goes wrong."""

    def __call__(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """The num_tokens tokens behind its known ones."""
        ...


class ScriptedSpeculator:
    """Drafts of random length, right up to a random place; now and then longer than is allowed.

    It asserts what the planner owes a speculator, and that what was right was accepted.
    """

    def __init__(
        self,
        truth: Truth,
        *,
        vocab_size: int,
        seed: object = 0,
        max_drafts: int = 6,
        is_always_right: bool = False,
        is_first: bool = True,
    ) -> None:
        """is_always_right: every draft has max_drafts tokens, all of them right.

        is_first: whether no sequence was begun with another speculator.
        """
        self._is_first = is_first
        self._is_always_right = is_always_right
        self._truth = truth
        self._vocab_size = vocab_size
        self._rng = Random(str(seed))
        self._max_drafts = max_drafts
        self._num_right: dict[int, int] = {}
        """Of the draft in flight, by id of the sequence."""
        self._num_observed: dict[int, int] = {}
        """Tokens that it has learnt of, by id of a sequence that goes on."""
        self._ended: list[Sequence] = []
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_steps = 0

    def propose(self, sequences: Items[Sequence], *, num_tokens: int, budget: int) -> list[Draft]:
        assert sequences
        assert budget > 0
        assert num_tokens >= len(sequences)
        return [self._draft(sequence) for sequence in sequences]

    def _draft(self, sequence: Sequence) -> list[int]:
        num_known = len(sequence.token_ids) + sequence.num_pending_tokens
        assert sequence.num_computed_tokens == num_known, "it is not about to decode"
        assert num_known < sequence.max_num_tokens
        assert sequence.status is SequenceStatus.RUNNING
        self._num_right.pop(id(sequence), None)
        num_drafts = num_right = self._max_drafts
        if not self._is_always_right:
            if self._rng.random() < 0.3:
                return []
            num_drafts = self._rng.randint(1, self._max_drafts)
            num_right = self._rng.randint(0, num_drafts)
        self._num_right[id(sequence)] = num_right
        num_pending = sequence.num_pending_tokens
        draft = self._truth(sequence, num_pending + num_drafts)[num_pending:]
        for position in range(num_right, num_drafts):
            draft[position] = (draft[position] + 1) % self._vocab_size
        return draft

    def observe(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        assert sequence not in self._ended, "it has ended"
        num_before = self._num_observed.get(id(sequence))
        if num_before is None and self._is_first:
            num_before = sequence.num_prompt_tokens
        if num_before is not None:
            num_new = len(sequence.token_ids) - num_before
            assert 1 <= num_new <= num_accepted + 1, "it misses tokens"
        self._num_observed[id(sequence)] = len(sequence.token_ids)
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self._check_acceptance(sequence, num_drafted, num_accepted)

    def _check_acceptance(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        # Steps before the one with the draft may come back first.
        num_right = self._num_right.pop(id(sequence)) if num_drafted else 0
        assert num_accepted == min(num_right, num_drafted), "what was right was not accepted"

    def note_step(
        self,
        *,
        num_tokens: int,
        busy_ms: float,
        num_drafts: int = 0,
        idle_ms: float | None = None,
    ) -> None:
        assert num_tokens > 0
        assert busy_ms >= 0
        self.num_steps += 1

    def forget(self, sequence: Sequence) -> None:
        assert sequence.status is SequenceStatus.FINISHED
        assert sequence not in self._ended, "it has ended twice"
        self._ended.append(sequence)
        self._num_observed.pop(id(sequence), None)
        self._num_right.pop(id(sequence), None)

    def reset_epoch(self) -> None:
        """The drafts in flight are lost: their test calls this, the planner does not."""
        self._num_right.clear()


class DraftModelSpeculator(ScriptedSpeculator):
    """Says how long drafts may be; the executor's draft model makes them."""

    def _draft(self, sequence: Sequence) -> list[int]:
        return [0] * len(super()._draft(sequence))

    def _check_acceptance(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafted
