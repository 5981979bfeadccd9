"""What must hold of speculation, as functions that raise AssertionError where it does not.

Tests call them, and so do the tests that plant bugs, which each expect one of them to fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kernels.interface import Sample, SamplingBatch
from stepwire_executor.speculation.interface import (
    DraftRows,
    DrawnTokens,
    VerificationRule,
    VerifiedRows,
)
from stepwire_executor.speculation.rejection import PositionKeyedDraws, RejectionVerification
from stepwire_executor.speculation.verification import SampledVerification
from support.speculation_oracle import (
    ContextModel,
    NumDrafts,
    RejectionRule,
    Rule,
    SampledRule,
    enumerated_law,
    row_parameters,
)
from support.speculation_sampling import Speculation, chi_square_p_value, generate
from torch import Tensor

TOLERANCE = 1e-12
"""Most total deviation of an enumerated law."""
NUM_DRAWS = 200_000
MIN_P_VALUE = 1e-3
"""Seeds are fixed, so a check passes always or never; chance alone fails 1 of 1000 once."""

NUM_DRAFTS: dict[str, NumDrafts] = {
    "always 1": lambda index, left: min(1, left),
    "always 3": lambda index, left: min(3, left),
    "by request": lambda index, left: min(index % 4, left),
    "by request, the other way": lambda index, left: min(3 - index % 4, left),
}
"""Of a step, at most; requests of one batch differ in two of them."""

UP = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3], [0.3, 0.4, 0.1, 0.2], [0.2, 0.3, 0.4, 0.1]]
DOWN = [row[::-1] for row in UP]
LOW = [[0.7, 0.3, 0.0, 0.0], [0.4, 0.6, 0.0, 0.0]] * 2
HIGH = [[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.8, 0.2]] * 2

MODELS: dict[str, tuple[list[list[float]], list[list[float]]]] = {
    "reversed": (UP, DOWN),
    "disjoint": (LOW, HIGH),
    "equal": (UP, UP),
    # A greedy draft that claims to be soft makes [0.75, 0.25] of these.
    "two tokens": ([[0.6, 0.4]] * 2, [[0.8, 0.2]] * 2),
    "half disjoint": ([[0.5, 0.5, 0.0]] * 3, [[0.0, 0.4, 0.6]] * 3),
}
"""Probabilities of the model and of the draft model, a row for each last token."""

LIMITS: dict[str, dict[str, float]] = {
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.3},
    "temperature": {"temperature": 0.5},
    "all": {"temperature": 1.5, "top_k": 3, "min_p": 0.2, "top_p": 0.8},
    "greedy": {"temperature": 0.0},
}


def models(name: str, max_len: int) -> tuple[ContextModel, ContextModel]:
    """Return the model and the draft model of a case."""
    if name.startswith("random"):
        vocab_size = int(name.removeprefix("random "))
        return (
            ContextModel.random(vocab_size, max_len, seed=1),
            ContextModel.random(vocab_size, max_len, seed=2),
        )
    p, q = MODELS[name]
    return ContextModel.of_last_token(p, max_len), ContextModel.of_last_token(q, max_len)


def limited(model: ContextModel, limits: dict[str, float]) -> ContextModel:
    """Apply sampling parameters to a model's logits, row by row, as their definition says."""

    def limit(logits: Tensor) -> Tensor:
        rows = [_limited_row(row, **limits) for row in logits.tolist()]
        return torch.tensor(rows, dtype=torch.float64)

    return model.changed(limit)


