"""Tiny context-dependent models, and the joint law that speculation over them has.

`enumerated_law` follows every path of drafts, acceptances and draws with its probability, through
the code that serves requests: only its draws are replaced by enumeration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from stepwire_executor.kernels.interface import SampleOutput, SamplingBatch
from stepwire_executor.speculation import rejection
from stepwire_executor.speculation.distributions import probabilities_of
from stepwire_executor.speculation.interface import NO_DRAFT, DraftRows
from stepwire_executor.speculation.rejection import RejectionVerification
from stepwire_executor.speculation.verification import SampledVerification
from torch import Tensor

NumDrafts = Callable[[int, int], int]
"""How many drafts a step makes for (index of the prefix or request, tokens left behind it)."""


class ContextModel:
    """Logits that depend on the whole context, of contexts up to some length."""

    def __init__(self, tables: list[Tensor]) -> None:
        """Take logits [vocab_size**n, vocab_size] for each context length n from 0 on.

        A context is the number that its tokens are the digits of, the first one the highest.
        """
        self.vocab_size = tables[0].shape[1]
        self._offsets = torch.tensor([0, *(len(table) for table in tables)]).cumsum(0)
        self._logits = torch.cat(tables)

    @staticmethod
    def random(vocab_size: int, max_len: int, *, seed: int, spread: float = 1.0) -> ContextModel:
        """Draw the logits from a normal distribution."""
        generator = torch.Generator().manual_seed(seed)
        return ContextModel(
            [
                spread * torch.randn(vocab_size**n, vocab_size, generator=generator).double()
                for n in range(max_len + 1)
            ]
        )

    @staticmethod
    def of_last_token(after: list[list[float]], max_len: int) -> ContextModel:
        """Take probabilities of each next token given the last one; the first follows token 0."""
        table = torch.tensor(after, dtype=torch.float64).log()
        return ContextModel([table[:1], *(table.tile(len(after) ** n, 1) for n in range(max_len))])

    def logits(self, contexts: Tensor, lengths: Tensor) -> Tensor:
        """Return [num_rows, vocab_size] float64 of contexts and lengths, [num_rows] int64."""
        return self._logits[self._offsets[lengths] + contexts]

    def changed(self, change: Callable[[Tensor], Tensor]) -> ContextModel:
        """Return a model whose logits, [num_contexts, vocab_size], are changed."""
        model = ContextModel.__new__(ContextModel)
        model.vocab_size, model._offsets = self.vocab_size, self._offsets
        model._logits = change(self._logits)
        return model

    def joint_law(self, num_tokens: int) -> Tensor:
        """Return the probability of every sequence of num_tokens: [vocab_size**num_tokens]."""
        law = torch.ones(1, dtype=torch.float64)
        for length in range(num_tokens):
            contexts = torch.arange(self.vocab_size**length)
            p = self.logits(contexts, torch.full_like(contexts, length)).softmax(dim=1)
            law = (law.unsqueeze(1) * p).flatten()
        return law


def row_parameters(seeds: Tensor, positions: Tensor, **changes: float) -> SamplingBatch:
    """Return parameters of rows at temperature 1 without limits, but for changes."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.full(seeds.shape, changes.get(name, default), dtype=dtype)

    return SamplingBatch(
        temperature=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        seeds=seeds,
        positions=positions,
        streams=torch.zeros_like(seeds),
    )


class Rule(Protocol):
    """Enumerates one step of one way to verify."""

    def __call__(
        self, p: ContextModel, q: ContextModel, prefixes: Tensor, length: int, num_drafts: Tensor
    ) -> Outcomes: ...


class Outcomes:
    """Ways a step may go."""

    def __init__(
        self, prefixes: Tensor, masses: Tensor, num_tokens: Tensor, token_ids: Tensor
    ) -> None:
        """Take the prefix each continues, its probability given that, and what it emits.

        prefixes, masses, num_tokens: [num_outcomes]; token_ids: [num_outcomes, most tokens].
        """
        self.prefixes, self.masses = prefixes, masses
        self.num_tokens, self.token_ids = num_tokens, token_ids


def enumerated_law(
    rule: Rule, p: ContextModel, q: ContextModel, num_tokens: int, num_drafts: NumDrafts
) -> Tensor:
    """Return the law of the first num_tokens tokens: [vocab_size**num_tokens] float64.

    All prefixes of a length are one batch, in which num_drafts may differ; steps follow each other
    until num_tokens are there.
    """
    vocab_size = p.vocab_size
    laws = [torch.zeros(vocab_size**n, dtype=torch.float64) for n in range(num_tokens + 1)]
    laws[0][0] = 1.0
    for length in range(num_tokens):
        prefixes = torch.arange(vocab_size**length)
        counts = [num_drafts(i, num_tokens - length - 1) for i in prefixes.tolist()]
        outcomes = rule(p, q, prefixes, length, torch.tensor(counts))
        contexts = outcomes.prefixes
        masses = laws[length][contexts] * outcomes.masses
        for emitted in range(1, outcomes.token_ids.shape[1] + 1):
            contexts = contexts * vocab_size + outcomes.token_ids[:, emitted - 1]
            here = outcomes.num_tokens == emitted
            laws[length + emitted].index_add_(0, contexts[here], masses[here])
    return laws[num_tokens]


