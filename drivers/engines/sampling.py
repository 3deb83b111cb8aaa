"""Choosing the next tokens of a batch, each row by its own job's parameters.

The library's per-request processors were tried first: they exist only for what the
shared generation config names, they cannot mix greedy with sampled rows, and top-p
sorts the whole vocabulary for every row of every step. Here greedy rows cost one
argmax in the model's own precision, and sampled rows sort their best candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmos.drivers.protocols import SamplingParams

CANDIDATES = 1024
"""Sorted first; the whole vocabulary only if these do not hold top_p of the mass."""
_COLDEST = 1e-6
"""Below this, division would overflow float32; the choice is greedy long before."""


def choose(
    logits: torch.Tensor,
    sampled: Sequence[tuple[int, SamplingParams]],
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: (rows, vocabulary), any float type.
        sampled: rows with a temperature, and their parameters; all others are greedy.
        generator: source of chance on the logits' device.

    Returns:
        Token ids of shape (rows,).
    """
    # Not argmax: on the CPU it takes four times as long in bfloat16. Both give the first maximum.
    tokens = logits.max(dim=-1).indices
    plain = [(r, p) for r, p in sampled if p.top_k == 0 and p.top_p == 1.0]
    cut = [(r, p) for r, p in sampled if p.top_k > 0 or p.top_p < 1.0]
    if plain:
        rows = [r for r, _ in plain]
        probs = _scaled(logits, plain).softmax(dim=-1)
        tokens[rows] = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    if cut:
        rows = [r for r, _ in cut]
        tokens[rows] = _cut(_scaled(logits, cut), [p for _, p in cut], generator)
    return tokens


def _scaled(logits: torch.Tensor, chosen: Sequence[tuple[int, SamplingParams]]) -> torch.Tensor:
    scores = logits[[r for r, _ in chosen]].float()
    heat = torch.tensor([max(p.temperature, _COLDEST) for _, p in chosen], device=logits.device)
    # The best score becomes 0, so that no temperature can overflow upwards.
    return (scores - scores.amax(dim=-1, keepdim=True)) / heat.unsqueeze(1)


def _cut(
    scores: torch.Tensor, params: Sequence[SamplingParams], generator: torch.Generator | None
) -> torch.Tensor:
    """Sample under top-k, then top-p of what top-k left."""
    vocabulary = scores.shape[-1]
    device = scores.device
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=device).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], device=device).unsqueeze(1)
    total = scores.logsumexp(dim=-1, keepdim=True)
    width = min(vocabulary, max(CANDIDATES, *(p.top_k for p in params)))
    while True:
        best, ids = scores.topk(width, dim=-1)
        rank = torch.arange(width, device=device).unsqueeze(0)
        probs = (best - total).exp().masked_fill(rank >= top_k, 0.0)
        limited = top_k <= width
        covered = limited | (probs.sum(dim=-1, keepdim=True) >= top_p)
        if width == vocabulary or bool(covered.all()):
            break
        width = vocabulary
    probs = torch.where(limited, probs / probs.sum(dim=-1, keepdim=True), probs)
    before = probs.cumsum(dim=-1) - probs
    keep = before < top_p
    keep[:, 0] = True
    picked = torch.multinomial(probs.masked_fill(~keep, 0.0), 1, generator=generator)
    return ids.gather(1, picked).squeeze(1)