def _limited_row(
    row: list[float],
    *,
    temperature: float = 1.0,
    top_k: float = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> list[float]:
    scaled = torch.tensor(row, dtype=torch.float64)
    if temperature == 0:
        kept = {int(scaled.argmax())}
    else:
        scaled = scaled / temperature
        weights = scaled.softmax(dim=0).tolist()
        order = sorted(range(len(row)), key=lambda i: (-weights[i], i))
        order = order[: int(top_k) or None]
        order = [i for i in order if weights[i] >= min_p * max(weights)]
        total, mass, kept = sum(weights[i] for i in order), 0.0, set[int]()
        for i in order:
            if kept and mass >= top_p * total:
                break
            kept.add(i)
            mass += weights[i]
    return [x if i in kept else -torch.inf for i, x in enumerate(scaled.tolist())]


@functools.cache
def host_sample() -> Sample:
    """The sampler that a CPU gets: the native one where it can be built."""
    return select_kernels(torch.device("cpu")).sample


def rejection_rule(sample: Sample | None = None) -> VerificationRule:
    return RejectionVerification(PositionKeyedDraws(sample or host_sample()))


def sampled_rule(sample: Sample | None = None) -> VerificationRule:
    return SampledVerification(sample or host_sample())


def check_enumerated(name: str, rule: Rule, num_tokens: int = 4) -> None:
    """Every way to choose the number of drafts has the model's law, in float64."""
    p, q = models(name, num_tokens)
    expected = p.joint_law(num_tokens)
    for num_drafts in NUM_DRAFTS.values():
        law = enumerated_law(rule, p, q, num_tokens, num_drafts)
        assert float((law - expected).abs().sum()) <= TOLERANCE


def check_enumerated_rejection(name: str) -> None:
    check_enumerated(name, RejectionRule())


def check_enumerated_look_up(name: str) -> None:
    check_enumerated(name, RejectionRule(is_looked_up=True))


def check_enumerated_sampled(name: str, *, is_looked_up: bool = True) -> None:
    check_enumerated(name, SampledRule(is_looked_up=is_looked_up))


def check_enumerated_limits(limits: dict[str, float]) -> None:
    """Under sampling parameters the law is that of the model with these parameters."""
    p, q = models("random 4", 4)
    expected = limited(p, limits).joint_law(4)
    for num_drafts in NUM_DRAFTS.values():
        law = enumerated_law(RejectionRule(**limits), p, q, 4, num_drafts)
        assert float((law - expected).abs().sum()) <= TOLERANCE


def check_drawn(
    name: str,
    make_rule: Callable[[], VerificationRule] = rejection_rule,
    *,
    num_tokens: int = 4,
    num_drafts: tuple[int, ...] = (3, 1, 2, 0),
    is_looked_up: bool = False,
    limits: dict[str, float] | None = None,
    num_draws: int = NUM_DRAWS,
    first_seed: int = 1 << 40,
) -> None:
    """Sequences that are drawn with the real noise have the model's joint law, by χ²."""
    p, q = models(name, num_tokens)
    speculation = Speculation(
        rule=make_rule(),
        p=p,
        q=None if is_looked_up else q,
        num_drafts=num_drafts,
        parameters=limits or {},
    )
    # Some at a time, which bounds memory.
    tokens = torch.cat(
        [
            generate(speculation, seeds, num_tokens)
            for seeds in (first_seed + torch.arange(num_draws)).split(NUM_DRAWS)
        ]
    )
    law = limited(p, limits or {}).joint_law(num_tokens)
    assert chi_square_p_value(tokens, law) >= MIN_P_VALUE


def check_drawn_is_declared(limits: dict[str, float], num_draws: int = NUM_DRAWS) -> None:
    """Drafts are drawn from the distribution that is declared with them."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0]).expand(num_draws, -1).contiguous()
    seeds = torch.arange(num_draws)
    drawn = rejection_rule().draw(logits, row_parameters(seeds, seeds * 0 + 3, **limits))
    assert drawn.probabilities is not None
    assert (drawn.probabilities == drawn.probabilities[0]).all()
    declared = drawn.probabilities[0].double()
    p_value = chi_square_p_value(drawn.token_ids.unsqueeze(1), declared / declared.sum())
    assert p_value >= MIN_P_VALUE


def check_ids_do_not_depend_on_the_row(make_rule: Callable[[], VerificationRule]) -> None:
    """A request emits the same in another place of the batch, and alone."""
    p, q = models("random 4", 6)
    speculation = Speculation(rule=make_rule(), p=p, q=q, num_drafts=(2,))
    seeds = torch.arange(1000) * 7919
    tokens = generate(speculation, seeds, 6)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(speculation, seeds[order], 6), tokens[order])
    for request in (0, 1, 500, 999):
        alone = generate(speculation, seeds[request : request + 1], 6)
        assert torch.equal(alone[0], tokens[request])


def check_neighbours_drafts_do_not_matter(make_rule: Callable[[], VerificationRule]) -> None:
    """A request emits the same whatever the number of drafts of those beside it."""
    p, q = models("random 4", 6)

    def tokens_of_even(num_drafts: tuple[int, ...]) -> Tensor:
        speculation = Speculation(rule=make_rule(), p=p, q=q, num_drafts=num_drafts)
        return generate(speculation, torch.arange(1000), 6)[::2]

    expected = tokens_of_even((2, 0))
    for others in (1, 2, 3):
        assert torch.equal(tokens_of_even((2, others)), expected)


def check_sampled_ids_do_not_depend_on_speculation(num_requests: int = NUM_DRAWS) -> None:
    """Under `sampled` every request emits what it emits without drafts, whatever drafts it has."""
    p, q = models("random 4", 4)
    seeds = torch.arange(num_requests) + 99

    def tokens(draft_model: ContextModel | None, *num_drafts: int) -> Tensor:
        speculation = Speculation(rule=sampled_rule(), p=p, q=draft_model, num_drafts=num_drafts)
        return generate(speculation, seeds, 4)

    expected = tokens(None, 0)
    assert torch.equal(tokens(None, 3, 1, 2, 0), expected)
    assert torch.equal(tokens(q, 0, 3, 1, 2), expected)


def check_equal_models_accept_everything(
    make_rule: Callable[[], VerificationRule], limits: dict[str, float]
) -> None:
    """Drafts of a draft model that is the model itself are all accepted."""
    p, _ = models("random 4", 4)
    counting = _CountingRule(make_rule())
    generate(
        Speculation(rule=counting, p=p, q=p, num_drafts=(3, 1, 2), parameters=limits),
        torch.arange(50_000),
        4,
    )
    assert counting.num_drafts > 0
    assert counting.num_accepted == counting.num_drafts


class _CountingRule:
    """Another rule, and how many drafts it accepted."""

    def __init__(self, rule: VerificationRule) -> None:
        """Count what rule does."""
        self._rule = rule
        self.num_drafts = self.num_accepted = 0

    def draw(self, logits: Tensor, batch: SamplingBatch) -> DrawnTokens:
        return self._rule.draw(logits, batch)

    def verify(self, logits: Tensor, batch: SamplingBatch, rows: DraftRows) -> VerifiedRows:
        verified = self._rule.verify(logits, batch, rows)
        self.num_drafts += int((rows.next_drafts >= 0).sum())
        self.num_accepted += int(verified.num_accepted.sum())
        return verified
