"""Choosing the next tokens of a batch, each row by its own job's parameters.

The library's per-request processors were tried first: they exist only for what the
shared generation config names, they cannot mix greedy with sampled rows, and top-p
sorts the whole vocabulary for every row of every step. Here greedy rows cost one
maximum in the model's own precision, and only rows that cut sort their best candidates.

Chance is counted, not drawn from a generator: the number behind a token is a hash of the
job's key and of the token's place in the answer. So it depends on nothing else in the batch,
a job that was put back goes on where it was without a state to keep, and one that is handed
its answer so far as a prefix goes on as if it had never stopped. One number chooses a token
by the inverse of the distribution; torch.multinomial draws one for each token of the
vocabulary, and takes 67 ms for 64 rows of 49,152 where this takes less than one.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llmos.drivers.errors import InvalidGrammar
from llmos.drivers.protocols import SamplingParams

CANDIDATES = 1024
"""Sorted first; the whole vocabulary only if these do not hold top_p of the mass."""
BLOCK = 256
"""Probabilities that are added up together before one of them is looked for."""
_COLDEST = 1e-6
"""Below this, division would overflow float32; the choice is greedy long before."""
_NEVER = 3e38
"""Taken from the score of a token that the grammar forbids. Finite, so that it can be
multiplied by 0; filling by a mask takes five times as long."""


class Binding(Protocol):
    """What a grammar says of one answer; see :mod:`llmos.drivers.engines.structured`."""

    @property
    def done(self) -> bool:
        """The grammar is complete, and nothing may follow."""
        ...

    def allowed(self, bits: npt.NDArray[np.int32]) -> None:
        """Set the bit of each token that may come next."""
        ...

    def took(self, token: int) -> None:
        """This token came."""
        ...


@dataclass(frozen=True, slots=True)
class Chances:
    """Log-probabilities of the place of one token."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    """Tokens, likeliest first."""


class Row:
    """How the next token of one sequence is chosen, and how far it has come.

    It stays with its job while that waits, runs, or is put back. Then :attr:`place` need not
    be set again: tokens that are read a second time were counted the first time.
    """

    __slots__ = ("binding", "chances", "failed", "key", "params", "place", "plain")

    def __init__(
        self, params: SamplingParams, *, place: int = 0, binding: Binding | None = None
    ) -> None:
        """``place``: tokens that the answer has already, by its prefix."""
        self.params = params
        self.place = place
        self.binding = binding
        seed = secrets.token_bytes(8) if params.seed is None else str(params.seed).encode()
        # Hashed, so that the streams of neighbouring seeds have nothing to do with each other.
        self.key = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "little")
        self.chances: Chances | None = None
        """Of the token chosen last, where asked for."""
        self.failed: InvalidGrammar | None = None
        """Why the grammar cannot be followed any further. The row is greedy from then on, and
        whoever runs it ends its job."""
        self.plain = params.temperature == 0 and params.logprobs is None and self.binding is None
        """Whether it is greedy and nothing else: its token is the best one."""

    @property
    def done(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self.binding is not None and self.binding.done

    def took(self, token: int) -> None:
        """The answer goes on with this token. Called once for each, in order."""
        self.place += 1
        if self.binding is not None and self.failed is None:
            try:
                self.binding.took(token)
            except InvalidGrammar as error:
                self.failed = error


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The next token of each row. Sets the rows' ``chances`` and ``failed``.

    Args:
        logits: (rows, vocabulary), any float type; left as they are.
        rows: How each of them is chosen.

    Returns:
        Token ids of shape (rows,), on the logits' device.
    """
    # Not argmax: on the CPU it takes four times as long in bfloat16. Both give the first maximum.
    tokens = logits.max(dim=-1).indices
    busy = [(at, row) for at, row in enumerate(rows) if not row.plain]
    if not busy:
        return tokens
    bound = [(at, row) for at, row in busy if row.binding is not None and row.failed is None]
    heated = [(at, row) for at, row in busy if row.params.temperature > 0]
    if bound or heated:
        wanted = sorted({at for at, _ in (*bound, *heated)})
        places = {at: i for i, at in enumerate(wanted)}
        scores = logits[wanted].float()
        if bound:
            _forbid(scores, [(places[at], row) for at, row in bound])
            tokens[wanted] = scores.max(dim=-1).indices
        if heated:
            _draw(tokens, scores, places, heated)
    told = [(at, row) for at, row in busy if row.params.logprobs is not None]
    if told:
        _tell(logits, tokens, told)
    return tokens


