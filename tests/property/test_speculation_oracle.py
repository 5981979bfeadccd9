"""The joint law of speculated tokens is the model's, by enumeration in float64."""

from __future__ import annotations

import pytest
from support import speculation_checks as checks

NAMES = ["random 3", "random 4", *checks.MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_rejection_has_the_law_of_the_model(name: str) -> None:
    checks.check_enumerated_rejection(name)


@pytest.mark.parametrize("name", NAMES)
def test_rejection_of_looked_up_drafts_has_the_law_of_the_model(name: str) -> None:
    checks.check_enumerated_look_up(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_looked_up", [True, False])
def test_sampled_verification_has_the_law_of_the_model(name: str, is_looked_up: bool) -> None:
    checks.check_enumerated_sampled(name, is_looked_up=is_looked_up)


@pytest.mark.parametrize("limits", checks.LIMITS.values(), ids=list(checks.LIMITS))
def test_rejection_has_the_law_of_the_limited_model(limits: dict[str, float]) -> None:
    checks.check_enumerated_limits(limits)