class _EnumeratedDraws:
    """Gives what was enumerated, and multiplies up how likely that is.

    A row's seed names its outcome, its position the row's place in the sequence.
    """

    def __init__(self, paths: Tensor, acceptances: Tensor, finals: Tensor) -> None:
        """Take paths and acceptances [num_outcomes, most drafts + 1], finals [num_outcomes]."""
        self._paths, self._acceptances, self._finals = paths, acceptances, finals
        self.masses = torch.ones(len(finals), dtype=torch.float64)

    def draft(self, probabilities: Tensor, batch: SamplingBatch) -> Tensor:
        return self._choose(self._paths[batch.seeds, batch.positions], probabilities, batch)

    def accept(self, probabilities: Tensor, batch: SamplingBatch) -> Tensor:
        is_accepted = self._acceptances[batch.seeds, batch.positions]
        self._multiply(batch, torch.where(is_accepted, probabilities, 1 - probabilities))
        return is_accepted

    def residual(self, weights: Tensor, batch: SamplingBatch) -> Tensor:
        p = weights / weights.sum(dim=1, keepdim=True)
        return self._choose(self._finals[batch.seeds], p, batch)

    def target(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        p = probabilities_of(logits, batch)
        return SampleOutput(
            token_ids=self._choose(self._finals[batch.seeds], p, batch),
            is_finite=p[:, 0].isfinite(),
        )

    def _choose(self, token_ids: Tensor, p: Tensor, batch: SamplingBatch) -> Tensor:
        self._multiply(batch, p.gather(1, token_ids.unsqueeze(1)).squeeze(1))
        return token_ids

    def _multiply(self, batch: SamplingBatch, factors: Tensor) -> None:
        # What cannot have come so far may go on in any way, NaN among them.
        factors = torch.where(self.masses[batch.seeds] == 0, 0.0, factors)
        self.masses.scatter_reduce_(0, batch.seeds, factors, "prod")


class RejectionRule:
    """Enumerates `RejectionVerification`, with drafts of q or with looked-up ones."""

    def __init__(self, *, is_looked_up: bool = False, **changes: float) -> None:
        """Say how drafts are made; changes: sampling parameters of target and draft alike."""
        self._is_looked_up = is_looked_up
        self._changes = changes

    def __call__(
        self, p: ContextModel, q: ContextModel, prefixes: Tensor, length: int, num_drafts: Tensor
    ) -> Outcomes:
        vocab_size, most = p.vocab_size, int(num_drafts.max())
        kinds = torch.cartesian_prod(
            prefixes,
            torch.arange(vocab_size**most),
            torch.arange(2**most),
            torch.arange(vocab_size),
        )
        # A sequence of fewer drafts has fewer paths.
        count = num_drafts[kinds[:, 0]]
        kinds = kinds[(kinds[:, 1] < vocab_size**count) & (kinds[:, 2] < 2**count)]
        prefix, path, acceptance, finals = kinds.unbind(1)
        places = torch.arange(most + 1)
        paths = path.unsqueeze(1) // vocab_size**places % vocab_size
        acceptances = acceptance.unsqueeze(1) // 2**places % 2 == 1
        if self._is_looked_up:
            looked_up = torch.stack([looked_up_drafts(p, int(x), most) for x in prefixes])
            is_made = (path == 0).nonzero().squeeze(1)
            prefix, acceptances, finals = prefix[is_made], acceptances[is_made], finals[is_made]
            paths = looked_up[prefix]
        draws = _EnumeratedDraws(paths, acceptances, finals)
        rule = RejectionVerification(draws)
        step = StepRows.of(prefix, paths, num_drafts[prefix], vocab_size)
        batch = row_parameters(step.sequences, step.places, **self._changes)
        with_draft = step.with_draft
        drawn = None
        if not self._is_looked_up:
            drawn = rule.draw(
                q.logits(step.contexts[with_draft], length + step.places[with_draft]),
                rejection.select(batch, with_draft),
            )
        verified = rule.verify(
            p.logits(step.contexts, length + step.places),
            batch,
            step.draft_rows(None if drawn is None else drawn.probabilities),
        )
        assert verified.is_finite.all()
        return Outcomes(
            prefix, draws.masses, verified.num_accepted + 1, step.by_place(verified.token_ids)
        )


class SampledRule:
    """Enumerates `SampledVerification`, with drafts of q or with looked-up ones."""

    def __init__(self, *, is_looked_up: bool) -> None:
        """Say how drafts are made."""
        self._is_looked_up = is_looked_up

    def __call__(
        self, p: ContextModel, q: ContextModel, prefixes: Tensor, length: int, num_drafts: Tensor
    ) -> Outcomes:
        vocab_size, most = p.vocab_size, int(num_drafts.max())
        kinds = torch.cartesian_prod(
            prefixes,
            torch.arange(1 if self._is_looked_up else vocab_size**most),
            torch.arange(vocab_size ** (most + 1)),
        )
        count = num_drafts[kinds[:, 0]]
        kinds = kinds[(kinds[:, 1] < vocab_size**count) & (kinds[:, 2] < vocab_size ** (count + 1))]
        prefix, path, final = kinds.unbind(1)
        places = torch.arange(most + 1)
        paths = path.unsqueeze(1) // vocab_size**places % vocab_size
        if self._is_looked_up:
            paths = torch.stack([looked_up_drafts(p, int(x), most) for x in prefixes])[prefix]
        samples = final.unsqueeze(1) // vocab_size**places % vocab_size
        step = StepRows.of(prefix, paths, num_drafts[prefix], vocab_size)
        masses = torch.ones(len(prefix), dtype=torch.float64)

        def choose(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
            token_ids = samples[batch.seeds, batch.positions]
            factors = logits.softmax(dim=1).gather(1, token_ids.unsqueeze(1)).squeeze(1)
            masses.scatter_reduce_(0, batch.seeds, factors, "prod")
            return SampleOutput(
                token_ids=token_ids, is_finite=torch.ones_like(token_ids, dtype=torch.bool)
            )

        if not self._is_looked_up:
            with_draft = step.with_draft
            drafted = q.logits(step.contexts[with_draft], length + step.places[with_draft])
            factors = drafted.softmax(dim=1).gather(1, step.next_drafts[with_draft].unsqueeze(1))
            masses.scatter_reduce_(0, step.sequences[with_draft], factors.squeeze(1), "prod")
        verified = SampledVerification(choose).verify(
            p.logits(step.contexts, length + step.places),
            row_parameters(step.sequences, step.places),
            step.draft_rows(None),
        )
        return Outcomes(
            prefix, masses, verified.num_accepted + 1, step.by_place(verified.token_ids)
        )


def looked_up_drafts(p: ContextModel, prefix: int, num_drafts: int) -> Tensor:
    """Return drafts that are a function of the prefix, as a look-up makes them, and one more."""
    return (prefix + 2 * torch.arange(num_drafts + 1)) % p.vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """The sampled rows of a step: for each sequence one a draft and one behind the last."""

    sequences: Tensor
    """[num_rows] int64."""
    places: Tensor
    """[num_rows] int64, 0 in the first row of each sequence."""
    contexts: Tensor
    """[num_rows] int64, what the row's token follows."""
    next_drafts: Tensor
    """[num_rows] int64, NO_DRAFT in the last row of each sequence."""
    first_rows: Tensor
    """[num_seqs] int64."""

    @staticmethod
    def of(prefixes: Tensor, drafts: Tensor, num_drafts: Tensor, vocab_size: int) -> StepRows:
        """Lay out drafts, [num_seqs, at least most drafts], behind prefixes, [num_seqs]."""
        contexts = [prefixes]
        for place in range(int(num_drafts.max())):
            contexts.append(contexts[-1] * vocab_size + drafts[:, place])
        first_rows = (num_drafts + 1).cumsum(0) - num_drafts - 1
        sequences = torch.repeat_interleave(num_drafts + 1)
        places = torch.arange(len(sequences)) - first_rows[sequences]
        is_last = places == num_drafts[sequences]
        last_place = drafts.shape[1] - 1
        return StepRows(
            sequences=sequences,
            places=places,
            contexts=torch.stack(contexts, dim=1)[sequences, places],
            next_drafts=torch.where(
                is_last, NO_DRAFT, drafts[sequences, places.clamp(max=last_place)]
            ),
            first_rows=first_rows,
        )

    @property
    def with_draft(self) -> Tensor:
        """[num_drafts] int64, the rows that have a draft."""
        return torch.nonzero(self.next_drafts != NO_DRAFT).squeeze(1)

    def draft_rows(self, probabilities: Tensor | None) -> DraftRows:
        """Say it as an engine does."""
        return DraftRows(
            first_rows=self.first_rows, next_drafts=self.next_drafts, probabilities=probabilities
        )

    def by_place(self, values: Tensor) -> Tensor:
        """Return values, [num_rows], as [num_seqs, most rows of one]; 0 elsewhere."""
        table = values.new_zeros(len(self.first_rows), int(self.places.max()) + 1)
        table[self.sequences, self.places] = values
        return table
