"""Bugs planted in verification, most of them shipped by somebody: each must fail its check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepwire_executor.kernels.sample import noise
from stepwire_executor.kernels.sample.noise import Purpose
from stepwire_executor.speculation import rejection, verification
from stepwire_executor.speculation.interface import DrawnTokens
from stepwire_executor.speculation.rejection import PositionKeyedDraws, RejectionVerification
from stepwire_executor.speculation.verification import SampledVerification
from support import speculation_checks as checks

Plant = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[], None]


def verify_by_the_logits_of_the_next_row(patch: pytest.MonkeyPatch) -> None:
    for rule in (RejectionVerification, SampledVerification):
        verify = rule.verify

        def shifted(self: Any, logits: Any, batch: Any, rows: Any, verify: Any = verify) -> Any:
            return verify(self, logits.roll(-1, 0), batch, rows)

        patch.setattr(rule, "verify", shifted)


def accept_every_draft(patch: pytest.MonkeyPatch) -> None:
    def everything(is_accepted: Any, first_rows: Any) -> Any:
        return torch.diff(first_rows, append=torch.tensor([len(is_accepted)])) - 1

    for module in (rejection, verification):
        patch.setattr(module, "count_accepted", everything)


def accept_drafts_behind_a_rejected_one(patch: pytest.MonkeyPatch) -> None:
    def any_place(is_accepted: Any, first_rows: Any) -> Any:
        sums = torch.cat((torch.zeros(1, dtype=torch.int64), is_accepted.long().cumsum(0)))
        return torch.diff(sums[torch.cat((first_rows, torch.tensor([len(is_accepted)])))])

    for module in (rejection, verification):
        patch.setattr(module, "count_accepted", any_place)


def divide_the_wrong_way(patch: pytest.MonkeyPatch) -> None:
    acceptance = rejection.acceptance
    patch.setattr(rejection, "acceptance", lambda p, q, drafts: acceptance(q, p, drafts))


def accept_by_the_likelihood_alone(patch: pytest.MonkeyPatch) -> None:
    acceptance = rejection.acceptance
    patch.setattr(rejection, "acceptance", lambda p, q, drafts: acceptance(p, None, drafts))


def draw_from_p_behind_a_rejection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rejection, "residual", lambda p, q, drafts, places: p[places].double())


def take_the_residual_of_the_draft_before(patch: pytest.MonkeyPatch) -> None:
    residual = rejection.residual

    def before(p: Any, q: Any, drafts: Any, places: Any) -> Any:
        return residual(p, q, drafts, (places - 1).clamp(min=0))

    patch.setattr(rejection, "residual", before)


def declare_a_greedy_draft_soft(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PositionKeyedDraws, "draft", lambda self, p, batch: p.argmax(dim=1))


def declare_the_unlimited_distribution(patch: pytest.MonkeyPatch) -> None:
    drawn = RejectionVerification.draw

    def raw(self: Any, logits: Any, batch: Any) -> DrawnTokens:
        return DrawnTokens(
            token_ids=drawn(self, logits, batch).token_ids, probabilities=logits.softmax(dim=1)
        )

    patch.setattr(RejectionVerification, "draw", raw)


def _share(patch: pytest.MonkeyPatch, purpose: Purpose, other: Purpose) -> None:
    uniforms = rejection._uniforms
    patch.setattr(
        rejection,
        "_uniforms",
        lambda batch, asked: uniforms(batch, other if asked is purpose else asked),
    )


def share_noise_of_draft_and_residual(patch: pytest.MonkeyPatch) -> None:
    _share(patch, Purpose.RESIDUAL, Purpose.DRAFT)


def share_noise_of_draft_and_acceptance(patch: pytest.MonkeyPatch) -> None:
    _share(patch, Purpose.ACCEPT, Purpose.DRAFT)


def share_noise_of_acceptance_and_residual(patch: pytest.MonkeyPatch) -> None:
    _share(patch, Purpose.RESIDUAL, Purpose.ACCEPT)


def key_noise_by_the_row(patch: pytest.MonkeyPatch) -> None:
    uniforms = noise.uniforms
    patch.setattr(
        noise,
        "uniforms",
        lambda seeds, positions, streams, purpose: uniforms(
            seeds, torch.arange(len(seeds)), streams, purpose
        ),
    )


def forget_the_position(patch: pytest.MonkeyPatch) -> None:
    uniforms = noise.uniforms
    patch.setattr(
        noise,
        "uniforms",
        lambda seeds, positions, streams, purpose: uniforms(seeds, positions * 0, streams, purpose),
    )


def draft_with_the_noise_of_the_next_place(patch: pytest.MonkeyPatch) -> None:
    drawn = SampledVerification.draw

    def later(self: Any, logits: Any, batch: Any) -> DrawnTokens:
        moved = rejection.select(batch, torch.arange(len(logits)))
        moved.positions.add_(1)
        return drawn(self, logits, moved)

    patch.setattr(SampledVerification, "draw", later)


def check(function: Callable[..., None], *arguments: Any, **keywords: Any) -> Check:
    def run() -> None:
        function(*arguments, **keywords)

    run.__name__ = f"{function.__name__}-{'-'.join(a for a in arguments if isinstance(a, str))}"
    return run


ONE_DRAFT = {"num_tokens": 2, "num_drafts": (1,)}

CASES: list[tuple[Plant, Check]] = [
    (verify_by_the_logits_of_the_next_row, check(checks.check_enumerated_rejection, "random 3")),
    (verify_by_the_logits_of_the_next_row, check(checks.check_enumerated_sampled, "random 3")),
    (accept_every_draft, check(checks.check_enumerated_rejection, "random 3")),
    (accept_every_draft, check(checks.check_enumerated_look_up, "random 3")),
    (accept_every_draft, check(checks.check_enumerated_sampled, "random 3")),
    (accept_every_draft, check(checks.check_drawn, "disjoint")),
    (accept_drafts_behind_a_rejected_one, check(checks.check_enumerated_rejection, "random 3")),
    (accept_drafts_behind_a_rejected_one, check(checks.check_enumerated_sampled, "random 3")),
    (divide_the_wrong_way, check(checks.check_enumerated_rejection, "random 3")),
    (accept_by_the_likelihood_alone, check(checks.check_enumerated_rejection, "random 3")),
    (draw_from_p_behind_a_rejection, check(checks.check_enumerated_rejection, "half disjoint")),
    (draw_from_p_behind_a_rejection, check(checks.check_enumerated_look_up, "random 3")),
    (
        draw_from_p_behind_a_rejection,
        check(checks.check_drawn, "half disjoint", **ONE_DRAFT),
    ),
    (take_the_residual_of_the_draft_before, check(checks.check_enumerated_rejection, "random 3")),
    (declare_a_greedy_draft_soft, check(checks.check_drawn, "two tokens", **ONE_DRAFT)),
    (
        declare_a_greedy_draft_soft,
        check(checks.check_drawn_is_declared, checks.LIMITS["temperature"]),
    ),
    (
        declare_the_unlimited_distribution,
        check(checks.check_drawn_is_declared, checks.LIMITS["top-k"]),
    ),
    (
        declare_the_unlimited_distribution,
        check(checks.check_drawn, "random 4", limits=checks.LIMITS["all"]),
    ),
    (share_noise_of_draft_and_residual, check(checks.check_drawn, "reversed", **ONE_DRAFT)),
    (share_noise_of_draft_and_acceptance, check(checks.check_drawn, "reversed", **ONE_DRAFT)),
    (share_noise_of_acceptance_and_residual, check(checks.check_drawn, "reversed", **ONE_DRAFT)),
    (forget_the_position, check(checks.check_drawn, "reversed")),
    (
        key_noise_by_the_row,
        check(checks.check_ids_do_not_depend_on_the_row, checks.rejection_rule),
    ),
    (
        key_noise_by_the_row,
        check(checks.check_neighbours_drafts_do_not_matter, checks.rejection_rule),
    ),
    (accept_every_draft, check(checks.check_sampled_ids_do_not_depend_on_speculation, 1000)),
    (
        draft_with_the_noise_of_the_next_place,
        check(
            checks.check_equal_models_accept_everything,
            checks.sampled_rule,
            checks.LIMITS["temperature"],
        ),
    ),
]


@pytest.mark.parametrize(
    ("plant", "check"),
    CASES,
    ids=[f"{plant.__name__}-{check.__name__}" for plant, check in CASES],
)
def test_the_check_fails_under(plant: Plant, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
