"""What an agent waits for: the part of the kernel actor that asks hosts and devices, and puts
what they say into sentences.

The answer is a tree: each thing that is waited for, and under it what that waits for in turn.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import JobPlace
from llmos.drivers.stores.rows import AgentRow, MailRow, TimerRow
from llmos.kernel.core.slots import SlotState
from llmos.kernel.core.state import KernelCore
from llmos.kernel.core.types import ProcessKind, ProcessState
from llmos.kernel.remote import Handle, answers, call

log = logging.getLogger("llmos.kernel")

LOOK_S = 5.0
"""Longest wait for one process to say what it has."""
MAX_DEPTH = 16
"""Agents that wait for one another and are followed."""

Reason = dict[str, Any]
"""``{"what": word, "text": sentence, "under": [reasons], …facts}``."""


def reason(what: str, text: str, under: list[Reason] | None = None, **facts: Any) -> Reason:
    """One thing that is waited for."""
    return {"what": what, "text": text, **facts, "under": under or []}


class Why:
    """Mixed into the kernel actor."""

    _core: KernelCore
    _handles: dict[str, Handle]
    _kinds: dict[str, ProcessKind]
    _model_errors: dict[str, LlmosError]

    async def _booted(self) -> None:
        raise NotImplementedError

    async def _read(self, method: str, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    def _resolve(self, agent: str) -> str:
        raise NotImplementedError

    def _host_of(self, agent: str) -> str:
        raise NotImplementedError

    @answers
    async def why(self, agent: str) -> dict[str, Any]:
        """What an agent waits for, as a tree of reasons.

        Raises:
            UnknownAgent
        """
        await self._booted()
        agent = self._resolve(agent)
        found = await self._reasons(agent, ())
        return {"agent": agent, "host": self._host_of(agent), "reasons": found}

    async def _reasons(self, agent: str, chain: tuple[str, ...]) -> list[Reason]:
        if agent in chain or len(chain) >= MAX_DEPTH:
            return [reason("cycle", f"{agent} was looked at already: {' → '.join(chain)}.")]
        entry = self._core.agents.get(agent)
        if entry is not None and entry.state.value == "pending":
            models = ", ".join(f"{m} ({self._slot_words(m)})" for m in entry.models)
            return [reason("launch", f"It is not launched yet: it waits for its models: {models}.")]
        row: AgentRow | None = await self._read("agent", agent)
        out: list[Reason] = []
        if row is not None and row.hold:
            then = "llmos effects list" if row.hold == "unknown effect" else "llmos release"
            out.append(
                reason(
                    "hold",
                    f"It is held ({row.hold}) and gets no turns until a person has looked: {then}.",
                    hold=row.hold,
                    story=row.story,
                )
            )
        host = self._host_of(agent)
        handle = self._handles.get(host)
        here: dict[str, Any] = {"turns": [], "messages": [], "waiting": 0}
        if handle is None:
            process = self._core.processes.get(host)
            state = process.state.value if process is not None else "nowhere"
            text = f"Its host {host} is {state}." if host else "No host serves it now."
            out.append(reason("host", text, host=host, state=state))
        else:
            try:
                here = await call(handle.why.remote(agent), host, LOOK_S)
            except LlmosError as error:
                out.append(reason("host", f"Its host {host} does not answer: {error}.", host=host))
        out += [await self._turn(agent, turn, (*chain, agent)) for turn in here["turns"]]
        # Of an agent that was asked only what its asker has sent is of interest.
        mine = [m for m in here["messages"] if not chain or m["sender"] == chain[-1]]
        out += [_message(message) for message in mine]
        if here["waiting"] > len(mine):
            more = here["waiting"] - len(mine)
            out.append(reason("mailbox", f"{more} other messages wait for it.", count=more))
        mail: list[MailRow] = await self._read("waiting", agent)
        known = {m["message"] for m in (*here["turns"], *here["messages"])}
        left = [m for m in mail if f"{m.stream}#{m.seq}" not in known]
        if left and here["waiting"] <= len(here["messages"]):
            text = f"{len(left)} messages are in the store and not in its host yet."
            out.append(reason("store", text, count=len(left)))
        if not out:
            out.append(reason("nothing", "It waits for nothing: no message is there for it."))
        timers: list[TimerRow] = await self._read("timers_of", agent)
        if timers:
            first = min(timers, key=lambda timer: timer.due)
            due_s = first.due - time.time()
            text = f"Its next timer, {first.name}, is due in {_span(max(due_s, 0.0))}."
            out.append(reason("timer", text, timer=first.name, due=first.due))
        return out

    # ------------------------------------------------------------ turns

    async def _turn(self, agent: str, turn: dict[str, Any], chain: tuple[str, ...]) -> Reason:
        head = f"Turn {turn['turn']} handles {turn['kind']} from {turn['sender']}"
        stages = {
            "starting": "it is about to begin",
            "committing": "its handler has ended, and it is being committed",
            "computing": "its handler computes, or waits for something of its own",
            "calling": "it has calls under way",
        }
        left = turn["remaining_s"]
        until = f"; its deadline is in {_span(left)}" if left is not None else ""
        text = f"{head}: {stages[turn['stage']]}{until}."
        under = [await self._call(agent, turn["turn"], c, chain) for c in turn["calls"]]
        return reason(
            "turn",
            text,
            under,
            turn=turn["turn"],
            kind=turn["kind"],
            sender=turn["sender"],
            stage=turn["stage"],
            deadline_in_s=left,
        )

    async def _call(
        self, agent: str, turn: str, made: dict[str, Any], chain: tuple[str, ...]
    ) -> Reason:
        name, since = made["name"], _span(made["since_s"])
        facts = {"syscall": made["syscall"], "resource": name, "since_s": made["since_s"]}
        match made["for"]:
            case "model":
                under = await self._model(agent, turn, name)
                return reason("model", f"An answer of model {name}, for {since}.", under, **facts)
            case "encoder":
                slot = reason("slot", f"Model {name} is {self._slot_words(name)}.")
                text = f"Model {name} ({made['syscall']}), for {since}."
                return reason("model", text, [slot], **facts)
            case "agent":
                under = await self._reasons(name, chain)
                return reason("agent", f"The reply of {name}, for {since}.", under, **facts)
            case "time":
                left = max(made["seconds"] - made["since_s"], 0.0)
                return reason("sleep", f"Time to pass: {_span(left)} more.", left_s=left, **facts)
            case "tool":
                return reason("tool", f"Tool {name}, for {since}.", **facts)
        what = f"{made['syscall']} {name}".strip()
        return reason("kernel", f"{what}, for {since}.", **facts)

    # ------------------------------------------------------------ models

    def _slot_words(self, model: str) -> str:
        if model in self._model_errors:
            return f"missing: {self._model_errors[model]}"
        slot = self._core.slots.get(model)
        if slot is None:
            return "not in the system"
        if slot.state is SlotState.FAILED:
            return f"failed: {slot.error}"
        where = f" on {slot.device}" if slot.device else ""
        process = self._core.processes.get(f"device:{slot.device}")
        if process is not None and process.state is not ProcessState.UP:
            return f"{slot.state.value}{where}, whose process is {process.state.value}"
        return f"{slot.state.value}{where}"

    async def _model(self, agent: str, turn: str, model: str) -> list[Reason]:
        """What a request to a model waits for."""
        slot = self._core.slots.get(model)
        words = self._slot_words(model)
        if slot is None or slot.state is not SlotState.READY or slot.device is None:
            state = slot.state.value if slot is not None else "unknown"
            text = f"No device serves {model} now: it is {words}."
            return [reason("slot", text, model=model, state=state)]
        name = f"device:{slot.device}"
        handle = self._handles.get(name)
        if handle is None:
            text = f"{name} is being restarted; the request starts again where {model} is loaded."
            return [reason("device", text, device=slot.device)]
        try:
            found = await call(handle.places.remote(agent), name, LOOK_S)
        except LlmosError as error:
            return [reason("device", f"{name} does not answer: {error}.", device=slot.device)]
        places = [
            _place(model, request["place"])
            for request in found["requests"]
            if (request["model"], request["turn"]) == (model, turn) and request["place"]
        ]
        if places:
            return places
        text = f"No request of it is in {model} at this moment: it is on its way there or back"
        if found["refused"] is not None:
            refused = found["refused"]
            text += f", or was refused: {refused}"
            return [reason("quota", text + ".", limit=refused.limit, facts=refused.facts)]
        return [reason("route", text + ".", model=model)]


def _place(model: str, place: JobPlace) -> Reason:
    facts: dict[str, Any] = {
        "model": model,
        "state": place.state,
        "position": place.position,
        "policy": place.reason,
        "waited_s": place.waited_s,
        "running": place.running,
        "new_tokens": place.new_tokens,
        "max_new_tokens": place.max_new_tokens,
        "kv_needed": place.kv_needed,
        "kv_free": place.kv_free,
        "estimate_s": place.estimate_s,
    }
    if place.state == "running":
        beside = f", with {place.running - 1} more beside it" if place.running > 1 else ""
        text = (
            f"It is being answered{beside}: "
            f"{place.new_tokens} of at most {place.max_new_tokens} tokens are written."
        )
        return reason("engine", text, **facts)
    if place.state == "paused":
        text = "It is paused: who reads the answer does not keep up."
        return reason("engine", text, **facts)
    inside = "1 is running" if place.running == 1 else f"{place.running} are running"
    text = f"It is number {place.position} in the queue of {model}, {inside}"
    if place.reason:
        text += f"; {place.reason}"
    under = []
    if place.kv_needed:
        enough = "there is room" if place.kv_needed <= place.kv_free else "there is no room yet"
        memory = (
            f"It needs {place.kv_needed} tokens of KV cache, {place.kv_free} are free: {enough}."
        )
        under.append(reason("kv", memory, needed=place.kv_needed, free=place.kv_free))
    if place.estimate_s is not None:
        when = f"It enters in {_span(place.estimate_s)} at most, if nobody overtakes it."
        under.append(reason("estimate", when, estimate_s=place.estimate_s))
    return reason("engine", text + ".", under, **facts)


# ---------------------------------------------------------------- messages


def _message(message: dict[str, Any]) -> Reason:
    head = f"{message['kind']} from {message['sender']} waits for {_span(message['waited_s'])}: "
    match message["by"]:
        case "hold":
            why = "the agent is held"
        case "time":
            left = _span(max(message["not_before"] - time.time(), 0.0))
            why = f"attempt {message['attempts']} failed, and the next one is due in {left}"
        case "turn":
            why = f"turn {message['turns'][0]} runs, and an agent's turns run one after the other"
        case "readers":
            count = len(message["turns"])
            why = f"{count} read-only turns run, which it has to wait for"
        case "host":
            why = f"its host runs as many turns as it may ({message['host_limit']})"
        case _:
            why = "it is the next to begin" if message["position"] == 1 else "it stands in a row"
    behind = ""
    if message["behind"] and message["by"] != "time":
        kind = "earlier messages of its sender" if message["behind"] == "its stream" else "others"
        behind = f"; {message['position'] - 1} messages are before it, {kind} among them"
    last = f" ({message['story'][-1]})" if message["story"] and message["by"] == "time" else ""
    return reason("mailbox", f"{head}{why}{behind}{last}.", **message)


def _span(seconds: float) -> str:
    """A span of time for people."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
