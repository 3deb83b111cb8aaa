"""One running sequence, as everything that takes part in a step sees it."""

from __future__ import annotations

from typing import Any

from llmos.drivers.engines.lora import ResidentAdapter
from llmos.drivers.engines.sampling import Row
from llmos.drivers.protocols import SamplingParams


class Sequence:
    """A prompt and what was generated after it, with its place in the KV cache.

    It is the same object from submit to the end, whether it waits, runs, or was put
    back into the queue: what must go on where it was (tokens, chance) is kept here.
    """

    __slots__ = (
        "adapter",
        "agent",
        "blocks",
        "cached_tokens",
        "eos",
        "key",
        "max_new_tokens",
        "nodes",
        "params",
        "paused",
        "prompt_tokens",
        "read",
        "resident",
        "row",
        "started_s",
        "tenant",
        "tokens",
    )

    def __init__(
        self,
        key: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        eos: frozenset[int] = frozenset(),
        tenant: str = "",
        agent: str = "",
        resident: ResidentAdapter | None = None,
        row: Row | None = None,
    ) -> None:
        self.key = key
        """Unique in the engine, and never used again."""
        self.params, self.tenant, self.agent = params, tenant, agent
        self.resident = resident
        """The adapter that it holds until its end; None: the model as it is."""
        self.adapter = "" if resident is None else resident.key
        """Names this version of the adapter, since the keys and values of another are not its."""
        self.eos = eos
        """Tokens that end it; empty under ``ignore_eos``."""
        self.max_new_tokens = params.max_new_tokens
        self.tokens = list(prompt)
        """The prompt's and then the generated ones. The last one is not in the cache yet."""
        self.prompt_tokens = len(prompt)
        self.read = 0
        """How many of ``tokens`` are in the cache; 0 while it is not inside."""
        self.blocks: list[int] = []
        """KV blocks in order, all that it may ever need; empty while it is not inside."""
        self.nodes: list[Any] = []
        """What the memory of prefixes knows of its first blocks."""
        self.cached_tokens = 0
        """Prompt tokens that were in the cache when it first came in."""
        self.started_s = 0.0
        """``time.monotonic`` of its first step; 0 before."""
        self.paused = False
        """Takes part in no step. Set under the engine's lock, read between steps."""
        self.row = row if row is not None else Row(params)
        """What the sampler keeps for it from step to step."""

    @property
    def adapter_digest(self) -> str:
        """Of the adapter; empty: none."""
        return "" if self.resident is None else self.resident.digest

    @property
    def new_tokens(self) -> int:
        """Generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def cache_tokens(self) -> int:
        """Places in the cache that it may ever need. The last token is never fed back."""
        return self.prompt_tokens + self.max_new_tokens - 1

    @property
    def ended(self) -> bool:
        """Whether its last token ended it, as a token or by completing its grammar."""
        new = self.new_tokens
        ended = new >= self.max_new_tokens or self.tokens[-1] in self.eos or self.row.done
        return new > 0 and ended
