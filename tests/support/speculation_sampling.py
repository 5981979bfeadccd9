"""Many requests of tiny models, speculated on by the code that serves requests, and their χ²."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from stepwire_executor.speculation.interface import VerificationRule
from support.speculation_oracle import ContextModel, StepRows, row_parameters
from torch import Tensor

FIRST_POSITION = 17
"""Of each request's first sampled token: as behind a prompt."""

LookUp = Callable[[Tensor, Tensor], Tensor]
"""The next draft of requests: (their ids, their contexts with drafts), [num] int64 each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How requests are speculated on."""

    rule: VerificationRule
    p: ContextModel
    """The model."""
    q: ContextModel | None = None
    """The draft model; None: drafts are looked up."""
    look_up: LookUp = lambda requests, contexts: (requests + contexts) % 2
    num_drafts: tuple[int, ...] = (3,)
    """Most drafts a step; requests take turns."""
    parameters: dict[str, float] = field(default_factory=dict)
    """Of every request; as row_parameters takes them."""


def generate(speculation: Speculation, seeds: Tensor, num_tokens: int) -> Tensor:
    """Return what requests of seeds, [num_requests], emit: [num_requests, num_tokens] int64.

    All requests that are not done take a step together; logits are float32.
    """
    p = speculation.p
    most = torch.tensor(speculation.num_drafts)[
        torch.arange(len(seeds)) % len(speculation.num_drafts)
    ]
    tokens = torch.zeros(len(seeds), num_tokens, dtype=torch.int64)
    contexts, lengths = torch.zeros_like(seeds), torch.zeros_like(seeds)
    while True:
        requests = torch.nonzero(lengths < num_tokens).squeeze(1)
        if not requests.numel():
            return tokens
        num_drafts = torch.minimum(most[requests], num_tokens - 1 - lengths[requests])
        drafts, probabilities = _propose(
            speculation, seeds, requests, contexts[requests], lengths[requests], num_drafts
        )
        step = StepRows.of(contexts[requests], drafts, num_drafts, p.vocab_size)
        lens = lengths[requests][step.sequences] + step.places
        verified = speculation.rule.verify(
            p.logits(step.contexts, lens).float(),
            row_parameters(
                seeds[requests][step.sequences], FIRST_POSITION + lens, **speculation.parameters
            ),
            step.draft_rows(probabilities),
        )
        emitted = step.by_place(verified.token_ids)
        for place in range(emitted.shape[1]):
            is_kept = place <= verified.num_accepted
            some, ids = requests[is_kept], emitted[is_kept, place]
            tokens[some, lengths[some]] = ids
            contexts[some] = contexts[some] * p.vocab_size + ids
            lengths[some] += 1


def _propose(
    speculation: Speculation,
    seeds: Tensor,
    requests: Tensor,
    contexts: Tensor,
    lengths: Tensor,
    num_drafts: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return drafts, [num_requests, most + 1], and what they were drawn from, a row a draft."""
    most = int(num_drafts.max())
    drafts = torch.zeros(len(requests), most + 1, dtype=torch.int64)
    table: Tensor | None = None
    for place in range(most):
        rows = torch.nonzero(num_drafts > place).squeeze(1)
        if speculation.q is None:
            token_ids = speculation.look_up(requests[rows], contexts[rows])
        else:
            lens = lengths[rows] + place
            drawn = speculation.rule.draw(
                speculation.q.logits(contexts[rows], lens).float(),
                row_parameters(
                    seeds[requests[rows]], FIRST_POSITION + lens, **speculation.parameters
                ),
            )
            token_ids = drawn.token_ids
            if drawn.probabilities is not None:
                if table is None:
                    table = torch.zeros(len(requests), most, speculation.p.vocab_size)
                table[rows, place] = drawn.probabilities
        drafts[rows, place] = token_ids
        contexts = contexts.clone()
        contexts[rows] = contexts[rows] * speculation.p.vocab_size + token_ids
    if table is None:
        return drafts, None
    return drafts, table[torch.arange(most) < num_drafts.unsqueeze(1)]


def chi_square_p_value(tokens: Tensor, law: Tensor) -> float:
    """Return how likely a deviation as large as that of tokens from a law is, by Pearson's χ².

    tokens: [num_requests, num_tokens]; law: [vocab_size**num_tokens] float64, of sequences as
    ContextModel numbers them. Sequences of which fewer than 5 are expected are counted together;
    one without probability makes it 0.
    """
    num_requests, num_tokens = tokens.shape
    vocab_size = round(len(law) ** (1 / num_tokens))
    digits = vocab_size ** torch.arange(num_tokens - 1, -1, -1)
    observed = (tokens * digits).sum(dim=1).bincount(minlength=len(law)).double()
    if (observed[law == 0] > 0).any():
        return 0.0
    expected = law * num_requests
    is_rare = expected < 5
    pooled = [torch.cat((x[~is_rare], x[is_rare].sum().reshape(1))) for x in (observed, expected)]
    observed, expected = (x[pooled[1] > 0] for x in pooled)
    if len(expected) == 1:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))
