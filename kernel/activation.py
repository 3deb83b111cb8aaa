"""Agents in memory. An agent is virtual: it is loaded from its rows when it has mail, and
dropped again when it has been idle."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

import msgpack
from pydantic import BaseModel

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import AgentRow, LaunchRow
from llmos.kernel.manifest import Manifest
from llmos.kernel.program import (
    Program,
    ProgramLoader,
    code_version,
    load_state,
    make_config,
    pack_state,
)
from llmos.syscalls.errors import UnknownAgent

MAX_TIMES = 4_096
"""Activations whose times are remembered."""
MAX_ACTIVE = 10_000
"""Agents in memory; the longest idle are dropped beyond that."""
IDLE_S = 300.0
"""After so long without a turn an agent is dropped from memory."""

Rows = list[tuple[LaunchRow | None, AgentRow | None]]


class Prepared:
    """A launch, made ready once for all its agents."""

    __slots__ = ("code_version", "config", "launch", "manifest", "name", "program")

    def __init__(self, launch: LaunchRow, program: Program) -> None:
        self.launch = launch
        self.program = program
        self.name = launch.program
        """``module:Class``."""
        self.config: BaseModel = make_config(
            launch.program, program, msgpack.unpackb(launch.config)
        )
        self.manifest: Manifest = program.manifest.resolve(self.config)
        self.code_version = code_version(cast(Any, program))


class Active:
    """An agent in memory."""

    __slots__ = (
        "agent",
        "changes",
        "hold",
        "packed",
        "prepared",
        "sent",
        "stored",
        "story",
        "used_at",
    )

    def __init__(self, agent: str, prepared: Prepared, row: AgentRow | None) -> None:
        row = row or AgentRow(agent)
        self.agent = agent
        self.prepared = prepared
        program = prepared.program
        state = load_state(prepared.name, program, row.state, row.state_version)
        self.packed = pack_state(state)
        """The committed state, in the form of the program that is loaded."""
        self.stored = row.state is not None
        self.changes = row.changes
        self.sent = row.sent
        self.hold = row.hold
        self.story = row.story
        self.used_at = 0.0

    def refresh(self, row: AgentRow) -> None:
        """The store has a newer state: that of a commit of which no word came back.

        In place: a turn under way that reads only has this object, and numbers what it sends.
        """
        program = self.prepared.program
        state = load_state(self.prepared.name, program, row.state, row.state_version)
        self.packed, self.changes = pack_state(state), row.changes
        self.sent = max(self.sent, row.sent)

    def state(self) -> BaseModel:
        """A copy of the committed state, for one turn."""
        return self.prepared.program.State.model_validate_json(self.packed)


class Activations:
    """The agents of one host, by use."""

    def __init__(
        self,
        programs: ProgramLoader,
        read: Callable[[list[str]], Awaitable[Rows]],
        loaded: Callable[[Active], None],
        dropped: Callable[[str], None],
    ) -> None:
        self._programs = programs
        self._read = read
        self._loaded = loaded
        self._dropped = dropped
        self._active: OrderedDict[str, Active] = OrderedDict()
        self._loading: dict[str, asyncio.Future[Active]] = {}
        self._took: deque[float] = deque(maxlen=MAX_TIMES)
        self._prepared: dict[str, Prepared] = {}
        """By id of the launch."""

    def __len__(self) -> int:
        return len(self._active)

    def here(self, agent: str) -> Active | None:
        """The agent, if it is in memory."""
        active = self._active.get(agent)
        if active is not None:
            self._active.move_to_end(agent)
        return active

    async def get(self, agent: str) -> Active:
        """The agent; loaded if need be.

        Raises:
            UnknownAgent, ProgramError, StateError.
        """
        while True:
            active = self.here(agent)
            if active is not None:
                return active
            found = (await self.load([agent]))[agent]
            if isinstance(found, LlmosError):
                raise found
            if self._active.get(agent) is found:
                return found
            # It was dropped meanwhile: what was read may be out of date.

    async def load(self, agents: Iterable[str]) -> dict[str, Active | LlmosError]:
        """Many agents at once: one read for all that are not in memory."""
        out: dict[str, Active | LlmosError] = {}
        mine: dict[str, asyncio.Future[Active]] = {}
        others: dict[str, asyncio.Future[Active]] = {}
        for agent in dict.fromkeys(agents):
            active = self.here(agent)
            if active is not None:
                out[agent] = active
            elif agent in self._loading:
                others[agent] = self._loading[agent]
            else:
                future: asyncio.Future[Active] = asyncio.get_running_loop().create_future()
                future.add_done_callback(lambda done: done.cancelled() or done.exception())
                self._loading[agent] = mine[agent] = future
        if mine:
            # In a task of its own: somebody who stops waiting must not stop the others.
            await asyncio.shield(asyncio.ensure_future(self._load(mine)))
        for agent, future in {**mine, **others}.items():
            try:
                out[agent] = await asyncio.shield(future)
            except LlmosError as error:
                out[agent] = error
        return out

    async def _load(self, wanted: dict[str, asyncio.Future[Active]]) -> None:
        agents = list(wanted)
        began = time.perf_counter()
        try:
            rows = await self._read(agents)
        except LlmosError as error:
            for agent, future in wanted.items():
                if self._loading.get(agent) is future:
                    del self._loading[agent]
                if not future.done():
                    future.set_exception(error)
            return
        for agent, (launch, row) in zip(agents, rows, strict=True):
            future = wanted[agent]
            try:
                if launch is None:
                    raise UnknownAgent(agent)
                prepared = await self._prepare(launch)
                active = Active(agent, prepared, row)
            except LlmosError as error:
                result: Active | Exception = error
            except Exception as error:  # noqa: BLE001 - becomes a typed error
                # Making a configuration or a state runs the program's own code.
                from llmos.kernel.dispatch import as_llmos_error

                result = as_llmos_error(error, agent, "")
            else:
                result = active
                if self._loading.get(agent) is future:
                    self._active[agent] = active
                    self._loaded(active)
            if self._loading.get(agent) is future:
                del self._loading[agent]
            self._took.append(time.perf_counter() - began)
            if future.done():
                continue
            if isinstance(result, Active):
                future.set_result(result)
            else:
                future.set_exception(result)

    async def _prepare(self, launch: LaunchRow) -> Prepared:
        prepared = self._prepared.get(launch.id)
        if prepared is None:
            program = await self._programs.load(launch.program)
            prepared = Prepared(launch, program)
            if len(self._prepared) >= MAX_ACTIVE:
                self._prepared.clear()
            self._prepared[launch.id] = prepared
        return prepared

    def drop(self, agent: str) -> None:
        """Forget an agent, also one that is being read; its rows are in the store."""
        self._loading.pop(agent, None)
        if self._active.pop(agent, None) is not None:
            self._dropped(agent)

    def passivate(self, now: float, busy: Callable[[str], bool]) -> int:
        """Drop what has been idle for long, or too many; returns how many."""
        count = 0
        for agent, active in list(self._active.items()):
            over = len(self._active) > MAX_ACTIVE
            if not over and now - active.used_at < IDLE_S:
                # In the order of use: the rest was used later.
                break
            if not busy(agent):
                self.drop(agent)
                count += 1
        return count

    def statistics(self) -> dict[str, float]:
        """How long the latest activations took, in seconds."""
        took = sorted(self._took)
        if not took:
            return {"count": 0, "p50_s": 0.0, "p99_s": 0.0}
        return {
            "count": len(took),
            "p50_s": took[len(took) // 2],
            "p99_s": took[int(len(took) * 0.99)],
        }

    def agents(self) -> list[str]:
        """Those in memory, or on the way there."""
        return [*self._active, *(a for a in self._loading if a not in self._active)]


def first_state(name: str, program: Program) -> BaseModel:
    """The state that an agent of the program begins with.

    Raises:
        ProgramError: a field has no default.
    """
    from llmos.kernel.program import ProgramError

    try:
        return program.State()
    except ValueError as error:
        raise ProgramError(
            name, f"State cannot begin empty: {error}", remedy="Give every field a default"
        ) from None


def unpack_config(launch: LaunchRow) -> dict[str, Any]:
    """The configuration of a launch."""
    config: dict[str, Any] = msgpack.unpackb(launch.config)
    return config
