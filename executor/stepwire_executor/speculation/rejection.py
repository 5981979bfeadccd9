"""The rule `rejection`: exact for drafts that were drawn, whatever they were drawn from.

A draft x that was drawn from q is accepted with probability min(1, p(x) / q(x)), p being what the
model's token would be drawn from; in the place of the first one that is rejected a token is drawn
from norm(max(p - q, 0)), and behind drafts that were all accepted one is drawn from p.
Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"; Chen et al.
2023, "Accelerating large language model decoding with speculative sampling".

Every draw is keyed by its token's position and by its purpose, so that no two share noise. The
next step uses the noise of drafts that a rejection discarded again: nothing that was emitted
depends on it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import Sample, SampleOutput, SamplingBatch
from stepwire_executor.kernels.sample import noise
from stepwire_executor.kernels.sample.noise import Purpose
from stepwire_executor.speculation.distributions import draw, probabilities_of
from stepwire_executor.speculation.interface import DraftRows, DrawnTokens, VerifiedRows
from stepwire_executor.speculation.verification import count_accepted


class Draws(Protocol):
    """Where chance enters; a batch holds the parameters of the rows that are drawn for."""

    def draft(self, probabilities: Tensor, batch: SamplingBatch) -> Tensor:
        """Draw a draft from each row of probabilities, [num_rows, vocab_size]; NaN: any id."""
        ...

    def accept(self, probabilities: Tensor, batch: SamplingBatch) -> Tensor:
        """Return True with each of probabilities, [num_rows] float64; NaN: False."""
        ...

    def residual(self, weights: Tensor, batch: SamplingBatch) -> Tensor:
        """Draw in proportion to weights, [num_rows, vocab_size] float64; NaN: any id."""
        ...

    def target(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        """Sample as without drafts; logits: [num_rows, vocab_size], may be overwritten."""
        ...


class PositionKeyedDraws:
    """Draws that are a pure function of seed, position and stream."""

    def __init__(self, sample: Sample) -> None:
        """Use the sampler of the kernels where no draft is involved."""
        self._sample = sample

    def draft(self, probabilities: Tensor, batch: SamplingBatch) -> Tensor:
        """See Draws."""
        return draw(probabilities, _uniforms(batch, Purpose.DRAFT))

    def accept(self, probabilities: Tensor, batch: SamplingBatch) -> Tensor:
        """See Draws."""
        return _uniforms(batch, Purpose.ACCEPT) < probabilities

    def residual(self, weights: Tensor, batch: SamplingBatch) -> Tensor:
        """See Draws."""
        return draw(weights, _uniforms(batch, Purpose.RESIDUAL))

    def target(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        """See Draws."""
        return self._sample(logits, batch)


class RejectionVerification:
    """Accepts drafts by chance; the law of a sequence's tokens is that of sampling without drafts.

    A sequence without drafts gets the token that sampling gives it anywhere. Distributions are
    kept in the logits' dtype: float32 ones, which are off by 2^-24 of each probability. Equal
    logits give equal ones, so that a draft model that equals the model is always accepted.
    """

    def __init__(self, draws: Draws) -> None:
        """Draw by draws."""
        self._draws = draws

    def draw(self, logits: Tensor, batch: SamplingBatch) -> DrawnTokens:
        """See VerificationRule."""
        probabilities = probabilities_of(logits, batch)
        return DrawnTokens(
            token_ids=self._draws.draft(probabilities, batch), probabilities=probabilities
        )

    def verify(self, logits: Tensor, batch: SamplingBatch, rows: DraftRows) -> VerifiedRows:
        """See VerificationRule; waits for the device."""
        draft_rows = torch.nonzero(rows.next_drafts >= 0).squeeze(1)
        drafts = rows.next_drafts[draft_rows]
        p = probabilities_of(logits[draft_rows], select(batch, draft_rows))
        q = rows.probabilities
        is_accepted = torch.zeros_like(rows.next_drafts, dtype=torch.bool)
        is_accepted[draft_rows] = self._draws.accept(
            acceptance(p, q, drafts), select(batch, draft_rows)
        )
        num_accepted = count_accepted(is_accepted, rows.first_rows)

        # Until a row's own token is drawn, the draft that may be accepted there.
        token_ids = rows.next_drafts.clamp(min=0)
        is_finite = torch.ones_like(is_accepted)
        last_rows = rows.first_rows + num_accepted
        has_draft = rows.next_drafts[last_rows] >= 0

        rejected = last_rows[has_draft]
        if rejected.numel():
            places = torch.searchsorted(draft_rows, rejected)
            token_ids[rejected] = self._draws.residual(
                residual(p, q, drafts, places), select(batch, rejected)
            )
            is_finite[rejected] = p[places, 0].isfinite()

        free = last_rows[~has_draft]
        if free.numel():
            output = self._draws.target(logits[free], select(batch, free))
            token_ids[free] = output.token_ids
            is_finite[free] = output.is_finite
        return VerifiedRows(token_ids=token_ids, is_finite=is_finite, num_accepted=num_accepted)


def acceptance(p: Tensor, q: Tensor | None, drafts: Tensor) -> Tensor:
    """Return min(1, p(x) / q(x)) of each draft x, NaN where either is: [num_drafts] float64.

    p, q: [num_drafts, vocab_size], q None where each draft was certain; drafts: [num_drafts].
    """
    chosen = drafts.unsqueeze(1)
    likelihoods = p.gather(1, chosen).squeeze(1).double()
    if q is not None:
        likelihoods /= q.gather(1, chosen).squeeze(1).double()
    return likelihoods.clamp(max=1.0)


def residual(p: Tensor, q: Tensor | None, drafts: Tensor, places: Tensor) -> Tensor:
    """Return weights in proportion to norm(max(p - q, 0)): [num_places, vocab_size] float64.

    Arguments as of acceptance; places: [num_places] int64, which of the drafts were rejected.
    A rejection leaves some weight; where rounding took all of it, p and q are equal but for
    rounding, and p is returned. So it is where q is NaN: that draft has no chance to be accepted.
    """
    targets = p[places].double()
    if q is None:
        return targets.scatter(1, drafts[places].unsqueeze(1), 0.0)
    weights = (targets - q[places].double().nan_to_num(nan=0.0)).clamp(min=0.0)
    is_empty = (weights == 0).all(dim=-1, keepdim=True)
    return torch.where(is_empty, targets, weights)


def select(batch: SamplingBatch, rows: Tensor) -> SamplingBatch:
    """Return the parameters of rows, [num_selected] int64."""
    return SamplingBatch(
        temperature=batch.temperature[rows],
        top_k=batch.top_k[rows],
        top_p=batch.top_p[rows],
        min_p=batch.min_p[rows],
        seeds=batch.seeds[rows],
        positions=batch.positions[rows],
        streams=batch.streams[rows],
    )


def _uniforms(batch: SamplingBatch, purpose: Purpose) -> Tensor:
    return noise.uniforms(batch.seeds, batch.positions, batch.streams, purpose)
