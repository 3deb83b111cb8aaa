"""Policies that know what no kernel can: how long each answer will be. To compare with."""

from __future__ import annotations

from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core.policies.ranked import Ranked
from llmos.kernel.simulation.world import World


class ShortestKnown(Ranked):
    """The request that may need least work first, by what a kernel knows of it: its prompt and
    its ``max_new_tokens``."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """Work of this request at most."""
        left = request.max_new_tokens - request.new_tokens
        return self._world.cost.of(request.prompt_tokens, left)


class ShortestRequest(Ranked):
    """The request that needs least work first, by its true length; knows nothing of turns."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """Work of this request."""
        progress = self._world.keys[request.key]
        new = progress.job.calls[progress.at].new_tokens - request.new_tokens
        return self._world.cost.of(request.prompt_tokens, new)


class ShortestJob(Ranked):
    """The turn that needs least work from now on first, by its true length (SRPT)."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """Work of all calls of the turn that are left, prompts as far as they are new."""
        progress = self._world.keys[request.key]
        job, at = progress.job, progress.at
        new = sum(c.new_tokens for c in job.calls[at:]) - request.new_tokens
        read = request.prompt_tokens + sum(self._world.new_prompts(job)[at + 1 :])
        return self._world.cost.of(read, new)
