"""The rules by which drafts are verified, by the names that operators use."""

from __future__ import annotations

from typing import Literal

from stepwire_executor.kernels.interface import Sample
from stepwire_executor.speculation.interface import VerificationRule
from stepwire_executor.speculation.rejection import PositionKeyedDraws, RejectionVerification
from stepwire_executor.speculation.verification import SampledVerification

RuleName = Literal["sampled", "rejection"]


def make_rule(name: RuleName, sample: Sample) -> VerificationRule:
    """Return the rule of a name, over the sampler of the kernels."""
    if name == "rejection":
        return RejectionVerification(PositionKeyedDraws(sample))
    return SampledVerification(sample)
