"""Many LoRA adapters on one model, each token of a step with its own.

The weights of all resident adapters lie stacked per linear layer: A of shape (places,
rank, in) and B of shape (places, rank, out). A step sorts its tokens by adapter and
multiplies all of them in two batched products per layer, whatever the number of
adapters. Adapters with very many tokens in the step (a prompt) go by themselves, so
that the others are not padded to their length.

Two other ways were measured (AMD EPYC, bfloat16, one thread, 64 tokens, 576 → 576,
rank 8, microseconds added to a layer): all columns of all adapters under a mask takes
50 for 1 adapter, 85 for 8 and 860 for 64; gathering A and B per token takes 450 for
any number. The batched products take 70, 90 and 170, and for 1 adapter two plain ones
take 35.

Everything here runs in the engine's thread, between two steps or in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from llmos.drivers.engines.adapter_files import AdapterWeights


@dataclass(eq=False, slots=True)
class ResidentAdapter:
    """One version of an adapter whose weights are in a bank."""

    name: str
    serial: int
    """Of all versions in this engine; what was computed with one is never good for another."""
    digest: str
    size_bytes: int
    """Of its weights in the bank."""
    place: int = -1
    """Where they are; the bank may move them. Negative: nowhere."""
    users: int = 0
    """Jobs that hold it."""

    @property
    def key(self) -> str:
        """Names this version, in this engine."""
        return f"{self.serial}:{self.name}"


@dataclass(slots=True)
class _Step:
    """Which tokens of a step go with which adapter, as indices for the layers."""

    tokens: int
    """In the step, with and without adapter."""
    only: int
    """The place that every token of the step goes with; negative: they differ."""
    gather: torch.Tensor
    """Token of each row of the products: those of ``alone`` first, then ``front`` × ``height``
    rows in order of places, short places filled up with any token."""
    alone: tuple[tuple[int, int, int], ...]
    """(place, first row, one past the last row)."""
    front: int
    """Places, from 0, that the batched products take in; 0: no such products."""
    height: int
    """Rows per place."""
    rows: torch.Tensor | None
    """Tokens that have an adapter, ascending. None: all of them."""
    back: torch.Tensor
    """Row of the products for each of those tokens."""
    seen: torch.Tensor | None = field(default=None, repr=False)
    gathered: torch.Tensor | None = field(default=None, repr=False)

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of the products, from the step's (tokens, in).

        Kept for the next layer, which often reads the same: query, key and value do.
        """
        if self.seen is not x or self.gathered is None:
            self.seen = x
            self.gathered = x.view(-1, x.shape[-1]).index_select(0, self.gather)
        return self.gathered


class StackedLinear(nn.Module):
    """A linear layer and its share of every adapter. ``base`` may be any linear layer."""

    def __init__(self, base: nn.Linear, bank: AdapterBank) -> None:
        super().__init__()
        self.base: nn.Module = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self._bank = bank
        # Plain attributes: nothing that walks the model may cast or save them.
        self._memory: tuple[torch.Tensor, torch.Tensor] | None = None
        self._a: torch.Tensor | None = None
        self._b: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input (…, in_features), output (…, out_features)."""
        y: torch.Tensor = self.base(x)
        step = self._bank.step
        if step is None or self._a is None or self._b is None:
            return y
        flat = y.view(-1, self.out_features)
        if flat.shape[0] != step.tokens:
            # Rather no answer than one with somebody else's adapter.
            raise RuntimeError(
                f"a layer with adapters got {flat.shape[0]} tokens of a step with {step.tokens}"
            )
        if step.only >= 0:
            inner = torch.mm(x.view(-1, self.in_features), self._a[step.only].t())
            flat.addmm_(inner, self._b[step.only])
            return y
        rows = step.rows_of(x)
        changes = y.new_empty(rows.shape[0], self.out_features)
        for place, first, last in step.alone:
            inner = torch.mm(rows[first:last], self._a[place].t())
            torch.mm(inner, self._b[place], out=changes[first:last])
        if step.front:
            size = step.front * step.height
            batch = rows[rows.shape[0] - size :].view(step.front, step.height, -1)
            inner = torch.bmm(batch, self._a[: step.front].transpose(1, 2))
            into = changes[rows.shape[0] - size :].view(step.front, step.height, -1)
            torch.bmm(inner, self._b[: step.front], out=into)
        if step.rows is None:
            flat.add_(changes.index_select(0, step.back))
        else:
            flat.index_add_(0, step.rows, changes.index_select(0, step.back))
        return y

    # ------------------------------------------------------------ for the bank

    def resize(self, places: int, old: int, rank: int) -> None:
        """Have ``rank`` rows per place instead of ``old``; 0: nothing here is kept."""
        if self._memory is None or self._a is None or self._b is None:
            return
        kept = (self._a.clone(), self._b.clone())
        self._view(places, rank)
        if old:
            for stacked, before in zip((self._a, self._b), kept, strict=True):
                stacked[:, :old].copy_(before)
                stacked[:, old:].zero_()

    def _view(self, places: int, rank: int) -> None:
        assert self._memory is not None
        # Contiguous whatever the rank, since the kernels copy what is not.
        self._a, self._b = (
            memory[: places * rank * width].view(places, rank, width)
            for memory, width in zip(
                self._memory, (self.in_features, self.out_features), strict=True
            )
        )

    def write(
        self,
        place: int,
        weights: tuple[torch.Tensor, torch.Tensor] | None,
        places: int,
        capacity: int,
        rank: int,
        like: tuple[torch.dtype, torch.device],
    ) -> None:
        """Put an adapter's share into a place; None: it does not change this layer."""
        if self._a is None or self._b is None:
            if weights is None:
                return
            dtype, device = like
            self._memory = (
                torch.zeros(places * capacity * self.in_features, dtype=dtype, device=device),
                torch.zeros(places * capacity * self.out_features, dtype=dtype, device=device),
            )
            self._view(places, rank)
            assert self._a is not None
            assert self._b is not None
        for stacked, mine in zip((self._a, self._b), weights or (None, None), strict=True):
            stacked[place].zero_()
            if mine is not None:
                stacked[place, : mine.shape[0]].copy_(mine)

    def swap(self, one: int, other: int) -> None:
        """Exchange two places."""
        if self._a is None or self._b is None:
            return
        for stacked in (self._a, self._b):
            kept = stacked[one].clone()
            stacked[one].copy_(stacked[other])
            stacked[other].copy_(kept)


