"""The joint law of speculated tokens is the model's, by χ² over sequences of the real draws."""

from __future__ import annotations

import pytest
from stepwire_executor.kernels.sample.reference import sample as reference_sample
from support import speculation_checks as checks

RULES = {"rejection": checks.rejection_rule, "sampled": checks.sampled_rule}


@pytest.mark.parametrize("name", ["random 4", "reversed", "disjoint", "two tokens"])
def test_rejection_draws_from_the_law_of_the_model(name: str) -> None:
    checks.check_drawn(name)


@pytest.mark.parametrize("name", ["reversed", "disjoint", "two tokens", "half disjoint"])
def test_one_draft_and_what_follows_are_drawn_from_the_law_of_the_model(name: str) -> None:
    checks.check_drawn(name, num_tokens=2, num_drafts=(1,))


def test_rejection_of_looked_up_drafts_draws_from_the_law_of_the_model() -> None:
    checks.check_drawn("random 4", is_looked_up=True)


def test_sampled_verification_of_looked_up_drafts_draws_from_the_law_of_the_model() -> None:
    checks.check_drawn("random 4", checks.sampled_rule, is_looked_up=True)


def test_sampled_verification_of_a_draft_model_draws_from_the_law_of_the_model() -> None:
    checks.check_drawn("reversed", checks.sampled_rule)


@pytest.mark.parametrize("rule", ["rejection", "sampled"])
def test_the_reference_sampler_draws_from_the_law_of_the_model(rule: str) -> None:
    checks.check_drawn("random 4", lambda: RULES[rule](reference_sample))


def test_rejection_draws_from_the_law_of_the_limited_model() -> None:
    checks.check_drawn("random 4", limits=checks.LIMITS["all"])


@pytest.mark.parametrize("limits", checks.LIMITS.values(), ids=list(checks.LIMITS))
def test_drafts_are_drawn_from_what_is_declared(limits: dict[str, float]) -> None:
    checks.check_drawn_is_declared(limits)


def test_ids_of_sampled_verification_do_not_depend_on_drafts() -> None:
    checks.check_sampled_ids_do_not_depend_on_speculation()


@pytest.mark.parametrize("rule", RULES)
def test_ids_do_not_depend_on_the_place_in_the_batch(rule: str) -> None:
    checks.check_ids_do_not_depend_on_the_row(RULES[rule])


@pytest.mark.parametrize("rule", RULES)
def test_ids_do_not_depend_on_how_many_drafts_others_have(rule: str) -> None:
    checks.check_neighbours_drafts_do_not_matter(RULES[rule])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limits", ["temperature", "all", "greedy"])
def test_drafts_of_the_model_itself_are_all_accepted(rule: str, limits: str) -> None:
    checks.check_equal_models_accept_everything(RULES[rule], checks.LIMITS[limits])


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["random 4", "reversed", "half disjoint", "two tokens"])
@pytest.mark.parametrize("is_looked_up", [False, True], ids=["draft model", "looked up"])
def test_two_million_draws_have_the_law_of_the_model(
    name: str, rule: str, is_looked_up: bool
) -> None:
    checks.check_drawn(
        name,
        RULES[rule],
        is_looked_up=is_looked_up,
        num_draws=10 * checks.NUM_DRAWS,
        first_seed=1 << 50,
    )


@pytest.mark.long
@pytest.mark.parametrize("limits", checks.LIMITS.values(), ids=list(checks.LIMITS))
def test_two_million_draws_have_the_law_of_the_limited_model(limits: dict[str, float]) -> None:
    checks.check_drawn(
        "random 4", limits=limits, num_draws=10 * checks.NUM_DRAWS, first_seed=1 << 50
    )