def _forbid(scores: torch.Tensor, bound: Sequence[tuple[int, Row]]) -> None:
    """Push down what the grammars do not allow, in place."""
    vocabulary = scores.shape[-1]
    bits = np.zeros((len(bound), -(-vocabulary // 32)), dtype=np.int32)
    for i, (_, row) in enumerate(bound):
        assert row.binding is not None
        try:
            row.binding.allowed(bits[i])
        except InvalidGrammar as error:
            row.failed = error
            bits[i] = -1
    free = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :vocabulary]
    bias = torch.from_numpy(free).to(scores.device).float().sub_(1.0).mul_(_NEVER)
    where = [i for i, _ in bound]
    if len(where) == scores.shape[0]:
        scores += bias
    else:
        scores[where] += bias


def _draw(
    tokens: torch.Tensor,
    scores: torch.Tensor,
    places: dict[int, int],
    heated: Sequence[tuple[int, Row]],
) -> None:
    """Replace the tokens of rows with a temperature by chosen ones."""
    chance = torch.from_numpy(uniforms([row for _, row in heated])).to(scores.device)
    for cutting in (False, True):
        group = [
            (i, at, row)
            for i, (at, row) in enumerate(heated)
            if (row.params.top_k > 0 or row.params.top_p < 1.0) == cutting
        ]
        if not group:
            continue
        heat = [max(row.params.temperature, _COLDEST) for _, _, row in group]
        some = scores[[places[at] for _, at, _ in group]]
        # The best score becomes 0, so that no temperature can overflow upwards.
        some -= some.amax(dim=-1, keepdim=True)
        some /= torch.tensor(heat, device=scores.device).unsqueeze(1)
        drawn = chance[[i for i, _, _ in group]]
        if cutting:
            chosen = _cut(some, [row.params for _, _, row in group], drawn)
        else:
            chosen = _pick(some.exp_(), drawn)
        tokens[[at for _, at, _ in group]] = chosen


def uniforms(rows: Sequence[Row]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for the next token of each row: SplitMix64 of its key and place."""
    gamma = 0x9E3779B97F4A7C15
    state = [(row.key + (row.place + 1) * gamma) & 0xFFFFFFFFFFFFFFFF for row in rows]
    z = np.array(state, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _pick(weights: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Where the running sum of each row's weights passes its chance.

    Sums of blocks first, then inside one block: the running sum of a whole vocabulary would
    take eight times as long, and lose digits in float32.
    """
    rows, width = weights.shape
    left = -width % BLOCK
    if left:
        weights = torch.nn.functional.pad(weights, (0, left))
    blocks = weights.view(rows, -1, BLOCK)
    sums = blocks.sum(dim=-1).double()
    upto = sums.cumsum(dim=-1)
    target = chance.unsqueeze(1) * upto[:, -1:]
    block = _passed(sums, upto, target)
    inside = blocks[torch.arange(rows, device=weights.device), block.squeeze(1)].double()
    within = inside.cumsum(dim=-1)
    at = _passed(inside, within, target - (upto - sums).gather(1, block))
    return (block * BLOCK + at).squeeze(1)


def _passed(weights: torch.Tensor, upto: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first place of each row whose running sum is above the target, shape (rows, 1).

    Rounding may put the target on the very end, or behind it: then the last place with any
    weight, so that what has none is never chosen.
    """
    last = upto.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(upto, target, right=True), last)


def _cut(
    scores: torch.Tensor, params: Sequence[SamplingParams], chance: torch.Tensor
) -> torch.Tensor:
    """Sample under top-k, then top-p of what top-k left."""
    vocabulary = scores.shape[-1]
    device = scores.device
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=device).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=torch.float64).unsqueeze(1)
    mass = scores.softmax(dim=-1)
    width = min(vocabulary, max(CANDIDATES, *(p.top_k for p in params)))
    while True:
        best, ids = mass.topk(width, dim=-1)
        rank = torch.arange(width, device=device).unsqueeze(0)
        # In float64: the width depends on the other rows, and must not show in the sums.
        probs = best.double().masked_fill_(rank >= top_k, 0.0)
        limited = top_k <= width
        covered = limited | (probs.sum(dim=-1, keepdim=True) >= top_p)
        if width == vocabulary or bool(covered.all()):
            break
        width = vocabulary
    probs = torch.where(limited, probs / probs.sum(dim=-1, keepdim=True), probs)
    before = probs.cumsum(dim=-1) - probs
    keep = before < top_p
    keep[:, 0] = True
    probs = probs.masked_fill(~keep, 0.0)
    upto = probs.cumsum(dim=-1)
    picked = _passed(probs, upto, chance.unsqueeze(1) * upto[:, -1:])
    return ids.gather(1, picked).squeeze(1)


def _tell(logits: torch.Tensor, tokens: torch.Tensor, told: Sequence[tuple[int, Row]]) -> None:
    """Set the chances of rows that are asked for them."""
    where = [at for at, _ in told]
    logs = logits[where].float().log_softmax(dim=-1)
    chosen = tokens[where]
    of_chosen: list[float] = logs.gather(1, chosen.unsqueeze(1)).squeeze(1).tolist()
    most = min(max(row.params.logprobs or 0 for _, row in told), logs.shape[-1])
    best: list[list[Any]] = [[], []]
    if most:
        values, ids = logs.topk(most, dim=-1)
        best = [ids.tolist(), values.tolist()]
    for i, (token, (_, row)) in enumerate(zip(chosen.tolist(), told, strict=True)):
        count = row.params.logprobs or 0
        likeliest = zip(best[0][i][:count], best[1][i][:count], strict=True) if count else ()
        row.chances = Chances(token, of_chosen[i], tuple(likeliest))