ALONE_ROWS = {torch.float32: 8, torch.bfloat16: 128}
"""Padded rows that cost as much as two products for one adapter by itself, on the CPU: these
are cheap to start in float32, and in bfloat16 rows are."""
ALONE_ROWS_CUDA = 1024
"""The same on a GPU, where starting a kernel is what costs."""


class AdapterBank:
    """The weights of all adapters that are resident on one model.

    Adapters that the running jobs use are kept at the front, so that a step passes over
    few places that it does not need.
    """

    def __init__(self, model: PreTrainedModel, places: int, max_rank: int) -> None:
        """Wrap the model's linear layers; before they are packed.

        Args:
            model: a causal model of transformers, on its device and in its number format.
            places: adapters that may be resident.
            max_rank: the largest rank that one may have.
        """
        self.step: _Step | None = None
        """What the layers apply; None: no token of the step has an adapter."""
        self._places, self._max_rank = places, max_rank
        self._rank = 0
        """Rows per place now; the largest rank of those that are here."""
        self._at: list[ResidentAdapter | None] = [None] * places
        self._key: tuple[tuple[int, int], ...] = ()
        self._last: _Step | None = None
        weight = next(model.parameters())
        self._like = (weight.dtype, weight.device)
        self._layers = _wrap(model, self)
        self._alone_rows = (
            ALONE_ROWS_CUDA if weight.device.type == "cuda" else ALONE_ROWS.get(weight.dtype, 128)
        )

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Linear layers that an adapter may change, with (in, out)."""
        return {n: (layer.in_features, layer.out_features) for n, layer in self._layers.items()}

    @property
    def max_rank(self) -> int:
        """The largest rank there is room for."""
        return self._max_rank

    @property
    def places_bytes(self) -> int:
        """What all places take. A layer's are made when the first adapter changes it, but
        nobody is asked for them then, so they count from the beginning."""
        widths = sum(i + o for i, o in self.layers.values())
        return self._places * self._max_rank * widths * int(self._like[0].itemsize)

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return sum(adapter is None for adapter in self._at)

    def size_bytes(self, weights: AdapterWeights) -> int:
        """What an adapter takes here."""
        numbers = sum(a.numel() + b.numel() for a, b in weights.layers.values())
        return numbers * int(self._like[0].itemsize)

    def write(self, adapter: ResidentAdapter, weights: AdapterWeights) -> None:
        """Give an adapter a free place, and put its weights there. ``free`` must not be 0."""
        if all(kept is None for kept in self._at):
            self._resize(weights.rank, keep=False)
        elif weights.rank > self._rank:
            self._resize(weights.rank, keep=True)
        place = self._at.index(None)
        for name, layer in self._layers.items():
            layer.write(
                place,
                weights.layers.get(name),
                self._places,
                self._max_rank,
                self._rank,
                self._like,
            )
        self._at[place], adapter.place = adapter, place

    def free_place(self, adapter: ResidentAdapter) -> None:
        """Nobody uses this adapter any more."""
        if adapter.place >= 0:
            self._at[adapter.place], adapter.place = None, -1

    def set_step(self, tokens: Sequence[tuple[ResidentAdapter | None, int]]) -> None:
        """Say which adapter goes with which tokens of the next forward pass.

        Args:
            tokens: for the sequences of the step in order, adapter and number of tokens.
        """
        used = {a.place for a, count in tokens if a is not None and count}
        if not used:
            self.step = None
            return
        if min(used) < 0:
            raise RuntimeError("a job's adapter is not resident")
        self._move_to_front(used)
        key = tuple((-1 if a is None else a.place, count) for a, count in tokens)
        if key != self._key or self._last is None:
            self._key, self._last = key, self._sort(key)
        self.step = self._last

    def clear_step(self) -> None:
        """The forward pass is over."""
        if self.step is not None:
            self.step.seen = self.step.gathered = None
            self.step = None

    def validate(self) -> None:
        """Every adapter is where it thinks it is."""
        for place, adapter in enumerate(self._at):
            assert adapter is None or adapter.place == place, (place, adapter)

    # ------------------------------------------------------------ inside

    def _resize(self, rank: int, *, keep: bool) -> None:
        old, self._rank = self._rank, rank
        for layer in self._layers.values():
            layer.resize(self._places, old if keep else 0, rank)

    def _move_to_front(self, used: set[int]) -> None:
        """Exchange places until at most half of those passed over are not used.

        Not until none is: moving one adapter costs as much as passing over its place in
        some ten steps.
        """
        count = len(used)
        if count == 1 or max(used) < 2 * count:
            return
        holes = [place for place in range(count) if place not in used]
        for far in sorted((p for p in used if p >= count), reverse=True):
            near = holes.pop()
            for layer in self._layers.values():
                layer.swap(near, far)
            for place, adapter in ((near, self._at[far]), (far, self._at[near])):
                self._at[place] = adapter
                if adapter is not None:
                    adapter.place = place

    def _sort(self, key: Sequence[tuple[int, int]]) -> _Step:
        places = np.repeat([p for p, _ in key], [n for _, n in key])
        rows = np.flatnonzero(places >= 0)
        owners = places[rows]
        everyone = len(rows) == len(places)
        counts = np.bincount(owners)
        alone = self._alone(counts)
        # Row of the products for each token in order of adapters; then for each token.
        gather: list[np.ndarray[tuple[int], np.dtype[np.intp]]] = []
        slices = []
        at = 0
        back = np.empty(len(rows), dtype=np.int64)
        for place in alone:
            mine = np.flatnonzero(owners == place)
            gather.append(rows[mine])
            back[mine] = np.arange(at, at + len(mine))
            slices.append((int(place), at, at + len(mine)))
            at += len(mine)
        rest = counts.copy()
        rest[alone] = 0
        front = height = 0
        if rest.any():
            front, height = int(np.flatnonzero(rest)[-1]) + 1, int(rest.max())
            padded = np.full(front * height, rows[0])
            for filled in np.flatnonzero(rest):
                mine = np.flatnonzero(owners == filled)
                first = int(filled) * height
                padded[first : first + len(mine)] = rows[mine]
                back[mine] = at + first + np.arange(len(mine))
            gather.append(padded)
        device = self._like[1]
        return _Step(
            tokens=len(places),
            only=int(owners[0]) if everyone and np.count_nonzero(counts) == 1 else -1,
            gather=torch.from_numpy(np.concatenate(gather)).to(device),
            alone=tuple(slices),
            front=front,
            height=height,
            rows=None if everyone else torch.from_numpy(rows).to(device),
            back=torch.from_numpy(back).to(device),
        )

    def _alone(self, counts: np.ndarray[tuple[int], np.dtype[np.intp]]) -> list[int]:
        """The places whose tokens go by themselves, so that the whole step costs least."""
        order = [int(p) for p in np.argsort(-counts, kind="stable") if counts[p]]
        best, chosen = float("inf"), len(order)
        for n in range(len(order) + 1):
            rest = order[n:]
            # More padding than the tokens of the step twice is not granted memory for.
            padded = (max(rest) + 1) * int(counts[rest[0]]) if rest else 0
            if padded > 2 * (int(counts.sum()) + self._places):
                continue
            # A batched product has a fixed cost too, about that of one by itself.
            cost = n * self._alone_rows + padded + (self._alone_rows if rest else 0)
            if cost < best:
                best, chosen = cost, n
        return order[:chosen]


def _wrap(model: PreTrainedModel, bank: AdapterBank) -> dict[str, StackedLinear]:
    """Put a :class:`StackedLinear` around each linear layer but the output layer.

    The output layer runs on some tokens of a step alone, and experts on those that were
    sent to them, so the tokens' order is not known there.
    """
    output = model.get_output_embeddings()
    wrapped: dict[str, StackedLinear] = {}
    for name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            full = f"{name}.{child_name}" if name else child_name
            if type(child) is not nn.Linear or child is output or ".experts." in f".{full}.":
                continue
            wrapped[full] = StackedLinear(child, bank)
            setattr(parent, child_name, wrapped[full])
    return wrapped
